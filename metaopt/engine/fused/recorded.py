"""What a wrapper does to the update, found out beforehand, if it only applies rules of elements. Touches no tensor."""

from collections.abc import Mapping
from typing import Any, cast

from metaopt.engine.chain import ParamGroup
from metaopt.group import Group
from metaopt.rules import Rule
from metaopt.wrapper import Wrapper

Applied = list[tuple[Rule, Mapping[str, Any]]]


def rules_on_update(wrapper: Wrapper, group: ParamGroup, updates: int) -> Applied | None:
    """Return the rules that `update_rules` applies, with their numbers; None if it does anything else.

    It is called with a group that has numbers only. If it fails, `on_update` is called with a real one, where it sees
    all, or where its failure belongs.
    """
    if not wrapper.has_rules:
        return None
    recorder = _Recorder(wrapper, group, updates)
    try:
        wrapper.update_rules(cast(Group, recorder))
    except Exception:
        return None
    return recorder.applied


class _Recorder:
    """A group with numbers and rules, and without tensors: what is not here cannot be known beforehand."""

    def __init__(self, wrapper: Wrapper, group: ParamGroup, updates: int) -> None:
        self._wrapper, self._group = wrapper, group
        self.updates = updates
        self.applied: Applied = []

    def apply(self, rule: Rule, numbers: Mapping[str, Any]) -> None:
        self.applied.append((rule, rule.numbers_of(self, numbers)))

    @property
    def base_lr(self) -> Any:
        return self._group["lr"]

    @property
    def maximize(self) -> bool:
        return bool(self._group.get("maximize", False))

    def __getattr__(self, name: str) -> Any:
        wrapper = self.__dict__["_wrapper"]
        if name in wrapper.hyperparameters or name in wrapper.counters:
            return self._group[f"{wrapper.label}.{name}"]
        raise AttributeError(name)
