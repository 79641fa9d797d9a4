"""A fused step that is put off: rules of elements behind the base join its one pass over memory.

Only with the optional library. The step changes weights and state when it is made, not when a rule joins it.
"""

from array import array
from collections.abc import Mapping
from itertools import chain
from operator import itemgetter
from typing import Any

import torch

from metaopt.engine.chain import ParamGroup, ParamState
from metaopt.engine.fused.lists import FusedLists
from metaopt.joined_rules import GRAD, UPDATE, Item
from metaopt.multi_tensor import Tensors
from metaopt.programs import Compiled, Unfit, kernels, library
from metaopt.rules import Rule
from metaopt.wrapper import Wrapper


class PostponedStep:
    """The fused step of a group, put off so that rules of elements behind the base join its pass over memory.

    It is made when somebody looks at the weights or at the state, at the latest when the update ends.
    """

    def __init__(
        self, lists: FusedLists, group: ParamGroup, members: Tensors, gradients: Tensors, divisor: Any
    ) -> None:
        self.params = members
        self.gradients, self.divisor = gradients, divisor
        self._lists, self._group = lists, group
        self._items: list[Item] = []
        self._numbers: list[Mapping[str, Any]] = []
        self._tensors: list[Tensors] = []
        self._addresses: list[array[int]] = []
        self._places: dict[Any, int] = {}
        # the counts of all members, if they are views of one tensor
        self._counts: torch.Tensor | None = None
        self._state = len(lists.keys) - ("step" in lists.keys)

    def begin(self) -> bool:
        """Return whether the library can make the update: it computes torch's numbers, and all lists are right."""
        lists = self._lists
        native = kernels()
        if native is None or not native.knows(self.params[0].dtype, lists.kernel):
            return False
        if lists.is_settled and "step" in lists.keys:
            self._counts = lists.gathered_counts()
        named = [("param", lists.members), ("grad", self.gradients), *zip(lists.keys, lists.state_lists, strict=True)]
        return all(self._place(key, tensors) is not None for key, tensors in named)

    def add(
        self,
        wrapper: Wrapper,
        rule: Rule,
        numbers: Mapping[str, Any],
        state: Mapping[torch.Tensor, ParamState],
        *,
        on_update: bool = False,
    ) -> bool:
        """Let a rule act behind those that have joined; return False if it cannot. Only those on the update may sum."""
        if any(isinstance(number, torch.Tensor) for number in numbers.values()):
            return False
        if {"param", "grad"} & rule.graph.outputs.keys() if on_update else rule.graph.sums:
            return False
        lists: list[tuple[str, int]] = []
        for name in rule.tensors:
            slot = wrapper.slots.get(name)
            place: int | None = None
            if name == "param" or (on_update and name == "grad"):
                place = self._places[name]
            elif on_update and name == "update":
                place = UPDATE
            elif slot is not None and slot.kind in ("anchor", "start", "zeros"):
                key = f"{wrapper.label}.{name}"
                place = self._place(key, list(map(itemgetter(key), map(state.__getitem__, self.params))))
            if place is None:
                return False
            lists.append((name, place))
        self._items.append(Item(rule.graph, tuple(lists), on_update))
        self._numbers.append(numbers)
        if self._compiled() is None:
            del self._items[-1], self._numbers[-1]
            return False
        return True

    def make(self) -> None:
        """Make the update."""
        compiled, lists, group = self._compiled(), self._lists, self._group
        assert compiled is not None
        kernels().run(
            self.params[0].dtype,
            compiled.program,
            array("Q", b"".join(self._addresses)),
            lists.sizes,
            compiled.numbers(self._numbers),
            base=lists.kernel,
            settings=_settings(group, lists.kernel),
            count=self._addresses[self._places["step"]] if "step" in lists.keys else None,
            divisor=self.divisor,
        )
        unwritten = {GRAD} if self._counts is None else {GRAD, self._places["step"]}
        written = [tensors for place, tensors in enumerate(self._tensors) if place not in unwritten]
        # views have the version of the tensor that they are views of
        counts = [] if self._counts is None else [self._counts]
        torch.autograd.graph.increment_version([*chain.from_iterable(written), *counts])

    def _place(self, key: Any, tensors: Tensors) -> int | None:
        if key not in self._places:
            # gradients are new tensors in most updates, and known to be uniform
            found = addresses_of(tensors) if key == "grad" else self._lists.addresses(key, tensors)
            if found is None:
                return None
            self._places[key] = len(self._tensors)
            self._tensors.append(tensors)
            self._addresses.append(found)
        return self._places[key]

    def _compiled(self) -> Compiled | None:
        key = self._lists.kernel, self._state, self.divisor is None, tuple(self._items)
        known = self._lists.programs
        if key not in known:
            try:
                state = GRAD + 1 if self._state else 0
                compiled = Compiled(key[0], state, self._items, divided=self.divisor is not None)
                fits = kernels().knows(self.params[0].dtype, *compiled.needs)
                known[key] = compiled if fits else None
            except Unfit:
                known[key] = None
        return known[key]


def postponed_step(
    lists: FusedLists, group: ParamGroup, members: Tensors, gradients: Tensors, divisor: Any
) -> PostponedStep | None:
    """Return a step that rules behind it may join; None: torch has to make it, and now.

    A profiler and whatever else watches torch's calls is to see them.
    """
    if torch.autograd.profiler._is_profiler_enabled or torch._C._len_torch_dispatch_stack():
        return None
    if divisor is not None and not divisor.is_cpu:  # a clip has taken the norm on another device
        divisor = divisor.to("cpu")
    postponed = PostponedStep(lists, group, members, gradients, divisor)
    return postponed if postponed.begin() else None


def addresses_of(tensors: Tensors) -> "array[int]":
    """Return where tensors begin."""
    return array("Q", list(map(torch.Tensor.data_ptr, tensors)))


def _settings(group: ParamGroup, kernel: str) -> tuple[float, ...]:
    rest = group["weight_decay"], group["maximize"]
    if kernel == "adam":
        numbers = library.adam_settings(
            group["lr"], group["betas"], group["eps"], *rest, group["decoupled_weight_decay"]
        )
    else:
        numbers = library.sgd_settings(group["lr"], group["momentum"], group["dampening"], group["nesterov"], *rest)
    found: tuple[float, ...] = numbers
    return found
