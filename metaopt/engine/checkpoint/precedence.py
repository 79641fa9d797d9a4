"""Whose values are in force after a load: the checkpoint's, this stack's or its schedules'; works on copies.

The rule, for each hyperparameter of each group: a scheduled value follows this stack's schedule at the loaded count;
what decides which state there is stays this stack's; every other value is the checkpoint's, or this stack's with
keep="live". If the groups are others than the checkpoint's, that holds for values that all groups share; what a group
sets for itself is this stack's.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from metaopt.engine.chain import PART, RUN_FLAGS, ParamGroup
from metaopt.engine.checkpoint.matching import Matched
from metaopt.engine.checkpoint.report import Choice, Difference, LoadReport
from metaopt.engine.param_state.scratch import scratch_step
from metaopt.engine.run.entries import (
    AVERAGE_SHOWN,
    BUILT_LR,
    FORMAT,
    FORMAT_KEY,
    LABELS,
    OWN_SCHEDULES,
    TEMPLATE,
    TOTAL_STEPS,
    UPDATES,
)
from metaopt.engine.run.run import Run
from metaopt.errors import CheckpointError, HyperparameterError
from metaopt.scheduled_values import LR_SCALE, ScheduledValues
from metaopt.wrapper import Wrapper

# where a bare optimizer counts its updates, in state[p] or in a group, and its count after the first
Counts = Mapping[tuple[Literal["state", "group"], str], int]
COUNTS_OF_MOST: Counts = {("state", "step"): 1, ("group", "step"): 1}


def count_of(
    groups: list[ParamGroup], state: Mapping[Any, Any], first: Counts = COUNTS_OF_MOST
) -> tuple[int, Literal["checkpoint", "base", "nowhere"]]:
    """Return how many updates were made, and who says so; "nowhere" is 0."""
    own = [group[UPDATES] for group in groups if UPDATES in group]
    if own:
        return own[0], "checkpoint"
    held = [param_state for param_state in state.values() if isinstance(param_state, Mapping)]
    known = []
    for (where, key), one in first.items():
        for entries in held if where == "state" else groups:
            number = _whole(entries.get(key))
            if number is not None:
                known.append(max(0, number - one + 1))
    # a parameter whose first gradient came later has fewer
    return (max(known), "base") if known else (0, "nowhere")


def counts_of_bases(run: Run) -> Counts:
    """Return where the bases of a run count, as a step of a new one over a small parameter shows."""
    found: dict[tuple[Literal["state", "group"], str], int] = {}
    for chain in run.structure.chains:
        group = next((g for g in run.param_groups if chain.has_group(g) and g["params"]), None)
        if group is None:
            continue
        p = group["params"][0]
        small = torch.zeros([2] * p.dim(), dtype=p.dtype, device=p.device)
        try:
            state, made, changed = scratch_step(chain, group, small, gradient=1.0)
        except Exception:  # a class from elsewhere may want more than one parameter
            found |= COUNTS_OF_MOST
            continue
        counted: dict[tuple[Literal["state", "group"], str], Any] = {("state", "step"): state.get("step")}
        counted |= {("group", key): made[key] for key in ("step", "k") if key in changed}
        # an entry that is there after the first step, and 0, counts something else
        found |= {place: number for place, value in counted.items() if (number := _whole(value))}
    return found


def _whole(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 else None
    number = not isinstance(value, bool) and isinstance(value, int | float)
    return round(value) if number and 0 <= value < float("inf") else None


# group entries that say what the group is in this stack
OF_THIS_STACK = (OWN_SCHEDULES, PART, "metaopt.undecayed")


def merged_groups(run: Run, found: Matched, choice: Choice, report: LoadReport) -> list[ParamGroup]:
    """Return the groups to load, with the values that are to be in force; the report gets what differs."""
    merged = []
    dropped = tuple(f"{label}." for label in report.dropped)
    for position, group in enumerate(run.param_groups):
        merge = _Merge(run, found, position, choice, report)
        saved = {k: v for k, v in merge.saved().items() if not belongs(k, dropped)}
        kept = merge.settings(saved)
        for key, initial in merge.chain.counters.items():
            kept.setdefault(key, next((g[key] for g in found.groups if key in g), initial))
        for key, (_, scalar) in merge.chain.scalars.items():
            if scalar.per == "run":
                kept[key] = merge.saved_groups_of_chain()[0].get(key)
            _keep_scalar(kept, key, group[key], scalar.initial)
        for key in (*RUN_FLAGS, *OF_THIS_STACK):
            if key in group:
                kept[key] = group[key]
            else:
                kept.pop(key, None)
        for key in ("name", "param_names"):
            if key in group:
                kept[key] = group[key]
        first = found.groups[0]
        kept |= {
            "params": found.ids[position],
            UPDATES: report.updates,
            AVERAGE_SHOWN: first.get(AVERAGE_SHOWN, ""),
            TEMPLATE: kept.get(TEMPLATE, first.get(TEMPLATE, "")),
            FORMAT_KEY: FORMAT,
            TOTAL_STEPS: group[TOTAL_STEPS],
            LABELS: group[LABELS],
        }
        merge.report_schedules(saved, kept)
        merged.append(kept)
    return merged


class _Merge:
    """One live group and what the checkpoint has for it."""

    def __init__(self, run: Run, found: Matched, position: int, choice: Choice, report: LoadReport) -> None:
        self.run, self.found, self.choice, self.report = run, found, choice, report
        self.group = run.param_groups[position]
        self.chain = run.structure.chain_of(self.group)
        self.schedules = run.schedules_of(self.group)
        self.is_same_group = found.is_same_group(position)
        self.sources = [found.groups[source] for source in found.sources[position]]
        own = self.chain.constructor_names & self.group.keys()
        # what a user sets; everything else in a group is state
        self.keys = ((own | {"lr"}) & self.group.keys()) - RUN_FLAGS | self.chain.hyperparameters.keys()

    def saved(self) -> ParamGroup:
        """Return what the checkpoint has for the group: its own group, or what the groups that it comes from share."""
        if self.is_same_group:
            return dict(self.sources[0])
        settings = self.keys | {LR_SCALE}
        kept = {k: v for k, v in self.chain.base.defaults.items() if k not in settings and k not in RUN_FLAGS}
        for key in {k for group in self.sources for k in group} - settings:
            values = [group[key] for group in self.sources if key in group]
            if all(same(value, values[0]) for value in values):
                kept[key] = values[0]
            elif key in self.chain.scalars:
                self.report.fresh += [key] if key not in self.report.fresh else []
            elif key in self.chain.base.defaults:
                raise CheckpointError(
                    f"the checkpoint's groups have different {key}, which is state of "
                    f"{type(self.chain.base).__name__}: the parameters of such groups cannot be put into one"
                )
        for key in settings:
            ours = [g[key] for g in self.chain.groups_in(self.run.param_groups) if key in g]
            theirs = [g[key] for g in self.saved_groups_of_chain() if key in g]
            if theirs and all(same(a, side[0]) for side in (ours, theirs) for a in side):
                kept[key] = theirs[0]
        return kept

    def saved_groups_of_chain(self) -> list[ParamGroup]:
        part = self.group.get(PART)
        return [group for group in self.found.groups if part is None or group.get(PART, part) == part]

    def settings(self, saved: ParamGroup) -> ParamGroup:
        """Return the saved entries with the hyperparameters that are to be in force."""
        kept = dict(saved)
        for key in sorted(self.keys):
            kept[key] = self._value(key, saved)
        self._scale(kept, saved)
        return kept

    def _value(self, key: str, saved: ParamGroup) -> Any:
        live = self.group[key]
        wrapper, name = self.chain.hyperparameters.get(key, (None, key))
        # a scheduled value is computed anew; a warm-up may begin at a value that a constant must not have
        if key in self.schedules or (wrapper is not None and wrapper.label in self.report.fresh):
            return live
        if key not in saved:  # an older version of the base, or groups that were taken apart
            for value in [group[key] for group in self.sources if key in group]:
                if not same(value, live):
                    self._report(key, value, live, "stack")
            return live
        value = saved[key] if wrapper is None else _validated(wrapper, name, saved[key])
        differs = _rates_differ(self.group, saved) if key == "lr" else not same(value, live)
        if wrapper is not None and wrapper.hyperparameters[name].defines_state:
            if differs:
                self._report(key, value, live, "stack")
            return live
        if _is_cycled(saved, key):
            return value
        # a torch scheduler goes on from the rate that it left
        own = self.choice.keep == "live" and not (key == "lr" and "initial_lr" in self.group and "initial_lr" in saved)
        if differs:
            self._report(key, value, live, "stack" if own else "checkpoint")
        return live if own else value

    def _scale(self, kept: ParamGroup, saved: ParamGroup) -> None:
        """Decide on the group's factor of the rate, and the rate that it was built with, which go with the rate."""
        live = self.group[LR_SCALE]
        own_rate = "lr" in self.schedules or kept.get("lr") is self.group.get("lr")
        kept[BUILT_LR] = self.group[BUILT_LR] if own_rate else _as_built(saved)
        if LR_SCALE not in saved:
            # the checkpoint of a bare optimizer: its rate holds the factor already, a schedule's does not
            kept[LR_SCALE] = live if own_rate else 1.0
            return
        own = self.choice.keep == "live"
        kept[LR_SCALE] = live if own else saved[LR_SCALE]
        if not same(live, saved[LR_SCALE]):
            self._report("lr_scale", saved[LR_SCALE], live, "stack" if own else "checkpoint")

    def report_schedules(self, saved: ParamGroup, kept: ParamGroup) -> None:
        """Report scheduled values that are not those with which the checkpoint would have gone on."""
        values = ScheduledValues(self.schedules, self.run.structure.total_steps)
        for key in self.schedules:
            label = key.partition(".")[0]
            theirs = [saved[key]] if key in saved else [group[key] for group in self.sources if key in group]
            if not theirs or (key in self.chain.hyperparameters and label in self.report.fresh):
                continue
            value = values.value(key, kept[UPDATES], kept)
            if not any(same(value, other) for other in theirs):
                self._report(key, theirs[0], value, "schedule")

    def _report(self, key: str, saved: Any, live: Any, taken: Any) -> None:
        self.report.add(Difference(key, saved, live, taken))


