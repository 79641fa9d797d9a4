"""What a result depends on besides its trial: versions, code, data, threads, device; with others it may differ."""

import ast
import hashlib
import inspect
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import metaopt
from metaopt.lab.named import file_of, problem_entry, problem_named
from metaopt.registry import registry
from metaopt.schedule import Schedule
from metaopt.specs.pipeline import Pipeline

# one, so that a run gives the same numbers alone and beside others
THREADS = 1


def circumstances(problem: str, pipelines: Sequence[Pipeline], device: str, plugins: Sequence[str]) -> dict[str, Any]:
    """Return what all trials of a comparison have in common, as plain values."""
    parts = sorted({name for pipeline in pipelines for name in _names(pipeline)})
    entries = [problem_entry(problem), *(registry.find(name) for name in parts)]
    versions = {entry.origin: entry.version for entry in entries}
    versions |= {"metaopt": metaopt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "versions": versions,
        "code": _code([entry.target for entry in entries], plugins, file_of(problem)),
        "data": problem_named(problem).data_hash(),
        "threads": THREADS,
        "device": _named(device),
    }


def _names(value: Any) -> Iterator[str]:
    """Yield the names of all parts in a pipeline, also of those inside of others, and of schedules."""
    if isinstance(value, Pipeline):
        for part in value:
            yield part.name
            yield from _names(part.arguments)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _names(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _names(inner)
    elif isinstance(value, Schedule):
        yield from filter(None, [registry.name_of(type(value))])
        yield from _names([*value.given.values(), *(value.positional or ())])


def digest(value: Any) -> str:
    """Return a short name that changes with anything in a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _code(targets: Sequence[Any], plugins: Sequence[str], own: Path | None = None) -> str:
    """Return a hash of metaopt's own files and of those that define the parts, with all that these import from beside.

    A plugin, or a module that it imports, is edited between two runs; what is installed has a version instead.
    """
    files = set(Path(metaopt.__file__).parent.rglob("*.py"))
    for target in targets:
        try:
            files |= imported_files(Path(inspect.getfile(target)))
        except (TypeError, OSError):  # made in an interactive session: no file to read
            continue
    if own is not None:
        files |= imported_files(own)
    for name in plugins:
        files |= imported_files(Path(str(sys.modules[name].__file__)))
    contents = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        contents.update(file.read_bytes())
    return contents.hexdigest()[:24]


def imported_files(file: Path) -> set[Path]:
    """Return a file and the files that it imports, directly or not, of modules that are loaded and not installed."""
    loaded = _loaded_files()
    known = {path: name for name, path in loaded.items()}
    found: set[Path] = set()
    pending = [file.resolve()]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        pending += [loaded[name] for name in _imports(current, known.get(current, "")) & loaded.keys()]
    return found


def _loaded_files() -> dict[str, Path]:
    """Return the files of all modules that are loaded and not installed."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    # as text: thousands of modules are installed, and to resolve a path takes a look at every folder of it
    installed = tuple(f"{path}{os.sep}" for folder in folders for path in (folder, os.path.realpath(folder)))
    found = {}
    for name, module in sys.modules.copy().items():  # a thread or the collector may import meanwhile
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py") or name.split(".")[0] == "metaopt":
            continue
        if not path.startswith(installed) and not (real := os.path.realpath(path)).startswith(installed):
            found[name] = Path(real)
    return found


def _imports(file: Path, name: str) -> set[str]:
    """Return the names of all modules that a file may import, also inside of functions."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    # a module's packages are run as well
    return {".".join(parts[: n + 1]) for parts in (one.split(".") for one in found) for n in range(len(parts))}


def _named(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
