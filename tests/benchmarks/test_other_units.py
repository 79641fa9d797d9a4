"""The measurement of false verdicts trains what `metaopt compare` trains."""

import pytest

pytest.importorskip("scipy")
from benchmarks.other_units import SideBySide, compare_pairs, verdict_of
from metaopt.lab.named import problem_named
from metaopt.lab.trial import Trial, run_trial


@pytest.mark.parametrize(("problem", "steps"), [("xor", 30), ("digits", 8)])
def test_runs_side_by_side_are_the_lab_s_own_runs(problem: str, steps: int) -> None:
    seeds, rates = [3, 3, 4], [0.01, 0.1, 0.05]
    running = SideBySide(problem_named(problem), seeds, rates)
    for _ in range(steps):
        running.update()
    for split in ("validation", "test"):
        alone = [
            run_trial(Trial(problem, f"sgd(lr={rate}, momentum=0.9)", seed, steps, steps, 1, "cpu", ""))[split]["loss"]
            for seed, rate in zip(seeds, rates, strict=True)
        ]
        assert running.losses(split) == pytest.approx(alone, rel=1e-4)


def test_pairs_are_the_same_one_by_one_and_together() -> None:
    xor = problem_named("xor")
    together = compare_pairs(xor, 4, 2, 5, studies=3)
    assert together[1]["rates"] == compare_pairs(xor, 5, 1, 5, studies=3)[0]["rates"]
    assert len(together[0]["losses"]) == 2 and len(together[0]["losses"][0]) == 3
    assert verdict_of(together[0]) == ("no difference shown", False)
