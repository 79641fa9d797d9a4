"""What an extra brings is not required, and where it is missing one error says what to install."""

import tomllib
from pathlib import Path

import pytest
from documents import ROOT, in_forks

# finds no module of these names, as where they are not installed
WITHOUT = """
import importlib.util, sys
find, missing = importlib.util.find_spec, {missing!r}
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in missing else find(name, *more)
sys.modules.update(dict.fromkeys(missing))
{program}
"""


def test_only_torch_and_what_the_core_needs_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.partition(">")[0] for line in project["dependencies"]}
    assert names == {"torch", "pluggy", "filelock"}
    assert {"tensorboard", "cli", "lab", "all"} <= project["optional-dependencies"].keys()


MISSING = (
    (["typer"], "import metaopt.__main__ as m; m.main()", "the command line needs typer"),
    (
        ["tensorboard"],
        "import metaopt, torch; metaopt.build([torch.nn.Parameter(torch.ones(1))], 'sgd', log='runs')",
        "the log of TensorBoard needs tensorboard",
    ),
    (["scipy"], "from metaopt.lab.search import points; points(1, 2, 0)", "a search needs scipy"),
    (["sklearn"], "import metaopt; next(metaopt.digits().batches(0))", "the problem digits needs scikit-learn"),
)
TRAINS = (
    "import metaopt, torch; x = torch.nn.Parameter(torch.ones(1)); opt = metaopt.build([x], 'sgd | lookahead'); "
    "x.sum().backward(); opt.step()"
)


@pytest.mark.slow
def test_what_is_missing_is_one_error_that_says_what_to_install(tmp_path: Path) -> None:
    programs = [WITHOUT.format(missing=missing, program=program) for missing, program, _ in MISSING]
    for (status, _, errors), (_, _, told) in zip(in_forks(programs, tmp_path), MISSING, strict=True):
        assert status != 0
        last = errors.strip().splitlines()[-1]
        assert f"{told}, which is not installed: pip install 'metaopt-torch[" in last


@pytest.mark.slow
def test_a_stack_trains_without_any_extra(tmp_path: Path) -> None:
    extras = ["typer", "rich", "tensorboard", "scipy", "sklearn", "matplotlib"]
    ((status, _, errors),) = in_forks([WITHOUT.format(missing=extras, program=TRAINS)], tmp_path)
    assert status == 0, errors
