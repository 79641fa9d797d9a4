"""Loading a checkpoint, whole or not at all (law 1), and forgetting parts of the state on request."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain as joined
from typing import Any

import torch

from metaopt.engine import averages
from metaopt.engine.chain import PLACEHOLDER, RUN_FLAGS, Chain, ParamGroup, ParamState
from metaopt.engine.param_state import placed, remove_placeholders
from metaopt.engine.run import AVERAGE_SHOWN, OWN_SCHEDULES, TEMPLATE, UPDATES, Run
from metaopt.errors import CheckpointError, HyperparameterError, StepError, did_you_mean
from metaopt.scheduled_values import LR_FACTOR
from metaopt.torch_internals import only_class_hooks
from metaopt.wrapper import Wrapper


@dataclass
class LoadReport:
    """What came of a `load_state_dict`: labels taken from the checkpoint, started fresh, and dropped.

    `kept` names what decides which state there is, if the checkpoint had another value than the live stack.
    """

    taken: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = (
            ("taken", self.taken),
            ("started fresh", self.fresh),
            ("dropped", self.dropped),
            ("kept as this stack has it", self.kept),
        )
        return "; ".join(f"{what}: {', '.join(labels)}" for what, labels in parts if labels)

    def warn(self) -> None:
        """Warn of what started fresh or was dropped: last, because a warning may be made an error."""
        if self.fresh or self.dropped or self.kept:
            warnings.warn(f"loaded a checkpoint of another stack; {self}", UserWarning, stacklevel=3)


def load(run: Run, state_dict: dict[str, Any]) -> LoadReport:
    """Load into the base through its own `load_state_dict`, then restore what belongs to wrappers, uncast."""
    _validate_form(state_dict)
    saved_groups = copy.deepcopy(list(state_dict["param_groups"]))
    saved_state: dict[Any, Any] = state_dict["state"]
    _validate_fit(run, saved_groups, saved_state)
    report = _report(run, saved_groups)
    groups = _merged_groups(run, saved_groups, report)
    base_state = _base_state(saved_state, tuple(f"{label}." for label in (*run.structure.labels(), *report.dropped)))
    extras = {k: _without_bytes(v) for k, v in state_dict.items() if k not in ("state", "param_groups")}
    live = run.base.state, run.base.param_groups
    try:
        with only_class_hooks(run.base):
            run.base.load_state_dict({**extras, "state": base_state, "param_groups": groups})
        _restore_dtypes(run, groups, base_state)
        _restore_wrapper_state(run, groups, saved_state)
    except BaseException:
        run.base.state, run.base.param_groups = live
        raise
    for p in run.state:  # what the constructor made of these will not be needed
        run.constructor_state.pop(p, None)
    for group in run.param_groups:
        run.place_scalars(group, run.structure.chain_of(group))
    if any(str(group[TEMPLATE]).startswith("made") for group in run.param_groups):
        # saved before the base had begun: only what wrappers had summed up by then is real
        remove_placeholders(run, keep_early=True)
    return report


# ---- what is refused, before anything of the checkpoint is applied


def _validate_form(state_dict: Any) -> None:
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


def _validate_fit(run: Run, groups: list[ParamGroup], state: Mapping[Any, Any]) -> None:
    """Raise CheckpointError for the checkpoint of another model, another base or another run."""
    live = run.param_groups
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in live]:
        raise CheckpointError(
            f"the checkpoint has groups of {[len(g['params']) for g in groups]} parameters, this stack of "
            f"{[len(g['params']) for g in live]}: build the stack over the same model and groups"
        )
    for position, (saved, group) in enumerate(zip(groups, live, strict=True)):
        _validate_base_keys(run.structure.chain_of(group), saved, group, position)
        _validate_total_steps(saved.get("metaopt.total_steps"), group["metaopt.total_steps"])
    _validate_counts(run, groups)
    label = groups[0].get(AVERAGE_SHOWN)
    if label and label not in run.structure.averages():
        raise CheckpointError(
            f"the checkpoint was taken inside averaged({label!r}), when the model held that average, and this stack "
            f"has no {label!r} to restore the weights: load it into a stack that has, or save outside the context"
        )
    ids = joined.from_iterable(g["params"] for g in groups)
    places = ((p, group) for group in live for p in group["params"])
    for i, (p, group) in zip(ids, places, strict=True):
        param_state = state.get(i, {})
        # some bases keep numbers of the whole run under names
        if not isinstance(param_state, Mapping) and not isinstance(i, str):
            raise CheckpointError(
                f"the checkpoint's state of parameter {i} is a {type(param_state).__name__}, not a dict"
            )
        _validate_param_state(run, group, i, p, param_state)


def _validate_base_keys(chain: Chain, saved: ParamGroup, group: ParamGroup, position: int) -> None:
    found = {k for k in saved if "." not in k} - RUN_FLAGS - {"params", "param_names", "name"}
    # heavyball keeps under names that begin so what no checkpoint should hold
    own = {k for k in chain.base.defaults if not k.startswith("_")} - RUN_FLAGS
    missing, unknown = own - found, found - own - set(group)
    # one of them alone is an older torch or a scheduler's note; both are another optimizer
    if missing and unknown:
        raise CheckpointError(
            f"the checkpoint belongs to another base than {type(chain.base).__name__}: its group {position} has "
            f"{', '.join(sorted(unknown))} and lacks {', '.join(sorted(missing))}"
        )


def _validate_total_steps(saved: Any, own: int | None) -> None:
    if saved is not None and own is not None and saved != own:
        raise CheckpointError(
            f"the checkpoint's run has total_steps={saved}, this stack total_steps={own}: "
            f"schedules would not continue where they stopped; build the stack with total_steps={saved}"
        )


def _validate_counts(run: Run, groups: list[ParamGroup]) -> None:
    counters = {key: initial for chain in run.structure.chains for key, initial in chain.counters.items()}
    for key, initial in {UPDATES: 0, **counters}.items():
        counts = [group[key] for group in groups if key in group]
        if isinstance(initial, float):
            if any(not isinstance(count, float) for count in counts):
                raise CheckpointError(f"the checkpoint's {key} is {counts[0]!r}, expected a float")
        elif any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
            raise CheckpointError(f"the checkpoint's {key} is {counts[0]!r}, expected an integer from 0 up")
        if len(set(counts)) > 1:
            raise CheckpointError(
                f"the checkpoint's groups have different {key}, {', '.join(map(str, counts))}: a run has one count; "
                f"the checkpoint was put together from several"
            )


def _validate_param_state(run: Run, group: ParamGroup, i: Any, p: torch.Tensor, saved: Mapping[str, Any]) -> None:
    chain = run.structure.chain_of(group)
    slots = {keyed.key: keyed.slot for keyed in chain.slots}
    live = run.state.get(p) or run.constructor_state.get(p) or {}
    suspect: dict[Any, torch.Tensor] = {}
    for key, value in saved.items():
        if key in slots and not isinstance(value, torch.Tensor):
            raise CheckpointError(f"the checkpoint's {key} of parameter {i} is a {type(value).__name__}, not a tensor")
        if not isinstance(value, torch.Tensor):
            continue
        expected = live.get(key)
        if isinstance(expected, torch.Tensor) and expected.shape == value.shape:
            continue
        if key in slots and value.shape != (torch.Size() if slots[key].kind == "number" else p.shape):
            raise _of_another_model(key, value, i, p)
        if key not in slots and _cannot_fit(value, p):
            suspect[key] = value
    if suspect:
        fits = any(isinstance(value, torch.Tensor) and value.shape == p.shape for value in saved.values())
        _compare_with_scratch(chain, group, i, p, suspect, another_fits=fits)


def _compare_with_scratch(
    chain: Chain, group: ParamGroup, i: Any, p: torch.Tensor, suspect: Mapping[Any, torch.Tensor], *, another_fits: bool
) -> None:
    """Refuse tensors of other shapes than the base keeps: it may keep what it likes, such as a matrix per dimension."""
    kept = _state_after_step(chain, group, p)
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


def _state_after_step(chain: Chain, group: ParamGroup, p: torch.Tensor) -> ParamState:
    """Return the state that the base makes for a parameter like this one: {} if it does not step over a single one."""
    try:
        return chain.scratch_step(group, p, gradient=1.0)[0]
    except Exception:
        return {}


# ---- what is taken


def _base_state(state: dict[Any, Any], foreign: tuple[str, ...]) -> dict[Any, Any]:
    """Return the base's own entries; a parameter without any (its moments were reset) is left out, not left empty."""
    found = {}
    for i, saved in state.items():
        own = {k: v for k, v in saved.items() if not _belongs(k, foreign)} if isinstance(saved, dict) else saved
        # some bases keep numbers of the whole run here, under names: 0 is one of them
        if own or not isinstance(saved, dict):
            found[i] = own
    return found


