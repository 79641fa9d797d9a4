"""What a result depends on besides its trial: versions, code, data, threads, device; with others it may differ."""

import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import metaopt
from metaopt.lab.named import problem_entry, problem_named
from metaopt.registry import registry
from metaopt.specs.pipeline import Pipeline

# one, so that a run gives the same numbers alone and beside others
THREADS = 1


def circumstances(problem: str, pipelines: Sequence[Pipeline], device: str, plugins: Sequence[str]) -> dict[str, Any]:
    """Return what all trials of a comparison have in common, as plain values."""
    parts = sorted({part.name for pipeline in pipelines for part in pipeline})
    entries = [problem_entry(problem), *(registry.find(name) for name in parts)]
    versions = {entry.origin: entry.version for entry in entries}
    versions |= {"metaopt": metaopt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "versions": versions,
        "code": _code([entry.target for entry in entries], plugins),
        "data": problem_named(problem).data_hash(),
        "threads": THREADS,
        "device": _named(device),
    }


def digest(value: Any) -> str:
    """Return a short name that changes with anything in a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _code(targets: Sequence[Any], plugins: Sequence[str]) -> str:
    """Return a hash of metaopt's own files and of those that define the parts: a plugin is edited between two runs."""
    files = set(Path(metaopt.__file__).parent.rglob("*.py"))
    for target in (*targets, *(sys.modules[name] for name in plugins)):
        try:
            files.add(Path(inspect.getfile(target)))
        except (TypeError, OSError):  # made in an interactive session: no file to read
            continue
    contents = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        contents.update(file.read_bytes())
    return contents.hexdigest()[:24]


def _named(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
