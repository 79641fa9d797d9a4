"""The exceptions that metaopt raises, as a tree, and the near misses that their messages name."""

import difflib
from collections.abc import Iterable


class MetaoptError(Exception):
    """The root: whatever metaopt raises on purpose is one of these."""


class SpecError(MetaoptError, ValueError):
    """A pipeline that cannot be read, composed or written as text."""


class UnknownPart(SpecError, LookupError):
    """A name that nothing registered bears."""


class HyperparameterError(MetaoptError, ValueError):
    """A hyperparameter that is unknown, missing, of the wrong type or out of its bounds."""


class ParameterError(MetaoptError, ValueError):
    """Model parameters or groups that cannot be optimized as they were given."""


class ScheduleConflict(MetaoptError, RuntimeError):
    """A value owned by a schedule was changed from outside."""


class StepError(MetaoptError, RuntimeError):
    """A `step()` that cannot be made as it was asked for."""


class CheckpointError(MetaoptError, ValueError):
    """A checkpoint that does not belong to this stack, or is damaged."""


class PluginError(MetaoptError):
    """A plugin that cannot be imported, or that breaks the rules of a hook."""


class LogError(MetaoptError, OSError):
    """Measurements that cannot be written where they were asked for."""


class ProblemError(MetaoptError, ValueError):
    """A problem that does not exist or cannot be trained as asked."""


class MissingExtra(MetaoptError, ImportError):
    """A package that a feature needs and that is not installed: which, and how to install it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'metaopt-torch[{extra}]'")


class MetaoptWarning(UserWarning):
    """What metaopt warns of: `warnings.filterwarnings("ignore", category=metaopt.MetaoptWarning)` silences it."""


class HintWarning(MetaoptWarning):
    """A setting that is allowed, and probably not what was meant."""


def with_article(kind: str) -> str:
    """Return a kind of part with its article: `an optimizer`."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def near_misses(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """Return up to `most` of the known names that look like `name`, the nearest first."""
    every = sorted(known)
    wanted = _bare(name)
    same = [own for own in every if wanted and wanted in (_bare(own), _bare(own.rpartition(".")[2]))]
    return same[:most] or difflib.get_close_matches(name.lower(), every, n=most, cutoff=0.6)


def _bare(name: str) -> str:
    """Return a name as people who write it another way have in common: `SparseAdam` and `sparse_adam`."""
    return name.lower().replace("_", "").replace("-", "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean a or b?`, or an empty text where nothing is near."""
    near = near_misses(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""