def _belongs(key: Any, prefixes: tuple[str, ...]) -> bool:
    return isinstance(key, str) and key.startswith(prefixes) if prefixes else False


def _without_bytes(value: Any) -> Any:
    """Return what a base wrote beside state and groups, without bytes: a base might unpickle them (law 4)."""
    if not isinstance(value, dict):
        return copy.copy(value)
    return {key: _without_bytes(v) for key, v in value.items() if not isinstance(v, bytes | bytearray)}


def _report(run: Run, groups: list[ParamGroup]) -> LoadReport:
    saved = list(dict.fromkeys(label for group in groups for label in _saved_labels(group)))
    own = run.structure.labels()
    return LoadReport(
        taken=["base", *(label for label in own if label in saved)],
        fresh=[label for label in own if label not in saved],
        dropped=[label for label in saved if label not in own],
    )


def _saved_labels(group: ParamGroup) -> list[str]:
    named = [label for label in str(group.get("metaopt.labels", "")).split(",") if label]
    return named + [key.split(".")[0] for key in group if "." in key and not key.startswith("metaopt.")]


def _merged_groups(run: Run, saved: list[ParamGroup], report: LoadReport) -> list[ParamGroup]:
    """Return groups with the checkpoint's constants, and the live stack's ways to run and fresh parts."""
    dropped = tuple(f"{label}." for label in report.dropped)
    merged = []
    for saved_group, group in zip(saved, run.param_groups, strict=True):
        chain, scheduled = run.structure.chain_of(group), run.schedules_of(group)
        kept = {k: v for k, v in saved_group.items() if not _belongs(k, dropped)}
        for key, initial in chain.counters.items():
            kept.setdefault(key, initial)
        for key, (_, scalar) in chain.scalars.items():
            _keep_scalar(kept, key, group[key], scalar.initial)
        for key, (wrapper, name) in chain.hyperparameters.items():
            # a scheduled value is computed anew; a warm-up may begin at a value that a constant must not have
            if wrapper.label in report.fresh or key not in kept or key in scheduled:
                kept[key] = group[key]
            elif wrapper.hyperparameters[name].defines_state:
                line = f"{key}={group[key]!r}, not {kept[key]!r}"
                if kept[key] != group[key] and line not in report.kept:
                    report.kept.append(line)
                kept[key] = group[key]
            else:
                kept[key] = _validated(wrapper, name, kept[key])
        for key in (*RUN_FLAGS, OWN_SCHEDULES):
            if key in group:
                kept[key] = group[key]
            else:
                kept.pop(key, None)
        for key, default in ((UPDATES, 0), (AVERAGE_SHOWN, ""), (TEMPLATE, ""), ("metaopt.lr_scale", 1.0)):
            kept.setdefault(key, default)
        kept["metaopt.total_steps"] = group["metaopt.total_steps"]
        kept["metaopt.labels"] = group["metaopt.labels"]
        merged.append(kept)
    return merged


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


