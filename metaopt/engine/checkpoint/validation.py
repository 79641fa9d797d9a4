"""What a load refuses before anything of it is applied: another model, base or run. Steps scratch bases to see."""

from collections.abc import Mapping
from typing import Any

import torch

from metaopt.engine.chain import PART, RUN_FLAGS, Chain, ParamGroup, ParamState
from metaopt.engine.checkpoint.matching import Matched
from metaopt.engine.checkpoint.report import Choice
from metaopt.engine.param_state.scratch import scratch_step
from metaopt.engine.run.entries import AVERAGE_SHOWN, FORMAT, FORMAT_KEY, TOTAL_STEPS, UPDATES
from metaopt.engine.run.run import Run
from metaopt.errors import CheckpointError
from metaopt.slots import Slot

# points at which the schedules of two lengths are compared
SAMPLES = 1000


def validate_form(state_dict: Any) -> None:
    """Raise CheckpointError for what is not an optimizer's state dict, or one of a later format."""
    form = "an optimizer's state dict has 'state', a dict, and 'param_groups', a list of dicts with 'params'"
    for key in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise CheckpointError(f"the checkpoint has no {key!r}: {form}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the checkpoint's 'state' is a {type(state).__name__}: {form}")
    if not isinstance(groups, list | tuple):
        raise CheckpointError(f"the checkpoint's 'param_groups' is a {type(groups).__name__}: {form}")
    for position, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise CheckpointError(f"the checkpoint's group {position} has no 'params': {form}")
        written = group.get(FORMAT_KEY, 1)
        if not isinstance(written, int) or written > FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {written!r}, and this version of metaopt reads formats up to {FORMAT}: "
                f"install the version that wrote it, or a later one"
            )


def validate_fit(run: Run, found: Matched, choice: Choice, count: int) -> None:
    """Raise CheckpointError for the checkpoint of another model, another base or another run."""
    for position, group in enumerate(run.param_groups):
        chain = run.structure.chain_of(group)
        for source in found.sources[position]:
            _validate_base_keys(chain, found.groups[source], group, source)
            _validate_part(found.groups[source], group, source)
        if chain.needs_closure and not found.is_same_order:
            raise CheckpointError(
                f"the state of {type(chain.base).__name__} is one vector over all parameters, and the checkpoint has "
                f"others, or another order: build the stack over the same parameters"
            )
    _validate_counts(run, found.groups)
    for saved in found.groups:
        _validate_total_steps(run, saved.get(TOTAL_STEPS), choice, count)
    label = found.groups[0].get(AVERAGE_SHOWN) if found.groups else ""
    if label and label not in run.structure.averages():
        raise CheckpointError(
            f"the checkpoint was taken inside averaged({label!r}), when the model held that average, and this stack "
            f"has no {label!r} to restore the weights: load it into a stack that has, or save outside the context"
        )
    named = run.names()
    for group, ids in zip(run.param_groups, found.ids, strict=True):
        slots = {keyed.key: keyed.slot for keyed in run.structure.chain_of(group).slots}
        for i, p in zip(ids, group["params"], strict=True):
            param_state = found.state.get(i)
            if not param_state and isinstance(param_state, dict | None):
                continue
            called = i if named[p].startswith("#") else named[p]
            if isinstance(param_state, dict | Mapping):  # most are dicts, which is seen sooner
                _validate_param_state(run, group, slots, called, p, param_state)
            # some bases keep numbers of the whole run under names
            elif not isinstance(i, str):
                raise CheckpointError(
                    f"the checkpoint's state of parameter {called} is a {type(param_state).__name__}, not a dict"
                )


def _validate_base_keys(chain: Chain, saved: ParamGroup, group: ParamGroup, position: int) -> None:
    known = RUN_FLAGS | {"params", "param_names", "name"}
    found = {k for k in saved if "." not in k} - known
    # heavyball keeps under names that begin so what no checkpoint should hold
    own = {k for k in chain.base.defaults if not k.startswith("_")} - RUN_FLAGS
    missing, unknown = own - found, found - own - set(group)
    # one of them alone is an older torch or a scheduler's note; both are another optimizer
    if missing and unknown:
        raise CheckpointError(
            f"the checkpoint belongs to another base than {type(chain.base).__name__}: its group {position} has "
            f"{', '.join(sorted(unknown))} and lacks {', '.join(sorted(missing))}"
        )


def _validate_part(saved: ParamGroup, group: ParamGroup, position: int) -> None:
    """Refuse moments that another part's base has made."""
    part = group.get(PART)
    if part is not None and saved.get(PART, part) != part:
        raise CheckpointError(
            f"the checkpoint's group {position} belongs to the part {saved[PART]!r} and here to {part!r}: "
            f"build the stack with the same parts, over the same parameters"
        )


