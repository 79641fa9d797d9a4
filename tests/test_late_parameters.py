"""Parameters whose first gradient comes late, is taken away, or whose state a checkpoint brings in part."""

import torch
from small_runs import fill_gradients, small_model

import metaopt
from metaopt import Groups, Wrapper, anchor, hyper


class TakesFirstGradient(Wrapper):
    """Takes the gradients away, in the first update only."""

    start = anchor()

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            if group.updates == 0:
                group.clear_grads()


class Third(Wrapper):
    """Multiplies all gradients by a number."""

    share: float = hyper(1 / 3)

    def on_gradients(self, groups: Groups) -> None:
        groups.scale(self.share)


def test_a_parameter_whose_first_gradient_a_wrapper_took_away_begins_with_the_next() -> None:
    model = small_model()
    opt = metaopt.wrap(torch.optim.Adam(model.parameters(), lr=0.01), [TakesFirstGradient()])
    for step in range(3):
        fill_gradients(model, step)
        opt.step()
    assert all({"step", "exp_avg"} <= opt.state[p].keys() for p in model.parameters())


def test_moments_that_a_checkpoint_lacks_are_made_also_for_a_parameter_without_a_gradient_then() -> None:
    model = small_model()
    opt = metaopt.build(model, "adamw(lr=0.01) | lookahead(k=2)")
    fill_gradients(model, 0)
    opt.step()
    other = metaopt.build(model, "adamw(lr=0.01) | lookahead(k=2, pullback_momentum='pullback')")
    other.load_state_dict(opt.state_dict(), keep="live")
    for step in range(1, 6):
        fill_gradients(model, step)
        if step < 3:
            model[0].weight.grad = None
        other.step()
    assert "lookahead.cached.exp_avg" in other.state[model[0].weight]


def test_a_factor_that_is_a_number_is_exact_for_gradients_of_64_bits() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = metaopt.wrap(torch.optim.SGD([p], lr=1.0), [Third()])
    p.grad = torch.ones(3, dtype=torch.float64)
    opt.step()
    assert torch.equal(p, torch.full((3,), -1 / 3, dtype=torch.float64))
