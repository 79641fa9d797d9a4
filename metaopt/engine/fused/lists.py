"""torch's fused kernels, called directly: the lists that `torch.optim` gathers anew in every step are kept by group.

They serve torch's own Adam, AdamW and SGD on a processor, as soon as the base has its state of every parameter with a
gradient (SGD without momentum: at once); `lists_for` decides. Everything else goes through the base's own `step()`.
"""

from array import array
from collections.abc import Collection, Mapping
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, ParamState
from metaopt.engine.fused.uniform import is_uniform
from metaopt.multi_tensor import Tensors
from metaopt.programs import Compiled, kernels

# settings under which torch does more than call the kernel
CAREFUL = ("amsgrad", "capturable", "differentiable")

# elements from which on it pays that a factor of the gradients is not written to them
LARGE = 1 << 16
# tensors from which on the library, which takes less time for each, is faster although it has to be prepared
MANY = 24

# all parameters of a group that have a gradient
ALL = slice(None)


class KnownEntries:
    """Which parameters had which entries of a base's state, as far as lists were made of them.

    The hash of a tensor costs as much as a call of torch: it takes less time to compare all of a state with what it was
    than to look up each parameter in it.
    """

    def __init__(self) -> None:
        self._params: list[Any] = []
        self._entries: list[Any] = []
        # raised with every change
        self.edition = 0

    def look(self, state: Mapping[Any, Any]) -> int:
        """Return the edition of the state: it is another one after a parameter got another entry, or lost its own."""
        if not (are_identical(state, self._params) and are_identical(state.values(), self._entries)):
            self._params, self._entries = list(state), list(state.values())
            self.edition += 1
        return self.edition


class LocatedTensors:
    """Tensors that the library reads and writes by their addresses, which are looked up in every update."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self._places = kernels().places(tensors)
        # where they were when their properties were last right
        self._checked: array[int] | None = None

    def addresses(self, dtype: torch.dtype, sizes: "array[int] | None") -> "array[int] | None":
        """Return where the tensors begin; None if they are not all uniform, of one dtype and of some sizes.

        Their properties are looked at again when somebody has given them other memory (`p.data = ...`).
        """
        found: array[int] = self._places.look()
        if found != self._checked:
            if not is_uniform(self.tensors, dtype) or sizes not in (None, sizes_of(self.tensors)):
                return None
            self._checked = found
        return found


class FusedLists:
    """What a fused kernel takes of one group, as lists; valid while groups and state hold the same tensors."""

    def __init__(self, keys: tuple[str, ...], members: Tensors, states: list[ParamState]) -> None:
        self.keys = keys
        self.members = list(members)
        self.dtype = members[0].dtype
        self._states = states
        # of the state in which the members had these entries
        self._edition = 0
        self.state_lists: list[Tensors] = [list(map(itemgetter(key), states)) for key in keys]
        # the same tensors were updated twice: their counts may move into one tensor
        self.is_settled = False
        # the counts of all members, of which `state[p]["step"]` are views
        self._counts: torch.Tensor | None = None
        # by what a postponed step is to do: its program for the library, None if it does not fit
        self.programs: dict[Any, Compiled | None] = {}
        # by list: tensors that were found right for the library
        self._located: dict[Any, LocatedTensors] = {}
        self.sizes = sizes_of(members)
        self.elements = sum(self.sizes)

    @property
    def kernel(self) -> str:
        """The name of the base's update in the library."""
        return "adam" if "step" in self.keys else "sgd"

    def are_valid(self, chain: Chain, group: ParamGroup, members: Tensors, edition: int) -> bool:
        """Return whether a group with these members has the state that the lists hold; see `KnownEntries`."""
        if _keys(chain, group) != self.keys or not are_identical(members, self.members):
            return False
        if not self.keys:
            return True
        if not edition or edition != self._edition:
            if not are_identical(list(map(chain.base.state.get, members)), self._states):
                return False
            self._edition = edition
        try:
            self.is_settled = all(
                all(map(is_, map(itemgetter(key), self._states), kept))
                for key, kept in zip(self.keys, self.state_lists, strict=True)
            )
        except KeyError:
            return False
        return self.is_settled

    def are_uniform(self, dtype: torch.dtype) -> bool:
        """Return whether the state can be handed to the kernel as it is; torch would sort it by dtype and device."""
        return all(
            is_uniform(kept, torch.float32 if key == "step" else dtype)
            for key, kept in zip(self.keys, self.state_lists, strict=True)
        )

    def addresses(self, key: Any, tensors: Tensors) -> "array[int] | None":
        """Return where the tensors of a list begin; None if they are not as the members are.

        The list itself must not be changed later: it is kept, to be compared with that of the next update.
        """
        dtype, sizes = (torch.float32, None) if key == "step" else (self.dtype, self.sizes)
        located = self._located.get(key)
        if located is None or not (tensors is located.tensors or are_identical(tensors, located.tensors)):
            if not is_uniform(tensors, dtype):  # only of such tensors it may be asked where they are
                return None
            located = self._located[key] = LocatedTensors(tensors)
        return located.addresses(dtype, sizes)

    def look_again(self) -> bool:
        """Look at all tensors again: parameters or gradients have changed. Return whether the sizes are the same."""
        self._located.clear()
        return sizes_of(self.members) == self.sizes

    def step(
        self,
        group: ParamGroup,
        params: Tensors,
        gradients: Tensors,
        divisor: torch.Tensor | None,
        part: slice = ALL,
    ) -> None:
        """Update `params` and the state: the members in `part`, or copies of them that are to be moved instead."""
        if "step" in self.keys:
            self._count(part)
        if divisor is not None and not divisor.is_cpu:  # a clip has taken the norm on another device
            divisor = divisor.to(params[0].device)
        kernel = _adam if "step" in self.keys else _sgd
        kernel(group, params, gradients, [kept[part] for kept in self.state_lists], divisor)

    def _count(self, part: slice) -> None:
        """Add 1 to the counts of some members: one call for all of them, however many tensors they are."""
        if not self.is_settled:
            torch._foreach_add_(self.state_lists[-1][part], 1)
            return
        counts = self.gathered_counts()
        (counts if part == ALL else counts[part]).add_(1)

    def gathered_counts(self) -> torch.Tensor:
        """Return the counts of all members as one tensor, of which `state[p]["step"]` are views from now on."""
        if self._counts is None:
            with torch.inference_mode(False):  # tensors that are made in that mode cannot be changed outside of it
                self._counts = torch.stack(self.state_lists[-1])
                self.state_lists[-1] = list(self._counts.unbind())
            for state, count in zip(self._states, self.state_lists[-1], strict=True):
                state["step"] = count
        return self._counts


