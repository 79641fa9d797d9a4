"""On a device that is not the processor, emulated: no wait, nothing left to a kernel that was not tried, no capture."""

from pathlib import Path
from typing import Any

import emulated_runs
import emulation
import pytest
import warm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulation.compiler() is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module", autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--emulated-device"):
        pytest.skip("tested with --emulated-device")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation.built(tmp_path_factory.mktemp("emulation"))


def on_device(library: Path, function: Any, *arguments: Any) -> Any:
    return warm.called(emulated_runs.run, library, function.__name__, *arguments)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("AdamW", "clip_grad_norm(0.1) | adamw(lr=0.01)"),
        ("Adam", "clip_grad_norm(0.1) | adam(lr=0.01, amsgrad=True)"),
        ("SGD", "clip_grad_norm(0.1) | sgd(lr=0.1, momentum=0.9)"),
    ],
)
def test_a_factor_is_handed_to_a_kernel_only_if_it_divides_by_it(
    library: Path, kind: str, spec: str, ignored: bool
) -> None:
    takes, apart = on_device(library, emulated_runs.factor, kind, spec, ignored)
    assert takes is not ignored
    assert apart < 1e-6


@pytest.mark.parametrize("spec", ["adamw(lr=0.01)", "clip_grad_norm(0.1) | sgd(lr=0.1, momentum=0.9)"])
def test_a_stack_is_built_without_fused_kernels_where_a_device_has_none(library: Path, spec: str) -> None:
    fused, apart = on_device(library, emulated_runs.without_kernels, spec)
    assert fused is None
    assert apart < 1e-6


@pytest.mark.parametrize("spec", ["clip_grad_norm(0.1) | adamw(lr=0.01)", "clip_grad_norm(0.1) | sgd(lr=0.1)"])
def test_gradients_on_two_kinds_of_devices_are_multiplied(library: Path, spec: str) -> None:
    takes, apart = on_device(library, emulated_runs.beside_the_processor, spec)
    assert takes is False
    assert apart < 1e-6


def test_no_update_waits_for_the_device_but_of_torch_s_own_and_for_averages_in_main_memory(library: Path) -> None:
    found = on_device(library, emulated_runs.waits)
    own = {name: what for name, what in found.items() if "device='cpu'" not in name}
    assert {name.partition("(")[0] for name in own} <= {"adafactor", "asgd", "lbfgs"}, own


def test_no_part_is_captured_into_a_graph(library: Path) -> None:
    tried, wrong = on_device(library, emulated_runs.captured)
    assert tried > 40
    assert wrong == {}


def test_the_rate_of_a_base_without_state_is_not_read(library: Path) -> None:
    assert on_device(library, emulated_runs.rates) == []
