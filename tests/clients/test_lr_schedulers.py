"""Every scheduler of torch.optim.lr_scheduler drives a stack as it drives the bare optimizer."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import assert_same_weights, small_model, train
from torch.optim import lr_scheduler, swa_utils

import metaopt

STEPS = 24
SPEC = "clip_grad_norm(1e9) | lookahead(k=3, alpha=1.0)"
Scheduler = lr_scheduler.LRScheduler
Make = Callable[[torch.optim.Optimizer], Any]


def _decay(epoch: int) -> float:
    return 0.95**epoch


def _sequence(opt: torch.optim.Optimizer) -> Scheduler:
    first = lr_scheduler.LinearLR(opt, 0.1, 1.0, total_iters=5)
    second = lr_scheduler.CosineAnnealingLR(opt, STEPS - 5)
    return lr_scheduler.SequentialLR(opt, [first, second], milestones=[5])


def _chain(opt: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.3, total_iters=7), lr_scheduler.ExponentialLR(opt, 0.97)]
    )


# one way to make each class that torch offers; a class that is missing here fails the first test
RECIPES: dict[str, Make] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, _decay),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, _decay),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 5, gamma=0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [4, 9], gamma=0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.2, total_iters=6),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, total_iters=10),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=STEPS, power=2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, STEPS, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 5, T_mult=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=STEPS + 1),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 0.1, step_size_up=4, cycle_momentum=True),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=2),
    "SequentialLR": _sequence,
    "ChainedScheduler": _chain,
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.001, anneal_epochs=7),
}
every_scheduler = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in RECIPES.items()])


def offered() -> set[str]:
    classes = {**vars(lr_scheduler), **vars(swa_utils)}
    return {
        name
        for name, value in classes.items()
        if inspect.isclass(value)
        and (issubclass(value, Scheduler) or name == "ChainedScheduler")
        and not name.startswith("_")
        and name != "LRScheduler"
    }


def test_every_scheduler_that_torch_offers_is_tried() -> None:
    assert offered() == RECIPES.keys()


def sgd(model: torch.nn.Module, lr: Any = 0.05) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": copy.copy(lr)}, {"params": others}], lr=lr, momentum=0.9)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


class Follow:
    """What follows each step of the optimizer: the scheduler's own step, and a note of what it drives."""

    def __init__(self, scheduler: Any, opt: torch.optim.Optimizer, count: int = 0) -> None:
        self.scheduler, self.opt, self.count = scheduler, opt, count
        self.seen: list[Any] = []

    def __call__(self) -> None:
        self.count += 1
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step([3.0, 2.0, 2.0, 2.0, 2.0, 2.5, 1.0][self.count % 7])
        else:
            self.scheduler.step()
        self.seen.append([(float(g["lr"]), g.get("momentum"), g.get("betas")) for g in self.opt.param_groups])


@pytest.mark.parametrize("base", [sgd, adam])
@every_scheduler
def test_rates_and_weights_are_those_of_the_bare_optimizer(make: Make, base: Any) -> None:
    model, twin = small_model(), small_model()
    opt, bare = metaopt.wrap(base(model), SPEC), base(twin)
    found, expected = Follow(make(opt), opt), Follow(make(bare), bare)
    train(model, opt, range(STEPS), after=found)
    train(twin, bare, range(STEPS), after=expected)
    assert found.seen == expected.seen
    assert len({str(x) for x in found.seen}) > 1
    assert_same_weights(model, twin)


@every_scheduler
def test_a_scheduler_bound_to_the_base_before_it_was_wrapped_still_drives(make: Make) -> None:
    model, twin = small_model(), small_model()
    base, bare = sgd(model), sgd(twin)
    scheduler, plain = make(base), make(bare)
    opt = metaopt.wrap(base, SPEC)
    found, expected = Follow(scheduler, opt), Follow(plain, bare)
    train(model, opt, range(STEPS), after=found)
    train(twin, bare, range(STEPS), after=expected)
    assert found.seen == expected.seen
    assert_same_weights(model, twin)


@every_scheduler
def test_a_run_resumed_with_its_scheduler_goes_on_as_if_uninterrupted(make: Make) -> None:
    model = small_model()
    opt = metaopt.wrap(sgd(model), SPEC)
    follow = Follow(make(opt), opt)
    train(model, opt, range(11), after=follow)
    weights, state, schedule = copy.deepcopy((model.state_dict(), opt.state_dict(), follow.scheduler.state_dict()))
    train(model, opt, range(11, STEPS), after=follow)

    again = small_model(1)
    resumed = metaopt.wrap(sgd(again), SPEC)
    late = Follow(make(resumed), resumed, count=11)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    late.scheduler.load_state_dict(schedule)
    train(again, resumed, range(11, STEPS), after=late)
    assert late.seen == follow.seen[11:]
    assert_same_weights(again, model)


