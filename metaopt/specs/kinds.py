"""What a part has to be to be what it is offered as."""

import inspect
from typing import Any

from metaopt.errors import PluginError
from metaopt.schedule import Schedule
from metaopt.space import Space
from metaopt.tuner import Tuner
from metaopt.wrapper import Wrapper

BASES: dict[str, type] = {"wrapper": Wrapper, "schedule": Schedule, "space": Space, "tuner": Tuner}


def check_kind(kind: str, name: str, target: Any, origin: str) -> None:
    """Raise PluginError for a target that is not a class of its kind, or a class that leaves a method out."""
    base = BASES.get(kind)
    own = getattr(target, "__name__", type(target).__name__)
    if base is not None and not (isinstance(target, type) and issubclass(target, base)):
        raise PluginError(
            f"{origin} offers {name!r} as a {kind}, but {own} is not a subclass of metaopt.{base.__name__}: "
            f"subclass it, or offer {own} from the hook of its kind"
        )
    if inspect.isabstract(target):
        missing = ", ".join(f"{method}()" for method in sorted(target.__abstractmethods__))
        raise PluginError(f"{origin} offers {name!r}, but {own} leaves out what a {kind} must have: define {missing}")
