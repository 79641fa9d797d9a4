"""Tests whose bodies run in several processes at once: one start of the processes serves a whole test file."""

import functools
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import warm
from filelock import FileLock

# a rank that waits for one that died learns of it at once; this is for the rest, on a busy machine
PATIENCE = timedelta(seconds=120)


@dataclass
class Outcomes:
    """What each rank says of each body ("" is a pass), and the folder in which they ran."""

    said: dict[str, list[str]]
    folder: str


def on_ranks(number: int) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """Run the body of a test in some processes of one gloo group; the test passes where all ranks pass."""
    return functools.partial(_on_ranks, number)


def on_two_ranks(body: Callable[[], None]) -> Callable[..., None]:
    """Run the body of a test in two processes of one gloo group; the test passes where both ranks pass."""
    return _on_ranks(2, body)


def _on_ranks(number: int, body: Callable[[], None]) -> Callable[..., None]:
    @functools.wraps(body)
    def test(outcomes: Outcomes) -> None:
        failures = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcomes.said[body.__name__]) if text]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)

    del test.__wrapped__  # pytest reads the signature through it: the body takes no fixtures
    test.body, test.ranks = body, number
    return test


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run every body of the file on its ranks, once."""
    path = Path(request.path)
    names = {name: test.ranks for name, test in vars(request.module).items() if _body(test)}
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent  # shared by the workers of pytest-xdist: one of them starts the ranks for all
    found = folder / f"{path.stem}.json"
    with FileLock(f"{found}.lock"):
        if not found.exists():
            scratch = tmp_path_factory.mktemp(path.stem)
            found.write_text(json.dumps({"said": _run(path, names, scratch), "folder": str(scratch)}))
    return Outcomes(**json.loads(found.read_text()))


def _body(test: object) -> Callable[[], None] | None:
    return getattr(test, "body", None)


def _run(path: Path, names: dict[str, int], scratch: Path) -> dict[str, list[str]]:
    most = max(names.values())
    with ProcessPoolExecutor(most, mp_context=warm.context()) as ranks:
        running = [ranks.submit(_be_rank, path, names, scratch, rank) for rank in range(most)]
        died = [rank.exception() for rank in running]
    told = []
    for rank, error in enumerate(died):
        written = scratch / f"rank{rank}.json"
        said = json.loads(written.read_text()) if written.exists() else {}
        told.append({name: said.get(name, f"did not finish: {error!r}") for name in names})
    return {name: [told[rank][name] for rank in range(number)] for name, number in names.items()}


def meet(file: Path, rank: int, number: int = 2) -> None:
    """Join the ranks in a gloo group; try once more, with another file, if they miss each other under load.

    The second try is more patient: one rank may come to it while the other still waits in the first.
    """
    for attempt in (1, 2):
        try:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{file}.{attempt}",
                rank=rank,
                world_size=number,
                timeout=attempt * PATIENCE,
            )
            torch.distributed.barrier()  # all are there: a try that only one rank made is none
            return
        except RuntimeError:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            if attempt == 2:
                raise


def _be_rank(path: Path, names: dict[str, int], scratch: Path, rank: int) -> None:
    os.chdir(scratch)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    told = {}
    for name, number in names.items():
        if rank >= number:
            continue
        # a group of its own for each: what one test leaves behind cannot fail the next
        meet(scratch / name, rank, number)
        torch.manual_seed(0)
        try:
            _body(getattr(module, name))()
            told[name] = ""
        except BaseException:
            told[name] = traceback.format_exc()
        torch.distributed.destroy_process_group()
        Path(scratch, f"rank{rank}.json").write_text(json.dumps(told))
