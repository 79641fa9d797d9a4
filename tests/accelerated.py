"""The form that an accelerator's updates have, on a processor."""

import pytest

from metaopt import flat_memory, flat_rules, multi_tensor
from metaopt.engine.step import hooks
from metaopt.engine.update import change
from metaopt.engine.views import group_view, rows

ASKING = (multi_tensor, flat_memory, flat_rules, change, rows, group_view, hooks)


def take_for_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the processor for an accelerator; what `metaopt.distributed.shards` asks is asked of `multi_tensor`."""
    for module in ASKING:
        monkeypatch.setattr(module, "on_accelerator", bool)
