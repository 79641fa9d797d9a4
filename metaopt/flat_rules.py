"""Rules of elements on an accelerator: over flat memory, where an operation is one call for all tensors of a list.

A rule needs that if torch has no multi-tensor call for what it does: comparisons, `where`, sums over each tensor, and
numbers of each tensor that meet its elements. Other rules take fewer calls over the lists themselves (`rules.run`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch

from metaopt.flat_memory import CHUNK, clear_behind_, gathered, layout_of, memory_of, numbers_on, pieces, sums_of_chunks
from metaopt.flat_operations import as_tensor, beside, call
from metaopt.flat_padding import ANYTHING, Value, behind_tensors
from metaopt.group import Group
from metaopt.multi_tensor import Tensors, at_least_float32, on_accelerator
from metaopt.rules import LIST, NUMBER, ON_TENSORS, ONE_BY_ONE, SUMS, TENSOR, Graph, Symbol, Values, number_of


def fits(graph: Graph, lists: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Return whether a rule is run over flat memory: on an accelerator, if torch would go tensor by tensor for it."""
    if not (on_accelerator(lists[0]) and is_one_by_one(graph)) or any(each[0].is_complex() for each in lists):
        return False
    # a list may also have a number for each tensor, or the rows of a sparse gradient
    shapes = [tensor.shape for tensor in lists[0]]
    return all([tensor.shape for tensor in each] == shapes for each in lists[1:])


@lru_cache(maxsize=256)
def is_one_by_one(graph: Graph) -> bool:
    """Return whether torch has no multi-tensor call for something in a rule."""
    return any(
        symbol.op in ONE_BY_ONE or symbol.op in SUMS or any(arg.kind == TENSOR for arg in symbol.args)
        for symbol in graph.order
        if symbol.kind == LIST and symbol.op not in ("real", "conj")
    )


class Plan(NamedTuple):
    """The operations of a rule in turns; the sums of a turn are taken together, and have only numbers behind them."""

    turns: list[list[Symbol]]
    # what an operation takes: `real` and `conj` of real numbers are these numbers
    args: dict[Symbol, list[Symbol]]
    # the turn after which nobody reads a list any more
    last: dict[Symbol, int]
    outputs: dict[str, Symbol]
    behind: dict[Symbol, Value]


@lru_cache(maxsize=256)
def plan_of(graph: Graph) -> Plan:
    """Return the operations of a rule so that as many sums as can be are taken together."""
    same: dict[Symbol, Symbol] = {}
    args: dict[Symbol, list[Symbol]] = {}
    waves: dict[Symbol, int] = {}
    for symbol in graph.order:
        args[symbol] = [same[arg] for arg in symbol.args]
        is_same = symbol.op in ("real", "conj") and symbol.kind != NUMBER
        same[symbol] = args[symbol][0] if is_same else symbol
        waves[symbol] = max((waves[arg] for arg in args[symbol]), default=0) + (symbol.op in SUMS)
    made = [s for s in graph.order if same[s] is s and s.kind != NUMBER and s.op != "tensor"]
    # sums first, and norms before means, so that what is to be done to either is done by one call
    made.sort(key=lambda s: (waves[s], SUMS.index(s.op) if s.op in SUMS else len(SUMS)))
    turns: list[list[Symbol]] = []
    for symbol in made:
        joins = symbol.op in SUMS and turns and turns[-1][0].op in SUMS and waves[turns[-1][0]] == waves[symbol]
        turns[-1].append(symbol) if joins else turns.append([symbol])
    last = {arg: i for i, turn in enumerate(turns) for symbol in turn for arg in args[symbol]}
    outputs = {name: same[symbol] for name, symbol in graph.outputs.items()}
    last.update(dict.fromkeys(outputs.values(), len(turns)))
    return Plan(turns, args, last, outputs, behind_tensors(graph))


def run(
    graph: Graph,
    group: Group,
    tensors: Mapping[str, Tensors],
    numbers: Values,
    over_shards: Callable[[Tensors], Tensors] | None = None,
) -> None:
    """Run a rule over the lists of a group, outputs in place; `over_shards` adds numbers of shards up, if there are."""
    # a rank without elements has its part in sums over shards
    if over_shards is not None or any(tensor.numel() for tensor in next(iter(tensors.values()))):
        _Run(graph, group, tensors, numbers, over_shards).run()