def _restore_wrapper_state(run: Run, groups: list[ParamGroup], saved: dict[Any, Any]) -> None:
    ids = joined.from_iterable(g["params"] for g in groups)
    if not isinstance(run.state, defaultdict):
        run.base.state = defaultdict(dict, run.state)
    places = ((p, run.structure.chain_of(group)) for group in run.param_groups for p in group["params"])
    for i, (p, chain) in zip(ids, places, strict=True):
        entries = saved.get(i)
        if not isinstance(entries, dict):
            continue
        slots = {keyed.key: keyed for keyed in chain.slots}
        for key, value in entries.items():
            label, _, name = key.partition(".") if isinstance(key, str) else ("", "", "")
            if label not in chain.labelled or not isinstance(value, torch.Tensor):
                continue
            slot = chain.labelled[label].slots.get(name)
            if slot is not None and slot.kind == "previous":
                continue  # an earlier version kept the weights from before the update in the state
            keyed = slots.get(key)
            if keyed is not None and p.is_floating_point():
                # torch would round a float32 tensor of a 16-bit parameter
                run.state[p][key] = placed(value, keyed.slot, vars(keyed.wrapper), p)
            else:
                run.state[p][key] = value.detach().to(device=p.device, copy=True)


def _restore_dtypes(run: Run, groups: list[ParamGroup], saved: Mapping[Any, Any]) -> None:
    """Replace tensors that torch cast to the parameter's dtype on load if the base itself keeps them in the saved one.

    Otherwise float32 moments of a bfloat16 parameter come back rounded, and a float32 product of a float64 one counts
    on with other digits.
    """
    known: dict[Any, ParamState] = {}
    for saved_group, group in zip(groups, run.param_groups, strict=True):
        for i, p in zip(saved_group["params"], group["params"], strict=True):
            before, loaded = saved.get(i), run.state.get(p)
            if not (isinstance(before, dict) and isinstance(loaded, dict) and _was_cast(before, loaded)):
                continue
            kind = id(group), p.dtype, p.device, p.dim()
            if kind not in known:
                # dtypes do not depend on the size
                small = torch.zeros([2] * p.dim(), dtype=p.dtype, device=p.device)
                known[kind] = _state_after_step(run.structure.chain_of(group), group, small)
            loaded.update(_unrounded(before, loaded, known[kind]))


