"""`explain` says which path the updates of a stack take, and it is the path that they take."""

from typing import Any

import pytest
import torch

import metaopt
from metaopt.engine.fused.lists import FusedLists
from metaopt.engine.fused.postponed import PostponedStep
from metaopt.explaining import paths as explained
from metaopt.programs import kernels

SHAPES = [(8, 4), (8,), (300, 300)]


class OwnAdamW(torch.optim.AdamW):
    """A subclass may do anything in its step."""


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def strided() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(4, 8).t())]


def many() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(30)]


def path(opt: Any) -> str:
    (line,) = metaopt.explain(opt).paths
    return line


STEPPED = [
    (lambda: metaopt.build(parameters(), "adamw(amsgrad=True) | lookahead(k=2)"), "because amsgrad=True"),
    (lambda: metaopt.build(parameters(), "adamw(fused=False) | ema"), "because fused=False"),
    (lambda: metaopt.wrap(torch.optim.AdamW(parameters()), "ema"), "because fused=None"),
    (lambda: metaopt.build(parameters(), "adamw", exact=True), "because fused=None"),
    (lambda: metaopt.build(parameters(), "rmsprop | ema"), "for torch's own Adam, AdamW and SGD only"),
    (lambda: metaopt.wrap(OwnAdamW(parameters(), fused=True), "ema"), "for torch's own Adam, AdamW and SGD only"),
    (lambda: metaopt.wrap(torch.optim.SGD(parameters(), lr=torch.tensor(0.1), fused=True), "ema"), "lr is a tensor"),
    (lambda: metaopt.wrap(torch.optim.AdamW(strided(), fused=True), "ema"), "not plain contiguous tensors"),
    (lambda: metaopt.build(parameters(), "adamw"), "called directly"),
    (lambda: metaopt.build(parameters(), "clip_grad_norm(1.0) | adamw | lookahead(k=2)"), "lookahead"),
    (lambda: metaopt.build(parameters(), "sgd(lr=0.1, momentum=0.9) | ema | lookahead(k=2)"), "ema"),
    (lambda: metaopt.build(parameters(), "adamw | ema | lookahead(k=2) | tail_average"), "ema and lookahead"),
    (lambda: metaopt.build(parameters(), "adamw | tail_average | ema"), "tail_average acts behind it"),
    (lambda: metaopt.build(parameters(), "adamw | lookahead(k=2) | lookahead(k=4, label='outer')"), "lookahead"),
    (lambda: metaopt.build(parameters(), "adamw | ema(device='cpu') | ema(label='b')"), "ema acts behind it"),
    (lambda: metaopt.build(parameters(), "adamw | hyperball"), "on copies of the weights, because hyperball changes"),
    (lambda: metaopt.build(parameters(), "adamw | update_floor(rows=True)"), "because update_floor changes"),
    (lambda: metaopt.build(parameters(), "adamw | cautious | ema"), "cautious"),
    (lambda: metaopt.build(parameters(), "sgd(lr=0.1) | update_floor | radial_brake | cautious_decay"), "radial_brake"),
    (lambda: metaopt.build(parameters(), "adamw | clip_update_norm(0.1) | ema"), "compares the weights"),
    (lambda: metaopt.build(many(), "clip_grad_norm(1.0) | adamw"), "AdamW"),
    (lambda: metaopt.build(many(), "sgd(lr=0.1) | tail_average"), "SGD"),
    (lambda: metaopt.build(parameters(torch.float64), "adamw | ema"), "AdamW"),
    (lambda: metaopt.build(parameters(torch.bfloat16), "adamw | ema"), "AdamW"),
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What really makes an update, in order."""
    found: list[str] = []
    kernel, joint = FusedLists.step, PostponedStep.make

    def step(self: Any, *arguments: Any) -> None:
        found.append("kernel")
        kernel(self, *arguments)

    def make(self: Any) -> None:
        found.append(f"pass of {len(self._items)}")
        joint(self)

    monkeypatch.setattr(FusedLists, "step", step)
    monkeypatch.setattr(PostponedStep, "make", make)
    return found


@pytest.mark.parametrize(("made", "said"), STEPPED)
def test_the_path_that_is_said_is_taken(made: Any, said: str, taken: list[str]) -> None:
    opt = made()
    before = path(opt)
    assert said in before
    for _ in range(4):  # at the fourth update all parts act
        taken.clear()
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        opt.step()
    assert path(opt) == before
    if "step()" in before:
        assert taken == [], before
    elif "one pass over memory" in before:
        joined = before.partition(" in one pass")[0].replace(" and ", ", ").split(", ")
        assert taken == [f"pass of {len(joined) - 1}"], before
    elif "a factor of the gradients" in before:
        assert taken in (["kernel"], ["pass of 0"]), before
    else:
        assert set(taken) == {"kernel"}, before


def test_each_base_of_a_partition_has_a_line() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    opt = metaopt.build(model, "partition({'matrix': rmsprop, '*': adamw}) | ema")
    first, second = metaopt.explain(opt).paths
    assert first.startswith("RMSprop.step()") and second.startswith(
        ("torch's fused kernel of AdamW", "AdamW and ema in one")
    )


def test_a_group_that_keeps_torch_from_a_direct_call_is_named() -> None:
    first, *rest = parameters()
    groups = [{"params": [first], "name": "head", "amsgrad": True}, {"params": rest, "name": "body"}]
    assert "because of group head: amsgrad=True" in path(metaopt.wrap(torch.optim.AdamW(groups, fused=True), []))


def test_it_is_said_why_the_library_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = metaopt.build(parameters(), "adamw | ema")

    class Library:
        OFF = "METAOPT_KERNELS"

    monkeypatch.setattr(explained, "kernels", lambda: None)
    monkeypatch.setattr(explained, "library", None)
    assert "ema could join its pass over memory, but metaopt-kernels is not installed" in path(opt)
    monkeypatch.setattr(explained, "library", Library)
    assert "metaopt-kernels has no build for this machine" in path(opt)
    monkeypatch.setenv("METAOPT_KERNELS", "0")
    assert "METAOPT_KERNELS=0 turns metaopt-kernels off" in path(opt)


@pytest.mark.skipif(kernels() is None, reason="metaopt-kernels is not installed")
def test_a_dtype_that_the_library_lacks_is_named() -> None:
    assert "does not compute torch's numbers in bfloat16" in path(
        metaopt.build(parameters(torch.bfloat16), "adamw | ema")
    )


def test_a_plain_optimizer_has_no_path_and_the_text_shows_a_stack_s() -> None:
    assert metaopt.explain(torch.optim.AdamW(parameters())).paths == ()
    text = str(metaopt.explain(metaopt.build(parameters(), "adamw(lr=1e-3)")))
    assert "\npath: torch's fused kernel of AdamW, called directly" in text
