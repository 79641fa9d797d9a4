"""`reset_state`: what is forgotten begins anew at a parameter's next update, whenever its next gradient comes."""

from collections.abc import Callable

import pytest
import torch

import metaopt

SPECS = [
    "adam(lr=0.1) | lookahead(k=2)",
    "sgd(lr=0.1, momentum=0.9) | ema(0.9)",
    "adam(lr=0.1) | ema(0.9)",
    "adam(lr=0.1) | lookahead(k=2, pullback_momentum='pullback')",
    "adam(lr=0.1) | lookahead(k=2, pullback_momentum='reset')",
    "sgd(lr=0.1) | lookahead(k=2)",
    "adagrad(lr=0.1) | outer(k=2)",
]


class Run:
    """Two parameters, of which the second has no gradient for a while after the moments were reset."""

    def __init__(self, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> None:
        self.params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
        self.make = make
        self.opt = make(self.params)

    def steps(self, first: int, last: int, *, saved: bool = False) -> None:
        for step in range(first, last):
            early, late = self.params
            early.grad = torch.full_like(early, 0.5 + step)
            late.grad = None if 3 <= step < 6 else torch.full_like(late, 1.0 + step)
            self.opt.step()
            if saved:
                self.opt.state_dict()


def after_a_reset(spec: str, *, saved: bool = False) -> Run:
    run = Run(lambda params: metaopt.build(params, spec))
    run.steps(0, 3)
    run.opt.reset_state("moments")
    run.steps(3, 9, saved=saved)
    return run


@pytest.mark.parametrize("spec", SPECS)
def test_a_late_gradient_after_a_reset_starts_the_base_there(spec: str) -> None:
    run = after_a_reset(spec)
    assert len({frozenset(held) for held in run.opt.state.values()}) == 1
    if "ema" in spec:  # which leaves the weights to the base: a new one from the reset on
        name, kwargs = ("SGD", {"momentum": 0.9}) if "sgd" in spec else ("Adam", {})
        plain = Run(lambda params: getattr(torch.optim, name)(params, lr=0.1, **kwargs))
        plain.steps(0, 3)
        plain.opt = plain.make(plain.params)
        plain.steps(3, 9)
        torch.testing.assert_close(run.params, plain.params, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spec", SPECS)
def test_a_state_dict_taken_between_a_reset_and_the_next_gradient_is_whole_and_changes_nothing(spec: str) -> None:
    run = Run(lambda params: metaopt.build(params, spec))
    run.steps(0, 3)
    keys = [set(held) - {"metaopt.anew"} for held in run.opt.state_dict()["state"].values()]
    run.opt.reset_state("moments")
    run.steps(3, 5)
    assert [set(held) - {"metaopt.anew"} for held in run.opt.state_dict()["state"].values()] == keys
    run.steps(5, 9, saved=True)
    torch.testing.assert_close(run.params, after_a_reset(spec).params, rtol=0, atol=0)


def start() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,), ())]


def fill(members: list[torch.nn.Parameter], step: int) -> None:
    """Leave gradients that depend on the weights and on the step."""
    for p in members:
        p.grad = p.detach() + torch.sin(3 * p.detach() + step)


def test_what_is_reset_begins_as_in_a_new_run_and_the_rest_goes_on() -> None:
    spec = "adam(lr=linear(0.1, 0.2, steps=50)) | lookahead(k=7)"
    opt = metaopt.build(members := start(), spec)
    for step in range(10):
        fill(members, step)
        opt.step()
    x = opt.param_groups[0]["params"][0]
    slow = opt.state[x]["lookahead.slow"].clone()
    opt.reset_state("moments")
    assert {key for key in opt.state[x] if "metaopt." not in key} == {"lookahead.slow"} and torch.equal(
        opt.state[x]["lookahead.slow"], slow
    )
    opt.reset_state("lookahead", "counters")
    assert not opt.state and opt.updates == 0 and opt.param_groups[0]["lr"] == 0.1
    weights = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    fresh = metaopt.build([torch.nn.Parameter(w) for w in weights], spec)
    for step in range(9):
        for stack in (opt, fresh):
            fill(stack.param_groups[0]["params"], step)
            stack.step()
    for p, q in zip(opt.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    with pytest.raises(metaopt.StepError, match="Did you mean moments"):
        opt.reset_state("moment")


def test_a_reset_drops_means_that_are_on_their_way() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    opt = metaopt.build([p], "sgd(lr=0.1) | outer(k=2, delay=1, across='replicas')")
    for _ in range(2):
        p.grad = torch.ones(4)
        opt.step()
    opt.reset_state("averages")
    opt.state_dict()  # which puts what is on its way into the state
    assert not opt.state


@pytest.mark.parametrize("resumed", [False, True])
def test_what_was_sent_before_a_reset_does_not_move_the_weights_after_it(resumed: bool) -> None:
    p, q = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    opt, plain = metaopt.build([p], "sgd(lr=0.1) | outer(k=4, delay=2, across='replicas')"), torch.optim.SGD([q], 0.1)

    def step(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
        parameter.grad = torch.ones(())
        optimizer.step()

    for _ in range(5):  # sent behind the fourth
        step(opt, p)
    q.data.copy_(p.data)
    if resumed:
        opt.load_state_dict(opt.state_dict())
    opt.reset_state("averages")
    for _ in range(2):  # would come behind the sixth
        step(opt, p)
        step(plain, q)
    assert torch.equal(p, q)
    for _ in range(3):  # sent behind the eighth, comes behind the tenth
        step(opt, p)
        step(plain, q)
    assert not torch.equal(p, q)


def test_a_reset_of_counters_begins_a_new_round() -> None:
    p = torch.nn.Parameter(torch.zeros(()))
    opt = metaopt.build([p], "sgd(lr=0.1) | outer(k=4, across='replicas')")
    for _ in range(5):
        p.grad = torch.ones(())
        opt.step()
    opt.reset_state("counters")
    assert opt.param_groups[0]["metaopt.steps"] == 0
