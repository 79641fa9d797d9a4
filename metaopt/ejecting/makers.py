"""The function `make_optimizer` of a file that `metaopt eject` writes."""

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from metaopt.errors import SpecError
from metaopt.schedule import Schedule
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.wrapper import Wrapper

MAKER = ("def make_optimizer(params: Any) -> Stack:", '    """Return the optimizer."""')


def plain_maker(pipeline: Pipeline, stack: Any, wrappers: tuple[Wrapper, ...], own: str) -> str:
    """Return `make_optimizer` for one base; `own` is the source of the parts."""
    base = next(part for part in pipeline if part.kind == "optimizer")
    lines, made = _stack(base, stack.base, "params", wrappers, stack.total_steps, own)
    return "\n".join([*MAKER, *lines, f"    return {made}"])


def branching_maker(
    branches: Mapping[str, Pipeline],
    stack: Any,
    inner: Mapping[str, tuple[Wrapper, ...]],
    outer: tuple[Wrapper, ...],
    own: str,
) -> str:
    """Return `make_optimizer` for the bases of a partition, each with its own parts, and parts around all of them."""
    names = [f"members_{number}" for number in range(1, len(branches) + 1)]
    targets = ", ".join(names) + ("," if len(names) == 1 else "")
    lines = [*MAKER, f"    {targets} = chosen(params, {list(branches)!r})"]
    made = []
    for name, (pattern, branch), chain in zip(names, branches.items(), stack.base.chains, strict=True):
        base = next(part for part in branch if part.kind == "optimizer")
        more, one = _stack(base, chain.base, name, inner[pattern], stack.total_steps, own)
        lines += [*more, f"    {name.replace('members', 'stack')} = {one}"]
        made.append(name.replace("members", "stack"))
    lines.append(f"    base = Branches([{', '.join(made)}])")
    more, whole = _around(outer, stack.total_steps, own, {})
    return "\n".join([*lines, *more, f"    return {whole}"])


def _stack(
    base: Part, made: Any, params: str, wrappers: tuple[Wrapper, ...], total: int | None, own: str
) -> tuple[list[str], str]:
    """Return the lines that make a base and the parts around it, and the call that makes their stack."""
    scheduled: dict[str, str] = {}
    arguments = []
    for name, value in base.arguments.items():
        if isinstance(value, Schedule):
            scheduled[name] = f"{_schedule(value)}.curve({total}, {total})"
            value = value.curve(total, total)(0)
        arguments.append(f"{name}={value!r}")
    if made.param_groups[0].get("fused"):
        arguments.append("fused=True")
    lines, call = _around(wrappers, total, own, scheduled)
    return [f"    base = torch.optim.{type(made).__name__}({', '.join([params, *arguments])})", *lines], call


def _around(
    wrappers: tuple[Wrapper, ...], total: int | None, own: str, scheduled: Mapping[str, str]
) -> tuple[list[str], str]:
    before: list[str] = []
    behind: list[str] = []
    for wrapper in wrappers:
        (before if wrapper.runs_before_base() else behind).append(_wrapped(f"{_part(wrapper, total, own)},"))
    lines, given = [], ["base"]
    for name, made in (("before", before), ("behind", behind)):
        if made:
            one_line = f"    {name} = [{' '.join(text.strip() for text in made).rstrip(',')}]"
            lines += [one_line] if len(one_line) <= 116 else [f"    {name} = [", *made, "    ]"]
            given.append(f"{name}={name}")
    if scheduled:
        lines.append(f"    schedules = {{{', '.join(f'{k!r}: {v}' for k, v in scheduled.items())}}}")
        given.append("schedules=schedules")
    return lines, f"Stack({', '.join(given)})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 116, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)


def _part(wrapper: Wrapper, total: int | None, own: str) -> str:
    given = [repr(wrapper.label)]
    slots = {}
    for name, slot in wrapper.active_slots().items():
        dtype = vars(wrapper).get(slot.dtype, slot.dtype) if slot.dtype is not None else None
        slots[name] = (slot.kind, dtype)
    given += [f"slots={slots!r}"] if slots else []
    given += [f"acts_every={wrapper.acts_every!r}"] if wrapper.acts_every else []
    for name in wrapper.hyperparameters:
        value = getattr(wrapper, name)
        # a rule of elements takes its numbers by keyword
        if not re.search(rf"\.{name}\b|\b{name}: (float|int)\b", own) and name != wrapper.acts_every:
            continue  # only branches that are left out ask for it
        text = f"{_schedule(value)}.curve({total}, {total})" if isinstance(value, Schedule) else _literal(value)
        given.append(f"{name}={text}")
    return f"{type(wrapper).__name__}({', '.join(given)})"


def _schedule(schedule: Any) -> str:
    if type(schedule).__module__.startswith("metaopt.schedules."):
        if by_position := positional(schedule):
            return f"{type(schedule).__name__}({', '.join(map(_literal, by_position))})"
        values = {name: getattr(schedule, name) for name in schedule.hyperparameters}
        return f"{type(schedule).__name__}({', '.join(f'{k}={_literal(v)}' for k, v in values.items())})"
    raise SpecError(f"eject: {schedule!r:.60} is not a schedule of metaopt's own; only those can be written down")


def _literal(value: Any) -> str:
    if isinstance(value, Schedule):
        return _schedule(value)
    return "math.inf" if value == float("inf") else repr(value)


def positional(schedule: Any) -> tuple[Any, ...]:
    """Return what a schedule takes by position."""
    return tuple(getattr(schedule, "positional", None) or ())
