"""Several rules of elements as one: what each does to the lists that the one before it has left, worked out once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metaopt.rules import LIST, SUMS, TENSOR, Graph, Rule, Symbol

# the place among the lists of the parameters, of the gradients, and of what is about to be added to the parameters
PARAM, GRAD, UPDATE = 0, 1, 2


class Item(NamedTuple):
    """A rule at its place: which list each of its tensors is."""

    graph: Graph
    lists: tuple[tuple[str, int], ...]


def _add(param: Symbol, update: Symbol) -> Mapping[str, Symbol]:
    return {"param": param + update}


# what comes behind all rules on an update
ADDITION = Item(Rule(_add).graph, (("param", PARAM), ("update", UPDATE)))


def joined(items: Sequence[Item], current: dict[int, Symbol], *, moves: bool = False) -> Graph:
    """Return one rule for several: its lists are known by their place, its numbers by the item and their name.

    `current` is what lists are instead of what the memory holds. With `moves` the change is added to the parameters at
    the end, and nobody needs it any more. An operation that two rules share is done once. A sum of a list times a
    number of its tensor is the number times the sum.
    """
    items = [*items, ADDITION] if moves else items
    made: dict[Any, Symbol] = {}
    current = dict(current)

    def apply(op: str, args: Sequence[Symbol], kind: str, value: Any = None) -> Symbol:
        if op in SUMS:
            factors: list[Symbol] = []
            args = [_without_factors(arg, factors) for arg in args]
            if factors:
                result = apply(op, args, kind)
                for factor in factors:
                    size = apply("abs", [factor], factor.kind) if op == "norm" else factor
                    result = apply("mul", [result, size], TENSOR)
                return result
            if op == "dot" and args[0] is args[1]:
                norm = apply("norm", args[:1], kind)
                return apply("mul", [norm, norm], kind)
        if op == "mul" and args[1].op == "constant" and args[1].value == 1.0:
            return args[0]
        key = op, tuple(args), value
        if key not in made:
            made[key] = Symbol(op, tuple(args), value, kind)
        return made[key]

    for position, item in enumerate(items):
        names = dict(item.lists)
        found: dict[Symbol, Symbol] = {}
        for symbol in item.graph.order:
            if symbol.op == "tensor":
                at = names[symbol.value]
                found[symbol] = current[at] if at in current else apply("tensor", [], LIST, at)
            else:
                value = (position, symbol.value) if symbol.op == "number" else symbol.value
                found[symbol] = apply(symbol.op, [found[arg] for arg in symbol.args], symbol.kind, value)
        current.update({names[name]: found[symbol] for name, symbol in item.graph.outputs.items()})
    # gradients stay as they are
    return Graph({at: symbol for at, symbol in current.items() if at != GRAD and not (moves and at == UPDATE)})


def _without_factors(symbol: Symbol, factors: list[Symbol]) -> Symbol:
    """Return a list without what all elements of a tensor are multiplied by, which is put into `factors`."""
    if symbol.op == "mul" and symbol.kind == LIST:
        for each, other in (symbol.args, symbol.args[::-1]):
            if other.kind != LIST:
                factors.append(other)
                return _without_factors(each, factors)
    return symbol
