"""What `build` decides by itself is said, and can be decided otherwise: the kernel of the base, decay of biases."""

import warnings
from typing import Any

import pytest
import torch

import metaopt


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))


def trained(opt: torch.optim.Optimizer, model: torch.nn.Module) -> list[torch.Tensor]:
    for step in range(20):
        opt.zero_grad()
        model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).pow(3).mean().backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_exact_is_torch_s_default_bit_for_bit(name: str, kind: Any) -> None:
    model, bare = net(), net()
    opt = metaopt.build(model, f"{name}(lr=0.01)", exact=True)
    assert not opt.param_groups[0].get("fused")
    assert all(map(torch.equal, trained(opt, model), trained(kind(bare.parameters(), lr=0.01), bare)))
    parts = metaopt.build(net(), f"partition({{'*': {name}(lr=0.01)}})", exact=True)
    assert not parts.param_groups[0].get("fused")
    assert not metaopt.Optimizer(net(), spec=name, exact=True).param_groups[0].get("fused")


def test_the_hint_at_decay_is_a_warning_of_a_class_of_its_own() -> None:
    with pytest.warns(metaopt.HintWarning, match="weight_decay also acts on 3 parameters") as caught:
        metaopt.build(net(), "adamw")
    assert caught[0].filename == __file__  # the line that builds the stack, which a filter can name
    with pytest.warns(metaopt.HintWarning) as caught:
        metaopt.Optimizer(net())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", metaopt.HintWarning)
        metaopt.build(net(), "adamw")
        metaopt.build(metaopt.groups(net(), no_decay="1d"), "adamw")
        metaopt.build(net(), "sgd")


def test_explain_and_show_say_that_the_fused_kernel_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    from metaopt.cli import main

    model = net()
    assert "AdamW runs with fused=True, chosen by metaopt.build" in str(metaopt.explain(metaopt.build(model, "adamw")))
    for opt in (metaopt.build(model, "adamw", exact=True), metaopt.build(model, "adamw(fused=True)")):
        assert "chosen by metaopt" not in str(metaopt.explain(opt))
    with pytest.raises(SystemExit):
        main(["show", "adamw"])
    assert "exact=True leaves the kernel to torch" in capsys.readouterr().out
