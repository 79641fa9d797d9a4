"""Every example runs, and Rosenbrock ends where it should."""

import re
from pathlib import Path

import page_runner
import pytest
import warm

pytestmark = pytest.mark.slow

EXAMPLES = {file.stem: file for file in sorted((Path(__file__).parent.parent / "examples").glob("*.py"))}
# what these print is looked at below
LOOKED_AT = {
    "compare_charlm",
    "evaluate_on_averages",
    "outer_momentum",
    "partition_a_model",
    "rosenbrock",
    "sam_ends_where_it_is_flat",
    "xor",
}


def run(name, folder, *arguments):
    return warm.printed(page_runner.run_program, str(EXAMPLES[name]), *arguments, folder=folder)


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - LOOKED_AT))
def test_the_example_runs_and_prints(name, tmp_path):
    assert run(name, tmp_path).strip()


def test_sam_ends_where_the_loss_is_less_curved(tmp_path):
    output = run("sam_ends_where_it_is_flat", tmp_path)
    plain, sam = (float(value) for value in re.findall(r"largest curvature (\S+)", output))
    assert sam < 0.7 * plain


def test_partition_gives_each_part_its_own_parameters(tmp_path):
    output = run("partition_a_model", tmp_path)
    alone, parted = (float(value) for value in re.findall(r"test loss (\S+)", output))
    # a model that always says the same is at 3.1
    assert max(alone, parted) < 3.0 and alone != parted
    assert "'blocks.* & matrix': 4 tensors at lr 0.02" in output and "'*': 14 tensors at lr 0.01" in output


def test_outer_momentum_ends_at_the_known_point(tmp_path):
    output = run("outer_momentum", tmp_path)
    ends = [(float(x), float(y)) for x, y in re.findall(r"ends at \((\S+), (\S+)\)", output)]
    assert ends[1] == ends[2]
    assert ends[3] == pytest.approx((0.982046, 0.964284), abs=2e-6)


def test_averages_are_evaluated_inside_one_run(tmp_path):
    output = run("evaluate_on_averages", tmp_path)
    losses = {name: float(loss) for name, loss in re.findall(r"(\w+) +validation loss ([\d.]+)", output)}
    assert losses["lookahead"] < 0.9 * losses["fast"]
    assert losses["ema"] < 0.9 * losses["fast"]


def test_a_comparison_trains_every_contender_and_says_what_so_little_can_show(tmp_path):
    output = run("compare_charlm", tmp_path, "--short")
    contenders = re.findall(r"^stack: (.+?); lr", output, flags=re.MULTILINE)
    assert contenders[0] == "adamw(weight_decay=0.1)" and len(contenders) == 4
    assert [c.split(" | ")[1].partition("(")[0] for c in contenders[1:]] == ["lookahead", "outer", "ema"]
    assert "no difference of any size could be shown" in output
    assert (tmp_path / "runs/compare_charlm/report.md").exists()


def test_rosenbrock_ends_at_the_known_points_and_draws(tmp_path):
    output = run("rosenbrock", tmp_path)
    ends = {name: (float(x), float(y)) for name, x, y in re.findall(r"(\w+) +ends at \((\S+), (\S+)\)", output)}
    assert ends["SGD"] == pytest.approx((0.242146, 0.055676), abs=2e-6)
    assert ends["momentum"] == pytest.approx((0.958858, 0.919240), abs=2e-6)
    assert ends["Adam"] == pytest.approx((0.411228, 0.166267), abs=2e-6)
    # chaotic: the last bits of the square root decide where it goes
    assert ends["RMSprop"] == pytest.approx((0.7795, 0.5940), abs=1e-2)
    assert (tmp_path / "rosenbrock.png").stat().st_size > 10_000


def test_every_optimizer_learns_xor(tmp_path):
    output = run("xor", tmp_path)
    names = [line.split()[0] for line in output.splitlines()]
    assert names == ["SGD", "momentum", "RMSprop", "Adam", "AdamW"]
    losses = [float(value) for value in re.findall(r"\bloss (\S+)", output)]
    assert len(losses) == 5 and max(losses) < 0.5
