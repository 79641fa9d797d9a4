"""Programs for the optional library: the base's update and rules of elements, in as few passes as sums allow.

A sum over a tensor ends a pass: what needs it is worked out in the next one, from lists in memory.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from metaopt.joined_rules import GRAD, PARAM, UPDATE
from metaopt.rules import LIST, SUMS, TENSOR, Graph, Symbol, Values, number_of

try:
    import metaopt_kernels
except ImportError:
    library: Any = None
else:
    library = metaopt_kernels

# of the library that this file writes programs for: an older one is not used
INTERFACE = 3
# the number that the library fills in: the divisor of the gradients
DIVISOR = 63
MOST_REGISTERS = 12
MOST_OF_TENSOR = 64

# what the base makes of the parameters, in the place of what the memory holds
BASE = Symbol("base", kind=LIST)
DIVIDED = Symbol("div", (Symbol("tensor", value=GRAD, kind=LIST), Symbol("divisor")), kind=LIST)
_ONE = Symbol("constant", value=1.0)
_OPS = {"and": "mul", "where": "select", "clamp": "max", "norm": "dot", "square": "mul", "reciprocal": "div"}


@cache
def kernels() -> Any:
    """Return the library if it is installed, fits torch and is not turned off by METAOPT_KERNELS=0; otherwise None."""
    return library.load() if library is not None and library.INTERFACE == INTERFACE else None


class Unfit(Exception):
    """The library has too little room for a program."""


class Compiled:
    """A program with what is filled in at every update: its numbers."""

    def __init__(self, base: str, state: int, graph: Graph, *, proposes: bool) -> None:
        """`proposes`: what the base adds goes to the list of updates, and the parameters stay.

        Otherwise what it makes of the parameters is `BASE`, and there is one pass.
        """
        self.needs = {base, *(symbol.op for symbol in graph.order if symbol.op in ("lerp", "addcmul"))}
        self._numbers: list[Symbol] = []
        self._places: dict[Symbol, int] = {}
        self._base, self._state = base, state
        code: list[tuple[int, ...]] = []
        if proposes:
            update = library.TENSOR | UPDATE
            code += [tuple(self.base_code(update)), (library.CODES["sub"], update, update, library.TENSOR | PARAM, 0)]
        # by symbol: the pass in which it is known; of a sum, the one after its elements
        known: dict[Symbol, int] = {}
        for symbol in graph.order:
            known[symbol] = max((known[arg] for arg in symbol.args), default=0) + (symbol.op in SUMS)
        of_tensor = [symbol for symbol in graph.order if symbol.kind == TENSOR]
        last = max(known.values(), default=0)
        for number in range(last + 1):
            emitter, ready = _Emitter(self), [symbol for symbol in of_tensor if known[symbol] == number + 1]
            if not proposes:  # also if a rule throws the new weights away: what the base keeps goes on
                emitter.compute(BASE)
            for symbol in ready:
                if symbol.op in SUMS:
                    emitter.add(symbol, self.place(symbol))
            if number == last:
                emitter.finish(graph.outputs)
            code += emitter.code()
            for symbol in ready:
                code += self._on_numbers(symbol)
            if number < last:
                code.append((library.CODES["pass"], 0, 0, 0, 0))
        self.program = library.Program(code)

    def numbers(self, given: Values) -> list[float]:
        """Return the program's numbers for one update, from those of the rules."""
        return [number_of(symbol, given) for symbol in self._numbers]

    def base_code(self, to: int) -> list[int]:
        """Return the instruction of the base's own update."""
        state = library.TENSOR | self._state if self._state else 0
        return [library.CODES[self._base], to, library.TENSOR | PARAM, library.TENSOR | GRAD, state]

    def place(self, symbol: Symbol) -> int:
        """Return where a number is, of the program or of each tensor."""
        if symbol.op == "divisor":
            return int(library.NUMBER | DIVISOR)
        if symbol not in self._places:
            own = symbol.kind == TENSOR
            number = sum(each.kind == symbol.kind for each in self._places)
            if number >= (MOST_OF_TENSOR if own else DIVISOR):
                raise Unfit
            if not own:
                self._numbers.append(symbol)
            self._places[symbol] = (library.OF_TENSOR if own else library.NUMBER) | number
        return self._places[symbol]

    def _on_numbers(self, symbol: Symbol) -> list[tuple[int, ...]]:
        """Return the instructions that work out a number of each tensor between two passes."""
        if symbol.op == "norm":  # of which the pass has added up the squares
            return [(library.CODES["sqrt"], self.place(symbol), self.place(symbol), 0, 0)]
        if symbol.op in SUMS:
            return []
        args = [self.place(arg) for arg in operands(symbol)]
        return [(operation(symbol), self.place(symbol), *args, *[0] * (3 - len(args)))]


def operation(symbol: Symbol) -> int:
    """Return the library's number of an operation."""
    code: int = library.CODES["move" if symbol.op in ("real", "conj") else _OPS.get(symbol.op, symbol.op)]
    return code


def operands(symbol: Symbol) -> list[Symbol]:
    """Return what the library's operation takes."""
    if symbol.op in ("square", "norm"):
        return [symbol.args[0], symbol.args[0]]
    return [_ONE, *symbol.args] if symbol.op == "reciprocal" else list(symbol.args)


class _Emitter:
    """The instructions of one pass, first with a register for each list."""

    def __init__(self, program: Compiled) -> None:
        self._program = program
        self._steps: list[tuple[Symbol | None, list[int | Symbol]]] = []
        self._places: dict[Symbol, int | None] = {}

    def compute(self, symbol: Symbol) -> int | Symbol:
        """Return where a value is, and work it out if need be."""
        if symbol.kind != LIST:
            return self._program.place(symbol)
        if symbol.op == "tensor":
            return int(library.TENSOR | symbol.value)
        if symbol.op in ("real", "conj"):
            return self.compute(symbol.args[0])
        if symbol not in self._places:
            if symbol.op == "base":
                self._steps.append((symbol, [*self._program.base_code(0)]))
            else:
                self.add(symbol, 0)
            self._places[symbol] = None
        return symbol

    def add(self, symbol: Symbol, place: int) -> None:
        """Add an operation; `place` is where the result of a sum goes."""
        args = [self.compute(arg) for arg in operands(symbol)]
        owner = None if symbol.op in SUMS else symbol
        self._steps.append((owner, [operation(symbol), place, *args, *[0] * (3 - len(args))]))

    def finish(self, final: Mapping[int, Symbol]) -> None:
        """Work out the lists' last values, and write them directly where nobody reads the old ones any more."""
        values = {library.TENSOR | at: self.compute(symbol) for at, symbol in final.items()}
        moves: list[tuple[int, int | Symbol]] = []
        for place, value in values.items():
            at = next((i for i, (own, _) in enumerate(self._steps) if own is value), None)
            readers = [i for i, (_, code) in enumerate(self._steps) if place in code[2:]]
            if at is not None and self._places[self._steps[at][0]] is None and all(i <= at for i in readers):  # type: ignore[index]
                self._places[value] = place  # type: ignore[index]
            elif value != place:
                moves.append((place, value))
        for place, value in moves:
            self._steps.append((None, [library.CODES["move"], place, value, 0, 0]))

    def code(self) -> list[tuple[int, ...]]:
        """Return the instructions with registers, each used again when its value is not needed any more."""
        last = {a: i for i, (_, code) in enumerate(self._steps) for a in code if isinstance(a, Symbol)}
        free = list(range(MOST_REGISTERS))[::-1]
        done: list[tuple[int, ...]] = []
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
            done.append(tuple(args))
        return done