def _unrounded(saved: Any, loaded: Any, kept: Any) -> Any:
    """Return what was loaded with the saved tensors in place of cast ones, if the base keeps them in that dtype."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor) and isinstance(kept, torch.Tensor):
        wanted = saved.dtype != loaded.dtype and saved.dtype == kept.dtype
        return saved.detach().to(device=loaded.device, copy=True) if wanted else loaded
    if isinstance(saved, dict) and isinstance(loaded, dict) and isinstance(kept, dict):
        return {k: _unrounded(saved.get(k), v, kept.get(k)) for k, v in loaded.items()}
    lists = all(isinstance(value, list | tuple) for value in (saved, loaded, kept))
    if lists and len(saved) == len(loaded) == len(kept):
        return type(loaded)(_unrounded(*values) for values in zip(saved, loaded, kept, strict=True))
    return loaded


def _was_cast(saved: Any, loaded: Any) -> bool:
    """Return whether a tensor in what was loaded has another dtype than the saved one."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return saved.dtype != loaded.dtype
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return any(_was_cast(saved.get(key), value) for key, value in loaded.items())
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(saved) == len(loaded):
        return any(_was_cast(*pair) for pair in zip(saved, loaded, strict=True))
    return False


# ---- forgetting on request

RESET_NAMES = ("moments", "averages", "counters")


def reset(run: Run, names: tuple[str, ...]) -> None:
    """Forget what `names` say: moments, averages, counters or labels of wrappers; everything without a name.

    What is forgotten starts at the next update as in a new run. Raises StepError for another name, before anything
    changes.
    """
    labels = run.structure.labels()
    unknown = [name for name in names if name not in RESET_NAMES and name not in labels]
    if unknown:
        allowed = (*RESET_NAMES, *labels)
        raise StepError(
            f"reset_state({unknown[0]!r}): unknown name.{did_you_mean(unknown[0], allowed)} "
            f"Choose from: {', '.join(allowed)}"
        )
    if run.inside_averaged:
        raise StepError("reset_state() inside averaged(): leave the context first, the weights are an average now")
    averages.restore_weights(run)
    chosen = set(names or RESET_NAMES)
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        gone = {label for label in chain.labelled if "averages" in chosen or label in chosen}
        for p in group["params"]:
            _forget(run, chain, p, gone, moments="moments" in chosen)
        for key, initial in chain.counters.items():
            if "counters" in chosen or key.split(".")[0] in gone:
                group[key] = initial
        for key, (wrapper, scalar) in chain.scalars.items():
            if wrapper.label in gone:
                group[key].fill_(scalar.initial)
        if "counters" in chosen:
            group[UPDATES] = 0
            group.pop(LR_FACTOR, None)


def _forget(run: Run, chain: Chain, p: torch.Tensor, labels: set[str], *, moments: bool) -> None:
    param_state = run.state.get(p, {})
    of_base = [key for key in param_state if chain.is_base_key(key)]
    for key in [key for key in param_state if str(key).split(".")[0] in labels] + (of_base if moments else []):
        del param_state[key]
    if moments and of_base:
        param_state[PLACEHOLDER] = 1.0
    if not param_state.keys() - {PLACEHOLDER}:
        run.state.pop(p, None)