@every_scheduler
def test_a_scheduler_made_after_a_load_does_what_it_does_to_the_bare_optimizer(make: Make) -> None:
    runs = []
    for wrapped in (True, False):
        model = small_model()
        opt: Any = metaopt.wrap(sgd(model), SPEC) if wrapped else sgd(model)
        train(model, opt, range(11), after=Follow(make(opt), opt))
        fresh = metaopt.wrap(sgd(model), SPEC) if wrapped else sgd(model)
        fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
        late = Follow(make(fresh), fresh)
        train(model, fresh, range(11, STEPS), after=late)
        runs.append((late.seen, model))
    assert runs[0][0] == runs[1][0]
    assert_same_weights(runs[0][1], runs[1][1])


@every_scheduler
def test_model_stack_and_scheduler_copied_together_go_on_together(make: Make) -> None:
    model = small_model()
    opt = metaopt.wrap(sgd(model), SPEC)
    follow = Follow(make(opt), opt)
    train(model, opt, range(7), after=follow)
    copied, other, late = copy.deepcopy((model, opt, follow))
    assert late.scheduler.optimizer is other
    train(model, opt, range(7, STEPS), after=follow)
    train(copied, other, range(7, STEPS), after=late)
    assert late.seen == follow.seen
    assert_same_weights(copied, model)


@every_scheduler
def test_a_tensor_rate_is_driven_in_place(make: Make) -> None:
    model, twin = small_model(), small_model()
    opt, bare = metaopt.wrap(sgd(model, lr=torch.tensor(0.05)), SPEC), sgd(twin, lr=torch.tensor(0.05))
    rates = [entry["lr"] for entry in opt.param_groups]
    found, expected = Follow(make(opt), opt), Follow(make(bare), bare)
    train(model, opt, range(STEPS), after=found)
    train(twin, bare, range(STEPS), after=expected)
    assert found.seen == expected.seen
    kept = [entry["lr"] for entry in bare.param_groups]
    assert [a is b for a, b in zip(rates, [e["lr"] for e in opt.param_groups], strict=True)] == [
        isinstance(rate, torch.Tensor) for rate in kept
    ]
    assert_same_weights(model, twin)


@every_scheduler
def test_a_pull_of_lookahead_disturbs_no_rate(make: Make) -> None:
    model, twin = small_model(), small_model()
    opt, bare = metaopt.wrap(sgd(model), "lookahead(k=2, alpha=0.5)"), sgd(twin)
    slow = [p.detach().clone() for p in twin.parameters()]
    found, expected = Follow(make(opt), opt), Follow(make(bare), bare)

    def pull_by_hand() -> None:
        expected()
        if expected.count % 2 == 0:
            with torch.no_grad():
                for p, held in zip(twin.parameters(), slow, strict=True):
                    held.lerp_(p, 0.5)
                    p.copy_(held)

    train(model, opt, range(STEPS), after=found)
    train(twin, bare, range(STEPS), after=pull_by_hand)
    assert found.seen == expected.seen
    assert_same_weights(model, twin)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"ReduceLROnPlateau"}))
def test_a_second_driver_of_a_scheduled_rate_is_named(name: str) -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "sgd(lr=cosine(0.05), momentum=0.9)", total_steps=STEPS)
    with pytest.raises(metaopt.ScheduleConflict, match=r"opt\.scheduler\(\)"):
        train(model, opt, range(STEPS), after=Follow(RECIPES[name](opt), opt))


def test_the_reporting_scheduler_reports_what_the_stack_s_schedule_does() -> None:
    model, twin = small_model(), small_model()
    opt, bare = (
        metaopt.build(m.named_parameters(), "sgd(lr=warmup(cosine(0.05), 5), momentum=0.9)", total_steps=STEPS)
        for m in (model, twin)
    )
    scheduler = opt.scheduler()
    seen = []

    def after() -> None:
        scheduler.step()
        seen.append(scheduler.get_last_lr())
        assert scheduler.get_last_lr() == [entry["lr"] for entry in opt.param_groups]

    train(model, opt, range(STEPS), after=after)
    train(twin, bare, range(STEPS))
    assert len({tuple(rates) for rates in seen}) > STEPS // 2
    assert_same_weights(model, twin)
    again = opt.scheduler()
    again.load_state_dict(scheduler.state_dict())
    assert again.last_epoch == STEPS
    assert isinstance(scheduler, Scheduler)
