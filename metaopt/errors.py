"""The exceptions that metaopt raises, as a tree, its warnings, and the near misses that messages name."""

import difflib
import sys
import warnings
from collections.abc import Iterable
from types import FrameType

# a warning is for whoever wrote the line outside metaopt, torch and the programs that make and step optimizers
NOT_THE_USER = {
    *("metaopt", "metaopt_kernels", "torch", "accelerate", "hydra", "jsonargparse", "lightning", "lightning_fabric"),
    *("lightning_utilities", "omegaconf", "pytorch_lightning", "ray", "timm", "transformers"),
    *sys.stdlib_module_names,
}


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


def warn(text: str, category: type[Warning] = MetaoptWarning) -> None:
    """Warn at the line of the user that led here, not at one of metaopt, torch, a trainer or the calling package.

    Args:
        text: what happened, and what to do.
        category: the class of the warning; `metaopt.HintWarning` for a setting that is probably not what was meant.
    """
    frame = _frame_of_user(sys._getframe(1))
    module = frame.f_globals.get("__name__", "<unknown>")
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


def _frame_of_user(caller: FrameType) -> FrameType:
    """Return the nearest frame of the user's own code; the outermost frame if there is none, as on the command line."""
    frame, package = caller, _package_of(caller)
    while _package_of(frame) == package and frame.f_back is not None:
        frame = frame.f_back
    while _package_of(frame) in NOT_THE_USER and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _package_of(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__") or ""
    return name.partition(".")[0]


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
