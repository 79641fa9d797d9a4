"""Programs for the optional library: the base's update and rules of elements, in as few passes as their sums allow.

A sum over a tensor ends a pass: what needs it is worked out in the next one. One list, such as the update, is left from
pass to pass in memory of the library; all else is worked out again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from metaopt.joined_rules import BASE, CHANGE, GRAD, PARAM, WEIGHTS, Item, joined
from metaopt.rules import LIST, SUMS, TENSOR, Graph, Symbol, number_of

try:
    import metaopt_kernels
except ImportError:
    library: Any = None
else:
    library = metaopt_kernels

# of the library that this file writes programs for: another one is not used
INTERFACE = 5
# the number that the library fills in: the divisor of the gradients
DIVISOR = 63
MOST_REGISTERS = 12
MOST_OF_TENSOR = 64

_ONE = Symbol("constant", value=1.0)
_OPS = {"and": "mul", "where": "select", "clamp": "max", "square": "mul", "reciprocal": "div"}

Step = tuple[Symbol | None, list[Any]]


@cache
def kernels() -> Any:
    """Return the library if it is installed, fits torch and is not turned off by METAOPT_KERNELS=0; otherwise None."""
    return library.load() if library is not None and library.INTERFACE == INTERFACE else None


def compared(order: Iterable[Symbol]) -> set[str]:
    """Return the operations on elements that torch may round in its own way: the library compares them first."""
    return {symbol.op for symbol in order if symbol.kind == LIST and symbol.op in ("lerp", "addcmul", "sqrt")}


class Unfit(Exception):
    """The library has too little room for a program."""


class Compiled:
    """A program with what is filled in at every update: its numbers."""

    def __init__(self, base: str, state: int, items: Sequence[Item], *, divided: bool) -> None:
        self._base, self._state = base, state
        self._numbers: list[Symbol] = []
        self._places: dict[Symbol, int] = {}
        self._of_tensor = 0
        graph = joined(items, divided=divided)
        self.needs = {base, *compared(graph.order)}
        self.uses = Counter(arg for symbol in graph.order for arg in symbol.args) + Counter(graph.outputs.values())
        # by symbol: the pass in which it is known; a sum is known in the one after its elements
        known: dict[Symbol, int] = {}
        for symbol in graph.order:
            known[symbol] = max((known[arg] for arg in symbol.args), default=0) + (symbol.op in SUMS)
        last, left = max(known.values()), None
        code: list[Sequence[int]] = []
        for number in range(last + 1):
            behind = [s for s in graph.order if s.kind == TENSOR and known[s] == number + 1]
            emitter = _Emitter(self, left)
            if number == 0:  # also if a rule throws the new weights away: what the base keeps goes on
                emitter.compute(CHANGE if CHANGE in known else BASE)
            self._add_sums(emitter, [symbol for symbol in behind if symbol.op in SUMS])
            if number == last:
                emitter.finish({library.TENSOR | at: symbol for at, symbol in graph.outputs.items()})
            else:
                left = _left_behind(graph, known, number, left)
                emitter.finish({} if left is None else {library.SCRATCH: left})
            code += emitter.code()
            code += [self._on_numbers(symbol) for symbol in behind if symbol.op not in SUMS]
            code += [[library.CODES["pass"]]] if number < last else []
        self.program = library.Program(code)

    def numbers(self, given: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the program's numbers for one update, from those of each rule."""
        named = {(position, name): value for position, each in enumerate(given) for name, value in each.items()}
        return [number_of(symbol, named) for symbol in self._numbers]

    def base_code(self, *, change: bool) -> list[int]:
        """Return the instruction of the base's own update: what it makes of the weights, or what it adds to them."""
        state = library.TENSOR | self._state if self._state else 0
        return [library.CODES[self._base], 0, library.TENSOR | PARAM, library.TENSOR | GRAD, state, int(change)]

    def place(self, symbol: Symbol) -> int:
        """Return where a number is, of the program or of each tensor."""
        if symbol.op == "divisor":
            return int(library.NUMBER | DIVISOR)
        if symbol not in self._places:
            if symbol.kind == TENSOR:
                self._places[symbol] = self._new_place()
            else:
                self._places[symbol] = library.NUMBER | len(self._numbers)
                self._numbers.append(symbol)
                if len(self._numbers) > DIVISOR:
                    raise Unfit
        return self._places[symbol]

    def _new_place(self) -> int:
        self._of_tensor += 1
        if self._of_tensor > MOST_OF_TENSOR:
            raise Unfit
        return int(library.OF_TENSOR | (self._of_tensor - 1))

    def _add_sums(self, emitter: "_Emitter", sums: list[Symbol]) -> None:
        """Add the sums of a pass; those of two lists with themselves and each other are one instruction."""
        by_args = {symbol.args: symbol for symbol in sums if symbol.op == "dot"}
        # the weights first: the base then adds up these sums itself
        squares = sorted((a for a, b in by_args if a is b), key=lambda a: a is not WEIGHTS)
        if len(squares) > 1:
            a, b = squares[:2]
            places = [self._new_place() for _ in range(3)]
            for args, place in (((a, a), places[0]), ((a, b), places[1]), ((b, a), places[1]), ((b, b), places[2])):
                if args in by_args:
                    self._places[by_args[args]] = place
            emitter.add("dots", [a, b], places[0])
        for symbol in sums:
            if symbol not in self._places:
                emitter.add(symbol.op, symbol.args, self.place(symbol))

    def _on_numbers(self, symbol: Symbol) -> list[int]:
        """Return the instruction that works out a number of each tensor between two passes."""
        name, args = operation(symbol)
        return [library.CODES[name], self.place(symbol), *map(self.place, args)]


