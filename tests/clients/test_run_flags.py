"""How torch may run a base: foreach, fused, capturable, maximize, tensor rates; differentiable is refused."""

import copy
from typing import Any

import pytest
import torch
from small_runs import assert_same_weights, small_model, train, weights

import metaopt

SGD, ADAMW, ADAGRAD = torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad


def identical(make: Any, wrappers: Any = "lookahead(k=2, alpha=1.0)") -> None:
    model, twin = small_model(), small_model()
    opt, bare = metaopt.wrap(make(model), wrappers), make(twin)
    train(model, opt, range(7))
    train(twin, bare, range(7))
    assert_same_weights(model, twin)


@pytest.mark.parametrize("cls", [SGD, ADAMW, ADAGRAD])
@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}], ids=str)
def test_every_way_to_run_is_the_bare_optimizer_s(cls: Any, flags: dict[str, bool]) -> None:
    identical(lambda model: cls(model.parameters(), lr=0.01, **flags))


@pytest.mark.parametrize("maximize", [True, False])
def test_maximize_ascends_under_clipping(maximize: bool) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    opt = metaopt.build([p], f"clip_grad_norm(1.0) | sgd(lr=0.1, maximize={maximize}) | lookahead(k=2, alpha=1.0)")
    p.grad = torch.tensor([3.0, 4.0])
    opt.step()
    sign = 1.0 if maximize else -1.0
    torch.testing.assert_close(p.detach(), sign * 0.1 * torch.tensor([0.6, 0.8]))


def test_a_built_stack_fuses_where_torch_can_and_the_user_has_not_chosen() -> None:
    model = small_model()
    assert metaopt.build(model.named_parameters(), "adamw").param_groups[0]["fused"] is True
    assert metaopt.build(model.named_parameters(), "adamw(fused=False)").param_groups[0]["fused"] is False
    assert metaopt.build(model.named_parameters(), "adamw(foreach=True)").param_groups[0]["fused"] is None
    assert metaopt.build(model.named_parameters(), "rmsprop").param_groups[0].get("fused") is None
    assert metaopt.wrap(ADAMW(model.parameters()), "lookahead").param_groups[0]["fused"] is None


@pytest.mark.parametrize("cls", [ADAMW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop])
def test_capturable_on_a_cpu_is_torch_s_own_refusal_and_leaves_the_stack_whole(cls: Any) -> None:
    model = small_model()
    bare = cls(model.parameters(), lr=0.01, capturable=True)
    train_refused(model, bare)
    opt = metaopt.wrap(cls(model.parameters(), lr=0.01, capturable=True), "lookahead(k=2)")
    before = weights(model)
    train_refused(model, opt)
    assert opt.updates == 0
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    opt.param_groups[0]["capturable"] = False
    train(model, opt, range(3))
    assert opt.updates == 3


def train_refused(model: torch.nn.Module, opt: torch.optim.Optimizer) -> None:
    with pytest.raises(AssertionError, match="capturable=True, params"):
        train(model, opt, range(1))


@pytest.mark.parametrize("cls", [SGD, ADAMW, ADAGRAD, torch.optim.RMSprop, torch.optim.Adadelta])
def test_a_tensor_rate_is_the_bare_optimizer_s(cls: Any) -> None:
    identical(lambda model: cls(model.parameters(), lr=torch.tensor(0.01)))


def test_a_schedule_of_the_stack_drives_a_tensor_rate_in_place() -> None:
    model, twin = small_model(), small_model()
    rate = torch.tensor(0.0)
    opt = metaopt.build(model.named_parameters(), "sgd(lr=cosine(0.1))", total_steps=9)
    plain = metaopt.build(twin.named_parameters(), "sgd(lr=cosine(0.1))", total_steps=9)
    opt.param_groups[0]["lr"] = rate.fill_(opt.param_groups[0]["lr"])
    opt._run.begin_schedules()  # what a load does: the value that stands there is a tensor from now on
    train(model, opt, range(9))
    train(twin, plain, range(9))
    assert opt.param_groups[0]["lr"] is rate
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_tensor_rate_survives_a_checkpoint() -> None:
    model = small_model()
    opt = metaopt.wrap(ADAMW(model.parameters(), lr=torch.tensor(0.01)), "lookahead(k=2)")
    train(model, opt, range(3))
    twin = small_model()
    again = metaopt.wrap(ADAMW(twin.parameters(), lr=torch.tensor(0.5)), "lookahead(k=2)")
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()), keep="saved")
    assert again.param_groups[0]["lr"] == torch.tensor(0.01)
    train(model, opt, range(3, 6))
    train(twin, again, range(3, 6))
    assert_same_weights(model, twin)


def test_a_wrapper_s_hyperparameter_may_be_a_tensor() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.build(model.named_parameters(), "adamw(lr=0.01) | lookahead(k=2, alpha=0.25)")
    plain = metaopt.build(twin.named_parameters(), "adamw(lr=0.01) | lookahead(k=2, alpha=0.25)")
    opt.param_groups[0]["lookahead.alpha"] = torch.tensor(0.25)
    train(model, opt, range(6))
    train(twin, plain, range(6))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("how", ["built", "wrapped", "added"])
def test_differentiable_is_refused_with_the_reason(how: str) -> None:
    model = small_model()
    first, *others = model.parameters()
    with pytest.raises(metaopt.HyperparameterError, match=r"differentiable=True.*changes tensors in place"):
        if how == "built":
            metaopt.build(model.named_parameters(), "adamw(differentiable=True) | lookahead")
        elif how == "wrapped":
            metaopt.wrap(ADAMW(model.parameters(), differentiable=True), "lookahead")
        else:
            opt = metaopt.wrap(ADAMW([first]), "lookahead")
            opt.add_param_group({"params": others, "differentiable": True})
