"""Rules of elements: what a wrapper does to each element, written once as a function of tensors and numbers.

The function is called once, with symbols in the places of tensors and numbers. What it returns is a small graph, which
runs by multi-tensor calls of torch (here), over flat memory on an accelerator (`flat_rules`), or joined with other
rules (`joined_rules`) and the base's update in one pass over memory (`programs`).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from metaopt.errors import SpecError
from metaopt.group import Group
from metaopt.multi_tensor import copies, lerp_

# what an operation returns: a number for each element, for each tensor, or for the group
LIST, TENSOR, NUMBER = "list", "tensor", "number"
SUMS = ("norm", "mean", "dot")
OPERATIONS = (
    *("add", "sub", "mul", "div", "lt", "le", "gt", "and", "where", "lerp", "addcmul", "hypot"),
    *("sqrt", "abs", "neg", "square", "reciprocal", "real", "conj", "clamp", *SUMS),
)
NAMES = {"true_divide": "div", "__and__": "and", "multiply": "mul", "absolute": "abs", "rsub": "sub"}

Values = Mapping[Any, Any]


class Symbol:
    """What an author's function gets in the place of a tensor or a number: it remembers what is done to it."""

    def __init__(self, op: str, args: tuple["Symbol", ...] = (), value: Any = None, kind: str = NUMBER) -> None:
        self.op, self.args, self.value, self.kind = op, args, value, kind

    def __bool__(self) -> bool:
        raise SpecError("a rule of elements must not branch on a tensor or a number: use torch.where(condition, a, b)")

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Symbol":
        return applied(function.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return applied(name, self) if name == "real" else partial(applied, name, self)

    def __add__(self, other: Any) -> "Symbol":
        return applied("add", self, other)

    def __radd__(self, other: Any) -> "Symbol":
        return applied("add", other, self)

    def __sub__(self, other: Any) -> "Symbol":
        return applied("sub", self, other)

    def __rsub__(self, other: Any) -> "Symbol":
        return applied("sub", other, self)

    def __mul__(self, other: Any) -> "Symbol":
        return applied("mul", self, other)

    def __rmul__(self, other: Any) -> "Symbol":
        return applied("mul", other, self)

    def __truediv__(self, other: Any) -> "Symbol":
        return applied("div", self, other)

    def __rtruediv__(self, other: Any) -> "Symbol":
        return applied("div", other, self)

    def __lt__(self, other: Any) -> "Symbol":
        return applied("lt", self, other)

    def __le__(self, other: Any) -> "Symbol":
        return applied("le", self, other)

    def __gt__(self, other: Any) -> "Symbol":
        return applied("gt", self, other)

    def __and__(self, other: Any) -> "Symbol":
        return applied("and", self, other)

    def __neg__(self) -> "Symbol":
        return applied("neg", self)


def applied(name: str, *args: Any, **keywords: Any) -> Symbol:
    """Return the symbol of an operation on symbols and numbers."""
    name = NAMES.get(name, name)
    if name not in OPERATIONS:
        raise SpecError(f"a rule of elements cannot use {name}; it can use {', '.join(OPERATIONS)}")
    if name == "clamp" and set(keywords) == {"min"} and len(args) == 1:
        args, keywords = (*args, keywords["min"]), {}
    if name == "norm":  # torch.norm hands all its defaults on
        keywords = {key: value for key, value in keywords.items() if value not in (None, False, "fro")}
    if keywords:
        raise SpecError(f"{name} in a rule of elements takes no {', '.join(keywords)}=: give the operands in order")
    symbols = tuple(a if isinstance(a, Symbol) else Symbol("constant", value=float(a)) for a in args)
    kinds = {symbol.kind for symbol in symbols}
    kind = TENSOR if name in SUMS else LIST if LIST in kinds else TENSOR if TENSOR in kinds else NUMBER
    if name in SUMS and kinds != {LIST}:
        raise SpecError(f"{name} in a rule of elements takes tensors")
    return Symbol(name, symbols, kind=kind)


class Graph:
    """What a rule does: operations in order, and which symbol each output is."""

    def __init__(self, outputs: Mapping[Any, Symbol]) -> None:
        self.outputs = dict(outputs)
        self.order: list[Symbol] = []
        for symbol in self.outputs.values():
            self._visit(symbol)
        self.sums = any(symbol.op in SUMS for symbol in self.order)
        self.numbers = [symbol for symbol in self.order if symbol.kind == NUMBER]

    @cached_property
    def steps(self) -> list[tuple[Symbol, tuple[bool, ...]]]:
        """The operations on lists and tensors, and which of their operands nobody needs any more."""
        # the operation after which nobody reads a symbol again
        last = {arg: i for i, symbol in enumerate(self.order) for arg in symbol.args}
        last.update(dict.fromkeys(self.outputs.values(), len(self.order)))
        own: set[Symbol] = set()  # lists that nobody else holds
        steps: list[tuple[Symbol, tuple[bool, ...]]] = []
        for i, symbol in enumerate(self.order):
            if symbol.op == "tensor":
                # an update is as wide as what becomes of it, which may be made in its place
                own |= {symbol} if symbol.value == "update" and [*self.outputs] == ["update"] else set()
                continue
            if symbol.kind == NUMBER:
                continue
            free = [arg in own and last[arg] == i for arg in symbol.args]
            # the old value of the list that this is the new value of
            if (first := symbol.args[0]).op == "tensor" and last[first] == i:
                free[0] |= self.outputs.get(first.value) is symbol
            steps.append((symbol, tuple(free)))
            if free[0] or symbol.op not in ("real", "conj"):  # these may be the same tensors
                own.add(symbol)
        return steps

    def _visit(self, symbol: Symbol) -> None:
        if symbol not in self.order:
            for arg in symbol.args:
                self._visit(arg)
            self.order.append(symbol)


class Rule:
    """A rule of elements. Call it with a group, and with the numbers that are not the wrapper's own by name.

    The function's positional arguments are tensors: `param`, `grad`, `update` or a slot of the wrapper. Arguments by
    keyword are numbers: `lr` is the base's rate, others are the wrapper's hyperparameters, or given in the call.
    """

    def __init__(self, function: Callable[..., Mapping[str, Any]]) -> None:
        # `staticmethod` between the decorator and the function tells type checkers that there is no `self`
        self.function = function = getattr(function, "__func__", function)
        parameters = inspect.signature(function).parameters.values()
        self.tensors = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.numbers = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        self.__doc__ = function.__doc__
        self._graph: Graph | None = None

    def __call__(self, group: Group, **numbers: float) -> None:
        group.apply(self, numbers)

    def numbers_of(self, group: Any, given: Values) -> dict[str, Any]:
        """Return the numbers by name: those that are given, the base's rate, the wrapper's hyperparameters."""
        return {n: given[n] if n in given else group.base_lr if n == "lr" else getattr(group, n) for n in self.numbers}

    @property
    def graph(self) -> Graph:
        """What the function does, looked up once."""
        if self._graph is None:
            symbols = [Symbol("tensor", value=name, kind=LIST) for name in self.tensors]
            numbers = {name: Symbol("number", value=name) for name in self.numbers}
            outputs = self.function(*symbols, **numbers)
            for name, symbol in outputs.items():
                if name not in self.tensors or not isinstance(symbol, Symbol) or symbol.kind != LIST:
                    raise SpecError(
                        f"{self.function.__name__} returned {name!r}: a rule of elements returns a dict of its own "
                        f"tensors ({', '.join(self.tensors)}) to what becomes of them"
                    )
                if symbol.op == "tensor" and symbol.value in outputs and symbol.value != name:
                    raise SpecError(
                        f"{self.function.__name__} exchanges {name} and {symbol.value}, which a rule cannot do"
                    )
            self._graph = Graph(outputs)
        return self._graph


elementwise = Rule
"""Make a rule of elements of a static method: see `Rule` for its arguments and for how it is called."""


def rules_of(kind: type) -> list[Rule]:
    """Return the rules that a class has."""
    return [value for each in kind.__mro__ for value in vars(each).values() if isinstance(value, Rule)]


def number_of(symbol: Symbol, numbers: Values) -> Any:
    """Return what an operation on numbers gives, in double precision; a tensor stays one, and is not read."""
    if symbol.op == "constant":
        return symbol.value
    if symbol.op == "number":
        return numbers[symbol.value]
    return _ON_NUMBERS[symbol.op](*(number_of(arg, numbers) for arg in symbol.args))


_ON_NUMBERS: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "and": lambda a, b: bool(a) and bool(b),
    "where": lambda c, a, b: a if c else b,
    "lerp": lambda a, b, w: a + w * (b - a),
    "addcmul": lambda a, b, c: a + b * c,
    "hypot": math.hypot,
    "sqrt": math.sqrt,
    "abs": abs,
    "neg": lambda a: -a,
    "square": lambda a: a * a,
    "reciprocal": lambda a: 1 / a,
    "clamp": max,
    "real": lambda a: a,
    "conj": lambda a: a,
}