def _rates_differ(group: ParamGroup, saved: ParamGroup) -> bool:
    """Return whether the groups were built with different rates, or user code has changed this stack's rate since.

    Rates that were built equal and differ now because the saved run changed its own are no difference in settings.
    """
    if not same(_as_built(saved), _as_built(group)):
        return not same(saved["lr"], group["lr"])
    is_driven = "initial_lr" in group
    return not is_driven and not same(group["lr"], _as_built(group)) and not same(group["lr"], saved["lr"])


def _as_built(group: ParamGroup) -> Any:
    """Return the rate that a group was built with; of a bare optimizer's what it was before a torch scheduler."""
    built = group.get(BUILT_LR, group.get("initial_lr"))
    return group.get("lr") if built is None else built


def _is_cycled(saved: ParamGroup, key: str) -> bool:
    """Return whether torch's OneCycleLR or CyclicLR drives the momentum."""
    return key in ("momentum", "betas") and "max_momentum" in saved


def same(a: Any, b: Any) -> bool:
    """Return whether two values of a hyperparameter are the same; a tensor has fewer digits than a number."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        a, b = (x.detach().double().cpu() if isinstance(x, torch.Tensor) else x for x in (a, b))
        try:
            a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
            # a history is filled with NaN at first
            return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=0.0, equal_nan=True)
        except (TypeError, ValueError, RuntimeError):
            return False
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= 1e-9 * abs(a)
    return bool(a == b)


def belongs(key: Any, prefixes: tuple[str, ...]) -> bool:
    """Return whether a key belongs to one of some labels."""
    return isinstance(key, str) and key.startswith(prefixes) if prefixes else False


def _keep_scalar(kept: ParamGroup, key: str, live: torch.Tensor, initial: float) -> None:
    """Take a scalar from the checkpoint in the live one's dtype; a part that starts fresh begins with a new one."""
    saved = kept.get(key)
    if saved is None:
        kept[key] = torch.full_like(live, initial)
    elif not isinstance(saved, torch.Tensor) or saved.shape != live.shape:
        shape = tuple(saved.shape) if isinstance(saved, torch.Tensor) else type(saved).__name__
        raise CheckpointError(f"the checkpoint's {key} is {shape}, expected a tensor of shape {tuple(live.shape)}")
    else:
        kept[key] = saved.detach().to(device=live.device, dtype=live.dtype, copy=True)


def _validated(wrapper: Wrapper, name: str, value: Any) -> Any:
    try:
        return wrapper.hyperparameters[name].validate(value, where=f"the checkpoint's {wrapper.label}")
    except HyperparameterError as error:
        raise CheckpointError(str(error)) from error
