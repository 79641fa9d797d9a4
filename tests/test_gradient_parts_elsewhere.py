"""Parts on gradients and updates beside the same rules in code of others: numbers from it, or the code itself."""

from collections.abc import Callable, Sequence

import pytest
import torch
from gradient_runs import PARTS, STEPS, gradient, stack_text, weights

import metaopt

# optax 0.2.8, jax 0.10.2 in float64: weights a, b after 10 and 60 steps of optax.contrib.mechanize(base, **given), and
# the sum of s, on gradients c x + 0.3 sin(t + x); a begins at (1, -2, 0.5), b at ((0.3, -0.7), (1.1, 0.2))
CURVATURES = ([1.0, 4.0, 0.25], [[2.0, 0.5], [1.0, 3.0]])
OPTAX = [
    (
        "sgd(lr=1.0)",
        {},
        10,
        [
            0.999893209536221,
            -1.99917611984951,
            0.499981351065797,
            0.299932400391104,
            -0.699967913379798,
            1.09988341444965,
            0.19993237014964,
        ],
        1.04126457084845e-05,
    ),
    (
        "sgd(lr=1.0)",
        {},
        60,
        [
            0.64397682078279,
            -0.210493515131945,
            0.446206631176494,
            0.115477948794732,
            -0.568561035654188,
            0.708876186111277,
            0.0412385701456863,
        ],
        0.00693147053172309,
    ),
    (
        "sgd(lr=1.0, momentum=0.9)",
        {"s_init": 0.001, "weight_decay": 0.1, "num_betas": 3},
        10,
        [
            0.672497066627675,
            0.287979986595471,
            0.441843385998968,
            0.102374033575212,
            -0.595030180419159,
            0.742140253071574,
            0.00875563643876986,
        ],
        0.00771393247904234,
    ),
    (
        "sgd(lr=1.0, momentum=0.9)",
        {"s_init": 0.001, "weight_decay": 0.1, "num_betas": 3},
        60,
        [
            0.0099799967527946,
            0.0957483913334016,
            0.286262533500861,
            -0.0294583150128553,
            -0.218432754568668,
            0.01122262199806,
            -0.0126723746684672,
        ],
        0.00383906571360619,
    ),
    (
        "adam(lr=1.0)",
        {"s_init": 0.0001, "weight_decay": 0.0},
        10,
        [
            0.989814797984175,
            -1.98956755346532,
            0.492562157016991,
            0.290019241071033,
            -0.690989596753962,
            1.08978390846569,
            0.190010499002551,
        ],
        0.00104517353292192,
    ),
    (
        "adam(lr=1.0)",
        {"s_init": 0.0001, "weight_decay": 0.0},
        60,
        [
            -0.0390640400172579,
            -0.0611073488060745,
            -0.0592965162406344,
            0.137184800777728,
            -0.00254823195747467,
            -0.0608261340796197,
            0.106505615389261,
        ],
        0.0486006967936503,
    ),
]


@pytest.mark.parametrize(("base", "given", "after", "expected", "scale"), OPTAX)
def test_mechanic_is_optax_s(base: str, given: dict, after: int, expected: list[float], scale: float) -> None:
    starts = ([1.0, -2.0, 0.5], [[0.3, -0.7], [1.1, 0.2]])
    params = [torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
    curvatures = [torch.tensor(c, dtype=torch.float64) for c in CURVATURES]
    opt = metaopt.build(params, stack_text("mechanic", base, given))
    for t in range(after):
        for p, c in zip(params, curvatures, strict=True):
            p.grad = c * p.detach() + 0.3 * torch.sin(t + p.detach())
        opt.step()
    found = torch.cat([p.detach().flatten() for p in params]).tolist()
    assert found == pytest.approx(expected, rel=1e-9)
    learned = given.get("s_init", 1e-6) * float(opt.param_groups[0]["mechanic.bets"].sum())
    assert learned == pytest.approx(scale, rel=1e-9)


def test_mechanic_goes_up_where_the_base_does() -> None:
    down, up = (torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(2))
    first = metaopt.build([down], "sgd(lr=1.0) | mechanic(s_init=1e-3)")
    second = metaopt.build([up], "sgd(lr=1.0, maximize=True) | mechanic(s_init=1e-3)")
    for _ in range(STEPS):
        down.grad, up.grad = down.detach() - 1.0, 1.0 - up.detach()
        first.step()
        second.step()
        assert torch.equal(down, up)
    assert (down - 1.0).abs().max() < 0.9


class Held(torch.nn.Module):
    """A module that holds these parameters, for what takes a module."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__()
        self.held = torch.nn.ParameterList(params)


def elsewhere(part: str, params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Return the step of pytorch_optimizer's implementation of the part around Adam, written by others."""
    import pytorch_optimizer as other
    from pytorch_optimizer.optimizer.grokfast import gradfilter_ema

    if part == "mars":  # with its own Adam, whose eps is not where torch's is
        opt = other.MARS(params, lr=0.1, betas=(0.9, 0.999), gamma=0.1, optimize_1d=True, weight_decay=0.0, eps=1e-40)
    elif part == "orthograd":
        opt = other.OrthoGrad(torch.optim.Adam(params, lr=0.1, eps=1e-40))
    elif part == "magma":
        opt = other.Magma(torch.optim.Adam(params, lr=0.1, eps=1e-40), mask_prob=1.0, tau=0.3)
    else:
        opt = torch.optim.Adam(params, lr=0.1, eps=1e-40)
    module, kept = Held(params), None

    def update() -> None:
        nonlocal kept
        if part == "grokfast":
            kept = gradfilter_ema(module, kept, alpha=0.8, lamb=3.0)
        opt.step()

    return update


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        ("mars(gamma=0.1, beta1=0.9) | adam(lr=0.1, eps=1e-40)", 1e-9),  # an Adam that rounds otherwise
        ("grokfast(alpha=0.8, lamb=3.0) | adam(lr=0.1, eps=1e-40)", 1e-12),
        ("orthograd | adam(lr=0.1, eps=1e-40)", 1e-12),
        ("adam(lr=0.1, eps=1e-40) | magma(keep=1.0, tau=0.3)", 1e-6),  # the score over there has 32 bits
    ],
)
def test_a_part_does_what_the_same_rule_does_elsewhere(text: str, tolerance: float) -> None:
    values = [w for w in weights() if w.numel() > 1]  # one element has no direction but its own
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in values] for _ in range(2))
    opt = metaopt.build(ours, text)
    update = elsewhere(next(name for name in PARTS if name in text), theirs)
    for number in range(30):
        for each in (ours, theirs):
            for i, p in enumerate(each):
                p.grad = gradient(number)(i, p.detach())
        opt.step()
        update()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