class _Run:
    """One run of a rule: what is found of each symbol, with memories as rows of chunks."""

    def __init__(
        self, graph: Graph, group: Group, tensors: Mapping[str, Tensors], numbers: Values, over_shards: Any
    ) -> None:
        self._plan, self._group, self._tensors, self._over_shards = plan_of(graph), group, tensors, over_shards
        self._like = next(iter(tensors.values()))
        self._found: dict[Symbol, Any] = {symbol: number_of(symbol, numbers) for symbol in graph.numbers}
        self._symbols = {symbol.value: symbol for symbol in graph.order if symbol.op == "tensor"}
        # memories of lists, and memories that nobody else holds: copies of lists, and what operations have made
        self._lists: dict[str, torch.Tensor] = {}
        self._own: set[Symbol] = set()
        self._looked_up: dict[Symbol, torch.Tensor] = {}

    def run(self) -> None:
        self._take_lists()
        for turn, symbols in enumerate(self._plan.turns):
            if symbols[0].op in SUMS:
                self._found.update(zip(symbols, self._sums(symbols), strict=True))
            elif symbols[0].kind == TENSOR:
                self._found[symbols[0]] = self._on_numbers(symbols[0])
            else:
                self._found[symbols[0]] = self._on_memories(symbols[0], turn)
                self._own.add(symbols[0])
            for symbol in {arg for s in symbols for arg in self._plan.args[s] if self._plan.last[arg] == turn}:
                self._found.pop(symbol, None)
                self._looked_up.pop(symbol, None)
        for name, symbol in self._plan.outputs.items():
            self._write(name, symbol)

    def _take_lists(self) -> None:
        """Take each list as one memory: its own if it has one, otherwise a copy."""
        copied: dict[torch.dtype, list[str]] = {}
        for name, symbol in self._symbols.items():
            memory = memory_of(self._tensors[name])
            if memory is None:
                copied.setdefault(self._tensors[name][0].dtype, []).append(name)
                self._own.add(symbol)
            else:
                self._lists[name] = self._found[symbol] = memory.view(-1, CHUNK)
        for dtype, names in copied.items():
            memories = gathered([self._tensors[name] for name in names], dtype)
            self._found.update((self._symbols[n], m.view(-1, CHUNK)) for n, m in zip(names, memories, strict=True))

    # ---- operations

    def _on_numbers(self, symbol: Symbol) -> torch.Tensor:
        args = [self._found[arg] for arg in self._plan.args[symbol]]
        dtypes = [arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.dtype != torch.bool]
        dtype = dtypes[0] if dtypes else at_least_float32(self._like[0].dtype)
        if symbol.op == "where":
            args = [beside(arg, dtype, self._like[0].device) for arg in args]
        elif symbol.op == "div":
            args[0] = as_tensor(args[0], dtype)
        made: torch.Tensor = ON_TENSORS[symbol.op](*args)
        return made

    def _on_memories(self, symbol: Symbol, turn: int) -> torch.Tensor:
        of = self._plan.args[symbol]
        args = [self._of_chunks(arg) if arg.kind == TENSOR else self._found[arg] for arg in of]
        wide = reduce(torch.promote_types, (a.dtype for a, s in zip(args, of, strict=True) if s.kind != NUMBER))
        room = next(self._rooms(symbol, turn, wide), None)
        if room is None:
            room = torch.empty(layout_of(self._like).total, dtype=wide, device=self._like[0].device).view(-1, CHUNK)
        call(symbol.op, args, room)
        return room

    def _rooms(self, symbol: Symbol, turn: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield memories of operands that nobody needs any more, first those of lists that a rule changes."""
        done = [a for a in self._plan.args[symbol] if a.kind == LIST and self._plan.last[a] == turn]
        changed = [a for a in done if a.op == "tensor" and a not in self._own and self._may_change(a, symbol)]
        for arg in (*changed, *(a for a in done if a in self._own)):
            if self._found[arg].dtype == dtype:
                yield self._found[arg]

    def _may_change(self, old: Symbol, new: Symbol) -> bool:
        # as by multi-tensor calls: if the rule fails halfway, the update is half changed, but not weights or state
        is_update = old.value == "update" and [*self._plan.outputs] == ["update"]
        return is_update or self._plan.outputs.get(old.value) is new

    def _of_chunks(self, symbol: Symbol) -> torch.Tensor:
        """Return numbers of tensors as numbers of their chunks."""
        if symbol not in self._looked_up:
            owners = layout_of(self._like).owners
            self._looked_up[symbol] = self._found[symbol].index_select(0, owners).unsqueeze(1)
        return self._looked_up[symbol]

    # ---- sums

    def _sums(self, symbols: list[Symbol]) -> Tensors:
        operands = [[self._found[arg] for arg in self._plan.args[symbol]] for symbol in symbols]
        wide = at_least_float32(reduce(torch.promote_types, (each.dtype for args in operands for each in args)))
        count, device = layout_of(self._like).total // CHUNK, self._like[0].device
        of_chunks = torch.empty(len(symbols), count, dtype=wide, device=device)
        for symbol, args, out in zip(symbols, operands, of_chunks.unbind(), strict=True):
            self._sum_chunks(symbol, args, out)
        norms = sum(symbol.op == "norm" for symbol in symbols)
        if norms:
            of_chunks[:norms].square_()
        totals = sums_of_chunks(of_chunks, self._like)
        if self._over_shards is not None:
            rows = [self._group.stack(self._over_shards(list(row.unbind()))) for row in totals.unbind()]
            totals = torch.stack(rows)
        if norms:
            totals[:norms].sqrt_()
        means = [symbol.op == "mean" for symbol in symbols]
        if any(means):
            counts = tuple(max(1, numel) for numel in self._group.numels)
            totals[means.index(True) : means.index(True) + sum(means)].div_(numbers_on(counts, wide, device))
        return list(totals.unbind())

    def _sum_chunks(self, symbol: Symbol, args: Tensors, out: torch.Tensor) -> None:
        behind = [self._plan.behind[arg] for arg in self._plan.args[symbol]]
        if symbol.op == "dot":
            terms, is_own = torch.mul(args[0].to(out.dtype), args[1]), True
            adds_nothing = 0.0 in behind and ANYTHING not in behind
        else:
            terms, is_own, adds_nothing = args[0], False, behind[0] == 0.0
        if not adds_nothing:
            terms = terms if is_own else terms.clone()
            clear_behind_(terms, self._like)
        if symbol.op == "norm":
            torch.linalg.vector_norm(terms, dim=1, dtype=out.dtype, out=out)
        else:
            torch.sum(terms, dim=1, dtype=out.dtype, out=out)

    # ---- outputs

    def _write(self, name: str, symbol: Symbol) -> None:
        target, value = self._tensors[name], self._found[symbol]
        if symbol is self._symbols.get(name):
            return
        if name not in self._lists:
            torch._foreach_copy_(target, pieces(value, target))
            return
        memory = self._lists[name]
        if value is not memory:
            memory.copy_(value)
        if self._plan.behind[symbol] != 0.0:
            clear_behind_(memory, target)
