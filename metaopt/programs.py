"""Programs for the optional library: the base's update and rules of elements, as one pass over memory."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from metaopt.rules import LIST, NUMBER, Graph, Symbol, number_of

try:
    import metaopt_kernels
except ImportError:
    library: Any = None
else:
    library = metaopt_kernels

# the place of the parameters and of the gradients among the lists
PARAM, GRAD = 0, 1
# the number that the library fills in: the divisor of the gradients
DIVISOR = 63
MOST_REGISTERS = 12


@cache
def kernels() -> Any:
    """Return the library if it is installed, fits torch and is not turned off by METAOPT_KERNELS=0; otherwise None."""
    return None if library is None else library.load()


class Item(NamedTuple):
    """A rule at its place behind the base: which list each of its tensors is."""

    graph: Graph
    lists: tuple[tuple[str, int], ...]


class Value:
    """A value of a program: an operation on others, a list in memory, or a number."""

    def __init__(self, op: str, args: Sequence["Value"] = (), kind: str = LIST, at: int | None = None) -> None:
        self.op, self.args, self.kind, self.at = op, tuple(args), kind, at


class Unfit(Exception):
    """The library has too little room for a program, or does not compute torch's numbers for it."""


class Compiled:
    """A program with what is filled in at every update: its numbers."""

    def __init__(self, base: str, state: int, items: Sequence[Item], scaled: bool) -> None:
        # a sum in another order has other bits
        if any(item.graph.sums for item in items):
            raise Unfit
        self._numbers: list[tuple[Symbol, int]] = []
        self._places: dict[Any, int] = {}
        self._base, self._state = base, state
        self.needs: set[str] = {base}
        # a rule may overwrite what the base makes of the parameters, but not what it makes of its state
        made = Value("base", [Value("memory", at=PARAM)])
        emit = _Emitter(self)
        emit.compute(made)
        emit.finish(self._combined(made, items, scaled))
        self.program = library.Program(emit.code())

    def numbers(self, given: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the program's numbers for one update, from those of each rule."""
        return [number_of(symbol, given[item]) for symbol, item in self._numbers]

    def base_code(self, to: int) -> list[int]:
        """Return the instruction of the base's own update."""
        state = library.TENSOR | self._state if self._state else 0
        return [library.CODES[self._base], to, library.TENSOR | PARAM, library.TENSOR | GRAD, state]

    def _combined(self, made: Value, items: Sequence[Item], scaled: bool) -> dict[int, Value]:
        """Return what the lists hold at the end."""
        memory: dict[int, Value] = {}
        current = {PARAM: made}
        if scaled:
            divisor = Value("number", kind=NUMBER, at=library.NUMBER | DIVISOR)
            current[GRAD] = Value("div", [Value("memory", at=GRAD), divisor])
        for position, item in enumerate(items):
            names = dict(item.lists)
            found: dict[Symbol, Value] = {}
            for symbol in item.graph.order:
                if symbol.op == "tensor":
                    at = names[symbol.value]
                    found[symbol] = current.get(at) or memory.setdefault(at, Value("memory", at=at))
                else:
                    found[symbol] = self._value(symbol, found, position)
            current.update({names[name]: found[symbol] for name, symbol in item.graph.outputs.items()})
        current.pop(GRAD, None)
        return current

    def _value(self, symbol: Symbol, found: Mapping[Symbol, Value], position: int) -> Value:
        if symbol.kind == NUMBER:
            key = symbol.value if symbol.op == "constant" else (symbol, position)
            if key not in self._places:
                self._places[key] = len(self._numbers)
                self._numbers.append((symbol, position))
                if len(self._numbers) >= DIVISOR:
                    raise Unfit
            return Value("number", kind=NUMBER, at=library.NUMBER | self._places[key])
        args = [found[arg] for arg in symbol.args]
        name = symbol.op
        if name in ("lerp", "addcmul"):
            self.needs.add(name)
        if name in ("real", "conj"):
            return args[0]
        if name == "square":
            return Value("mul", [args[0], args[0]])
        if name == "reciprocal":
            return Value("div", [self._value(Symbol("constant", value=1.0), {}, 0), *args])
        return Value({"and": "mul", "where": "select", "clamp": "max"}.get(name, name), args)


class _Emitter:
    """The instructions of a program, first with a register for each value."""

    def __init__(self, program: Compiled) -> None:
        self._program = program
        self._steps: list[tuple[Value | None, list[int | Value]]] = []
        self._places: dict[Value, int | None] = {}

    def compute(self, value: Value) -> int | Value:
        """Return where a value is, and work it out if need be."""
        if value.at is not None:
            return int(value.at if value.kind == NUMBER else library.TENSOR | value.at)
        if value not in self._places:
            args = [self.compute(arg) for arg in value.args]
            if value.op == "base":
                code: list[int | Value] = [*self._program.base_code(0)]
            else:
                code = [library.CODES[value.op], 0, *args, *[0] * (3 - len(args))]
            self._steps.append((value, code))
            self._places[value] = None
        return value

    def finish(self, final: Mapping[int, Value]) -> None:
        """Work out the lists' last values, and write them directly where nobody reads the old ones any more."""
        for value in final.values():
            self.compute(value)
        moves: list[tuple[int, Value]] = []
        for index, value in final.items():
            at = next((i for i, (own, _) in enumerate(self._steps) if own is value), None)
            place = int(library.TENSOR | index)
            readers = [i for i, (_, code) in enumerate(self._steps) if place in code[2:]]
            if at is not None and self._places[value] is None and all(i <= at for i in readers):
                self._places[value] = place
            else:
                moves.append((place, value))
        for place, value in moves:
            self._steps.append((None, [library.CODES["move"], place, self.compute(value), 0, 0]))

    def code(self) -> list[tuple[int, ...]]:
        """Return the instructions with registers, each used again when its value is not needed any more."""
        last = {a: i for i, (_, code) in enumerate(self._steps) for a in code if isinstance(a, Value)}
        free = list(range(MOST_REGISTERS))[::-1]
        done: list[tuple[int, ...]] = []
        registers: dict[Value, int] = {}
        for i, (value, code) in enumerate(self._steps):
            args = [registers[a] if isinstance(a, Value) else a for a in code]
            for a in {a for a in code if isinstance(a, Value)}:
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
