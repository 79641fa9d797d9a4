"""`plateau` lowers the rate as torch's ReduceLROnPlateau does, over any schedule, and is in the checkpoint."""

import copy
import itertools
import math
import pickle
import random

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import metaopt


def build(rate: str, plateau: str = "", total_steps: int | None = None) -> tuple[torch.nn.Parameter, metaopt.Stack]:
    x = torch.nn.Parameter(torch.ones(2))
    part = f"plateau('val_loss', {plateau})" if plateau else "plateau('val_loss', patience=1, factor=0.5)"
    return x, metaopt.build([x], f"adamw(lr={rate}) | {part}", total_steps=total_steps)


def step(x: torch.nn.Parameter, opt: torch.optim.Optimizer) -> None:
    x.grad = torch.ones(2)
    opt.step()


def metrics(seed: int, number: int = 60) -> list[float]:
    """Return a loss that falls, rests and jumps, with values that are not finite among them."""
    drawn, value, found = random.Random(seed), 1.0, []
    for _ in range(number):
        value *= drawn.choice([1.0, 1.0, 0.99995, 0.9998, 0.9, 1.1])
        found.append(drawn.choice([value] * 12 + [math.nan, math.inf, -value]))
    return found


SETTINGS = [
    dict(zip(("mode", "threshold_mode", "patience", "cooldown"), chosen, strict=True))
    for chosen in itertools.product(("min", "max"), ("rel", "abs"), (0, 2), (0, 3))
]


def text(settings: dict) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


@pytest.mark.parametrize("settings", SETTINGS, ids=text)
def test_the_rate_is_that_of_torch_on_the_same_numbers(settings: dict) -> None:
    settings = {**settings, "factor": 0.3, "min_lr": 1e-6, "eps": 1e-9, "threshold": 1e-4}
    for seed in range(4):
        x, opt = build("0.1", text(settings))
        reference = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        scheduler = ReduceLROnPlateau(reference, **settings)
        rates = []
        for value in metrics(seed):
            step(x, opt)
            opt.record(val_loss=value)
            scheduler.step(value)
            rates.append(opt.param_groups[0]["lr"])
            assert rates[-1] == reference.param_groups[0]["lr"]
        assert len(set(rates)) > 2


def test_after_a_warm_up_and_along_a_cosine_the_schedule_goes_on_by_the_factor() -> None:
    for rate, schedule in (
        ("warmup(0.1, 10)", lambda t: 0.1 * min(t / 10, 1.0)),
        (
            "warmup(cosine(0.1), 10)",
            lambda t: 0.1 * t / 10 if t < 10 else 0.05 * (1 + math.cos(math.pi * (t - 10) / 90)),
        ),
    ):
        x, opt = build(rate, total_steps=100)
        falls = 0
        for t in range(60):
            assert opt.param_groups[0]["lr"] == pytest.approx(schedule(t) * 0.5**falls, rel=1e-12)
            step(x, opt)
            if t % 5 == 4:
                opt.record(val_loss=1.0)  # the first is the best, and every second of the others makes the rate fall
                falls = (t // 5) // 2
        assert falls == 5
        assert "warmup" in str(opt.spec)
        assert str(opt.spec).endswith(" | plateau(metric='val_loss', patience=1, factor=0.5)")


def test_during_a_warm_up_from_zero_nothing_falls_below_nothing() -> None:
    x, opt = build("warmup(0.1, 10)", "patience=0, factor=0.5")
    opt.record(val_loss=1.0)
    opt.record(val_loss=1.0)
    assert opt.param_groups[0]["lr"] == 0.0
    step(x, opt)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_rate_that_is_a_tensor_falls_in_place() -> None:
    rate = torch.tensor(0.1)
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.wrap(torch.optim.AdamW([x], lr=rate), "plateau('loss', patience=0, factor=0.5)")
    opt.record(loss=torch.tensor(1.0))
    opt.record(loss=torch.tensor(1.0))
    assert opt.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.05)