# ---- by multi-tensor calls of torch


def run(graph: Graph, group: Group, tensors: Mapping[str, list[torch.Tensor]], numbers: Values) -> None:
    """Run a rule over the lists of a group; outputs are written in place."""
    found: dict[Symbol, Any] = {symbol: number_of(symbol, numbers) for symbol in graph.numbers}
    found.update({symbol: tensors[symbol.value] for symbol in graph.order if symbol.op == "tensor"})
    for symbol, free in graph.steps:
        args = [found[arg] for arg in symbol.args]
        if symbol.kind == LIST:
            found[symbol] = _on_lists(symbol, args, list(free))
        elif symbol.op in SUMS:
            found[symbol] = torch.stack(getattr(group, f"{symbol.op}s")(*args))
        else:
            found[symbol] = ON_TENSORS[symbol.op](*args)
    for name, symbol in graph.outputs.items():
        target, value = tensors[name], found[symbol]
        if value is not target:
            torch._foreach_copy_(target, value if isinstance(value, list) else [value] * len(target))


def _on_lists(symbol: Symbol, args: list[Any], free: list[bool]) -> Any:
    name = symbol.op
    # a number may be a tensor too: a hyperparameter that lives on a device
    lists = [arg.unbind() if of.kind == TENSOR else arg for of, arg in zip(symbol.args, args, strict=True)]
    if name in ("add", "mul") and not (isinstance(lists[0], list) and (free[0] or not free[1])):
        lists.reverse()
        free.reverse()
    if not isinstance(lists[0], list) or name in ONE_BY_ONE:
        each = zip(*(a if isinstance(a, list | tuple) else [a] * len(_first(lists)) for a in lists), strict=True)
        return [_ON_ELEMENTS[name](*parts, free[0]) for parts in each]
    if name == "lerp" and lists[0][0].dtype != lists[1][0].dtype:
        starts = lists[0] if free[0] else copies(lists[0])
        lerp_(starts, lists[1], lists[2])
        return starts
    function = getattr(torch, f"_foreach_{name}{'_' if free[0] else ''}")
    result = function(*lists)
    return lists[0] if free[0] else list(result)


