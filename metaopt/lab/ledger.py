"""Which comparisons a folder holds, where each of them is, and which of them were looked at."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metaopt.errors import LogError
from metaopt.lab.circumstances import digest
from metaopt.lab.holding import write_text
from metaopt.lab.plan import Plan

NAME = ".metaopt-comparisons.json"
# what a comparison writes: where one of these is already, and it is nobody's here, it is somebody else's
WRITTEN = (
    *("report.md", "results.json", "trials.csv", "batch_sizes.csv", "tensorboard"),
    *(
        f"{picture}.{form}"
        for picture in ("curves", "sensitivity", "differences", "batch_size")
        for form in ("png", "pdf", "svg")
    ),
)


def free_of_results(folder: Path) -> Path:
    """Return a folder that holds no file that a comparison would write. Raises LogError."""
    there = next((name for name in WRITTEN if (folder / name).exists()), None)
    if there is not None:
        raise LogError(f"{folder / there} is there already: choose another folder")
    return folder


@dataclass
class Entry:
    """One comparison: its folder below the one of the ledger, its plan, and how many studies it was looked at with.

    `family` is the plan without its number of studies: two looks at the same question.
    """

    folder: str
    plan: str
    family: str
    looked: int | None = None


class Ledger:
    """The comparisons of one folder, which its caller holds. Raises LogError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            known = json.loads((folder / NAME).read_text(encoding="utf-8"))
            self._entries = [Entry(**entry) for entry in known]
        except FileNotFoundError:
            self._entries = []
        except (OSError, ValueError, TypeError) as error:
            raise LogError(f"{folder / NAME} cannot be read ({error}): choose another --out") from None

    def enter(self, plan: Plan) -> Path:
        """Return the folder of this plan's comparison, its own since the plan was first entered."""
        found = self._of(plan)
        if found is None:
            found = Entry(self._free(), *_digests(plan))
            self._entries.append(found)
            self._write()
        return self._folder / found.folder

    def earlier(self, plan: Plan) -> list[int]:
        """Return with how many studies the same question was looked at before, in the order of the looks."""
        own = self._of(plan)
        family = _digests(plan)[1]
        before = self._entries[: self._entries.index(own)] if own is not None and own.looked else self._entries
        return [e.looked for e in before if e.family == family and e is not own and e.looked is not None]

    def looked(self, plan: Plan, studies: int) -> None:
        """Write down that the results of this plan were seen; the looks stay in the order in which they were made."""
        own = self._of(plan)
        if own is not None and own.looked is None:
            own.looked = studies
            self._entries = [*(e for e in self._entries if e is not own), own]
            self._write()

    def _of(self, plan: Plan) -> Entry | None:
        wanted = _digests(plan)[0]
        return next((entry for entry in self._entries if entry.plan == wanted), None)

    def _free(self) -> str:
        if not self._entries and not any((self._folder / name).exists() for name in WRITTEN):
            return "."
        number = 2
        while (self._folder / f"comparison-{number}").exists():
            number += 1
        return f"comparison-{number}"

    def _write(self) -> None:
        write_text(self._folder / NAME, json.dumps([asdict(entry) for entry in self._entries], indent=1) + "\n")


def _digests(plan: Plan) -> tuple[str, str]:
    """Return a name for the plan, and one for the question that it asks, whatever the number of studies."""
    asked: Mapping[str, Any] = {
        k: v
        for k, v in asdict(plan).items()
        # other batch sizes have no part in the question
        if k not in ("out", "jobs", "plugins", "on", "retries", "sensitivity", "at_sizes")
    }
    question = {key: value for key, value in asked.items() if key != "looks"}
    return digest(asked), digest(question)
