"""What people hand over: numbers of numpy, no learning rate, a part registered again, tied weights by either name."""

import functools
import io
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
from transformers.optimization import Adafactor

import metaopt
from metaopt import adamw, clip_grad_norm, cosine, lookahead, sequence, sgd, warmup

# ---- numbers of numpy


@pytest.mark.parametrize(
    "stack",
    [
        lambda: adamw(lr=np.float64(1e-3)),
        lambda: adamw(lr=np.float32(1e-3)),
        lambda: adamw(betas=(np.float64(0.9), np.float32(0.99))),
        lambda: adamw(betas=np.array([0.9, 0.99])),
        lambda: adamw(betas=omegaconf.OmegaConf.create([0.9, 0.99])),
        lambda: adamw(amsgrad=np.bool_(True)),
        lambda: adamw | lookahead(k=np.int64(5), pullback_momentum=np.str_("reset")),
        lambda: clip_grad_norm(np.float64(1.0)) | adamw,
        lambda: adamw(lr=warmup(np.float64(1e-3), np.int64(3))),
        lambda: adamw(lr=warmup(cosine(np.float32(1e-3), steps=np.int64(9)), 3)),
        lambda: adamw(lr=sequence(np.float64(1e-3), np.int64(2), np.float64(1e-4))),
    ],
)
def test_numbers_of_numpy_train_print_and_are_saved_as_python_s_own(stack: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = metaopt.build([p], stack(), total_steps=np.int64(10), log_every=np.int32(2))
    p.grad = torch.ones(3)
    opt.step()
    again = metaopt.build([p], str(opt.spec), total_steps=10)
    assert str(again.spec) == str(opt.spec)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    assert again.updates == 1


def test_a_group_may_be_given_numbers_of_numpy() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = metaopt.build([{"params": [p], "lr": np.float64(0.5), "lookahead.k": np.int64(2)}], "sgd | lookahead")
    assert type(opt.param_groups[0]["lr"]) is float and type(opt.param_groups[0]["lookahead.k"]) is int
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lookahead.alpha": np.float32(0.5)})
    assert type(opt.param_groups[1]["lookahead.alpha"]) is float


@pytest.mark.parametrize("wrong", [np.float64(2.5), np.array([1, 2]), np.float64("nan")])
def test_a_number_of_numpy_is_held_to_the_same_rules(wrong: Any) -> None:
    with pytest.raises(metaopt.HyperparameterError, match="lookahead: k"):
        lookahead(k=wrong)


# ---- a base that works its rate out itself


def relative(params: Any) -> torch.optim.Optimizer:
    return Adafactor(params, scale_parameter=True, relative_step=True, warmup_init=True, lr=None)


def trained(opt: torch.optim.Optimizer, model: torch.nn.Module) -> list[torch.Tensor]:
    for _ in range(4):
        opt.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4)


def test_a_base_without_a_rate_of_its_own_trains_as_it_does_bare() -> None:
    model, bare = linear(), linear()
    opt = metaopt.wrap(relative(model.parameters()), [], log_every=1)
    assert all(map(torch.equal, trained(opt, model), trained(relative(bare.parameters()), bare)))
    model = linear()
    opt = metaopt.wrap(relative(model.parameters()), "lookahead(k=2)")
    trained(opt, model)
    assert opt.updates == 4
    other = metaopt.wrap(relative(model.parameters()), "lookahead(k=2)")
    other.load_state_dict(opt.state_dict())
    assert np.isnan(opt.scheduler().get_last_lr()[0])
    assert "?" in str(metaopt.explain(opt, model))


def test_what_needs_a_rate_says_that_the_base_has_none() -> None:
    model = linear()
    with pytest.raises(metaopt.StepError, match="decay needs a learning rate, Adafactor has none"):
        trained(metaopt.wrap(relative(model.parameters()), "decay(0.1)"), model)
    with pytest.raises(metaopt.HyperparameterError, match=r"lr_scale.*works its learning rate out itself"):
        metaopt.wrap(relative([{"params": list(model.parameters()), "lr_scale": 0.1}]), [])


# ---- a cell of a notebook that is run again


class Toward(torch.optim.SGD):
    """Descend."""


def test_a_module_that_registers_a_name_again_replaces_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaopt.registry.registry._entries", dict(metaopt.registry.registry._entries))  # type: ignore[attr-defined]

    def cell(sign: float) -> float:
        class Mine(torch.optim.SGD):
            def __init__(self, params: Any, lr: float = 0.1) -> None:
                super().__init__(params, lr=lr, maximize=sign > 0)

        metaopt.register(optimizers={"mine": Mine})
        p = torch.nn.Parameter(torch.zeros(1))
        opt = metaopt.build([p], "mine(lr=1.0)")
        p.grad = torch.ones(1)
        opt.step()
        return p.item()

    assert [cell(-1), cell(1)] == [-1.0, 1.0]
    metaopt.register(optimizers={"mine": functools.partial(Toward, momentum=0.9)})  # another kind of object, from here
    assert metaopt.mine.target.func is Toward


def test_another_module_s_name_is_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaopt.registry.registry._entries", dict(metaopt.registry.registry._entries))  # type: ignore[attr-defined]
    metaopt.register(optimizers={"mine": Toward})
    with pytest.raises(metaopt.PluginError, match="'mine' is registered already"):
        metaopt.register(optimizers={"mine": torch.optim.SGD})
    with pytest.raises(metaopt.PluginError, match="'adamw' is registered already, by metaopt"):
        metaopt.register(optimizers={"adamw": Toward})
    assert metaopt.mine.target is Toward


# ---- tied weights


class LanguageModel(torch.nn.Module):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.body = torch.nn.Linear(4, 4)
        self.lm_head = torch.nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_a_tied_parameter_is_found_by_either_name(name: str) -> None:
    model = LanguageModel()
    tied, rest = metaopt.groups(model, {f"{name}.*": {"lr_scale": 0.5}})
    assert tied["params"][0] is model.embed.weight and tied["param_names"] == ["embed.weight"]
    assert [*rest["param_names"]] == ["body.weight", "body.bias"]
    spec = f"partition({{'{name}.*': sgd(lr=1.0), '*': adamw(lr=0.1)}})"
    for given in (model, [tied, rest], metaopt.groups(model)):
        opt = metaopt.build(given, spec)
        (chain,) = [chain for chain in opt.chains if chain.name == f"{name}.*"]
        assert chain.base.param_groups[0]["params"] == [model.embed.weight]


def test_no_trace_of_the_other_name_is_left_in_the_groups() -> None:
    for opt in (
        metaopt.build(LanguageModel(), sgd(lr=0.1)),
        metaopt.wrap(torch.optim.SGD(metaopt.groups(LanguageModel()), lr=0.1), []),
    ):
        assert not [key for key in opt.param_groups[0] if "tied" in key]


def test_a_rule_that_comes_too_late_for_a_tied_parameter_says_so() -> None:
    rules = {"embed.*": {"lr_scale": 0.5}, "lm_head.*": {"weight_decay": 0.0}}
    with pytest.raises(metaopt.ParameterError, match=r"'embed\.\*' takes.*lm_head.weight is the same tensor as embed"):
        metaopt.groups(LanguageModel(), rules)
    with pytest.raises(metaopt.ParameterError, match=r"lm_head.weight is the same tensor as embed.weight"):
        metaopt.build(LanguageModel(), "partition({'embed*': sgd(lr=1.0), 'lm_head*': sgd(lr=0.1), '*': adamw})")
