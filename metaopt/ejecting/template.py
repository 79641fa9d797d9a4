"""The engine of a file that `metaopt eject` writes: one device, no checkpoints of wrappers' numbers, no logs.

`ejecting` takes this source, leaves out what a stack does not need, and adds the parts; nothing imports it.
"""

from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch

Tensors = list[torch.Tensor]


class Schedule:
    """A value over time: `curve` returns the function from the number of updates to the value."""

    def __init__(self, *positional: Any, **values: Any) -> None:
        self.positional = positional
        self.__dict__ |= values

    def resolve_steps(self, steps: Any, run: Any, span: Any, *, least: int = 1) -> Any:
        if steps is None:
            return max(1, span)
        return max(1, round(steps * run)) if isinstance(steps, float) and steps < 1.0 else int(steps)

    def curve_of(self, member: Any, run: Any, span: Any) -> Any:
        return member.curve(run, span) if hasattr(member, "curve") else lambda t: float(member)


class Part:
    """A part around the base: its hyperparameters, and the tensors (slots) that it keeps for every parameter."""

    acts_on_frozen = False

    def __init__(self, label: str, slots: Any = (), acts_every: str | None = None, **values: Any) -> None:
        self.label, self.slots, self.acts_every, self.values = label, dict(slots), acts_every, values
        self.set_values(0)

    def set_values(self, updates: int) -> None:
        """Set the hyperparameters for the next update; those that change with time are curves."""
        for name, value in self.values.items():
            setattr(self, name, value(updates) + 0.0 if callable(value) else value)

    def is_due(self, updates: int) -> bool:
        return self.acts_every is None or updates % getattr(self, self.acts_every) == 0

    def initial(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the part keeps of a parameter before its first update."""
        kept = {}
        for name, (kind, named) in self.slots.items():
            dtype = p.dtype if named is None else getattr(torch, named, torch.promote_types(p.dtype, torch.float32))
            if kind != "previous":
                copy = p.detach().to(dtype=dtype, copy=True)
                kept[f"{self.label}.{name}"] = copy.zero_() if kind == "zeros" else copy
        return kept


class elementwise:
    """A rule of elements: from a parameter's tensors and the part's numbers to what becomes of the tensors."""

    def __init__(self, function: Any) -> None:
        self.function = function.__func__
        code = self.function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.tensors, self.numbers = names[: code.co_argcount], names[code.co_argcount :]

    def __call__(self, group: Any, **numbers: Any) -> None:
        values = {name: numbers[name] if name in numbers else getattr(group, name) for name in self.numbers}
        lists = [getattr(group, "params" if name == "param" else name) for name in self.tensors]
        for tensors in zip(*lists, strict=True):
            widest = max((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
            changed = self.function(*(t.to(widest) for t in tensors), **values)
            for name, value in changed.items():
                tensors[self.tensors.index(name)].copy_(value)
            # <anchors>
            if "param" in changed:
                group.whole.move_inner_anchors(group.part, [tensors[self.tensors.index("param")]])
            # </anchors>


class Group:
    """What a part sees of one parameter group: aligned lists of parameters, gradients and kept tensors."""

    def __init__(self, whole: Any, part: Any, group: dict[str, Any], params: Tensors, updates: int) -> None:
        self.whole, self.part, self.group, self.params, self.updates = whole, part, group, params, updates

    def __getattr__(self, name: str) -> Any:
        if name not in self.part.slots:
            return getattr(self.part, name)
        # <previous>
        if self.part.slots[name][0] == "previous":
            return [self.whole.before[p] for p in self.params]
        # </previous>
        key = f"{self.part.label}.{name}"
        return [{**self.whole.state.get(p, {}), **self.whole.initial.get(p, {})}[key] for p in self.params]

    @property
    def grads(self) -> Tensors:
        self.whole.apply_factor()
        return [p.grad for p in self.params if p.grad is not None]

    @property
    def update(self) -> Tensors:
        return [self.whole.change_of(p) for p in self.params]

    @property
    def base_lr(self) -> Any:
        return self.group["lr"]

    @property
    def maximize(self) -> bool:
        return bool(self.group.get("maximize", False))

    def norms(self, tensors: Tensors, *, rows: bool = False) -> Tensors:
        dims = [list(range(1 if rows and t.dim() > 1 else 0, t.dim())) for t in tensors]
        wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
        each = zip(tensors, dims, wide, strict=True)
        return [torch.linalg.vector_norm(t, dim=dim, keepdim=rows, dtype=dtype) for t, dim, dtype in each]

    def means(self, tensors: Tensors, *, rows: bool = False) -> Tensors:
        found = []
        for t, p in zip(tensors, self.params, strict=True):
            dims = list(range(1 if rows and t.dim() > 1 else 0, t.dim()))
            wide = torch.promote_types(t.dtype, torch.float32)
            count = p.numel() // max(1, p.shape[0]) if rows and p.dim() > 1 else p.numel()
            total = t.sum(dim=dims, keepdim=rows, dtype=wide) if dims else t.to(wide)
            found.append(total / max(1, count))
        return found

    def dots(self, a: Tensors, b: Tensors) -> Tensors:
        found = []
        for x, y in zip(a, b, strict=True):
            wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
            product = torch.vdot(x.reshape(-1).to(wide), y.reshape(-1).to(wide))
            found.append(product.real if wide.is_complex else product)
        return found

    def blocks(self) -> list[Any]:
        return [self]

    def matrices(self) -> list[Any]:
        members = [p for p in self.params if p.dim() > 1]
        return [Group(self.whole, self.part, self.group, members, self.updates)] if members else []

    def rows_of(self, tensors: Tensors) -> Any:
        return Rows(self, tensors)

    def cast(self, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
        return [t.to(dtype or torch.promote_types(t.dtype, torch.float32)) for t in tensors]

    # <stacks>
    def stack(self, numbers: Tensors) -> torch.Tensor:
        return torch.stack(numbers)

    # </stacks>
    def multiply(self, tensors: Tensors, numbers: torch.Tensor) -> None:
        torch._foreach_mul_(tensors, list(numbers.unbind()))

    def add_multiples(self, tensors: Tensors, others: Tensors, numbers: torch.Tensor) -> None:
        torch._foreach_addcmul_(tensors, others, list(numbers.unbind()))

    def clear_grads(self) -> None:
        for p in self.params:
            p.grad = None

    def set_params(self, tensors: Tensors) -> None:
        torch._foreach_copy_(self.params, tensors)
        # <anchors>
        self.whole.move_inner_anchors(self.part, self.params)
        # </anchors>

    def measure(self, *ignored: Any, **too: Any) -> None:
        """Nothing is logged."""


class Rows:
    """The rows of several tensors of a group; their numbers are one tensor."""

    def __init__(self, group: Group, tensors: Tensors) -> None:
        self.group, self.tensors = group, tensors

    def norms(self) -> torch.Tensor:
        return self._joined(self.group.norms(self.tensors, rows=True))

    def means(self) -> torch.Tensor:
        return self._joined(self.group.means(self.tensors, rows=True))

    def multiply(self, numbers: torch.Tensor) -> None:
        torch._foreach_mul_(self.tensors, self._of_each(numbers))

    def subtract(self, numbers: torch.Tensor) -> None:
        torch._foreach_sub_(self.tensors, self._of_each(numbers))

    def _joined(self, numbers: Tensors) -> torch.Tensor:
        self.shapes = [n.shape for n in numbers]
        return torch.cat([n.reshape(-1) for n in numbers])

    def _of_each(self, numbers: torch.Tensor) -> Tensors:
        parts = torch.split(numbers.to(self.tensors[0].dtype), [shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Groups:
    """All groups at once, for norms and decisions that are global."""

    def __init__(self, whole: Any, part: Any) -> None:
        self.whole, self.part = whole, part

    # <iterates>
    def __iter__(self) -> Any:
        for group in self.whole.param_groups:
            yield from self.whole.views(self.part, group, [p for p in group["params"] if p.grad is not None])

    # </iterates>
    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        total, factor = total_norm([p.grad for p in self.whole._trained()], norm_type), self.whole.factor
        return total if factor is None else total * factor.abs()

    def norm_of(self, name: str) -> torch.Tensor:
        return total_norm([t for group in self for t in getattr(group, name)], 2.0)

    def scale(self, factor: Any) -> None:
        if isinstance(factor, torch.Tensor) or factor != 1.0:
            factor = factor if isinstance(factor, torch.Tensor) else torch.tensor(factor, dtype=torch.float32)
            self.whole.factor = factor if self.whole.factor is None else self.whole.factor * factor

    def skip_update(self, reason: str) -> None:
        self.whole.skipped = reason

    def set_counter(self, name: str, value: int) -> None:
        setattr(self.part, name, value)

    def measure(self, *ignored: Any, **too: Any) -> None:
        """Nothing is logged."""


class Stack(torch.optim.Optimizer):
    """A base optimizer with parts before it (on gradients and weights) and behind it (on its update and after it)."""

    def __init__(self, base: torch.optim.Optimizer, before: Any = (), behind: Any = (), schedules: Any = None) -> None:
        self.base, self.parts_before, self.parts_behind, self.schedules = base, before, behind, schedules or {}
        super().__init__(base.param_groups, base.defaults)
        for group in self.param_groups:
            group.setdefault("updates", 0)
        # <branches>
        self.is_branch = False
        self.handed: torch.Tensor | None = None
        self.share(self.param_groups, self.state)
        # </branches>
        # <single>
        base.param_groups, base.state = self.param_groups, self.state
        # </single>
        self.forget()

    # <branches>
    def share(self, groups: Any, state: Any) -> None:
        """Use these groups and this state, as the base does."""
        self.param_groups, self.state = groups, state
        # <schedules>
        for part in [*self.parts_before, *self.parts_behind]:
            part.set_values(groups[0]["updates"])
        # </schedules>
        if isinstance(self.base, Branches):
            self.base.share(groups, state)
        self.base.param_groups, self.base.state = groups, state

    # </branches>

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # <branches>
        self.share(self.param_groups, self.state)
        # </branches>
        # <single>
        self.base.param_groups, self.base.state = self.param_groups, self.state
        # <schedules>
        for part in [*self.parts_before, *self.parts_behind]:
            part.set_values(self.param_groups[0]["updates"])
        # </schedules>
        # </single>

    def forget(self) -> None:
        """Begin an update: nothing waits to be multiplied in, no weights are remembered."""
        self.factor: torch.Tensor | None = None
        # <skips>
        self.skipped: str | None = None
        # </skips>
        # kept tensors of parameters at their first update: a base begins only if the state is empty
        self.initial: dict[torch.Tensor, Any] = {}
        # <weights>
        self.before: dict[torch.Tensor, torch.Tensor] = {}
        self.change: dict[torch.Tensor, tuple[torch.Tensor, int, int]] = {}
        # </weights>

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.forget()
        # <branches>
        self.factor, self.handed = self.handed, None
        # </branches>
        count, trained = self.param_groups[0]["updates"], self._trained()
        if not trained:
            # <branches>
            if self.is_branch:
                self._end(count)
            # </branches>
            return loss
        # <slots>
        parts = [*self.parts_before, *self.parts_behind]
        for p, kept in [(p, self.state.get(p, {})) for p in trained]:
            self.initial[p] = {k: v for part in parts for k, v in part.initial(p).items() if k not in kept}
        # </slots>
        # <on_gradients>
        for part in self.parts_before:
            if hasattr(part, "on_gradients"):
                part.on_gradients(Groups(self, part))
                # <skips>
                if self.skipped:
                    return loss
                # </skips>
        # </on_gradients>
        # <before_update>
        for part in self.parts_before:
            self._call(part, "before_update", self._with_gradient, count)
        # </before_update>
        self._step_base(count)
        # <slots>
        for p in trained:
            self.state[p] |= self.initial.pop(p)
        # </slots>
        self._end(count)
        return loss

    def _end(self, count: int) -> None:
        # <branches>
        if not isinstance(self.base, Branches):  # whose stacks count
            for group in self.param_groups:
                group["updates"] += 1
        # </branches>
        # <single>
        for group in self.param_groups:
            group["updates"] += 1
        # </single>
        # <acts_behind>
        # <on_update>
        moved = False
        # </on_update>
        for part in self.parts_behind:
            if part.is_due(count + 1):
                # <on_update>
                if moved and hasattr(part, "on_update"):
                    self._change([part], count)
                    # <anchors>
                    self.move_inner_anchors(part, self._trained())
                    # </anchors>
                if hasattr(part, "after_updates"):
                    part.after_updates(Groups(self, part))
                    self._apply_written(part)
                # </on_update>
                self._call(part, "after_update", lambda group, part=part: self._updated(part, group), count + 1)
            # <on_update>
            moved = moved or hasattr(part, "after_update") or hasattr(part, "after_updates")
            # </on_update>
        # </acts_behind>
        # <schedules>
        for part in [*self.parts_before, *self.parts_behind]:
            part.set_values(count + 1)
        for group in self.param_groups:
            group |= {key: curve(count + 1) + 0.0 for key, curve in self.schedules.items()}
        # </schedules>

    def _step_base(self, count: int) -> None:
        # <on_update>
        leading = []  # the parts on the update that act before anything else has moved the weights
        for part in self.parts_behind:
            leading += [part] if hasattr(part, "on_update") else []
            if hasattr(part, "after_update") or hasattr(part, "after_updates"):
                break
        # </on_update>
        # <weights>
        if any(self._needs_weights(part) for part in self.parts_behind):
            self.before = {p: p.detach().clone() for p in self._trained()}
        # </weights>
        # <on_gradients>
        # <branches>
        if isinstance(self.base, Branches):
            self.base.factor, self.factor = self.factor, None
        # </branches>
        # <scales>
        if self.factor is not None and self._folds():
            self.base.grad_scale, self.factor = self.factor.reciprocal().to(torch.float32), None  # type: ignore[attr-defined]
        # </scales>
        self.apply_factor()
        # </on_gradients>
        self.base.step()
        # <scales>
        self.base.__dict__.pop("grad_scale", None)
        # </scales>
        # <on_update>
        due = [part for part in leading if part.is_due(count + 1)]
        if due:
            self._change(due, count)
        # </on_update>

    def _folds(self) -> bool:
        """Return whether the base's fused kernel multiplies the gradients in its own pass."""
        fits = [g.get("fused") and all(p.element_size() <= 4 for p in g["params"]) for g in self.param_groups]
        return all(fits) and self.base._step_supports_amp_scaling  # type: ignore

    def _needs_weights(self, part: Any) -> bool:
        kinds = [kind for kind, _ in part.slots.values()]
        return "previous" in kinds or hasattr(part, "on_update") or hasattr(part, "after_updates")

    def apply_factor(self) -> None:
        """Multiply the gradients by the factor that they wait for."""
        if self.factor is not None:
            torch._foreach_mul_([p.grad for p in self._trained() if p.grad is not None], self.factor)
            self.factor = None

    def change_of(self, p: torch.Tensor) -> torch.Tensor:
        """Return what was added to a parameter, at least float32."""
        held = self.change.get(p)
        if held is None or held[2] != p._version:
            wide = torch.promote_types(p.dtype, torch.float32)
            change = torch.sub(p.detach().to(wide), self.before[p], out=torch.empty_like(p, dtype=wide))
            held = self.change[p] = (change, change._version, p._version)
        return held[0]

    def _change(self, parts: Any, count: int) -> None:
        """Let parts change what is added to the weights, and add it."""
        members = self._trained()
        for p in members:
            change = self.change_of(p)
            p.copy_(self.before[p])
            self.change[p] = (change, change._version, p._version)
        for part in parts:
            self._call(part, "on_update", self._with_gradient, count)
        self._add(members)

    def _add(self, members: Tensors) -> None:
        torch._foreach_add_(members, [self.change[p][0] for p in members])
        for p in members:
            change = self.change[p][0]
            self.change[p] = (change, change._version, p._version)

    def _apply_written(self, part: Any) -> None:
        """Add the changes that a part has written to, in the place of what was added."""
        written = [p for p in self._trained() if p in self.change and self.change[p][0]._version != self.change[p][1]]
        for p in written:
            p.copy_(self.before[p])
        if written:
            self._add(written)
            # <anchors>
            self.move_inner_anchors(part, written)
            # </anchors>

    def move_inner_anchors(self, part: Any, members: Tensors) -> None:
        """Set the anchors of parts nearer the base to the weights that this part has moved."""
        order = [*self.parts_before, *self.parts_behind]
        for inner in order[: order.index(part)]:
            for key in [f"{inner.label}.{n}" for n, (kind, _) in inner.slots.items() if kind == "anchor"]:
                for p in members:
                    if key in self.state[p]:
                        self.state[p][key].copy_(p)

    def _with_gradient(self, group: dict[str, Any]) -> Tensors:
        return [p for p in group["params"] if p.grad is not None]

    def _trained(self) -> Tensors:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _updated(self, part: Any, group: dict[str, Any]) -> Tensors:
        """Return the parameters that have been updated and are not frozen."""
        keys = [f"{part.label}.{name}" for name, (kind, _) in part.slots.items() if kind != "previous"]
        # <previous>
        if len(keys) < len(part.slots):
            return [p for p in self._with_gradient(group) if all(key in self.state[p] for key in keys)]
        # </previous>
        begun = [p for p in group["params"] if (p in self.state if keys else p in self.state or p.grad is not None)]
        found = [p for p in begun if all(key in self.state[p] for key in keys)]
        return [p for p in found if part.acts_on_frozen or p.requires_grad or p.grad is not None]

    def views(self, part: Any, group: dict[str, Any], members: Tensors, updates: int | None = None) -> list[Group]:
        """Return the parameters by dtype and device."""
        kinds: dict[Any, Tensors] = {}
        for p in members:
            kinds.setdefault((p.dtype, p.device), []).append(p)
        updates = group["updates"] if updates is None else updates
        return [Group(self, part, group, alike, updates) for alike in kinds.values()]

    def _call(self, part: Any, hook: str, members: Any, updates: int) -> None:
        if hasattr(part, hook):
            for group in self.param_groups:
                for view in self.views(part, group, members(group), updates):
                    getattr(part, hook)(view)

    # <averaged>
    @contextmanager
    def averaged(self, label: str) -> Any:
        """Let the parameters hold the average of the part with this label."""
        # <single>
        kept = [(self, part, group) for part in self.parts_behind if part.label == label for group in self.param_groups]
        # </single>
        # <branches>
        stacks = [self, *(self.base.stacks if isinstance(self.base, Branches) else [])]
        parts = [(stack, part) for stack in stacks for part in stack.parts_behind if part.label == label]
        kept = [(stack, part, group) for stack, part in parts for group in stack.param_groups]
        # </branches>
        if not kept:
            raise ValueError(f"no part of the optimizer is called {label}")
        own = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]
        for stack, part, group in kept:
            for view in stack.views(part, group, stack._updated(part, group)):
                torch._foreach_copy_([p.detach() for p in view.params], part.averaged(view))
        try:
            yield
        finally:
            for p, weights in own:
                p.detach().copy_(weights)

    # </averaged>


