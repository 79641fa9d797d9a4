"""Several rules of elements as one, behind the base's update: each acts on what the one before it has left."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from metaopt.rules import LIST, TENSOR, Graph, Rule, Symbol

# the place among the lists of the parameters and of the gradients; what is about to be added has none in memory
PARAM, GRAD, UPDATE = 0, 1, -1


class Item(NamedTuple):
    """A rule at its place behind the base: which list each of its tensors is."""

    graph: Graph
    lists: tuple[tuple[str, int], ...]
    # it changes what is added to the parameters, which still hold the weights from before
    on_update: bool = False


WEIGHTS, GRADIENTS = (Symbol("tensor", value=at, kind=LIST) for at in (PARAM, GRAD))
# what the base makes of the parameters, and what it adds to them
BASE = Symbol("base", kind=LIST)
CHANGE = Symbol("sub", (BASE, WEIGHTS), kind=LIST)
DIVIDED = Symbol("div", (GRADIENTS, Symbol("divisor")), kind=LIST)


def _add(param: Symbol, update: Symbol) -> Mapping[str, Symbol]:
    return {"param": param + update}


# what comes behind all rules on an update
ADDITION = Item(Rule(_add).graph, (("param", PARAM), ("update", UPDATE)))


def joined(items: Sequence[Item], *, divided: bool) -> Graph:
    """Return one rule for the base and those behind it: lists are known by place, numbers by item and name.

    Rules on the update come first. An operation that two rules share is done once. A factor of a tensor is taken out of
    sums over it, so that rules whose sums follow from each other need one pass.
    """
    leading = sum(item.on_update for item in items)
    placed = [*enumerate(items)]
    if leading:
        placed.insert(leading, (-1, ADDITION))
    current = {PARAM: WEIGHTS, UPDATE: CHANGE} if leading else {PARAM: BASE}
    if divided:
        current[GRAD] = DIVIDED
    apply = _builder()
    for number, item in placed:
        names = dict(item.lists)
        found: dict[Symbol, Symbol] = {}
        for symbol in item.graph.order:
            if symbol.op == "tensor":
                at = names[symbol.value]
                found[symbol] = current[at] if at in current else apply("tensor", [], LIST, at)
            else:
                value = (number, symbol.value) if symbol.op == "number" else symbol.value
                found[symbol] = apply(symbol.op, [found[arg] for arg in symbol.args], symbol.kind, value)
        current.update({names[name]: found[symbol] for name, symbol in item.graph.outputs.items()})
    # gradients stay as they are, and nobody needs the update any more
    return Graph({at: symbol for at, symbol in current.items() if at not in (GRAD, UPDATE)})


def _builder() -> Callable[..., Symbol]:
    """Return a function that makes symbols, each operation on the same symbols once."""
    made: dict[Any, Symbol] = {}

    def apply(op: str, args: Sequence[Symbol], kind: str, value: Any = None) -> Symbol:
        if op in ("real", "conj"):  # the library knows no complex numbers
            return args[0]
        if op == "norm":
            return apply("sqrt", [apply("dot", [args[0], args[0]], TENSOR)], TENSOR)
        if op == "mul" and args[0].kind != LIST:
            args = args[::-1]
        if op in ("dot", "mean"):
            factor = next((each for each in args if _has_factor(each)), None)
            if factor is not None:
                without = [factor.args[0] if each is factor else each for each in args]
                product = apply(op, without, TENSOR)
                for _ in range(sum(each is factor for each in args)):
                    product = apply("mul", [product, factor.args[1]], TENSOR)
                return product
        if op == "mul" and kind == LIST and args[1].kind == TENSOR and _has_factor(args[0]):
            inner, factor = args[0].args
            return apply("mul", [inner, apply("mul", [factor, args[1]], TENSOR)], LIST)
        key = op, tuple(args), value
        if key not in made:
            made[key] = Symbol(op, tuple(args), value, kind)
        return made[key]

    return apply


def _has_factor(symbol: Symbol) -> bool:
    """Return whether a list is one times a number of each tensor."""
    return symbol.op == "mul" and symbol.kind == LIST and symbol.args[1].kind == TENSOR
