"""Programs for the optional library: the base's update and rules of elements, put together into one pass over memory.

A sum over a tensor ends a pass, because what follows from it needs the whole tensor. What a later pass needs of an
earlier one is worked out again, apart from what comes from the base, which cannot be: that is kept for one tensor.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from metaopt.rules import LIST, NUMBER, TENSOR, Graph, Symbol, number_of

try:
    import metaopt_kernels
except ImportError:
    library: Any = None
else:
    library = metaopt_kernels

# the place of the parameters and of the gradients among the lists
PARAM, GRAD = 0, 1
# numbers that the library fills in: the divisor of the gradients, and the size of a tensor
DIVISOR = SIZE = 63
MOST_REGISTERS, MOST_SUMS, MOST_LISTS = 12, 8, 24


@cache
def kernels() -> Any:
    """Return the library if it is installed, fits torch and is not turned off by METAOPT_KERNELS=0; otherwise None."""
    return None if library is None else library.load()


class Item(NamedTuple):
    """A rule at its place: which list each of its tensors is, and whether it acts on the update or on the weights."""

    graph: Graph
    lists: tuple[tuple[str, int], ...]
    on_update: bool


class Value:
    """A value of a program: an operation on others, a list in memory, or a number."""

    def __init__(self, op: str, args: Sequence["Value"] = (), kind: str = LIST, at: Any = None) -> None:
        self.op, self.args, self.kind, self.at = op, tuple(args), kind, at
        passes = [arg.ready + (kind == LIST and arg.kind == TENSOR) for arg in args if arg.kind != NUMBER]
        # the first pass in which it can be worked out
        self.ready: int = max(passes, default=0)
        # the base changes its state: its update is worked out once
        self.keeps = op == "base" or any(arg.op == "base" for arg in args)


class Unfit(Exception):
    """The library has too little room for a program."""


class Compiled:
    """A program with what is filled in at every update: its numbers."""

    def __init__(self, base: str, state: int, items: Sequence[Item], scaled: bool) -> None:
        self._numbers: list[tuple[Symbol, int]] = []
        self._places: dict[Any, int] = {}
        self._base = base
        self._state = state
        self._of_tensor = 0
        self._sum = 0
        self.needs: set[str] = {base}
        final = self._combined(items, scaled)
        values = _reached(final.values())
        self._last = max(value.ready for value in values)
        kept = [v for v in values if v.kind == LIST and v.keeps and self._is_needed_later(v, values)]
        self._kept = {v: i for i, v in enumerate(kept)}
        self._lists = max(final, default=0)
        self._lists = max([self._lists, state + 1, *(i for item in items for _, i in item.lists)]) + 1
        if self._lists + len(kept) > MOST_LISTS:
            raise Unfit
        self._sums: dict[Value, int] = {}
        passes = [self._pass(k, values, final) for k in range(self._last + 1)]
        self.program = library.Program(passes, len(kept))

    def numbers(self, given: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the program's numbers for one update, from those of each rule."""
        return [number_of(symbol, given[item]) for symbol, item in self._numbers]

    # ---- from rules to values

    def _combined(self, items: Sequence[Item], scaled: bool) -> dict[int, Value]:
        """Return what the lists hold at the end."""
        memory: dict[int, Value] = {}
        old = memory.setdefault(PARAM, Value("memory", at=PARAM))
        base = Value("base", [old])
        current: dict[int, Value] = {}
        if scaled:
            gradient = Value("memory", at=GRAD)
            current[GRAD] = Value("div", [gradient, Value("number", kind=NUMBER, at=library.NUMBER | DIVISOR)])
        changes = any(item.on_update for item in items)
        update = Value("sub", [base, old]) if changes else None
        moved = base
        for position, item in enumerate(items):
            if not item.on_update and update is not None:
                moved, update = Value("add", [old, update]), None
            names = dict(item.lists)
            found: dict[Symbol, Value] = {}
            for symbol in item.graph.order:
                if symbol.op == "tensor":
                    index = names[symbol.value]
                    if symbol.value == "update":
                        assert update is not None
                        found[symbol] = update
                    elif index == PARAM:
                        found[symbol] = old if item.on_update else moved
                    else:
                        found[symbol] = current.get(index) or memory.setdefault(index, Value("memory", at=index))
                else:
                    found[symbol] = self._value(symbol, found, position)
            for name, symbol in item.graph.outputs.items():
                if name == "update":
                    update = found[symbol]
                elif names[name] == PARAM:
                    moved = found[symbol]
                else:
                    current[names[name]] = found[symbol]
        if update is not None:
            moved = Value("add", [old, update])
        current.pop(GRAD, None)
        return {PARAM: moved, **current}

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
        if name == "norm":
            return Value("sqrt", [Value("squares", args, TENSOR)], TENSOR)
        if name == "dot":
            return Value("products", args, TENSOR)
        if name == "mean":
            size = Value("size", kind=TENSOR, at=library.OF_TENSOR | SIZE)
            return Value("div", [Value("sum", args, TENSOR), size], TENSOR)
        if name == "square":
            return Value("mul", [args[0], args[0]], symbol.kind)
        if name == "reciprocal":
            return Value("div", [self._value(Symbol("constant", value=1.0), {}, 0), *args], symbol.kind)
        return Value({"and": "mul", "where": "select", "clamp": "max"}.get(name, name), args, symbol.kind)

    # ---- from values to instructions

    def _is_needed_later(self, value: Value, values: Sequence[Value]) -> bool:
        """Return whether a pass after that of a value reads it, itself or to work something out again."""

        def reads(user: Value, at: int) -> bool:
            return any(
                arg is value or (arg.kind == LIST and not arg.keeps and arg.ready < at and reads(arg, at))
                for arg in user.args
            )

        later = [(user, self._last if user.kind == LIST else user.ready) for user in values]
        return any(at > value.ready and not user.keeps and reads(user, at) for user, at in later)

    def _pass(self, number: int, values: Sequence[Value], final: Mapping[int, Value]) -> tuple[list[Any], list[Any]]:
        emit = _Emitter(self, number)
        if number == 0:
            base = next(v for v in values if v.op == "base")
            if not (final[PARAM] is base or base in emit.places):
                emit.list_of(base)
        for value in self._kept:
            if value.ready == number:
                emit.list_of(value)
        for value in values:
            if value.op in ("squares", "products", "sum") and value.ready == number:
                emit.sum(value)
        if number == self._last:
            emit.finish(final)
        of_sums: list[Any] = []
        for value in values:
            if (
                value.kind == TENSOR
                and value.ready == number
                and value.op not in ("squares", "products", "sum", "size")
            ):
                of_sums.append((value, [self.place_of_number(arg) for arg in value.args]))
        numbers = [_instruction(v.op, self.place_of_number(v), args) for v, args in of_sums]
        return emit.code(), numbers

    def place_of_number(self, value: Value) -> int:
        """Return where a number, of the program or of each tensor, is kept."""
        if value.at is not None:
            return int(value.at)
        if value not in self._sums:
            self._sums[value] = len(self._sums)
            if len(self._sums) >= SIZE:
                raise Unfit
        return int(library.OF_TENSOR | self._sums[value])

    def kept_place(self, value: Value) -> int | None:
        """Return where a value that comes from the base is kept between passes, if it is."""
        return int(library.TENSOR | (self._lists + self._kept[value])) if value in self._kept else None

    def next_sum(self) -> int:
        """Return a place to add up in."""
        self._sum += 1
        if self._sum > MOST_SUMS:
            raise Unfit
        return self._sum - 1

    def base_code(self, to: int) -> list[int]:
        """Return the instruction of the base's own update."""
        state = library.TENSOR | self._state if self._state else 0
        return [library.CODES[self._base], to, library.TENSOR | PARAM, library.TENSOR | GRAD, state]


