"""Several problems, one answer: profiles, ranks and evaluations saved, and no winner that the studies do not carry."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from benchmarks import recompute, recompute_overall
from metaopt.errors import ProblemError
from metaopt.lab import profiles
from metaopt.lab.comparison import run_comparison
from metaopt.lab.overall import Overall
from metaopt.lab.plan import plan_comparison
from metaopt.lab.savings import evaluations_saved

INF = math.inf
# two problems, three contenders, three studies
TIMES = [
    np.array([[10.0, 12.0, 11.0], [22.0, 20.0, 30.0], [INF, INF, 40.0]]),
    np.array([[50.0, INF, 40.0], [20.0, 25.0, 21.0], [21.0, 84.0, 90.0]]),
]


def test_the_profile_is_that_of_the_paper() -> None:
    found = profiles.ratios(TIMES)
    # medians: 11, 22, missed; 50, 21, 84
    np.testing.assert_allclose(found, [[1.0, 2.0, INF], [50 / 21, 1.0, 4.0]])
    taus = np.array([1.0, 2.0, 2.5, 4.0])
    np.testing.assert_allclose(
        profiles.profile(found, taus), [[0.5, 0.5, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5]]
    )


def test_the_score_is_the_area_under_the_profile() -> None:
    found = profiles.ratios(TIMES)
    taus = np.linspace(1.0, 4.0, 30_001)
    area = profiles.profile(found, taus).mean(axis=1)
    np.testing.assert_allclose(profiles.scores(found), area, atol=1e-4)


def test_a_target_that_nobody_met_is_not_solved_by_anyone() -> None:
    found = profiles.ratios([*TIMES, np.full((3, 3), INF)])
    assert np.isinf(found[2]).all()
    np.testing.assert_allclose(profiles.scores(found), profiles.scores(profiles.ratios(TIMES)) * 2 / 3)


def drawn(random: Any, effect: float, contenders: int) -> list[Any]:
    """Return times of ten studies on eight problems; the first contender is faster by an effect, all are censored."""
    times = []
    for _ in range(8):
        study = 0.2 * random.normal(size=(1, 10)) + 0.4 * random.normal()
        time = np.ceil(8.0 * np.exp(0.3 * random.normal(size=(contenders, 10)) + study))
        time[0] = np.ceil(time[0] * math.exp(-effect))
        times.append(np.where(time > 20, INF, time))
    return times


def test_no_winner_is_named_without_a_difference_and_the_right_one_with_a_large_one() -> None:
    random = np.random.default_rng(0)
    assert sum(profiles.winner(drawn(random, 0.0, 2)) is not None for _ in range(40)) <= 4
    assert sum(profiles.winner(drawn(random, 0.5, 3)) == 0 for _ in range(10)) >= 9


def test_the_order_of_the_contenders_does_not_matter() -> None:
    times = drawn(np.random.default_rng(1), 0.2, 3)
    by, p = profiles.difference(times, 0, 2)
    back, p_back = profiles.difference([problem[::-1] for problem in times], 2, 0)
    assert (by.value, p) == pytest.approx((back.value, p_back))
    other, _ = profiles.difference(times, 2, 0)
    assert (other.value, other.low) == pytest.approx((-by.value, -by.high))


@pytest.fixture(scope="module")
def overall(tmp_path_factory: pytest.TempPathFactory) -> Overall:
    out = tmp_path_factory.mktemp("overall")
    options: dict[str, Any] = {"specs": ["sgd", "adam", "sgd(momentum=0.9)"], "studies": 3, "trials": 1, "steps": 12}
    found = []
    for number, problem in enumerate(("noisy_quadratic(dimensions=3)", "rosenbrock")):
        found.append(run_comparison(plan_comparison(problem=problem, out=out / str(number), **options)))
    return Overall(found, out)


def test_the_numbers_over_all_problems_are_those_of_the_comparisons(overall: Overall) -> None:
    ranks = []
    for comparison in overall.comparisons:
        losses = np.array([c.losses for c in comparison.contenders])
        ranks.append(
            [[1 + (study < loss).sum() + ((study == loss).sum() - 1) / 2 for loss in study] for study in losses.T]
        )
    expected = np.mean(ranks, axis=(0, 1))
    np.testing.assert_allclose([rank.value for rank in overall.ranks], expected)
    first = overall.comparisons[0]
    saved = [evaluations_saved(c.contenders[1].runs, c.contenders[0].runs) / c.plan.budget for c in overall.comparisons]
    assert overall.saved[0] is None and overall.saved[1] is not None
    assert overall.saved[1].value == pytest.approx(np.mean(saved))
    assert first.plan.problem == "noisy_quadratic(dimensions=3)"
    for estimate in (*overall.scores, *overall.ranks):
        assert estimate.low <= estimate.value <= estimate.high


def test_every_number_over_all_problems_follows_from_the_tables_of_trials(overall: Overall) -> None:
    for comparison in overall.comparisons:
        comparison.save()
    overall.save()
    for comparison in overall.comparisons:
        assert list(recompute.disagreements(comparison.folder)) == []
    assert list(recompute.disagreements_over_all(overall.out)) == []


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 0.6])
def test_a_winner_is_named_where_the_definitions_name_one(effect: float) -> None:
    times = drawn(np.random.default_rng(3), effect, 2)
    found = [
        {
            str(n): {
                "reached": row.tolist(),
                "losses": row.tolist(),
                "shares_saved": [0.0] * 10,
                "verdict": None if n == 0 else {},
            }
            for n, row in enumerate(problem)
        }
        for problem in times
    ]
    winner, numbers = profiles.winner(times), recompute_overall.of_problems(found)
    assert numbers["winner"] == (None if winner is None else str(winner)) == ("0" if effect else None)
    for score, contender in zip(profiles.score_estimates(times), numbers["contenders"], strict=True):
        assert contender["score"] == pytest.approx(asdict(score), rel=1e-6)


def test_report_and_picture_say_what_the_numbers_say(overall: Overall) -> None:
    text = str(overall)
    assert "| stack | score [95%] | solved | mean rank [95%] | evaluations saved [95%] |" in text
    assert ("No overall winner" in text) == (overall.winner is None)
    axes = overall.figure().axes[0]
    for position, line in enumerate(axes.get_lines()):
        assert line.get_ydata()[0] == profiles.profile(profiles.ratios(overall.times), np.ones(1))[position, 0]
    with pytest.raises(ProblemError, match="must be profile"):
        overall.figure("curves")


def test_other_contenders_on_another_problem_are_refused(overall: Overall, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="two or more"):
        Overall(overall.comparisons[:1], tmp_path)
