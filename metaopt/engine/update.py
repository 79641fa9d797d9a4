"""Update: most of what exists for one `step()` and not longer. It ends with the step, also with one that fails."""

from collections.abc import Iterator
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

import torch

from metaopt.distributed.shards import dense, local
from metaopt.engine.chain import Chain, ParamGroup, ParamState
from metaopt.engine.fused.lists import are_identical
from metaopt.engine.fused.postponed import PostponedStep
from metaopt.engine.fused.probes import takes_factor
from metaopt.engine.fused.uniform import uniform_dtype
from metaopt.engine.run.entries import UPDATES
from metaopt.engine.run.run import Run
from metaopt.flat_memory import flat_room, flat_rooms, memory_of
from metaopt.multi_tensor import add_, at_least_float32, cast, copies, on_accelerator, operand

# of parameters wider than this many bytes an element, gradients are not scaled by a fused kernel: its factor is float32
WIDEST_FOLDED = 4

Params = list[torch.Tensor]


class Update:
    """One update of a run: pending factors and state, the weights before and their change, steps that are put off.

    Outside a step `averaged()`, `averaged_module()` and `record()` of a value on which a part acts use one, in which
    nothing is pending.
    """

    __slots__ = (
        "_params_and_grads",
        "_uniform_dtypes",
        "accumulates",
        "applied_versions",
        "block_memory",
        "change",
        "change_for_observers",
        "change_memory",
        "counters_before",
        "grads_to_divide",
        "is_logged",
        "param_names",
        "params_by_group",
        "pending_scale",
        "pending_state",
        "postponed",
        "random_draws",
        "run",
        "skip_reason",
        "state_set_aside",
        "step_weight",
        "unapplied",
        "updates_before",
        "weights_before",
        "weights_for_observers",
        "with_replaced_grads",
    )  # fmt: skip

    def __init__(self, run: Run, *, is_logged: bool = False) -> None:
        self.run = run
        self.is_logged = is_logged
        self.updates_before: int = run.param_groups[0][UPDATES]
        # why a wrapper wants no update, and whether it keeps these gradients for a later one
        self.skip_reason: str | None = None
        self.accumulates = False
        # by group and key: counters before this update changed them
        self.counters_before: list[tuple[ParamGroup, str, Any]] = []
        # how much the gradients of this step count beside those of others of one update
        self.step_weight: float | torch.Tensor = 1.0

        # ---- parameters and gradients
        # by group: the parameters that have a gradient, and these gradients, until somebody changes them
        self._params_and_grads: dict[int, tuple[Params, list[torch.Tensor]]] = {}
        # by group: their dtype if they are what a fused kernel takes, otherwise None
        self._uniform_dtypes: dict[int, torch.dtype | None] = {}
        # by group: the parameters that the base updates, written down right before it does
        self.params_by_group: dict[int, Params] = {}
        # parameters whose gradient a wrapper has replaced: they lose it at the end of the step
        self.with_replaced_grads: Params = []
        # by chain: the factor by which its gradients are yet to be multiplied
        self.pending_scale: dict[Chain, torch.Tensor | float] = {}

        # ---- state
        # wrappers' state of parameters at their first update: stored when the base has made its own
        self.pending_state: dict[torch.Tensor, ParamState] = {}
        # what was in `state[p]` before: a base makes its own only if that is empty. It returns if the update fails
        self.state_set_aside: dict[torch.Tensor, ParamState] = {}

        # ---- the weights before, and what is added to them (`group.update`): local tensors
        self.weights_before: dict[torch.Tensor, torch.Tensor] = {}
        self.change: dict[torch.Tensor, torch.Tensor] = {}
        # parameters that hold the weights from before now: their change is yet to be added
        self.unapplied: set[torch.Tensor] = set()
        # of the others: versions of change and weights when the weights were last set to their sum
        self.applied_versions: dict[torch.Tensor, tuple[int, int]] = {}
        # memory for the change of a block, and by role and dtype what such memory is cut from
        self.change_memory: dict[torch.Tensor, torch.Tensor] = {}
        self.block_memory: dict[object, torch.Tensor] = {}
        # for parts that only look: the weights before, which become the whole change behind all others; None until then
        self.weights_for_observers: dict[torch.Tensor, torch.Tensor] = {}
        self.change_for_observers: dict[torch.Tensor, torch.Tensor] | None = None

        # ---- fused steps that were put off
        # by group: the base's step with the rules of wrappers behind it, until somebody looks at what it changes
        self.postponed: dict[int, PostponedStep] = {}
        # by group: a step that was made without dividing the gradients themselves by the scale
        self.grads_to_divide: dict[int, PostponedStep] = {}

        # ---- random numbers
        # by wrapper and parameter: how often numbers were drawn
        self.random_draws: dict[object, int] = {}
        self.param_names: dict[torch.Tensor, str] | None = None

    def state_of(self, p: torch.Tensor) -> ParamState:
        """Return what wrappers may see of a parameter's state, including what is yet to be stored."""
        param_state: ParamState = self.run.state.get(p, {})
        initial = self.pending_state.get(p)
        return param_state if initial is None else {**param_state, **initial}

    def params_of(self, group: ParamGroup) -> Params:
        """Return the parameters of a group that the base updates; until it does, those with a gradient."""
        if self.change_for_observers is not None:
            return [p for p in group["params"] if p in self.change_for_observers]
        params = self.params_by_group.get(id(group))
        return self.params_and_grads(group)[0] if params is None else params

    def params_and_grads(self, group: ParamGroup) -> tuple[Params, list[torch.Tensor]]:
        """Return the parameters of a group that have a gradient, and these gradients: looked up once in an update."""
        found = self._params_and_grads.get(id(group))
        if found is None:
            params, gradients = group["params"], [p.grad for p in group["params"]]
            if not all(map(is_not, gradients, repeat(None))):
                params = [p for p, g in zip(params, gradients, strict=True) if g is not None]
                gradients = [g for g in gradients if g is not None]
            found = self._params_and_grads[id(group)] = params, gradients
        return found

    def uniform_dtype(self, group: ParamGroup) -> torch.dtype | None:
        """Return the dtype of `params_and_grads` if they are what a processor's fused kernels take, otherwise None."""
        key = id(group)
        if key not in self._uniform_dtypes:
            known = self.run.uniform_tensors
            before = known.get(key)
            self._uniform_dtypes[key] = uniform_dtype(known, key, *self.params_and_grads(group))
            lists = self.run.fused_lists.get(key)
            if known.get(key) is not before and lists is not None and not lists.look_again():
                del self.run.fused_lists[key]
        return self._uniform_dtypes[key]

    def are_uniform(self, group: ParamGroup, params: Params) -> bool:
        """Return whether some parameters of a group are known to have one dtype and device."""
        known = self._params_and_grads.get(id(group))
        if known is None or self._uniform_dtypes.get(id(group)) is None:
            return False
        return params is known[0] or are_identical(params, known[0])

    def gradients_changed(self) -> None:
        """Look the gradients up again when they are next needed: some were made, replaced or taken away."""
        self._params_and_grads.clear()
        self._uniform_dtypes.clear()

    def make_postponed(self) -> None:
        """Make the steps that were put off: somebody looks at weights, gradients or state."""
        while self.postponed:  # one by one: if one fails, the others are made when the update is left
            key = next(iter(self.postponed))
            each = self.postponed.pop(key)
            each.make()
            if each.divisor is not None:
                self.grads_to_divide[key] = each

    def divide_gradients(self, group: ParamGroup) -> None:
        """Divide gradients by what the base has divided them by only for itself."""
        made = self.grads_to_divide.pop(id(group), None)
        if made is not None:
            torch._foreach_div_(made.gradients, made.divisor)

    # ---- the factor by which gradients are yet to be multiplied

    def add_scale(self, chain: Chain, factor: torch.Tensor | float) -> None:
        """Have the gradients of a chain multiplied by a factor before anyone uses them; the number 1 costs nothing."""
        if isinstance(factor, torch.Tensor) or factor != 1.0:
            pending = self.pending_scale.get(chain)
            self.pending_scale[chain] = factor if pending is None else pending * factor

    def apply_scale(self, chain: Chain) -> None:
        """Multiply a chain's gradients by its pending factor, once."""
        factor = self.pending_scale.pop(chain, None)
        if factor is None:
            return
        gradients: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for group in chain.groups_in(self.run.param_groups):
            for p, gradient in zip(*self.params_and_grads(group), strict=True):
                gradients.setdefault((p.device, gradient.dtype), []).append(dense(local(gradient)))
        for (_, dtype), tensors in gradients.items():
            torch._foreach_mul_(tensors, operand(_as_tensor(factor, dtype), tensors))

    def fold_scale(self, chain: Chain) -> None:
        """Hand a chain's factor to the base's fused kernel if it can take it; otherwise multiply now.

        Decided at each update: a loaded checkpoint or a client may have changed how a group runs.
        """
        if chain not in self.pending_scale:
            return
        groups = chain.groups_in(self.run.param_groups)
        foldable = (
            getattr(chain.base, "_step_supports_amp_scaling", False)
            and not chain.needs_closure
            and all(group.get("fused") for group in groups)
            and all(map(self._may_be_folded, groups))
            and (
                self.run.accelerators == ()
                or takes_factor(type(chain.base), [p for group in groups for p in group["params"]])
            )
        )
        if not foldable:
            self.apply_scale(chain)
            return
        # the kernel divides by it in its own pass
        divisor = _as_tensor(self.pending_scale.pop(chain)).reciprocal()
        chain.base.grad_scale = divisor if divisor.dtype is torch.float32 else divisor.float()  # type: ignore[attr-defined]

    def _may_be_folded(self, group: ParamGroup) -> bool:
        """Return whether the elements of a group's parameters are narrow enough for the factor of a fused kernel."""
        dtype = self.uniform_dtype(group)
        if dtype is not None and len(self.params_and_grads(group)[0]) == len(group["params"]):
            return dtype.itemsize <= WIDEST_FOLDED
        return all(p.element_size() <= WIDEST_FOLDED for p in group["params"])

    # ---- the change of the weights

    def keep_weights(self, params: Params) -> None:
        """Copy the weights of some parameters, right before the base moves them."""
        self.weights_before.update(_copied(params))

    def keep_weights_for_observers(self) -> None:
        """Copy the weights of all parameters that are updated, for parts that only look."""
        for group in self.run.param_groups:
            self.weights_for_observers.update(_copied(self.params_of(group)))

    def begin_observing(self) -> None:
        """Let parts that only look see all that was added to the weights; the copies of these are overwritten."""
        self.change_for_observers = {}
        for part in _taken_together(list(self.weights_for_observers)):
            if not on_accelerator(part):
                for p in part:
                    before, weights = self.weights_for_observers.pop(p), local(p)
                    wide = at_least_float32(weights.dtype)
                    out = before if wide == weights.dtype else torch.empty_like(weights, dtype=wide)
                    self.change_for_observers[p] = torch.sub(weights.to(wide), before, out=out)
                continue
            befores, weights_now = [self.weights_for_observers.pop(p) for p in part], [local(p) for p in part]
            self.change_for_observers.update(zip(part, _differences(weights_now, befores), strict=True))

    def keep_block(self, params: Params) -> None:
        """Copy the weights of a block of parameters into memory that the next block uses again.

        Fresh memory would cost a processor more time than the arithmetic: the system clears every page of it.
        """
        for part in _by_dtype_and_device(params):
            weights = [local(p) for p in part]
            before, change = self._room_for_block(weights)
            torch._foreach_copy_(before, weights)
            self.weights_before.update(zip(part, before, strict=True))
            self.change_memory.update(zip(part, change, strict=True))

    def copies_to_move(self, params: Params) -> list[torch.Tensor]:
        """Return copies of the weights of a block, which the base is to move in their place."""
        copies = self._cut_memory("change", params)
        torch._foreach_copy_(copies, params)
        return copies

    def take_change_of_copies(self, params: Params, copies: list[torch.Tensor]) -> None:
        """Take what the base has added to copies of the weights as the change; the weights themselves stand still."""
        torch._foreach_sub_(copies, params)
        self.weights_before.update(zip(params, params, strict=True))
        self.change.update(zip(params, copies, strict=True))
        self.unapplied.update(params)

    def _room_for_block(self, weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return room for the weights before and for their change."""
        if on_accelerator(weights) and weights[0].dtype == at_least_float32(weights[0].dtype):
            return flat_rooms(weights, weights[0].dtype, 2)
        return [self._cut_memory(role, weights) for role in ("before", "change")]

    def _cut_memory(self, role: str, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors of the weights' shapes in memory of this update; those of a change are at least float32."""
        dtype = weights[0].dtype if role == "before" else at_least_float32(weights[0].dtype)
        if on_accelerator(weights):
            return flat_room(weights, dtype)
        key, sizes = (role, weights[0].dtype, weights[0].device), [w.numel() for w in weights]
        memory = self.block_memory.get(key)
        if memory is None or memory.numel() < sum(sizes):
            memory = self.block_memory[key] = torch.empty(sum(sizes), dtype=dtype, device=weights[0].device)
        pieces = torch.split(memory[: sum(sizes)], sizes)
        return [piece.view(w.shape) for piece, w in zip(pieces, weights, strict=True)]

    def change_of(self, p: torch.Tensor) -> torch.Tensor:
        """Return what was added to a parameter so far, at least float32; `apply_change` counts changes of it."""
        if p in self.unapplied:
            return self.change[p]
        if self._has_moved_since(p):
            weights, before, memory = local(p), self.weights_before[p], self.change_memory.pop(p, None)
            wide = at_least_float32(weights.dtype)
            if memory is None:
                memory = torch.empty_like(weights, dtype=wide)
            change = self.change[p] = torch.sub(weights.to(wide), before, out=memory)
            self.applied_versions[p] = change._version, weights._version
        return self.change[p]

    def read_only_weights(self, params: Params) -> list[torch.Tensor]:
        """Return the weights of parameters, or their copies from before the update if these are in flat memory."""
        if all(p in self.unapplied for p in params):
            before = [self.weights_before[p] for p in params]
            if memory_of(before) is not None:
                return before
        return [local(p) for p in params]

    def _has_moved_since(self, p: torch.Tensor) -> bool:
        """Return whether a parameter has moved since its change was last worked out, if ever."""
        return p not in self.change or self.applied_versions.get(p, (0, -1))[1] != local(p)._version

    def changes_of(self, params: Params) -> list[torch.Tensor]:
        """Return `change_of` each of some parameters of one device and dtype."""
        if on_accelerator(params):
            new = [p for p in params if p not in self.unapplied and self._has_moved_since(p)]
            if new:
                weights, befores = [local(p) for p in new], [self.weights_before[p] for p in new]
                memory = [self.change_memory.pop(p, None) for p in new]
                out = [m for m in memory if m is not None]
                changes = _differences(weights, befores, out if len(out) == len(new) else None)
                self.change.update(zip(new, changes, strict=True))
                for p, change, now in zip(new, changes, weights, strict=True):
                    self.applied_versions[p] = change._version, now._version
        return [self.change_of(p) for p in params]

    def return_to_weights_before(self, params: Params) -> None:
        """Give the parameters their weights from before the update; `change` holds what is to be added."""
        for part in _taken_together([p for p in params if p not in self.unapplied]):
            if on_accelerator(part):
                self.changes_of(part)
                torch._foreach_copy_([local(p) for p in part], [self.weights_before[p] for p in part])
            else:
                for p in part:
                    self.change_of(p)
                    local(p).copy_(self.weights_before[p])
            self.unapplied.update(part)

    def apply_change(self, params: Params) -> None:
        """Set the parameters to the weights before plus the change, rounded once."""
        for part in _taken_together(params):
            add_([local(p) for p in part], [self.change[p] for p in part])
        for p in params:
            weights, change = local(p), self.change[p]
            self.unapplied.discard(p)
            self.applied_versions[p] = change._version, weights._version

    def apply_written_change(self, params: Params) -> Params:
        """Set those parameters to the weights before plus the change whose change a wrapper has written to."""
        written = [p for p in params if p in self.change and self.change[p]._version != self.applied_versions[p][0]]
        for part in _taken_together(written):
            torch._foreach_copy_([local(p) for p in part], [self.weights_before[p] for p in part])
        self.apply_change(written)
        return written

    def forget_change(self, params: Params) -> None:
        """Forget the weights before and the change of some parameters."""
        for p in params:
            self.weights_before.pop(p, None)
            self.change_memory.pop(p, None)
            self.change.pop(p, None)
            self.applied_versions.pop(p, None)

    # ---- the end

    def remove_temporaries(self) -> None:
        """Remove replaced gradients and the base's `grad_scale`, also if the update failed."""
        for chain in self.run.structure.chains:
            chain.base.__dict__.pop("grad_scale", None)
        for p in self.with_replaced_grads:
            p.grad = None

    def free_memory(self) -> None:
        """Let go of gradients and copies: a failed step's traceback, which may be kept for long, holds this object."""
        self.weights_before, self.change, self.change_memory, self.block_memory = {}, {}, {}, {}
        self.weights_for_observers, self.change_for_observers = {}, None
        self.postponed, self.grads_to_divide = {}, {}
        self.gradients_changed()


def _as_tensor(factor: torch.Tensor | float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a factor as a tensor: a number as float32, or as float64 for gradients of that dtype."""
    wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    return factor if isinstance(factor, torch.Tensor) else torch.tensor(factor, dtype=wide)


def _copied(params: Params) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parameters with copies of what this process holds of them."""
    for part in _taken_together(params):
        yield from zip(part, copies([local(p) for p in part]), strict=True)


def _differences(
    weights: list[torch.Tensor], befores: list[torch.Tensor], out: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Return how far weights have moved, in float32 at least, by calls over all of them."""
    out = flat_room(weights, at_least_float32(weights[0].dtype)) if out is None else out
    torch._foreach_copy_(out, weights)
    torch._foreach_sub_(out, cast(befores))
    return out


def _taken_together(params: Params) -> list[Params]:
    """Return the lists that multi-tensor calls take: all on a processor, where dtypes may be mixed at no cost."""
    if all(map(attrgetter("is_cpu"), params)):
        return [params] if params else []
    return _by_dtype_and_device(params)


def _by_dtype_and_device(params: Params) -> list[Params]:
    """Return the parameters in lists of one dtype and device each."""
    lists: dict[tuple[torch.dtype, torch.device], Params] = {}
    for p in params:
        lists.setdefault((p.dtype, p.device), []).append(p)
    return list(lists.values())