def _validate_total_steps(run: Run, saved: Any, choice: Choice, count: int) -> None:
    own = run.structure.total_steps
    if saved is None or own is None or saved == own or choice.extend or not _length_matters(run, saved, own, count):
        return
    raise CheckpointError(
        f"the checkpoint's run has total_steps={saved}, this stack total_steps={own}: schedules would not continue "
        f"where they stopped. Build the stack with total_steps={saved} to continue that run, or load with extend=True "
        f"to go on with the schedules of a run of {own} updates after {count}; if a trainer loads it, build the stack "
        f"with metaopt.build(...).resume_with(extend=True)"
    )


def _length_matters(run: Run, saved: Any, own: int, count: int) -> bool:
    """Return whether a schedule has other values in a run of the saved length, from the loaded count on."""
    if isinstance(saved, bool) or not isinstance(saved, int) or saved < 1:
        return True
    end = max(saved, own, count + 1)
    times = sorted({count + round((end - count) * i / SAMPLES) for i in range(SAMPLES + 1)})
    for group in run.param_groups:
        for schedule in run.schedules_of(group).values():
            try:
                then, now = schedule.curve(saved, saved), schedule.curve(own, own)
            except ValueError:  # it cannot be that long
                return True
            if any(then(t) != now(t) for t in times):
                return True
    return False


def _validate_counts(run: Run, groups: list[ParamGroup]) -> None:
    counters = {key: initial for chain in run.structure.chains for key, initial in chain.counters.items()}
    for key, initial in {UPDATES: 0, **counters}.items():
        counts = [group[key] for group in groups if key in group]
        for count in counts:
            if isinstance(initial, float):
                if not isinstance(count, float):
                    raise CheckpointError(f"the checkpoint's {key} is {count!r}, expected a float")
            elif isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise CheckpointError(f"the checkpoint's {key} is {count!r}, expected an integer from 0 up")
        if len(set(counts)) > 1:
            raise CheckpointError(
                f"the checkpoint's groups have different {key}, {', '.join(map(str, counts))}: a run has one count; "
                f"the checkpoint was put together from several"
            )


def _validate_param_state(
    run: Run, group: ParamGroup, slots: Mapping[str, Slot], i: Any, p: torch.Tensor, saved: Mapping[str, Any]
) -> None:
    live = run.state.get(p) or run.constructor_state.get(p) or {}
    suspect: dict[Any, torch.Tensor] = {}
    for key, value in saved.items():
        expected = live.get(key)
        if isinstance(expected, torch.Tensor) and isinstance(value, torch.Tensor) and expected.shape == value.shape:
            continue
        if key in slots and not isinstance(value, torch.Tensor):
            raise CheckpointError(f"the checkpoint's {key} of parameter {i} is a {type(value).__name__}, not a tensor")
        if not isinstance(value, torch.Tensor):
            continue
        if key in slots and value.shape != (torch.Size() if slots[key].kind == "scalar" else p.shape):
            raise _of_another_model(key, value, i, p)
        if key not in slots and _cannot_fit(value, p):
            suspect[key] = value
    if suspect:
        fits = any(isinstance(value, torch.Tensor) and value.shape == p.shape for value in saved.values())
        _compare_with_scratch(run.structure.chain_of(group), group, i, p, suspect, another_fits=fits)


def _compare_with_scratch(
    chain: Chain, group: ParamGroup, i: Any, p: torch.Tensor, suspect: Mapping[Any, torch.Tensor], *, another_fits: bool
) -> None:
    """Refuse tensors of other shapes than the base keeps: it may keep what it likes, such as a matrix per dimension."""
    kept = state_after_step(chain, group, p)
    # moments all have one shape: the checkpoint is taken for one of another model if the base cannot tell
    foreign = not kept and not another_fits and len({value.shape for value in suspect.values()}) == 1
    for key, value in suspect.items():
        own = kept.get(key)
        # if some entries fit, entries of other shapes may have grown (preconditioners)
        if isinstance(own, torch.Tensor) and (own.shape == p.shape or not another_fits):
            foreign = foreign or own.shape != value.shape
        if foreign:
            raise _of_another_model(key, value, i, p)


def _of_another_model(key: Any, value: torch.Tensor, i: Any, p: torch.Tensor) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's {key} of parameter {i} has shape {tuple(value.shape)}, "
        f"the parameter has {tuple(p.shape)}: it belongs to another model"
    )


def _cannot_fit(value: torch.Tensor, p: torch.Tensor) -> bool:
    """Return whether a base's tensor cannot belong to a parameter of this shape, whatever the base keeps."""
    if value.dim() == 0:
        return False
    if value.dim() == p.dim():
        return any(a not in (b, 1) for a, b in zip(value.shape, p.shape, strict=True))
    return value.numel() == p.numel() > 1 or (p.dim() == 0 and value.numel() > 1)


def state_after_step(chain: Chain, group: ParamGroup, p: torch.Tensor) -> ParamState:
    """Return the state that the base makes for a parameter like this one: {} if it does not step over a single one."""
    try:
        return scratch_step(chain, group, p, gradient=1.0)[0]
    except Exception:
        return {}
