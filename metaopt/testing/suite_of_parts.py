"""The checks as a pytest test: one line in a plugin's tests."""

from collections.abc import Callable
from typing import Any

from metaopt.registry import registry
from metaopt.testing.outcome import Check
from metaopt.testing.proving import Case, cases, outcome


def suite(*names: str, plugin: str | None = None, device: str = "cpu", **given: Any) -> Callable[[Case, Check], None]:
    """Return a test, parametrised over every check of these parts, for pytest to collect.

    `test_pull = suite("pull", plugin="pull")` is a whole test file. A name may be a part as text, `"pull(k=2)"`.
    `plugin` is the module that offers the parts, where no entry point does. Fields of `metaopt.Example` may be given:
    `reference=pull_on_plain_tensors`. Raises MetaoptError.
    """
    import pytest

    if plugin is not None:
        registry.load_plugin_module(plugin)
    pairs = [(case, check) for name in names for case in cases(name, device=device, **given) for check in case.checks]

    @pytest.mark.parametrize(("case", "check"), pairs, ids=[f"{case.name}-{check.name}" for case, check in pairs])
    def test_part(case: Case, check: Check) -> None:
        result = outcome(case, check)
        if result.bad:
            pytest.fail(result.reason, pytrace=False)
        if result.status != "passed":
            pytest.skip(f"{result.status}: {result.reason}")

    return test_part