class Branches(torch.optim.Optimizer):
    """Several stacks as one base, each over the parameters that a pattern chooses."""

    def __init__(self, stacks: list[Stack]) -> None:
        self.stacks = stacks
        self.factor: torch.Tensor | None = None
        for stack in stacks:
            stack.is_branch = True
        super().__init__([group for stack in stacks for group in stack.param_groups], {})

    def share(self, groups: Any, state: Any) -> None:
        """Give each stack its groups, and all of them one state."""
        for position, stack in enumerate(self.stacks):
            stack.share(groups[position : position + 1], state)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for stack in self.stacks:
            stack.handed = self.factor
            stack.step()
        self.factor = None


def chosen(params: Any, patterns: list[str]) -> list[Tensors]:
    """Return the parameters of each pattern: a glob on the name, a number of dimensions, or both, joined by &."""
    dimensions = {"scalar": 0, "vector": 1, "matrix": 2}
    found: list[Tensors] = [[] for _ in patterns]
    for name, p in params:
        for pattern, members in zip(patterns, found, strict=True):
            terms = [term.strip() for term in pattern.split("&")]
            if all(dimensions[t] == p.dim() if t in dimensions else fnmatchcase(name, t) for t in terms):
                members.append(p)
                break
        else:
            raise ValueError(f"no pattern matches {name}: give named parameters that one of {patterns} matches")
    return found


