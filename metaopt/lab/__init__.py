"""Training, tuning, comparing, statistics, figures: `train`, `tune` and `compare` are what the commands do."""

from importlib import import_module
from typing import Any

# public name -> the module that defines it; imported when it is asked for, since some need the extra `lab`
_HOMES = {"compare": "comparing", "compare_all": "comparing", "train": "training", "tune": "tuning"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"metaopt.lab.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'metaopt.lab' has no attribute {name!r}")
