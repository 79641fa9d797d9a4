"""Rules of practice: rates for another batch size, and what `metaopt.explain` says of settings for another base."""

import json
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import metaopt
from metaopt.cli import main


def codes(optimizer: torch.optim.Optimizer, **more: int) -> set[str]:
    return {finding.code for finding in metaopt.explain(optimizer, **more).findings}


def matrix() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(4, 3))


def stack(spec: str, total_steps: int | None = None) -> metaopt.Stack:
    return metaopt.build([matrix()], spec, total_steps=total_steps)


def only(optimizer: torch.optim.Optimizer, code: str, **more: int) -> str:
    """Return the one finding there is, in words."""
    (found,) = metaopt.explain(optimizer, **more).findings
    assert found.code == code and found.fix
    return str(found)


# ---- the rate for another batch size


@pytest.mark.parametrize(("rule", "expected"), [("linear", 0.1 * 8192 / 256), ("sqrt", 0.1 * math.sqrt(8192 / 256))])
def test_a_rate_grows_with_the_batch_by_the_rule(rule: str, expected: float) -> None:
    # arXiv:1706.02677 trains with 0.1 at 256 and with 3.2 at 8192
    assert metaopt.scale_lr(0.1, 256, 8192, rule=rule) == pytest.approx(expected, rel=1e-15)
    assert metaopt.scale_lr(expected, 8192, 256, rule=rule) == pytest.approx(0.1, rel=1e-15)


def test_the_linear_rule_is_the_one_without_a_name() -> None:
    assert metaopt.scale_lr(0.1, 256, 8192) == pytest.approx(3.2)


@pytest.mark.parametrize(
    ("arguments", "told", "came"),
    [
        ((0.0, 1, 2), "lr must be a number > 0", "got 0.0"),
        ((-0.1, 1, 2), "lr must be a number > 0", "got -0.1"),
        ((math.nan, 1, 2), "lr must be a number > 0", "got nan"),
        ((math.inf, 1, 2), "lr must be a number > 0", "got inf"),
        ((0.1, 0, 2), "from_batch must be a number > 0", "got 0"),
        ((0.1, 1, -2), "to_batch must be a number > 0", "got -2"),
        ((0.1, True, 2), "from_batch must be a number > 0", "got True"),
        ((0.1, "256", 2), "from_batch must be a number > 0", "got '256'"),
        ((0.1, 1, 2, "squareroot"), "rule must be one of 'linear', 'sqrt'", "got 'squareroot'"),
    ],
)
def test_what_is_no_rate_no_batch_or_no_rule_is_refused_by_name(arguments: tuple, told: str, came: str) -> None:
    with pytest.raises(metaopt.HyperparameterError) as caught:
        metaopt.scale_lr(*arguments)
    assert told in str(caught.value) and came in str(caught.value)


def test_a_schedule_is_scaled_inside() -> None:
    with pytest.raises(metaopt.HyperparameterError, match=r"cosine\(scale_lr"):
        metaopt.scale_lr(metaopt.cosine(0.1), 1, 2)


# ---- decay of a size for another base


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("adamw(lr=1e-3, weight_decay=5e-4)", "decay-of-sgd"),
        ("muon(lr=1e-3, weight_decay=1e-4)", "decay-of-sgd"),
        ("adam(lr=1e-3, weight_decay=1e-4, decoupled_weight_decay=True)", "decay-of-sgd"),
        ("decay(1e-4) | adam(lr=1e-3)", "decay-of-sgd"),
        ("sgd(lr=0.1, weight_decay=0.05)", "decay-of-adamw"),
        ("sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)", "decay-of-adamw"),
        ("adam(lr=1e-3, weight_decay=0.01)", "decay-of-adamw"),
        ("rmsprop(lr=1e-3, weight_decay=0.1)", "decay-of-adamw"),
        ("l2(0.1) | adam(lr=1e-3)", "decay-of-adamw"),
        ("l2(0.1) | sgd(lr=0.1)", "decay-of-adamw"),
    ],
)
def test_a_decay_of_the_other_kind_s_size_is_found(spec: str, code: str) -> None:
    assert "Fix: " in only(stack(spec), code)


@pytest.mark.parametrize(
    "spec",
    [
        "adamw(lr=1e-3, weight_decay=0.01)",
        "adamw(lr=1e-3, weight_decay=0.0)",
        "adamw(lr=1e-3, weight_decay=0.1)",
        "sgd(lr=0.1, momentum=0.9, weight_decay=5e-4)",
        "adam(lr=1e-3, weight_decay=1e-4)",
        "decay(0.1) | adam(lr=1e-3)",
        "l2(1e-4) | sgd(lr=0.1)",
        "l2(1e-4) | adam(lr=1e-3)",
        "lbfgs(lr=1.0)",  # what it does cannot be tried by itself, so nothing is said
    ],
)
def test_a_decay_of_the_usual_size_is_not(spec: str) -> None:
    assert codes(stack(spec)) == set()


