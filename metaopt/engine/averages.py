"""Averages shown in the parameters' place: weights are swapped with state, or set aside; they return bit for bit."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metaopt.distributed.shards import is_sharded, local
from metaopt.engine.chain import ParamState
from metaopt.engine.run.entries import AVERAGE_SHOWN, TEMPLATE
from metaopt.engine.run.run import Run
from metaopt.engine.update.update import Update
from metaopt.engine.views.cutting import views_of
from metaopt.engine.views.params import updated_params
from metaopt.errors import ParameterError, StepError, did_you_mean
from metaopt.module_buffers import KeptBuffers
from metaopt.torch_internals import Versions, keep_versions, reshard_fsdp_modules

# elements swapped at a time, so that the temporary tensor stays small
BLOCK = 1 << 20
# a parameter, the part of it that this process holds, its average, and where in the wrapper's state that is kept, if it
# is not computed
Shown = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int | None]


@contextmanager
def averages_shown(run: Run, label: str | None, model: torch.nn.Module | None) -> Iterator[None]:
    """Hold the average called `label` in the parameters for the length of the context.

    Afterwards the parameters, and the buffers of the model, are what they were before, also to autograd: a forward pass
    from before may go backward after. One from inside may not, because its weights are gone.
    """
    label = _choose(run, label, "averaged")
    shown = run.param_groups[0][AVERAGE_SHOWN]
    if shown and run.inside_averaged:
        raise StepError(f"averaged() inside averaged({shown!r}): leave that one first")
    restore_weights(run)
    run.await_copies()
    groups, plain = run.param_groups, [p for g in run.param_groups for p in g["params"] if not is_sharded(p)]
    buffers = KeptBuffers() if model is None else KeptBuffers(model)
    versions = Versions(plain)
    show(run, label)
    _mark(run, label)
    versions.set_apart()
    run.inside_averaged = True
    try:
        yield
    finally:
        run.inside_averaged = False
        # a checkpoint loaded inside the context has brought its own weights, or another average
        restore_weights(run)
        buffers.restore()
        _reshard(run)
        if run.param_groups is groups:
            versions.restore()


def before_step(run: Run) -> None:
    """Refuse a step inside the live context; restore the weights after a checkpoint from inside one was loaded."""
    label = run.param_groups[0].get(AVERAGE_SHOWN)
    if label and run.inside_averaged:
        raise StepError(f"step() inside averaged({label!r}): leave the context before the next update")
    restore_weights(run)


def before_gradients(run: Run) -> None:
    """At `zero_grad()`: restore the weights after a checkpoint that was taken inside `averaged()` was loaded.

    If it is called before the forward pass, as in torch's own examples, the first gradient is that of the weights. If
    it is called between forward and backward, the swap must not look like a change of the weights to autograd.
    """
    if run.param_groups[0].get(AVERAGE_SHOWN) and not run.inside_averaged:
        with keep_versions(tuple(local(p) for group in run.param_groups for p in group["params"])):
            restore_weights(run)


@torch.no_grad()
def restore_weights(run: Run) -> None:
    """Give the parameters their weights back if they hold an average."""
    label = run.param_groups[0].get(AVERAGE_SHOWN)
    if not label:
        return
    swapped = list(_swapped(run, label))
    for p, weights in _set_aside(run, label):
        local(p).copy_(local(weights))
    for weights, average in swapped:
        swap(weights, average)
    _forget_weights(run, label)
    _mark(run, "")


@torch.no_grad()
def show(run: Run, label: str) -> None:
    """Put an average into the parameters' place, for all of them or for none.

    An average that is kept in the state is swapped with the weights. If it is computed, of another dtype or on another
    device, the weights are set aside beside it.
    """
    done: list[Shown] = []
    try:
        for p, weights, average, place in _averages(run, label):
            if place is None:
                run.state[p][f"{label}.fast"] = p.detach().clone()
                weights.copy_(average)
            else:
                swap(weights, average)
                # a tensor, as all that a checkpoint keeps of a wrapper for each parameter
                run.state[p][f"{label}.shown"] = torch.tensor(float(place), device="cpu")
            done.append((p, weights, average, place))
    except BaseException:
        for p, weights, average, place in reversed(done):
            if place is None:
                weights.copy_(local(run.state[p][f"{label}.fast"]))
            else:
                swap(weights, average)
        _forget_weights(run, label)
        raise


# ---- a copy that shares nothing


@torch.no_grad()
def copied_with_averages(
    run: Run, model: torch.nn.Module, label: str | None, out: torch.nn.Module | None
) -> torch.nn.Module:
    """Return a copy of a model that holds an average, or write that into `out`, an earlier copy; nothing is swapped.

    Parameters that have no average have their weights.
    """
    label = _choose(run, label, "averaged_module")
    shown = run.param_groups[0][AVERAGE_SHOWN]
    if shown and shown != label:
        raise StepError(f"averaged_module({label!r}) inside averaged({shown!r}): leave that one first")
    originals = dict(model.named_parameters())
    held = {p for group in run.param_groups for p in group["params"]}
    if not any(p in held for p in originals.values()):
        raise ParameterError(
            "averaged_module(): none of the model's parameters is in this stack: give the model that it was built over"
        )
    if any(is_sharded(p) for p in originals.values()):
        raise StepError("averaged_module(): the model is sharded (FSDP2) and cannot be copied: use averaged()")
    twin = _copied(model) if out is None else out
    copies = dict(twin.named_parameters())
    if copies.keys() != originals.keys():
        odd = sorted(copies.keys() ^ originals.keys())[0]
        raise ParameterError(f"averaged_module(): out must be an earlier copy of the model, but {odd!r} is in only one")
    # what is shown is in the parameters already
    averages = {} if shown else {p: average for p, _, average, _ in _averages(run, label)}
    for name, p in originals.items():
        copies[name].copy_(averages.get(p, p))
    if out is not None:
        for mine, theirs in zip(twin.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
    return twin


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model, also in the middle of a step: what is kept of the forward pass is copied without it."""
    # torch refuses to copy tensors that have a history
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    }
    twin = copy.deepcopy(model, memo)
    return twin.requires_grad_(False)