class _Emitter:
    """The instructions of one pass, first with a register for each value."""

    def __init__(self, program: Compiled, number: int) -> None:
        self._program, self._number = program, number
        self._steps: list[tuple[Value | None, list[int | Value]]] = []
        self.places: dict[Value, int | None] = {}

    def list_of(self, value: Value) -> int | Value:
        """Return where a list is, and work it out in this pass if need be."""
        if value.kind != LIST:
            return self._program.place_of_number(value)
        if value.op == "memory":
            return int(library.TENSOR | value.at)
        if value in self.places:
            return value
        kept = self._program.kept_place(value)
        if kept is not None and value.ready < self._number:
            return kept
        args = [self.list_of(arg) for arg in value.args]
        if value.op == "base":
            code: list[int | Value] = [*self._program.base_code(0)]
        else:
            code = [library.CODES[value.op], 0, *args, *[0] * (3 - len(args))]
        self._steps.append((value, code))
        self.places[value] = kept
        return value

    def sum(self, value: Value) -> None:
        args = [self.list_of(arg) for arg in value.args]
        second = args[1] if len(args) > 1 else 0
        code = [
            library.CODES[value.op],
            self._program.place_of_number(value),
            args[0],
            second,
            self._program.next_sum(),
        ]
        self._steps.append((None, code))

    def finish(self, final: Mapping[int, Value]) -> None:
        """Write the lists' last values, directly where nobody reads the old ones any more."""
        for value in final.values():
            self.list_of(value)
        moves: list[tuple[int, Value]] = []
        for index, value in final.items():
            at = next((i for i, (own, _) in enumerate(self._steps) if own is value), None)
            place = int(library.TENSOR | index)
            readers = [i for i, (_, code) in enumerate(self._steps) if place in code[2:]]
            if at is not None and self.places[value] is None and all(i <= at for i in readers):
                self.places[value] = place
            else:
                moves.append((index, value))
        for index, value in moves:
            self._steps.append((None, [library.CODES["move"], int(library.TENSOR | index), self.list_of(value), 0, 0]))

    def code(self) -> list[tuple[int, ...]]:
        """Return the instructions with registers, each used again when its value is not needed any more."""
        last = {a: i for i, (_, code) in enumerate(self._steps) for a in code if isinstance(a, Value)}
        free = list(range(MOST_REGISTERS))[::-1]
        done: list[tuple[int, ...]] = []
        registers: dict[Value, int] = {}
        for i, (value, code) in enumerate(self._steps):
            args = [registers[a] if isinstance(a, Value) else a for a in code]
            for a in {a for a in code if isinstance(a, Value)}:
                if last[a] == i and self.places[a] is None:
                    free.append(registers[a])
            if value is not None:
                place = self.places[value]
                if place is None:
                    if not free:
                        raise Unfit
                    place = free.pop()
                    if value not in last:
                        free.append(place)
                registers[value] = args[1] = place
            done.append(tuple(args))
        return done


def _instruction(op: str, to: int, args: Sequence[int]) -> tuple[int, ...]:
    return (library.CODES[op], to, *args, *[0] * (3 - len(args)))


def _reached(values: Any) -> list[Value]:
    found: dict[Value, None] = {}

    def visit(value: Value) -> None:
        for arg in value.args:
            visit(arg)
        found.setdefault(value)

    for value in values:
        visit(value)
    return list(found)