def _left_behind(graph: Graph, known: Mapping[Symbol, int], number: int, left: Symbol | None) -> Symbol | None:
    """Return the list that a pass leaves to the later ones: the only one that they need, or what the one before left.

    The first one leaves them what the base adds if they need several.
    """
    later = [symbol for symbol in graph.order if known[symbol] > number + (symbol.op in SUMS)]
    needed = {arg for symbol in later for arg in symbol.args} | set(graph.outputs.values())
    lists = [s for s in needed if s.kind == LIST and s.op != "tensor" and known[s] <= number]
    if len(lists) == 1:
        return lists[0]
    return CHANGE if number == 0 and CHANGE in known else left


def operation(symbol: Symbol) -> tuple[str, list[Symbol]]:
    """Return the library's operation, and what it takes."""
    args = list(symbol.args)
    if symbol.op == "square":
        args *= 2
    if symbol.op == "reciprocal":
        args.insert(0, _ONE)
    return _OPS.get(symbol.op, symbol.op), args


class _Emitter:
    """The instructions of one pass, first with a register for each list."""

    def __init__(self, program: Compiled, left: Symbol | None) -> None:
        self._program = program
        # the list that the pass before has left
        self._left = left
        self._steps: list[Step] = []
        self._places: dict[Symbol, int | None] = {}

    def compute(self, symbol: Symbol) -> int | Symbol:
        """Return where a value is, and work it out if need be."""
        if symbol.kind != LIST:
            return self._program.place(symbol)
        if symbol is self._left:
            return int(library.SCRATCH)
        if symbol.op == "tensor":
            return int(library.TENSOR | symbol.value)
        if symbol not in self._places:
            if symbol is BASE or symbol is CHANGE:
                self._steps.append((symbol, self._program.base_code(change=symbol is CHANGE)))
            else:
                self.add(*self._in_one(symbol), 0, symbol)
            self._places[symbol] = None
        return symbol

    def add(self, name: str, args: Sequence[Symbol], place: int, symbol: Symbol | None = None) -> None:
        """Add an operation; `place` is where the result of a sum goes."""
        self._steps.append((symbol, [library.CODES[name], place, *map(self.compute, args)]))

    def _in_one(self, symbol: Symbol) -> tuple[str, list[Symbol]]:
        """Return an operation together with those before it whose result nobody else needs, if the library can."""
        name, args = operation(symbol)
        kinds = [arg.kind == LIST for arg in args]
        if name == "addcmul" and kinds == [True, True, False] and self._is_scaled(args[0]):
            return "mul_addcmul", [*args[0].args, *args[1:]]
        if name == "add" and kinds == [True, True]:
            if self._is_scaled(args[1]):
                return "mul_add", [*args[1].args, args[0]]
            if self._is_once("addcmul", args[1], [True, True, True]):
                return self._decayed(*args) or ("addcmul_add", [*args[1].args, args[0]])
        compared, times = symbol, _ONE
        if name == "mul" and kinds == [True, False] and self.uses_once(args[0]):
            compared, times = args
        if compared.op in ("lt", "le", "gt"):
            product, bound = compared.args
            if bound.kind != LIST and self._is_once("mul", product, [True, True]):
                return f"mul_{compared.op}", [*product.args, bound, times]
        return name, args

    def _decayed(self, weights: Symbol, total: Symbol) -> tuple[str, list[Symbol]] | None:
        """Return weights + (u + m weights) as one operation, m a number where u weights <= a bound; u may be scaled."""
        update, mask, factor = total.args
        if factor is not weights or not self._is_scaled(mask) or not self._is_once("le", mask.args[0], [True, False]):
            return None
        (product, bound), times = mask.args[0].args, mask.args[1]
        if product.args != (update, weights) or not self._is_once("mul", product, [True, True]):
            return None
        own = [update, weights, bound, times]
        turns = update.op == "addcmul" and self._program.uses[update] == 2 and update is not self._left
        if turns and self._is_scaled(update.args[0]) and update.args[1] is weights and update.args[2].kind != LIST:
            scaled, more = update.args[0], update.args[2]
            return "turn_decay_add", [scaled.args[0], *own[1:], scaled.args[1], more]
        return "decay_add", own

    def _is_scaled(self, symbol: Symbol) -> bool:
        return self._is_once("mul", symbol, [True, False])

    def _is_once(self, op: str, symbol: Symbol, kinds: list[bool]) -> bool:
        is_op = symbol.op == op and [arg.kind == LIST for arg in symbol.args] == kinds
        return is_op and self.uses_once(symbol)

    def uses_once(self, symbol: Symbol) -> bool:
        """Return whether one operation needs a value, which this pass has to work out."""
        return self._program.uses[symbol] == 1 and symbol is not self._left

    def finish(self, final: Mapping[int, Symbol]) -> None:
        """Work out lists' last values, and write them directly where nobody reads the old ones any more."""
        values = {place: self.compute(symbol) for place, symbol in final.items()}
        for place, value in values.items():
            # another list is written where this one is read: it is read first
            if isinstance(value, int) and value != place and values.get(value, value) != value:
                old = Symbol("old", kind=LIST)
                self._steps.insert(0, (old, [library.CODES["move"], 0, value]))
                self._places[old], values[place] = None, old
        moves: list[Step] = []
        for place, value in values.items():
            at = next((i for i, (own, _) in enumerate(self._steps) if own is value), None)
            reader = max((i for i, (_, code) in enumerate(self._steps) if place in code[2:]), default=0)
            if at is not None and isinstance(value, Symbol) and self._places[value] is None and reader <= at:
                self._places[value] = place
            elif value != place:
                moves.append((None, [library.CODES["move"], place, value]))
        self._steps += moves

    def code(self) -> list[list[int]]:
        """Return the instructions with registers, each used again when its value is not needed any more."""
        last = {a: i for i, (_, code) in enumerate(self._steps) for a in code if isinstance(a, Symbol)}
        free = list(range(MOST_REGISTERS))[::-1]
        done: list[list[int]] = []
        registers: dict[Symbol, int] = {}
        for i, (value, code) in enumerate(self._steps):
            args = [registers[a] if isinstance(a, Symbol) else a for a in code]
            for a in {a for a in code if isinstance(a, Symbol)}:
                if last[a] == i and self._places[a] is None:
                    free.append(registers[a])
            if value is not None:
                place = self._places[value]
                if place is None:
                    if not free:
                        raise Unfit
                    place = free.pop()
                    if value not in last:
                        free.append(place)
                registers[value] = args[1] = place
            done.append(args)
        return done