def total_norm(tensors: Tensors, p: float) -> torch.Tensor:
    """Return the p-norm over all tensors; on a processor many small ones are taken together, large ones by rows."""
    kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
    if len(kinds) > 1:
        parts = [total_norm([t for t in tensors if (t.dtype, t.device) == kind], p) for kind in kinds]
        return torch.linalg.vector_norm(torch.stack([n.to(tensors[0].device) for n in parts]), p)  # type: ignore
    # many small tensors as one, large ones by rows: a processor then uses all its threads, and the sum is more exact
    on_cpu = tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.float32, torch.float64)
    norms, small = [], [t for t in tensors if on_cpu and p in (1.0, 2.0) and t.numel() <= 1024]
    if len(small) >= 64:
        step, tensors = 65536 // max(1, *map(torch.numel, small)), [t for t in tensors if t.numel() > 1024]
        parts = [torch.cat([t.flatten() for t in small[i : i + step]]) for i in range(0, len(small), step)]
        norms = [torch.stack([torch.linalg.vector_norm(x, p, dtype=torch.float64) for x in parts]).to(small[0].dtype)]
    by_rows = [on_cpu and t.numel() >= 65536 and t.numel() % 64 == 0 and t.is_contiguous() for t in tensors]
    norms += [torch.linalg.vector_norm(t.view(64, -1), p, dim=1) for t, by in zip(tensors, by_rows, strict=True) if by]
    others = [t for t, by in zip(tensors, by_rows, strict=True) if not by]
    wide = torch.float32 if others and others[0].dtype in (torch.float16, torch.bfloat16) else None  # they end at 65504
    norms += [torch.stack(torch._foreach_norm(others, p, wide))] if others else []
    return torch.linalg.vector_norm(torch.cat(norms), p)  # type: ignore
