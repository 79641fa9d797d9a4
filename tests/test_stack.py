"""The laws of a stack that no other file holds: template steps, scaling, migration, groups, order."""

import copy
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook

import metaopt

SPEC = "clip_grad_norm(1.0) | adamw(lr=0.01) | lookahead(k=3)"


def small_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def train(model: torch.nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        opt.zero_grad()
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        model(data).pow(2).mean().backward()
        opt.step()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own checkpoint code
@pytest.mark.parametrize(
    "spec", [SPEC, "adagrad(lr=0.1) | lookahead(k=3)", "adamw(lr=warmup(0.01, 4)) | lookahead(k=2)"]
)
def test_taking_a_distributed_state_dict_before_the_first_update_changes_nothing(spec: str) -> None:
    model, twin = small_model(), small_model()
    opt, plain = metaopt.build(model.named_parameters(), spec), metaopt.build(twin.named_parameters(), spec)
    taken = get_optimizer_state_dict(model, opt)
    assert any(key.endswith(".slow") for held in taken["state"].values() for key in held)
    assert opt.updates == 0
    assert same(model, twin)
    train(model, opt, 0, 9)
    train(twin, plain, 0, 9)
    assert same(model, twin)


def test_a_warm_up_s_own_first_zero_is_an_update() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "adamw(lr=warmup(0.01, 4)) | lookahead(k=2)")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.updates == 1


def test_infinite_gradients_under_a_grad_scaler_change_nothing() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), SPEC)
    train(model, opt, 0, 2)
    before, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((1, 3), 1.0)).sum() * torch.inf).backward()
    scaler.step(opt)
    scaler.update()
    assert same(model, before)
    assert opt.updates == 2
    torch.testing.assert_close(opt.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_checkpoints_move_between_the_bare_base_and_the_stack() -> None:
    model, twin = small_model(), small_model()
    bare = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    train(model, bare, 0, 4)
    twin.load_state_dict(model.state_dict())
    stack = metaopt.build(twin.named_parameters(), "adamw(lr=0.01) | lookahead(k=100)")
    with pytest.warns(UserWarning, match="started fresh: lookahead"):
        stack.load_state_dict(copy.deepcopy(bare.state_dict()))  # torch does not copy tensors at load
    assert stack.load_report is not None and stack.load_report.fresh == ["lookahead"]
    train(model, bare, 4, 8)
    train(twin, stack, 4, 8)
    assert same(model, twin)
    back = torch.optim.AdamW(twin.parameters(), lr=0.01, fused=True)
    back.load_state_dict(copy.deepcopy(stack.state_dict()))
    train(model, bare, 8, 10)
    train(twin, back, 8, 10)
    assert same(model, twin)


def test_a_checkpoint_of_another_base_is_refused_and_nothing_changes() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), SPEC)
    train(model, opt, 0, 4)
    state = copy.deepcopy(opt.state_dict())
    other = metaopt.build(small_model().named_parameters(), "sgd(lr=0.1, momentum=0.9)")
    with pytest.raises(metaopt.CheckpointError, match="another base"):
        opt.load_state_dict(other.state_dict())
    assert opt.state_dict()["param_groups"] == state["param_groups"]
    torch.testing.assert_close(opt.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_the_folded_factor_clips_as_torch_does() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.build(model.named_parameters(), "clip_grad_norm(0.01) | sgd(lr=0.1, momentum=0.9)")
    hand = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    assert opt.param_groups[0]["fused"]
    for step in range(5):
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        for m, o in ((model, opt), (twin, hand)):
            o.zero_grad()
            m(data).pow(2).mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        hand.step()
        opt.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


def test_step_hooks_fire_once_with_the_stack() -> None:
    model = small_model()
    base = torch.optim.AdamW(model.parameters())
    seen: list[torch.optim.Optimizer] = []
    base.register_step_post_hook(lambda opt, args, kwargs: seen.append(opt))
    handle = register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(opt))
    opt = metaopt.wrap(base, "lookahead(k=2)")
    try:
        train(model, opt, 0, 1)
    finally:
        handle.remove()
    assert seen == [opt, opt]


def test_a_group_may_set_a_wrapper_s_hyperparameter() -> None:
    x, y = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = metaopt.build([{"params": [x], "lookahead.alpha": 1.0}, {"params": [y]}], "sgd(lr=0.1) | lookahead(k=1)")
    x.grad = y.grad = torch.ones(2)
    opt.step()
    assert x[0].item() == pytest.approx(0.9)
    assert y[0].item() == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adm", "Did you mean"),
        ("adamw(learning_rate=1)", "no hyperparameter"),
        ("clip_grad_norm | adamw", "needs max_norm"),
        ("clip_grad_norm(-1.0) | adamw", "max_norm must be > 0, got -1.0"),
        ("adamw | sgd", "one base"),
        ("adamw | clip_grad_norm(1.0)", "write it before adamw"),
        ("lookahead | adamw", "write it behind adamw"),
        ("clip_grad_norm(1.0) | sam | adamw", "write it before clip_grad_norm"),
        ("sam | accumulate(2) | sam(label='again') | adamw", "again makes the gradients.*write it before accumulate"),
        ("adamw | lookahead | lookahead", "label="),
        ("adamw | lookahead(label='metaopt')", "reserved"),
        ("lookahead", "needs a base"),
    ],
)
def test_a_mistake_in_a_spec_is_one_clear_sentence(spec: str, message: str) -> None:
    with pytest.raises(metaopt.MetaoptError, match=message):
        metaopt.build([torch.nn.Parameter(torch.zeros(2))], spec)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "empty"),
        ([{"params": [], "lr": 1.0}], "empty"),
        ("unknown", "no part of this stack has 'momentumm'"),
        ("unknown dotted", "no part of this stack has 'lookahed.k'"),
    ],
)
def test_a_mistake_in_the_groups_is_one_clear_sentence(groups: object, message: str) -> None:
    x = torch.nn.Parameter(torch.zeros(2))
    given = {"unknown": [{"params": [x], "momentumm": 1}], "unknown dotted": [{"params": [x], "lookahed.k": 1}]}
    with pytest.raises(metaopt.MetaoptError, match=message), warnings.catch_warnings():
        metaopt.build(given.get(groups, groups) if isinstance(groups, str) else groups, "sgd(lr=0.1) | lookahead")
