"""Explaining an optimizer: what is done to which parameters, at which rate, and what looks like a mistake."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metaopt.checkpoint_file import read_saved
from metaopt.engine.checkpoint.precedence import count_of
from metaopt.engine.run.entries import TOTAL_STEPS
from metaopt.errors import CheckpointError, ParameterError, SpecError
from metaopt.explaining import findings
from metaopt.explaining.paths import paths
from metaopt.explaining.table import Explanation, Row, table
from metaopt.logger import Table
from metaopt.scheduled_values import LR_FACTOR, LR_SCALE
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

# a closed form is sampled at this many updates at most when its peak is looked for
SAMPLES = 10_000
DEEPEST = 4


def explain(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None = None,
    *,
    batch_size: int | None = None,
    find_schedulers: bool = False,
) -> Explanation:
    """Return what an optimizer does, group by group, and what is suspicious about it; changes nothing.

    Takes a stack or any torch optimizer, before, during or after a run; with a model it also compares their
    parameters, and with a batch size (examples per update, over all devices and accumulated batches) it says whether
    that asks for a warm-up. `print(explain(opt, model))` shows a table. Reads learning rates, so it may wait for the
    device. torch marks an optimizer that has a scheduler, but not with which; `find_schedulers` looks through every
    object of the process for it, and for one that drives another optimizer over the same parameters.
    Raises ParameterError.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ParameterError(f"explain(): batch_size must be an integer >= 1, got {batch_size!r}")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ParameterError(f"explain(): model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ParameterError(f"explain(): optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    stack = optimizer if isinstance(optimizer, Stack) else None
    drivers = findings.found_schedulers(optimizer) if find_schedulers else findings.marked_schedulers(optimizer)
    rows = _rows(optimizer, next(iter(drivers[0]), None))
    return Explanation(
        optimizer=type(optimizer).__name__ if stack is None else _text(stack),
        updates=_count(optimizer),
        total_steps=None if stack is None else stack.total_steps,
        rows=tuple(rows),
        notes=_notes(stack),
        paths=() if stack is None else paths(stack),
        findings=findings.in_optimizer(optimizer, model, drivers, batch_size, [row.peak for row in rows]),
    )


def table_of(stack: Stack) -> Table:
    """Return the table of an explanation alone: a row for each group. Reads learning rates; looks for no mistakes."""
    return table(_rows(stack, None))


def _rows(optimizer: torch.optim.Optimizer, scheduler: str | None) -> list[Row]:
    stack = optimizer if isinstance(optimizer, Stack) else None
    rows = []
    for number, entry in enumerate(optimizer.param_groups):
        rate = _number(entry.get("lr"))
        peak, end = (None, None) if scheduler is not None else _peak_and_end(stack, entry, rate)
        order = _order(stack, optimizer, entry)
        if scheduler is not None:
            order = (*order, scheduler)
        parameters = entry["params"]
        rows.append(
            Row(
                group=str(entry.get("name", number)),
                tensors=len(parameters),
                elements=sum(p.numel() for p in parameters),
                order=order,
                rate=rate,
                peak=peak,
                end=end,
                decay=_number(entry.get("weight_decay")),
                state_bytes=sum(_bytes(optimizer.state.get(p)) for p in parameters),
            )
        )
    return rows


def _notes(stack: Stack | None) -> tuple[str, ...]:
    if stack is None:
        return ()
    chosen = [chain for chain in stack.chains if chain.fused_by_default]
    fused = [c for c in chosen if any(group.get("fused") for group in c.groups_in(stack.param_groups))]
    return tuple(
        f"{name} runs with fused=True, chosen by metaopt.build; exact=True leaves the kernel to torch, bit for bit"
        for name in dict.fromkeys(type(chain.base).__name__ for chain in fused)
    )


def explain_checkpoint(path: str | Path) -> Explanation:
    """Return what a checkpoint file tells of its optimizer; executes nothing in it. Raises CheckpointError."""
    content = read_saved(path)
    saved = _find_state_dict(content, DEEPEST)
    if saved is None:
        raise CheckpointError(
            f"{path} does not hold the state_dict of an optimizer (a dict with 'state' and 'param_groups')"
        )
    entries, state = saved["param_groups"], saved["state"]
    rows = tuple(_saved_row(number, entry, state) for number, entry in enumerate(entries))
    first = entries[0] if entries else {}
    updates, counted = count_of(entries, state)
    return Explanation(
        optimizer=f"checkpoint {path}",
        updates=None if counted == "nowhere" else updates,
        total_steps=first.get(TOTAL_STEPS),
        rows=rows,
        findings=tuple(findings.in_entries(entries)),
    )


def _find_state_dict(content: Any, depth: int) -> dict[str, Any] | None:
    """Return the first optimizer's state dict inside nested dicts and lists, or None."""
    if isinstance(content, Mapping):
        if isinstance(content.get("param_groups"), list) and isinstance(content.get("state"), Mapping):
            return dict(content)
        members: Sequence[Any] = list(content.values())
    else:
        members = content if isinstance(content, list | tuple) else ()
    found = (_find_state_dict(member, depth - 1) for member in members if depth > 0)
    return next((state_dict for state_dict in found if state_dict is not None), None)


def _saved_row(number: int, entry: dict[str, Any], state: Mapping[Any, Any]) -> Row:
    labels = dict.fromkeys(k.split(".")[0] for k in entry if "." in k and not k.startswith("metaopt."))
    held = [state[p] for p in entry["params"] if isinstance(state.get(p), Mapping)]
    keys = dict.fromkeys(k for p in held for k in p if isinstance(k, str) and "." not in k)
    # which class the base was is not saved; its own state keys tell the reader
    base = f"base ({', '.join(keys) or 'no state'})"
    return Row(
        group=str(entry.get("name", number)),
        tensors=len(entry["params"]),
        elements=sum(_elements(p) for p in held),
        order=(base, *labels),
        rate=_number(entry.get("lr")),
        peak=None,
        end=None,
        decay=_number(entry.get("weight_decay")),
        state_bytes=sum(_bytes(p) for p in held),
    )


def _elements(held: Mapping[str, Any]) -> int:
    return max((value.numel() for value in held.values() if isinstance(value, torch.Tensor)), default=0)


def _text(stack: Stack) -> str:
    if stack.description is None:
        return f"Stack over {type(stack.base).__name__}"
    try:
        return str(stack.spec)
    except SpecError:  # a part without text: repr always works
        return repr(stack.spec)


def _count(optimizer: torch.optim.Optimizer) -> int | None:
    """Return how many updates were done; None where a plain optimizer does not count them."""
    if isinstance(optimizer, Stack):
        return optimizer.updates
    count, counted = count_of(optimizer.param_groups, optimizer.state)
    return None if counted == "nowhere" and optimizer.state else count


def _order(stack: Stack | None, optimizer: torch.optim.Optimizer, entry: dict[str, Any]) -> tuple[str, ...]:
    """Return what is done to one group, in order, with the group's own values."""
    if stack is None:
        return (type(optimizer).__name__,)
    chain = stack.chain_of(entry)
    before = [_described(w, entry) for w in chain.ordered if w.runs_before_base()]
    behind = [_described(w, entry) for w in chain.ordered if not w.runs_before_base()]
    return (*before, type(chain.base).__name__, *behind)


def _described(wrapper: Wrapper, entry: Mapping[str, Any]) -> str:
    values = {name: entry[f"{wrapper.label}.{name}"] for name in wrapper.hyperparameters}
    shown = [
        f"{name}={_short(value)}"
        for name, value in values.items()
        if name in wrapper.arguments or name == wrapper.acts_every or value != wrapper.hyperparameters[name].default
    ]
    return f"{wrapper.label}({', '.join(shown)})"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _peak_and_end(stack: Stack | None, entry: dict[str, Any], rate: float | None) -> tuple[float | None, float | None]:
    """Return the highest and the last learning rate of the run; a rate without a schedule stays as it is."""
    schedule = None if stack is None else stack.schedules_of(entry).get("lr")
    if stack is None or schedule is None:
        return rate, rate
    run = stack.total_steps
    last = run if run is not None else schedule.length(None, None)
    if last is None:
        return None, None
    curve = schedule.curve(run, run)
    stride = max(1, last // SAMPLES)
    scale = float(entry.get(LR_SCALE, 1.0)) * float(entry.get(LR_FACTOR, 1.0))
    # the last update runs at the value after last - 1 updates
    return scale * max(curve(t) for t in range(0, last, stride)), scale * curve(last - 1)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | torch.Tensor) else None


def _bytes(held: Any) -> int:
    """Return the bytes of all tensors in one parameter's state, also in lists such as L-BFGS's."""
    if isinstance(held, torch.Tensor):
        return held.numel() * held.element_size()
    members = held.values() if isinstance(held, Mapping) else held if isinstance(held, list | tuple) else ()
    return sum(_bytes(member) for member in members)