def _choose(run: Run, label: str | None, asked: str) -> str:
    averages = run.structure.averages()
    if not averages:
        raise StepError(f"{asked}(): no part of this stack keeps an average; see: metaopt list wrappers")
    if label is None:
        label = run.structure.default_average()
        if label is None:
            raise StepError(
                f"{asked}(): the bases of this stack keep different averages: name one of {', '.join(averages)}"
            )
    elif label not in averages:
        raise StepError(
            f"{asked}({label!r}): no average has this label.{did_you_mean(label, averages)} "
            f"Choose from: {', '.join(averages)}"
        )
    return label


def _mark(run: Run, label: str) -> None:
    for group in run.param_groups:
        group[AVERAGE_SHOWN] = label
    _reshard(run)


def _reshard(run: Run) -> None:
    reshard_fsdp_modules(p for group in run.param_groups for p in group["params"])


def _set_aside(run: Run, label: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the parameters whose weights are set aside beside the average, with those weights."""
    for group in run.param_groups:
        for p in group["params"]:
            weights = run.state.get(p, {}).get(f"{label}.fast")
            if weights is not None:
                yield p, weights


def _forget_weights(run: Run, label: str) -> None:
    for group in run.param_groups:
        for p in group["params"]:
            param_state = run.state.get(p, {})
            found = [param_state.pop(f"{label}.{name}", None) for name in ("fast", "shown")]
            # `state[p]` is absent or whole
            if any(value is not None for value in found) and not param_state:
                del run.state[p]


def _swapped(run: Run, label: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the weights that were swapped with a kept average, and where they are now.

    The wrapper is not asked: its count or its settings may have changed since, so that it would show something else.
    """
    marked = unmarked = False
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        for p in group["params"] if label in chain.labelled else ():
            param_state = run.state.get(p, {})
            if f"{label}.shown" in param_state:
                marked = True
                keys = chain.slots_of(chain.labelled[label]).state_keys
                yield local(p), local(param_state[keys[int(param_state[f"{label}.shown"])]])
            elif param_state and f"{label}.fast" not in param_state:
                unmarked = True
    if unmarked and not marked:  # a checkpoint of an earlier version has no marks
        for p, weights, average, place in _averages(run, label):
            if place is not None and f"{label}.fast" not in run.state.get(p, {}):
                yield weights, average


def _averages(run: Run, label: str) -> Iterator[Shown]:
    """Yield every parameter that has an average; the others keep their weights."""
    update = Update(run)
    for group in run.param_groups:
        wrapper = run.structure.chain_of(group).labelled.get(label)
        if wrapper is None or "averaged" not in wrapper.implemented_hooks() or group[TEMPLATE]:
            continue
        keys = run.structure.chain_of(group).slots_of(wrapper).state_keys
        members = updated_params(update, group, wrapper)
        if not run.updates:  # a wrapper that keeps nothing would be asked before the first update
            members = [p for p in members if p in run.state]
        for view in views_of(update, group, wrapper, members):
            averages = wrapper.averaged(view)
            if averages is None:
                continue
            for p, weights, average in zip(view.parameters, view.params, averages, strict=True):
                place = _place(run.state.get(p, {}), keys, average) if average.dtype == weights.dtype else None
                yield p, weights, average, place


def _place(param_state: ParamState, keys: tuple[str, ...], average: torch.Tensor) -> int | None:
    """Return which tensor of the wrapper's own state an average is; None if it was computed, or fetched."""
    for place, key in enumerate(keys):
        kept = local(param_state[key]) if key in param_state else None
        if kept is not None and kept.data_ptr() == average.data_ptr() and kept.shape == average.shape:
            return place
    return None


def swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """Swap the contents of two tensors of one shape and dtype, a block at a time."""
    rows = max(1, BLOCK // max(1, a[0].numel())) if a.dim() and a.shape[0] else 1
    pairs = zip(torch.split(a, rows), torch.split(b, rows), strict=True) if a.dim() else [(a, b)]
    for x, y in pairs:
        first = x.clone()
        x.copy_(y)
        y.copy_(first)
