"""A wrapper whose class defines no hook: the engine never calls it."""

import inspect
from collections.abc import Iterable

from metaopt.errors import did_you_mean, warn
from metaopt.wrapper import HOOKS, Wrapper


def acts(wrapper: type[Wrapper]) -> bool:
    """Return whether the engine has anything to call on a class of wrappers."""
    return bool(wrapper.implemented_hooks()) or wrapper.adapt_base is not Wrapper.adapt_base


def nearly_a_hook(wrapper: type[Wrapper]) -> str:
    """Return the first public method that is named nearly like a hook, or an empty text."""
    own = [name for name, value in vars(wrapper).items() if inspect.isfunction(value) and not name.startswith("_")]
    contract = [name for name, value in vars(Wrapper).items() if not name.startswith("_") and callable(value)]
    return next((name for name in own if name not in contract and did_you_mean(name, HOOKS)), "")


def warn_of_no_hook(wrappers: Iterable[Wrapper]) -> None:
    """Warn of wrappers that do nothing because their class defines no hook."""
    for wrapper in wrappers:
        kind = type(wrapper)
        if not acts(kind):
            nearly = nearly_a_hook(kind)
            found = (
                f"{nearly}() is not one.{did_you_mean(nearly, HOOKS)}" if nearly else f"Hooks are {', '.join(HOOKS)}"
            )
            warn(
                f"{wrapper.label} does nothing: its class {kind.__name__} defines no hook. {found}",
            )