def lists_for(
    known: dict[int, FusedLists],
    chain: Chain,
    group: ParamGroup,
    members: Tensors,
    dtype: torch.dtype | None,
    edition: int = 0,
) -> FusedLists | None:
    """Return the lists for an update of a group; None: the base has to step itself, at least this time.

    `dtype` is that of parameters and gradients if they are uniform, otherwise None (`uniform_dtype`). `edition` is that
    of the base's state (`KnownEntries`), or 0 if it is not known: the entry of each member is then looked up.
    """
    if chain.fused_state is None or not members or not group.get("fused") or any(map(group.get, CAREFUL)):
        known.pop(id(group), None)
        return None
    if "found_inf" in vars(chain.base):  # of a GradScaler: torch reads it
        return None
    if dtype is None or any(isinstance(number, torch.Tensor) for number in (group["lr"], *group.get("betas", ()))):
        return None
    lists = known.get(id(group))
    if lists is None or lists.dtype is not dtype or not lists.are_valid(chain, group, members, edition):
        known.pop(id(group), None)
        lists = _lists_of_state(chain, group, members)
        if lists is None or not lists.are_uniform(dtype):
            return None
        known[id(group)] = lists
    return lists


def why_no_lists(group: ParamGroup, members: Tensors) -> str | None:
    """Return why `lists_for` gives no lists for a group whose base has its state, as far as the group itself tells.

    None if nothing in the group is against it. `lists_for` is called at every update and therefore makes no text.
    """
    elsewhere = next((p.device.type for p in members if not p.is_cpu), None)
    if elsewhere is not None:
        return f"that is done for parameters in main memory only, and some are on {elsewhere}"
    careful = next((name for name in CAREFUL if group.get(name)), None)
    if careful is not None:
        return f"{careful}=True"
    numbers = {"lr": (group.get("lr"),), "betas": group.get("betas", ())}
    tensor = next((key for key, given in numbers.items() if any(isinstance(n, torch.Tensor) for n in given)), None)
    if tensor is not None:
        return f"{tensor} is a tensor"
    if not group.get("fused"):
        return f"fused={group.get('fused')}"
    if members and not (is_uniform(members, members[0].dtype) and members[0].dtype.is_floating_point):
        return "its parameters are not plain contiguous tensors of one floating dtype"
    return None


def fits_kernel(members: Tensors, gradients: Tensors) -> bool:
    """Return whether a fused kernel updates these parameters rightly by these gradients.

    It reads no sparse gradient, and on a processor it takes the memory of parameter, gradient and moments in the order
    in which it lies: with other strides, or with gaps, elements are paired wrongly (torch 2.13, without an error).
    """
    if any(map(attrgetter("is_sparse"), gradients)):
        return False
    if all(map(torch.Tensor.is_contiguous, [*members, *gradients])):
        return True
    return all(
        not p.is_cpu or (p.is_contiguous() and g.is_contiguous()) or (p.stride() == g.stride() and _fills_its_memory(p))
        for p, g in zip(members, gradients, strict=True)
    )


def _fills_its_memory(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements lie side by side, in whatever order."""
    length = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != length:
            return False
        length *= size
    return True


def _lists_of_state(chain: Chain, group: ParamGroup, members: Tensors) -> FusedLists | None:
    keys = _keys(chain, group)
    states = [chain.base.state.get(p) or {} for p in members] if keys else []
    if any(state.get(PLACEHOLDER) or any(state.get(key) is None for key in keys) for state in states):
        return None
    return FusedLists(keys, members, states)


def _keys(chain: Chain, group: ParamGroup) -> tuple[str, ...]:
    # SGD keeps nothing without momentum
    return chain.fused_state if chain.fused_state and group.get("momentum", True) else ()


def sizes_of(tensors: Tensors) -> "array[int]":
    """Return how many elements each tensor has."""
    return array("q", list(map(torch.Tensor.numel, tensors)))


def are_identical(found: Collection[Any], kept: Collection[Any]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(found) == len(kept) and all(map(is_, found, kept))


def _adam(group: ParamGroup, params: Tensors, gradients: Tensors, kept: list[Tensors], divisor: Any) -> None:
    averages, squares, steps = kept
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = group["betas"]
    kernel(
        params,
        gradients,
        averages,
        squares,
        [],
        steps,
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        grad_scale=divisor,
        found_inf=None,
    )


def _sgd(group: ParamGroup, params: Tensors, gradients: Tensors, kept: list[Tensors], divisor: Any) -> None:
    torch._fused_sgd_(
        params,
        gradients,
        kept[0] if kept else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
        grad_scale=divisor,
        found_inf=None,
    )
