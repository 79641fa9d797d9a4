"""`metaopt check`: prove parts correct, by the checks that `metaopt.testing` also gives to pytest."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Annotated

import typer

from metaopt.cli import Plugins, progress_of
from metaopt.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from metaopt.testing import Case, Result

KINDS = ("optimizers", "wrappers", "schedules", "spaces", "tuners", "loggers", "problems")
SIGNS = {
    "passed": "ok",
    "failed": "FAILED",
    "outdated": "FAILED",
    "excused": "excused",
    "not applicable": "-",
    "not run": "not run",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(check)


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help='Parts, "lookahead(k=2)", or a kind such as wrappers.'),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check everything that is registered.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="CHECK", help="Only this check; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> int:
    """Prove parts correct: checkpoints, copies, groups, dtypes, bounds and the laws; exit status 1 if one fails."""
    import torch

    from metaopt.lab.device import usable_device
    from metaopt.testing import cases, prove

    usable_device(device)
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    chosen = [case for name in _named(names or [], every) for case in cases(name, device=device)]
    wanted = _wanted(only or [], chosen)
    results: list[list[Result]] = []
    total = sum(check.name in wanted for case in chosen for check in case.checks)
    numbers = count(1)
    with progress_of("checks") as show:
        for case in chosen:
            results.append(prove(case, lambda _: show(next(numbers), total), only=wanted))
    print(_as_json(results) if as_json else "\n".join(_lines(results)))
    return int(any(result.bad for found in results for result in found))


def _named(names: list[str], every: bool) -> list[str]:
    from metaopt.registry import registry

    if not names and not every:
        raise SpecError("check what? Name a part, a kind such as wrappers, or give --all. See: metaopt list")
    kinds = [name for name in (KINDS if every else names) if name in KINDS]
    found = [] if every else [name for name in names if name not in KINDS]
    return [*found, *(name for kind in kinds for name in registry.names(kind.removesuffix("s")))]


def _wanted(only: list[str], chosen: "list[Case]") -> set[str]:
    known = {check.name for case in chosen for check in case.checks}
    for name in only:
        if name not in known:
            raise SpecError(f"no check of these parts is called {name!r}.{did_you_mean(name, known)}")
    return set(only) or known


def _as_json(results: "list[list[Result]]") -> str:
    rows = [
        {"part": r.part, "check": r.check, "claim": r.claim, "status": r.status, "reason": r.reason}
        for found in results
        for r in found
    ]
    return json.dumps({"results": rows, "failed": sum(r.bad for found in results for r in found)}, indent=2)


def _lines(results: "list[list[Result]]") -> Iterator[str]:
    if len(results) == 1:
        yield from _in_full(results[0])
    else:
        width = max(len(found[0].part) for found in results if found)
        for found in results:
            if found:
                yield from _in_short(found, width)
    counts = Counter(result.status for found in results for result in found)
    yield ""
    yield ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def _in_full(found: "Iterable[Result]") -> Iterator[str]:
    """Yield every check of one part with its claim, and what came of it."""
    found = list(found)
    width = max(len(result.check) for result in found)
    yield f"{found[0].part}"
    told: dict[str, str] = {}
    for result in found:
        yield f"  {SIGNS[result.status]:8} {result.check:{width}}  {result.claim}".rstrip()
        if result.reason:
            first = told.setdefault(result.reason, result.check)
            yield from _wrapped(result.reason if first == result.check else f"as {first}", "    ")


def _in_short(found: "list[Result]", width: int) -> Iterator[str]:
    """Yield one line about a part, and more only where something is not as it should be."""
    counts = Counter(result.status for result in found)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    sign = "FAILED" if any(result.bad for result in found) else "not run" if counts["not run"] else "ok"
    yield f"{sign:8} {found[0].part:{width}}  {told}"
    alike: dict[tuple[str, str], list[str]] = {}
    for result in found:
        if result.bad or result.status in ("excused", "not run"):
            alike.setdefault((result.status, result.reason), []).append(result.check)
    for (status, reason), checks in alike.items():
        if status != "not run":
            yield from _wrapped(f"{', '.join(checks)}: {status}", "    ")
        yield from _wrapped(reason, "      ")


def _wrapped(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(text, width=116, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
