"""A parameter that is frozen (`requires_grad_(False)`) in the middle of a run stays exactly where it is.

`metaopt check` tries every registered wrapper (leaves_frozen_parameters_alone); here is what that cannot see.
"""

import weakref
from typing import Any

import pytest
import torch
from small_runs import assert_same, small_model, train, weights

import metaopt


def frozen_half_way(spec: str, *, before: int = 6, after: int = 6) -> tuple[torch.nn.Module, metaopt.Stack, list[Any]]:
    """Train, freeze the first layer, train on; return its weights from when it was frozen as well."""
    model = small_model()
    opt = metaopt.build(metaopt.groups(model), spec)
    train(model, opt, range(before))
    model[0].requires_grad_(False)
    frozen = weights(model[0])
    train(model, opt, range(before, before + after))
    return model, opt, frozen


@pytest.mark.parametrize(
    "spec",
    [
        "accumulate(2) | adamw(lr=0.01, weight_decay=0.1)",
        "accumulate(4) | sgd(lr=0.1, momentum=0.9)",  # frozen in the middle of a window
        "decay(0.1) | adamw(lr=0.01) | lookahead(k=4)",
        "adamw(lr=0.01) | lookahead(k=4, pullback_momentum='reset')",
        "adamw(lr=0.01) | lookahead(k=4, pullback_momentum='pullback', slow_dtype='float32')",
        "sgd(lr=0.1) | outer(k=4)",
        "sgd(lr=0.1) | lookahead(k=2) | outer(k=4) | ema(0.9)",
        "accumulate(2) | partition({'0.*': decay(0.1) | adamw | lookahead(k=2), '*': sgd(lr=0.1)}) | outer(k=3)",
    ],
)
def test_a_layer_that_is_frozen_in_mid_run_does_not_move(spec: str) -> None:
    model, _, frozen = frozen_half_way(spec)
    assert_same(weights(model[0]), frozen)


def test_what_was_summed_up_before_the_layer_was_frozen_is_dropped() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    opt = metaopt.build([p, q], "accumulate(2) | sgd(lr=1.0)")
    for step, trains in enumerate((True, False, False, True, True, True)):  # frozen and unfrozen inside of windows
        p.requires_grad_(trains)
        p.grad = torch.tensor(10.0**step) if trains else None
        q.grad = torch.ones(())
        opt.step()
        if step == 1:
            assert float(p.detach()) == 0.0
    # the second window saw one gradient of it, 1e3, the third 1e4 and 1e5
    assert float(p.detach()) == -(1e3 + 1e4 + 1e5) / 2
    assert float(q.detach()) == -3.0


@pytest.mark.parametrize("spec", ["ema(0.5)", "lawa(k=1, n=4)", "tail_average", "tail_average(every=2)"])
def test_the_average_of_a_frozen_layer_goes_on_toward_its_weights(spec: str) -> None:
    distances = []
    for updates in (1, 80):
        model, opt, frozen = frozen_half_way(f"sgd(lr=0.1) | {spec}", before=5, after=updates)
        with opt.averaged():
            shown = weights(model[0])
        distances.append(sum(float((a - b).norm()) for a, b in zip(shown, frozen, strict=True)))
    assert distances[1] < 0.1 * distances[0]


def test_who_sets_gradients_by_hand_need_not_set_requires_grad() -> None:
    p, q = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    ours, theirs = (metaopt.build([x], "accumulate(2) | sgd(lr=0.1) | lookahead(k=2)") for x in (p, q))
    for step in range(8):
        for x, opt in ((p, ours), (q, theirs)):
            x.grad = torch.full((3,), float(step))
            opt.step()
    assert_same(p, q.detach())


# ---- parameters that the stack does not hold


def backbone_frozen() -> torch.nn.Module:
    model = small_model()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("given", [lambda model: model, metaopt.groups, lambda m: metaopt.groups(m, no_decay="1d")])
def test_a_layer_that_is_unfrozen_and_in_no_group_is_announced_once(given: Any) -> None:
    model = backbone_frozen()
    opt = metaopt.build(given(model), "adamw(lr=0.01) | lookahead(k=2)")
    train(model, opt, range(3))
    model[0].requires_grad_(True)
    with pytest.warns(metaopt.MetaoptWarning, match=r"0\.weight, 0\.bias: frozen when .*opt\.add_param_group"):
        train(model, opt, [3])
    train(model, opt, range(4, 8))  # warnings are errors here


def test_nothing_is_announced_of_a_layer_that_was_added_or_has_no_gradient() -> None:
    model = backbone_frozen()
    opt = metaopt.build(model, "adamw(lr=0.01)")
    model[0].requires_grad_(True)
    opt.add_param_group({"params": list(model[0].parameters())})
    before = weights(model[0])
    train(model, opt, range(3))
    assert not torch.equal(before[0], model[0].weight)
    assert opt._run.left_out is None  # all are held: later updates look no more

    model = backbone_frozen()
    opt = metaopt.build(model[2], "adamw(lr=0.01)")  # the frozen ones belong to somebody else
    train(model, opt, range(3))
    assert opt._run.left_out is None


def test_one_of_thousands_of_frozen_parameters_is_found_in_a_while() -> None:
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1), requires_grad=i == 0) for i in range(100)])
    opt = metaopt.build(model, "sgd(lr=0.1)")
    model[77].requires_grad_(True)
    with pytest.warns(metaopt.MetaoptWarning, match="^77: frozen"):
        for _ in range(8):
            opt.zero_grad()
            (model[0] * model[77]).sum().backward()
            opt.step()


def test_frozen_parameters_are_not_kept_alive() -> None:
    model = backbone_frozen()
    opt = metaopt.build(model, "sgd(lr=0.1)")
    gone = weakref.ref(model[0].weight)
    model = torch.nn.Sequential(*list(model)[1:])
    assert gone() is None
    model[1].weight.grad = torch.ones_like(model[1].weight)
    opt.step()