def test_the_difference_between_adam_and_adamw_is_told() -> None:
    told = only(stack("adam(lr=1e-3, weight_decay=0.01)"), "decay-of-adamw")
    assert "Adam divides it by the gradient's size" in told and "adamw(weight_decay=0.01)" in told


def test_a_plain_torch_optimizer_is_judged_by_what_it_does() -> None:
    class Renamed(torch.optim.AdamW):
        """AdamW under a name that nobody knows."""

    assert codes(Renamed([matrix()], lr=2e-3, weight_decay=1e-4)) == {"decay-of-sgd"}
    assert codes(torch.optim.SGD([matrix()], lr=0.1, weight_decay=1e-4)) == set()


def test_only_the_group_with_the_decay_counts_and_it_is_told_once() -> None:
    groups = [{"params": [matrix()], "weight_decay": 0.0}, {"params": [matrix()]}, {"params": [matrix()]}]
    found = metaopt.explain(metaopt.build(groups, "adamw(lr=1e-3, weight_decay=1e-4)")).findings
    assert [f.code for f in found] == ["decay-of-sgd"]


def test_a_decay_by_a_wrapper_on_biases_is_found_too() -> None:
    net = torch.nn.Linear(2, 2)
    opt = metaopt.build(net.named_parameters(), "decay(0.1) | adam(lr=1e-3)")
    told = only(opt, "decay-on-1d")
    assert "bias" in told and 'no_decay="1d"' in told
    groups = metaopt.groups(net, no_decay="1d")
    assert codes(metaopt.build(groups, "decay(0.1) | adam(lr=1e-3)")) == set()


# ---- clips in vain


@pytest.mark.parametrize(
    "spec",
    [
        "clip_grad_norm(1.0) | rprop(lr=1e-3)",
        "clip_grad_value(1.0) | rprop(lr=1e-3)",
        "adaptive_grad_clip | rprop(lr=1e-3)",
        "clip_grad_norm(1.0) | adam(lr=1e-3, betas=(0.0, 0.0))",  # g / |g|: a sign, without a memory of sizes
    ],
)
def test_a_clip_before_a_base_that_ignores_the_gradient_s_scale_is_found(spec: str) -> None:
    assert "makes the same update for gradients of any size" in only(stack(spec), "clip-in-vain")


@pytest.mark.parametrize(
    "spec",
    [
        "clip_grad_norm(1.0) | sgd(lr=0.1)",
        "clip_grad_norm(1.0) | sgd(lr=0.1, momentum=0.9)",
        # Adam divides by the usual size, which a large gradient that is not cut spoils for many updates: the clip that
        # goes before it everywhere holds those back
        "clip_grad_norm(1.0) | adamw(lr=1e-3)",
        "clip_grad_norm(1e-3) | rmsprop(lr=1e-3)",
        "clip_grad_norm(1.0) | adagrad(lr=1e-3)",
        "clip_grad_norm(1.0) | adafactor(lr=1e-3)",
        "clip_grad_norm(1.0) | muon(lr=1e-3)",  # its momentum is of gradients, before any division
        "clip_grad_value(1.0) | adamw(lr=1e-3)",  # it turns the gradient
        "adaptive_grad_clip | adamw(lr=1e-3)",  # row by row: it turns the gradient too
        "centralize | adamw(lr=1e-3)",
        "skip_nonfinite(3) | adamw(lr=1e-3)",
        "accumulate(2) | adamw(lr=1e-3)",
        "sam | adamw(lr=1e-3)",
        "clip_grad_norm(1e12) | adamw(lr=1e-3)",  # it never acts
        "clip_grad_norm(1.0) | adam(lr=1e-3, eps=1e4)",  # with such an eps Adam follows the gradient's scale
    ],
)
def test_a_clip_that_acts_is_not(spec: str) -> None:
    assert codes(stack(spec)) == set()


def test_a_clip_over_several_bases_is_in_vain_only_where_all_ignore_the_scale() -> None:
    net = torch.nn.Linear(3, 3)

    def over(parts: str) -> set[str]:
        return codes(
            metaopt.build(net, f"clip_grad_norm(1.0) | partition({{'*weight': {parts}, '*': rprop(lr=1e-3)}})")
        )

    assert over("rprop(lr=1e-2)") == {"clip-in-vain"}
    assert over("sgd(lr=1e-3)") == set()


