"""Checks of groups: a value set in one acts there, and nowhere else."""

from typing import Any

import torch

from metaopt.errors import HyperparameterError, MetaoptError
from metaopt.hyperparameters import Hyperparameter
from metaopt.schedule import Schedule
from metaopt.testing.comparing import same
from metaopt.testing.feeding import Halves
from metaopt.testing.outcome import CheckFailed, NotApplicable, check
from metaopt.testing.subject import StackSubject, refused

FEW = 3
# what clients write into the groups of a base: torch's schedulers, and users with a head and a trunk
WRITTEN_BY_CLIENTS = frozenset({"lr", "weight_decay", "betas", "momentum"})


@check("optimizer", "wrapper")
def groups_have_values_of_their_own(subject: StackSubject) -> None:
    """A hyperparameter set in one group acts on that group, whatever stands in the others."""
    try:
        usual = _observed(subject, subject.pipeline, {}, {})
    except MetaoptError as error:
        if isinstance(error, CheckFailed) and not refused(error.__cause__ or error):
            raise  # a step that fails is no refusal
        raise NotApplicable(f"two groups are refused: {error}") from error
    tried = 0
    entry = subject.pair()[1].param_groups[0]
    for name, hyperparameter in subject.part.hyperparameters.items():
        if not subject.label and name not in WRITTEN_BY_CLIENTS:
            continue
        key = f"{subject.label}.{name}" if subject.label else name
        other = _another(hyperparameter, entry.get(key))
        if key not in entry or other is None:
            continue
        tried += _acts_in_its_group(subject, usual, name, key, other)
    if not tried:
        raise NotApplicable("it has no hyperparameter of a group that changes a short run")


def _acts_in_its_group(subject: StackSubject, usual: list[Any], name: str, key: str, other: Any) -> int:
    """Return 1 if the value matters at all; raise where it matters in all groups together but not in one."""
    try:
        everywhere = _observed(subject, subject.with_given(**{name: other}), {}, {})
    except (MetaoptError, AssertionError):
        return 0
    if same(usual[1], everywhere[1]):
        return 0
    try:
        mixed = _observed(subject, subject.pipeline, {}, {key: other})
    except (MetaoptError, AssertionError) as error:
        if refused(error.__cause__ or error):
            return 1
        raise
    if same(mixed[1], usual[1]):
        raise CheckFailed(
            f"{subject}: {key}={other!r} in the second group changes nothing there, though {name}={other!r} for the "
            f"whole stack does",
            "Users give the head another value than the trunk, and torch's schedulers write into the groups",
            f"Read the value from the group at every update (a wrapper: group.{name}, an optimizer: group[{name!r}])",
        )
    if same(mixed[0], everywhere[0]) and not same(mixed[0], usual[0]):
        raise CheckFailed(
            f"{subject}: {key}={other!r} in the second group acts on the first one as well",
            "Users give the head another value than the trunk",
            f"Read the value from each group, not from the last or from the object (group.{name}, group[{name!r}])",
        )
    return 1


def _observed(subject: StackSubject, spec: Any, first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
    """Return, for each of two groups, the weights after a few steps and the tensors of their state."""
    model: Halves = subject.model()
    groups = [{**group, **values} for group, values in zip(model.groups(), (first, second), strict=True)]
    opt = subject.stack(groups, spec)
    subject.train(model, opt, 0, FEW)
    return [
        [(p.detach().clone(), [v for v in opt.state.get(p, {}).values() if isinstance(v, torch.Tensor)]) for p in half]
        for half in (model.left.parameters(), model.right.parameters())
    ]


def _another(hyperparameter: Hyperparameter, value: Any) -> Any:
    """Return a value that differs from this one and is allowed, or None."""
    candidates: list[Any] = []
    if isinstance(value, Schedule):
        return None
    if hyperparameter.choices is not None:
        candidates = list(hyperparameter.choices)
    elif isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, int):
        candidates = [value + 1, value - 1]
    elif isinstance(value, float):
        candidates = [value / 2, value * 2, 0.01, 0.5]
    elif isinstance(value, tuple) and value and all(isinstance(item, float) for item in value):
        candidates = [tuple(item * 0.9 for item in value)]
    for candidate in candidates:
        try:
            if hyperparameter.validate(candidate, where=hyperparameter.name) != value:
                return candidate
        except HyperparameterError:
            continue
    return None
