"""Update: most of what exists for one `step()` and not longer. It ends with the step, also with one that fails."""

from itertools import repeat
from operator import is_not
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
from metaopt.engine.update.change import Change, Params
from metaopt.multi_tensor import operand

# of parameters wider than this many bytes an element, gradients are not scaled by a fused kernel: its factor is float32
WIDEST_FOLDED = 4


class Update:
    """One update of a run: pending factors and state, the weights before and their change, steps that are put off.

    Outside a step `averaged()`, `averaged_module()` and, with a part that acts on records, `record()` use one, in which
    nothing is pending.
    """

    __slots__ = (
        "_params_and_grads",
        "_uniform_dtypes",
        "accumulates",
        "change",
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
        "updates_before",
        "with_replaced_grads",
    )  # fmt: skip

    def __init__(self, run: Run, *, is_logged: bool = False) -> None:
        self.run = run
        self.is_logged = is_logged
        self.updates_before: int = run.param_groups[0][UPDATES]
        # why a wrapper wants no update, and whether it keeps these gradients for a later one
        self.skip_reason: str | None = None
        self.accumulates = False
        # group, key and value of counters before this update changed them
        self.counters_before: list[tuple[ParamGroup, str, Any]] = []
        # how much the gradients of this step count beside those of others of one update
        self.step_weight: float | torch.Tensor = 1.0

        # ---- parameters and gradients
        # by group: the parameters that have a gradient, and these gradients, until somebody changes them
        self._params_and_grads: dict[int, tuple[Params, list[torch.Tensor]]] = {}
        # by group: their dtype if they are what a fused kernel takes, otherwise None
        self._uniform_dtypes: dict[int, torch.dtype | None] = {}
        # by group: the parameters that the base updates, written down right before if a part needs the old weights
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

        # ---- what is added to the weights
        self.change = Change()

        # ---- fused steps that were put off
        # by group: the base's step with the rules of wrappers behind it, until somebody looks at what it changes
        self.postponed: dict[int, PostponedStep] = {}
        # by group: a step that was made without dividing the gradients themselves by the scale
        self.grads_to_divide: dict[int, PostponedStep] = {}

        # ---- random numbers
        # by label, parameter and rows of a block: how often numbers were drawn
        self.random_draws: dict[object, int] = {}
        self.param_names: dict[torch.Tensor, str] | None = None

    def state_of(self, p: torch.Tensor) -> ParamState:
        """Return what wrappers may see of a parameter's state, including what is yet to be stored."""
        param_state: ParamState = self.run.state.get(p, {})
        initial = self.pending_state.get(p)
        return param_state if initial is None else {**param_state, **initial}

    def params_of(self, group: ParamGroup) -> Params:
        """Return the parameters of a group that the base updates; if they were not kept, those with a gradient."""
        if self.change.whole is not None:
            return [p for p in group["params"] if p in self.change.whole]
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

    # ---- the end

    def remove_temporaries(self) -> None:
        """Remove replaced gradients and the base's `grad_scale`, also if the update failed."""
        for chain in self.run.structure.chains:
            chain.base.__dict__.pop("grad_scale", None)
        for p in self.with_replaced_grads:
            p.grad = None

    def free_memory(self) -> None:
        """Let go of gradients and copies: a failed step's traceback, which may be kept for long, holds this object."""
        self.change = Change()
        self.postponed, self.grads_to_divide = {}, {}
        self.gradients_changed()


def _as_tensor(factor: torch.Tensor | float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a factor as a tensor: a number as float32, or as float64 for gradients of that dtype."""
    wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    return factor if isinstance(factor, torch.Tensor) else torch.tensor(factor, dtype=wide)