def test_a_rule_of_one_s_own_is_judged_by_what_it_does() -> None:
    class SignDescent(torch.optim.Optimizer):
        def __init__(self, params, lr: float = 1e-3) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad.sign(), alpha=-group["lr"])

    opt = metaopt.wrap(SignDescent([matrix()], lr=0.1), "clip_grad_norm(1.0)")
    assert "SignDescent makes the same update for gradients of any size" in only(opt, "clip-in-vain")


def test_trying_leaves_weights_state_hooks_and_random_numbers_alone() -> None:
    opt = stack("clip_grad_norm(1.0) | adamw(lr=1e-3, betas=(0.0, 0.0), weight_decay=1e-4)")
    opt.param_groups[0]["params"][0].grad = torch.ones(4, 3)
    opt.step()
    before, numbers = repr(opt.state_dict()), torch.get_rng_state()
    fired: list[object] = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("before")),
        register_optimizer_step_post_hook(lambda *_: fired.append("after")),
    ]
    try:
        assert codes(opt) == {"decay-of-sgd", "clip-in-vain"}
    finally:
        for hook in hooks:
            hook.remove()
    assert fired == []
    assert repr(opt.state_dict()) == before and torch.equal(torch.get_rng_state(), numbers)


def test_a_base_that_cannot_be_tried_raises_nothing() -> None:
    class Picky(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].shape == (4, 3):
                raise RuntimeError("only for one shape")
            return super().step(closure)

    big = torch.nn.Parameter(torch.ones(5, 5))
    assert codes(metaopt.wrap(Picky([big], lr=0.1, weight_decay=0.1), "clip_grad_norm(1.0)")) == set()


# ---- warm-up


@pytest.mark.parametrize("spec", ["sgd(lr=0.1)", "sgd(lr=cosine(0.1))", "adamw(lr=warmup(0.1, 50, start=0.08))"])
def test_a_very_large_batch_without_a_warm_up_is_found(spec: str) -> None:
    assert "4,096" in only(stack(spec, 100), "no-warm-up", batch_size=4096)


@pytest.mark.parametrize("spec", ["sgd(lr=warmup(0.1, 0.05))", "sgd(lr=one_cycle(0.1))", "sgd(lr=noam(64, warmup=50))"])
def test_a_very_large_batch_with_a_warm_up_is_not(spec: str) -> None:
    assert "no-warm-up" not in codes(stack(spec, 100), batch_size=4096)


@pytest.mark.parametrize("batch_size", [None, 1, 256])
def test_without_a_large_batch_no_warm_up_is_asked_for(batch_size: int | None) -> None:
    assert codes(stack("sgd(lr=0.1)"), batch_size=batch_size) == set()


def test_a_torch_scheduler_that_begins_low_is_a_warm_up() -> None:
    for make in (
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=100),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 10)),
    ):
        optimizer = torch.optim.SGD([matrix()], lr=0.1)
        scheduler = make(optimizer)
        assert codes(optimizer, batch_size=4096) == set()
        del scheduler
    optimizer = torch.optim.SGD([matrix()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    assert codes(optimizer, batch_size=4096) == {"no-warm-up"}
    del scheduler


def test_a_base_may_warm_up_by_itself() -> None:
    class Warm(torch.optim.SGD):
        def __init__(self, params, lr: float = 0.1, warmup_steps: int = 0) -> None:
            super().__init__(params, lr)
            for group in self.param_groups:
                group["warmup_steps"] = warmup_steps

    assert codes(Warm([matrix()], lr=0.2, warmup_steps=10), batch_size=4096) == set()
    assert codes(Warm([matrix()], lr=0.2), batch_size=4096) == {"no-warm-up"}


def test_after_the_first_update_it_is_too_late_to_say() -> None:
    opt = stack("sgd(lr=0.1)")
    opt.param_groups[0]["params"][0].grad = torch.ones(4, 3)
    opt.step()
    assert codes(opt, batch_size=4096) == set()


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "64"])
def test_a_batch_size_is_a_number_of_examples(batch_size: object) -> None:
    with pytest.raises(metaopt.ParameterError, match="batch_size"):
        metaopt.explain(stack("sgd(lr=0.1)"), batch_size=batch_size)


def test_the_command_takes_the_batch_size_or_the_problem_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> set[str]:
        with pytest.raises(SystemExit) as exit:
            main(["explain", "sgd(lr=0.1)", "--json", *arguments])
        assert not exit.value.code
        return {finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]}

    assert told("--batch-size", "2048") == {"no-warm-up"}
    assert "no-warm-up" not in told("--problem", "xor")
