"""Update: everything that exists for one `step()` and not longer. It ends with the step, also with one that fails."""

import math
from collections.abc import Callable
from functools import partial
from itertools import repeat
from operator import is_not
from typing import Any

import torch

from metaopt.distributed.shards import dense, local
from metaopt.engine.chain import Chain, ParamGroup, ParamState
from metaopt.engine.fused import Waiting
from metaopt.engine.run import UPDATES, Run
from metaopt.errors import StepError
from metaopt.wrapper import Closure, Wrapper

# gradients wider than this many bytes are not scaled by a fused kernel: its factor is float32
WIDEST_FOLDED = 4

# elements that a processor's cache holds together with their state
CPU_BLOCK = 1 << 19
# larger blocks on accelerators: few launches, bounded temporary memory
DEVICE_BLOCK = 1 << 25

Members = list[torch.Tensor]


class Update:
    """One update of a run: what waits to be multiplied in, what is not in the state yet, what the weights were before.

    `averaged()` outside a step uses one in which nothing is pending.
    """

    __slots__ = (
        "applied",
        "before",
        "change",
        "change_buffers",
        "count",
        "counters",
        "draws",
        "gathered",
        "gathers",
        "initial",
        "is_logged",
        "members",
        "names",
        "observed",
        "observing",
        "parked",
        "replaced",
        "rewound",
        "run",
        "scale",
        "skip_reason",
        "step_weight",
        "storage",
        "undivided",
        "waiting",
    )  # fmt: skip

    def __init__(self, run: Run, *, is_logged: bool = False) -> None:
        self.run = run
        self.is_logged = is_logged
        self.count: int = run.param_groups[0][UPDATES]  # of the updates before this one
        # why a wrapper wants no update
        self.skip_reason: str | None = None
        # by group and key: counters before this update changed them
        self.counters: list[tuple[ParamGroup, str, Any]] = []
        # the step is kept for a later update
        self.gathers = False
        # by chain: the factor that gradients still wait for
        self.scale: dict[Chain, torch.Tensor | float] = {}
        # wrappers' state of parameters at their first update, until the base has begun them
        self.initial: dict[torch.Tensor, ParamState] = {}
        # wrappers' entries taken out of `state[p]` while the base begins
        self.parked: dict[torch.Tensor, ParamState] = {}
        # by group: the parameters that have a gradient, and these gradients, until somebody changes them
        self.gathered: dict[int, tuple[Members, list[torch.Tensor]]] = {}
        # by group: the parameters that the base updates
        self.members: dict[int, Members] = {}
        # parameters whose gradient a wrapper has replaced until the end of the step
        self.replaced: Members = []
        # local weights from right before the base's update, and what is added to them
        self.before: dict[torch.Tensor, torch.Tensor] = {}
        self.change: dict[torch.Tensor, torch.Tensor] = {}
        # memory for the change of a block, and what it is cut from
        self.change_buffers: dict[torch.Tensor, torch.Tensor] = {}
        self.storage: dict[object, torch.Tensor] = {}
        # parameters that hold the weights from before, and whose change is yet to be added
        self.rewound: set[torch.Tensor] = set()
        # copies of the weights from before for parts that only look, which later become the change of the weights
        self.observed: dict[torch.Tensor, torch.Tensor] = {}
        self.observing = False
        # versions of change and weights when the weights were last set to their sum
        self.applied: dict[torch.Tensor, tuple[int, int]] = {}
        # by group: what the base has yet to do to it, with the rules of wrappers behind it
        self.waiting: dict[int, Waiting] = {}
        self.undivided: dict[int, Waiting] = {}
        # how often a wrapper has drawn random numbers for a parameter
        self.draws: dict[object, int] = {}
        self.names: dict[torch.Tensor, str] | None = None
        self.step_weight: float | torch.Tensor = 1.0

    def state_of(self, p: torch.Tensor) -> ParamState:
        """Return what wrappers may see of a parameter's state, including what is yet to be stored."""
        param_state: ParamState = self.run.state.get(p, {})
        initial = self.initial.get(p)
        return param_state if initial is None else {**param_state, **initial}

    def members_of(self, group: ParamGroup) -> Members:
        """Return the parameters of a group that the base updates; until it does, those with a gradient."""
        if self.observing:
            return [p for p in group["params"] if p in self.observed]
        members = self.members.get(id(group))
        return self.gather(group)[0] if members is None else members

    def gather(self, group: ParamGroup) -> tuple[Members, list[torch.Tensor]]:
        """Return the parameters of a group that have a gradient, and these gradients: looked up once in an update."""
        found = self.gathered.get(id(group))
        if found is None:
            members, gradients = group["params"], [p.grad for p in group["params"]]
            if not all(map(is_not, gradients, repeat(None))):
                members = [p for p, g in zip(members, gradients, strict=True) if g is not None]
                gradients = [g for g in gradients if g is not None]
            found = self.gathered[id(group)] = members, gradients
        return found

    def gradients_changed(self) -> None:
        """Look the gradients up again when they are next needed: some were made, replaced or taken away."""
        self.gathered.clear()

    def make_waiting(self) -> None:
        """Make the updates that wait: somebody looks at weights, gradients or state."""
        if self.waiting:
            waiting, self.waiting = self.waiting, {}
            for key, each in waiting.items():
                each.make()
                if each.scale is not None:
                    self.undivided[key] = each

    def divide_gradients(self, group: ParamGroup) -> None:
        """Divide gradients by what the base has divided them by only for itself."""
        waiting = self.undivided.pop(id(group), None)
        if waiting is not None:
            torch._foreach_div_(waiting.gradients, waiting.scale)

    # ---- the factor that gradients wait for

    def add_scale(self, chain: Chain, factor: torch.Tensor | float) -> None:
        """Have the gradients of a chain multiplied by a factor before anyone uses them; the number 1 costs nothing."""
        if isinstance(factor, torch.Tensor) or factor != 1.0:
            waiting = self.scale.get(chain)
            self.scale[chain] = factor if waiting is None else _as_tensor(waiting) * factor

    def apply_scale(self, chain: Chain) -> None:
        """Multiply a chain's gradients by the factor that they wait for, once."""
        factor = self.scale.pop(chain, None)
        if factor is None:
            return
        gradients: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for group in chain.groups_in(self.run.param_groups):
            for p, gradient in zip(*self.gather(group), strict=True):
                gradients.setdefault((p.device, gradient.dtype), []).append(dense(local(gradient)))
        for (device, dtype), tensors in gradients.items():
            torch._foreach_mul_(tensors, _as_tensor(factor, dtype).to(device))

    def fold_scale(self, chain: Chain) -> None:
        """Hand a chain's factor to the base's fused kernel if it can take it; otherwise multiply now.

        Decided at each update: a loaded checkpoint or a client may have changed how a group runs.
        """
        if chain not in self.scale:
            return
        groups = chain.groups_in(self.run.param_groups)
        foldable = (
            getattr(chain.base, "_step_supports_amp_scaling", False)
            and not chain.needs_closure
            and all(group.get("fused") for group in groups)
            and all(p.element_size() <= WIDEST_FOLDED for group in groups for p in group["params"])
        )
        if not foldable:
            self.apply_scale(chain)
            return
        # the kernel divides by it in its own pass
        chain.base.grad_scale = _as_tensor(self.scale.pop(chain)).reciprocal().to(torch.float32)  # type: ignore[attr-defined]

    # ---- the change of the weights

    def keep_weights(self, members: Members) -> None:
        """Copy the weights of some parameters, right before the base moves them."""
        for p in members:
            self.before[p] = local(p).clone()

    def keep_observed(self) -> None:
        """Copy the weights of all parameters that are updated, for parts that only look."""
        for group in self.run.param_groups:
            for p in self.members_of(group):
                self.observed[p] = local(p).clone()

    def begin_observing(self) -> None:
        """Let parts that only look see all that was added to the weights."""
        self.observing = True
        for p, before in self.observed.items():
            weights = local(p)
            wide = torch.promote_types(weights.dtype, torch.float32)
            out = before if wide == weights.dtype else torch.empty_like(weights, dtype=wide)
            self.observed[p] = torch.sub(weights.to(wide), before, out=out)

    def keep_block(self, members: Members) -> None:
        """Copy the weights of a block of parameters into memory that the next block uses again.

        Fresh memory would cost a processor more time than the arithmetic: the system clears every page of it.
        """
        for part in _alike(members):
            weights = [local(p) for p in part]
            before, change = (self._buffers(role, weights) for role in ("before", "change"))
            torch._foreach_copy_(before, weights)
            self.before.update(zip(part, before, strict=True))
            self.change_buffers.update(zip(part, change, strict=True))

    def change_from_weights(self, members: Members) -> list[torch.Tensor]:
        """Return copies of the weights of a block, which the base is to move in their place; see `propose`."""
        copies = self._buffers("change", members)
        torch._foreach_copy_(copies, members)
        return copies

    def propose(self, members: Members, copies: list[torch.Tensor]) -> None:
        """Take what the base has added to copies of the weights as the change; the weights themselves stand still."""
        torch._foreach_sub_(copies, members)
        self.before.update(zip(members, members, strict=True))
        self.change.update(zip(members, copies, strict=True))
        self.rewound.update(members)

    def _buffers(self, role: str, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors of the weights' shapes in memory of this update; those of a change are at least float32."""
        dtype = weights[0].dtype if role == "before" else torch.promote_types(weights[0].dtype, torch.float32)
        key, sizes = (role, weights[0].dtype, weights[0].device), [w.numel() for w in weights]
        storage = self.storage.get(key)
        if storage is None or storage.numel() < sum(sizes):
            storage = self.storage[key] = torch.empty(sum(sizes), dtype=dtype, device=weights[0].device)
        pieces = torch.split(storage[: sum(sizes)], sizes)
        return [piece.view(w.shape) for piece, w in zip(pieces, weights, strict=True)]

    def change_of(self, p: torch.Tensor) -> torch.Tensor:
        """Return what was added to a parameter so far, at least float32; `apply_change` counts changes of it."""
        if p in self.rewound:
            return self.change[p]
        weights, change = local(p), self.change.get(p)
        if change is None or self.applied.get(p, (0, -1))[1] != weights._version:
            before, buffer = self.before[p], self.change_buffers.pop(p, None)
            wide = torch.promote_types(weights.dtype, torch.float32)
            if buffer is None:
                buffer = torch.empty_like(weights, dtype=wide)
            change = self.change[p] = torch.sub(weights.to(wide), before, out=buffer)
            self.applied[p] = change._version, weights._version
        return change

    def rewind_weights(self, members: Members) -> None:
        """Give the parameters their weights from before the update; `change` holds what is to be added."""
        for p in members:
            if p not in self.rewound:
                self.change_of(p)
                local(p).copy_(self.before[p])
                self.rewound.add(p)

    def apply_change(self, members: Members) -> None:
        """Set the parameters to the weights before plus the change, rounded once."""
        if members:
            torch._foreach_add_([local(p) for p in members], [self.change[p] for p in members])
        for p in members:
            weights, change = local(p), self.change[p]
            self.rewound.discard(p)
            self.applied[p] = change._version, weights._version

    def apply_changed(self, members: Members) -> Members:
        """Set those parameters to the weights before plus the change whose change a wrapper has written to."""
        written = [p for p in members if p in self.change and self.change[p]._version != self.applied[p][0]]
        for p in written:
            local(p).copy_(self.before[p])
        self.apply_change(written)
        return written

    def drop_weights(self, members: Members) -> None:
        """Forget the weights before and the change of some parameters."""
        for p in members:
            self.before.pop(p, None)
            self.change_buffers.pop(p, None)
            self.change.pop(p, None)
            self.applied.pop(p, None)

    # ---- the end

    def take_back(self) -> None:
        """Remove gradients that wrappers put in, and the base's `grad_scale`, whether or not the update was made."""
        for chain in self.run.structure.chains:
            chain.base.__dict__.pop("grad_scale", None)
        for p in self.replaced:
            p.grad = None


class Evaluation:
    """The closure of one `step()`: evaluated once before the base, its loss then handed to the base.

    It is evaluated again only if the base asks for that (L-BFGS). `update` is None if no update is due.
    """

    def __init__(self, update: Update, closure: Closure | None, filter_gradients: Callable[[Update], None]) -> None:
        self.run = update.run
        self._filter_gradients = filter_gradients
        self.update: Update | None = update
        self.loss: Any = None
        self._closure = closure
        self._handed_over = True
        self._versions: list[int] | None = None

    def evaluate(self, around: Callable[[Wrapper, Closure], Any]) -> None:
        """Evaluate the loss (None without a closure); `around` calls a wrapper that owns the evaluation."""
        structure = self.run.structure
        if self._closure is None and structure.needs_closure:
            raise StepError(f"{type(self.run.base).__name__} evaluates the loss itself: call step(closure)")
        if self._closure is None and structure.around:
            raise StepError(
                f"{structure.around[0].label} evaluates the loss itself: call step(closure), "
                f"with a closure that clears the gradients, computes the loss, calls backward() and returns the loss; "
                f"GradScaler.step() cannot hand one over: train in bfloat16, without it"
            )
        if self._closure is None:
            return
        evaluate: Closure = self.with_gradients
        for wrapper in reversed(structure.around):  # the first one outermost
            evaluate = partial(around, wrapper, evaluate)
        self.loss = evaluate()
        self._handed_over = False
        if structure.needs_closure:
            self._versions = self._parameter_versions()

    def closure_for_base(self) -> tuple[Closure, ...]:
        """Return what the base's step is called with; several bases share the one evaluation."""
        return () if self._closure is None or len(self.run.structure.chains) > 1 else (self.replay,)

    def replay(self) -> Any:
        """Give the base the first evaluation, and a new one if it has moved the parameters or asks again."""
        if self.run.structure.needs_closure:
            versions, self._versions = self._versions, None
            if versions is None or versions != self._parameter_versions():
                return self._reevaluate()
        elif self._handed_over:
            return self._reevaluate()
        self._handed_over = True
        return self.loss

    def _reevaluate(self) -> Any:
        assert self.update is not None
        loss = self.with_gradients()
        self._filter_gradients(self.update)
        for chain in list(self.update.scale):
            self.update.apply_scale(chain)
        return loss

    def with_gradients(self) -> Any:
        """Call the closure with gradients enabled."""
        assert self._closure is not None
        try:
            with torch.enable_grad():
                return self._closure()
        finally:
            if self.update is not None:
                self.update.gradients_changed()

    def _parameter_versions(self) -> list[int]:
        return [p._version for group in self.run.param_groups for p in group["params"]]


def _as_tensor(factor: torch.Tensor | float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a factor as a tensor: a number as float32, or as float64 for gradients of that dtype."""
    wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    return factor if isinstance(factor, torch.Tensor) else torch.tensor(factor, dtype=wide)


def _alike(members: Members) -> list[Members]:
    """Return the parameters in lists of one dtype and device each."""
    lists: dict[tuple[torch.dtype, torch.device], Members] = {}
    for p in members:
        lists.setdefault((p.dtype, p.device), []).append(p)
    return list(lists.values())


def block_size(members: Members) -> int:
    """Return how many elements to work on at a time: what a processor's cache holds, or costs little device memory."""
    return CPU_BLOCK if members and members[0].device.type == "cpu" else DEVICE_BLOCK


def blocks_of(members: Members, most: int | None = None) -> list[Members]:
    """Return the parameters in blocks of at most so many elements together; a larger one is a block of its own."""
    most = most or block_size(members)
    blocks: list[Members] = []
    filled = math.inf
    for p in members:
        size = local(p).numel()
        if filled + size > most:
            blocks.append([])
            filled = 0
        blocks[-1].append(p)
        filled += size
    return blocks