@pytest.mark.parametrize("way", ["checkpoint", "copy", "pickle"])
@pytest.mark.parametrize("rate", ["0.1", "warmup(cosine(0.1), 5)"])
def test_everything_is_in_the_checkpoint(rate: str, way: str) -> None:
    def go_on(x: torch.nn.Parameter, opt: metaopt.Stack, values: list[float]) -> list[float]:
        found = []
        for value in values:
            step(x, opt)
            opt.record(val_loss=value)
            found.append(opt.param_groups[0]["lr"])
        return found

    settings, values = "patience=1, factor=0.5, cooldown=1, mode='max'", metrics(5)
    x, opt = build(rate, settings, total_steps=100)
    go_on(x, opt, values[:27])
    if way == "checkpoint":
        y, later = build(rate, settings, total_steps=100)
        y.data.copy_(x.data)
        later.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert later.param_groups[0]["plateau.best"] == opt.param_groups[0]["plateau.best"]
    else:
        y, later = copy.deepcopy((x, opt)) if way == "copy" else pickle.loads(pickle.dumps((x, opt)))
    assert later.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    rates = go_on(x, opt, values[27:])
    assert go_on(y, later, values[27:]) == rates and len(set(rates)) > 2
    assert torch.equal(x, y)


def test_only_the_groups_of_its_part_fall() -> None:
    model = torch.nn.Linear(2, 2)
    plateau = "plateau('loss', patience=0, factor=0.1)"
    opt = metaopt.build(model, f"partition({{'weight': sgd(lr=1.0) | {plateau}, '*': sgd(lr=1.0)}})")
    for _ in range(2):
        opt.record(loss=1.0)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 1.0]


def test_each_group_falls_from_its_own_rate() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": scale} for scale in (1.0, 0.01)]
    opt = metaopt.build(
        groups, "sgd(lr=cosine(1.0)) | plateau('loss', patience=0, factor=0.1, min_lr=0.05)", total_steps=9
    )
    for _ in range(2):
        opt.record(loss=1.0)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.1, 0.01])
    opt.record(loss=1.0)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.05, 0.01])


def test_another_name_and_a_part_reset_change_nothing_or_everything() -> None:
    _, opt = build("cosine(0.1)", "patience=0, factor=0.5", total_steps=10)
    opt.record(other=1.0)
    opt.record(other=1.0)
    assert opt.param_groups[0]["lr"] == 0.1 and opt.param_groups[0]["plateau.best"] == math.inf
    opt.record(val_loss=1.0)
    opt.record(val_loss=2.0)
    assert opt.param_groups[0]["lr"] == 0.05
    opt.reset_state("counters")
    assert opt.param_groups[0]["lr"] == 0.1 and opt.param_groups[0]["plateau.best"] == math.inf


def test_a_rate_that_somebody_else_has_set_is_a_conflict() -> None:
    _, opt = build("cosine(0.1)", "patience=0", total_steps=10)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    opt.record(val_loss=1.0)
    opt.param_groups[0]["lr"] = 3.0
    with pytest.raises(metaopt.ScheduleConflict):
        opt.record(val_loss=1.0)


def test_the_explanation_tells_the_rate_that_is_left() -> None:
    _, opt = build("cosine(0.1)", "patience=0, factor=0.5", total_steps=10)
    opt.record(val_loss=1.0)
    opt.record(val_loss=1.0)
    (row,) = metaopt.explain(opt).rows
    assert row.rate == row.peak == pytest.approx(0.05)


def test_a_base_without_a_rate_is_told() -> None:
    class NoRate(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {})

        def step(self, closure=None):
            return None

    opt = metaopt.wrap(NoRate([torch.nn.Parameter(torch.ones(2))]), "plateau('loss', patience=0)")
    opt.record(loss=1.0)
    with pytest.raises(metaopt.StepError, match="no learning rate"):
        opt.record(loss=1.0)


@pytest.mark.parametrize("bad", [{"plateau.best": 1}, {"plateau.worse": 1.5}])
def test_a_checkpoint_with_another_kind_of_number_is_refused(bad: dict) -> None:
    _, opt = build("0.1")
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(bad)
    with pytest.raises(metaopt.CheckpointError, match=next(iter(bad))):
        opt.load_state_dict(saved)