def _first(lists: Sequence[Any]) -> Sequence[Any]:
    return next(each for each in lists if isinstance(each, list | tuple))


def _compared(method: str) -> Callable[..., Any]:
    def compare(a: Any, b: Any, free: bool) -> Any:
        # in place: as truth values the comparison would take three times as long on a processor
        return getattr(a, f"{method}_" if free else method)(b) if free else getattr(a, method)(b).to(a.dtype)

    return compare


ONE_BY_ONE = ("lt", "le", "gt", "and", "where", "hypot", "square", "real", "conj", "clamp")
_ON_ELEMENTS: dict[str, Callable[..., Any]] = {
    **{name: _compared(name) for name in ("lt", "le", "gt")},
    "and": lambda a, b, free: a * b,
    "where": lambda c, a, b, free: torch.where(c != 0, a, b),
    "hypot": lambda a, b, free: torch.hypot(a, b),
    "square": lambda a, free: a.square_() if free else a.square(),
    "real": lambda a, free: a.real,
    "conj": lambda a, free: a.conj(),
    "clamp": lambda a, low, free: a.clamp_(min=low) if free else a.clamp(min=low),
    "add": lambda a, b, free: a + b,
    "sub": lambda a, b, free: a - b,
    "mul": lambda a, b, free: a * b,
    "div": lambda a, b, free: a / b,
    "lerp": lambda a, b, w, free: torch.lerp(a, b, w),
    "addcmul": lambda a, b, c, free: a + b * c,
}
ON_TENSORS: dict[str, Callable[..., Any]] = {
    **_ON_NUMBERS,
    "and": lambda a, b: a & b,
    "where": lambda c, a, b: torch.where(c, a, b),
    "hypot": torch.hypot,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "clamp": lambda a, low: a.clamp(min=low),
    "addcmul": lambda a, b, c: a + b * c,
}
