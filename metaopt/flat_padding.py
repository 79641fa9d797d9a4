"""What a rule of elements makes of the zeros behind tensors: whether they stay zeros, which add nothing to a sum.

Each symbol is worked out for an element that is 0 in every tensor. Hyperparameters and numbers of a tensor count as
finite, and none that is divided by as 0: if it is not so, a sum over that tensor may be NaN where it would be infinite.
The zeros behind a tensor are added only to that tensor's sums.
"""

import math
from collections.abc import Callable

from metaopt.rules import LIST, NUMBER, Graph, Symbol, number_of

# a finite number that is not known, and anything at all, such as 1 / 0
FINITE, ANYTHING = "finite", "anything"
Value = float | str


def behind_tensors(graph: Graph) -> dict[Symbol, Value]:
    """Return what each symbol is where the tensors have zeros."""
    found: dict[Symbol, Value] = {}
    for symbol in graph.order:
        if symbol.op == "tensor":
            found[symbol] = 0.0
        elif symbol.op == "constant":
            found[symbol] = symbol.value
        elif symbol.kind != LIST:
            found[symbol] = FINITE
        else:
            found[symbol] = _value(symbol, [found[arg] for arg in symbol.args])
    return found


def _value(symbol: Symbol, values: list[Value]) -> Value:
    divides = symbol.op == "div" and symbol.args[1].kind == NUMBER
    early = _product if divides else _EARLY.get(symbol.op)
    if early is not None and (known := early(*values)) is not None:
        return known
    if ANYTHING in values:
        return FINITE if symbol.op in ("lt", "le", "gt") else ANYTHING
    if FINITE in values:
        return ANYTHING if symbol.op in _UNSAFE and not divides else FINITE
    numbers = Symbol(symbol.op, tuple(Symbol("constant", value=value) for value in values))
    try:
        made = float(number_of(numbers, {}))
    except (ArithmeticError, ValueError):
        return ANYTHING
    return made if math.isfinite(made) else ANYTHING


def _product(a: Value, b: Value) -> Value | None:
    return 0.0 if 0.0 in (a, b) and ANYTHING not in (a, b) else None


def _sum_of_product(a: Value, b: Value, c: Value) -> Value | None:
    return a if _product(b, c) == 0.0 else None


def _between(a: Value, b: Value, w: Value) -> Value | None:
    return a if a == b and isinstance(a, float) and w != ANYTHING else None


def _chosen(c: Value, a: Value, b: Value) -> Value | None:
    if isinstance(c, float):
        return a if c else b
    return a if a == b else None


_UNSAFE = ("div", "sqrt", "reciprocal")
# what is known though not all operands are
_EARLY: dict[str, Callable[..., Value | None]] = {
    "mul": _product,
    "and": _product,
    "addcmul": _sum_of_product,
    "lerp": _between,
    "where": _chosen,
}
