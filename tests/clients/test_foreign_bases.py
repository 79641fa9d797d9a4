"""Optimizers from elsewhere, unchanged, as bases: those of schedulefree, heavyball and pytorch-optimizer."""

import copy
import io
from collections.abc import Callable

import heavyball
import pytest
import pytorch_optimizer
import schedulefree
import torch
from clients.training import assert_same, batch, loss_of, small_model, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import metaopt

# a Lookahead around a schedule-free base is warned of; what it does with groups and checkpoints is right all the same
pytestmark = pytest.mark.filterwarnings("ignore:.*takes the moves back:metaopt.MetaoptWarning")

# its kernels run as they are written: compiling them takes minutes
heavyball.utils.compile_mode = None

Make = Callable[[object], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "schedulefree.AdamWScheduleFree": lambda params: schedulefree.AdamWScheduleFree(params, lr=0.05),
    "schedulefree.SGDScheduleFree": lambda params: schedulefree.SGDScheduleFree(params, lr=0.05),
    "schedulefree.RAdamScheduleFree": lambda params: schedulefree.RAdamScheduleFree(params, lr=0.05),
    "schedulefree.AdamWScheduleFreeClosure": lambda params: schedulefree.AdamWScheduleFreeClosure(params, lr=0.05),
    "heavyball.AdamW": lambda params: heavyball.AdamW(params, lr=0.05),
    "heavyball.SOAP": lambda params: heavyball.SOAP(params, lr=0.05),
    "heavyball.PSGDKron": lambda params: heavyball.PSGDKron(params, lr=0.05),
    "heavyball.SFAdamW": lambda params: heavyball.SFAdamW(params, lr=0.05),
    "pytorch_optimizer.ADOPT": lambda params: pytorch_optimizer.ADOPT(params, lr=0.05),
    "pytorch_optimizer.Lion": lambda params: pytorch_optimizer.Lion(params, lr=0.05),
    "pytorch_optimizer.ScheduleFreeAdamW": lambda params: pytorch_optimizer.ScheduleFreeAdamW(params, lr=0.05),
    "pytorch_optimizer.AliG": lambda params: pytorch_optimizer.AliG(params, max_lr=0.1),
}
# these evaluate the loss themselves, or ask for its value
NEED_CLOSURE = {"schedulefree.AdamWScheduleFreeClosure", "pytorch_optimizer.AliG"}
# torch's own load casts a float64 entry of its state to the parameters' float32
ROUNDED_AT_LOAD = {"heavyball.PSGDKron"}
# AliG has no learning rate, PSGD refuses gradients of zero: torch makes no state of theirs appear, in a stack or bare
NO_TEMPLATE = {"pytorch_optimizer.AliG", "heavyball.PSGDKron"}
PARTS = "clip_grad_norm(0.5) | lookahead(k=3)"
every_base = pytest.mark.parametrize("name", BASES)


def in_training(opt: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Put an optimizer with modes into the one in which it steps."""
    if hasattr(opt, "train"):
        opt.train()
    return opt


def stack(name: str, model: nn.Module, parts: str = PARTS) -> metaopt.Stack:
    return in_training(metaopt.wrap(BASES[name](model.parameters()), parts))


def train(name: str, model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int, clip: float = 0.0) -> None:
    """Make updates `first` to `last - 1`, with a closure where the base needs one."""
    for step in range(first, last):
        torch.manual_seed(step)  # for those that draw random numbers

        @torch.enable_grad()  # AliG does not turn gradients on itself
        def closure(step: int = step) -> torch.Tensor:
            model.zero_grad()
            loss = loss_of(model, batch(step))
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        if name in NEED_CLOSURE:
            opt.step(closure)
        else:
            closure()
            opt.step()


@every_base
def test_in_an_identity_stack_a_base_is_itself(name: str) -> None:
    model, twin = small_model(), small_model()
    opt, bare = stack(name, model, "lookahead(k=3, alpha=1.0)"), in_training(BASES[name](twin.parameters()))
    train(name, model, opt, 0, 8)
    train(name, twin, bare, 0, 8)
    assert_same(weights(model), weights(twin))
    assert opt.updates == 8


@every_base
def test_a_base_sees_clipped_gradients_at_every_evaluation(name: str) -> None:
    model, twin = small_model(), small_model()
    opt, bare = stack(name, model, "clip_grad_norm(0.1)"), in_training(BASES[name](twin.parameters()))
    # SOAP's eigenvectors turn with the last bit of a gradient: two bare runs differ by 0.05 after two updates
    last = 1 if name == "heavyball.SOAP" else 6
    train(name, model, opt, 0, last)
    train(name, twin, bare, 0, last, clip=0.1)
    torch.testing.assert_close(weights(model), weights(twin))


@every_base
def test_lookahead_pulls_every_k_updates(name: str) -> None:
    model, twin = small_model(), small_model()
    opt, bare = stack(name, model, "lookahead(k=3)"), in_training(BASES[name](twin.parameters()))
    start = weights(model)
    train(name, model, opt, 0, 3)
    train(name, twin, bare, 0, 3)
    # half way from where the run began to where the bare base is
    half = [a.lerp(b, 0.5) for a, b in zip(start, weights(twin), strict=True)]
    torch.testing.assert_close(weights(model), half)
    assert_same([opt.state[p]["lookahead.slow"] for p in model.parameters()], weights(model))


@every_base
def test_a_checkpoint_continues_bit_for_bit(name: str) -> None:
    model, again = small_model(), small_model(seed=1)
    opt, resumed = stack(name, model), stack(name, again)
    train(name, model, opt, 0, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    for m, o in ((model, opt), (again, resumed)):
        train(name, m, o, 4, 10)
    if name in ROUNDED_AT_LOAD:
        torch.testing.assert_close(weights(again), weights(model), rtol=1e-5, atol=1e-6)
    else:
        assert_same(weights(again), weights(model))


@every_base
def test_a_checkpoint_of_the_bare_base_continues_in_a_stack(name: str) -> None:
    twin, model = small_model(), small_model(seed=1)
    bare, opt = in_training(BASES[name](twin.parameters())), stack(name, model, "lookahead(k=100)")
    train(name, twin, bare, 0, 4)
    model.load_state_dict(twin.state_dict())
    with pytest.warns(UserWarning, match="started fresh: lookahead"):
        opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    train(name, twin, bare, 4, 8)
    train(name, model, opt, 4, 8)
    assert_same(weights(model), weights(twin))


@pytest.mark.parametrize("name", [name for name in BASES if name not in NO_TEMPLATE])
@pytest.mark.parametrize("at", [0, 4])
def test_taking_a_distributed_state_dict_changes_nothing(name: str, at: int) -> None:
    model, twin = small_model(), small_model()
    opt, plain = stack(name, model), stack(name, twin)
    train(name, model, opt, 0, at)
    train(name, twin, plain, 0, at)
    get_optimizer_state_dict(model, opt)
    train(name, model, opt, at, 8)
    train(name, twin, plain, at, 8)
    assert_same(weights(model), weights(twin))


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "heavyball.SFAdamW"])
def test_eval_and_train_reach_a_base_with_modes(name: str) -> None:
    model, twin = small_model(), small_model()
    opt, bare = stack(name, model, "clip_grad_norm(1e9)"), in_training(BASES[name](twin.parameters()))
    for m, o in ((model, opt), (twin, bare)):
        train(name, m, o, 0, 4)
    trained = weights(model)
    for o in (opt, bare):
        o.eval()
    assert_same(weights(model), weights(twin))
    assert not torch.equal(weights(model)[0], trained[0])
    opt.train()
    torch.testing.assert_close(weights(model), trained)


def test_eval_and_train_do_nothing_to_a_base_without_modes() -> None:
    model = small_model()
    opt = metaopt.build(model, "adamw(lr=0.05) | lookahead(k=3)")
    train("adamw", model, opt, 0, 4)
    before = weights(model)
    opt.eval()
    opt.train()
    assert_same(weights(model), before)


@pytest.mark.parametrize("name", sorted(NEED_CLOSURE))
def test_what_needs_a_closure_says_so(name: str) -> None:
    model = small_model()
    opt = stack(name, model)
    loss_of(model, batch(0)).backward()
    with pytest.raises((metaopt.StepError, pytorch_optimizer.base.exception.NoClosureError), match="closure"):
        opt.step()
    assert opt.updates == 0


def test_heavyball_takes_its_gradients_away_and_keeps_what_it_writes_of_itself() -> None:
    model = small_model()
    opt = stack("heavyball.AdamW", model)
    train("heavyball.AdamW", model, opt, 0, 3)
    assert all(p.grad is None for p in model.parameters())
    assert opt.state_dict()["heavyball"]["inner_group"] == opt.base.inner_group
    assert "heavyball" in copy.deepcopy(opt).state_dict()


def test_a_checkpoint_s_bytes_reach_no_base_that_would_unpickle_them() -> None:
    model = small_model()
    opt = stack("heavyball.AdamW", model)
    train("heavyball.AdamW", model, opt, 0, 1)
    crafted = copy.deepcopy(opt.state_dict())
    assert isinstance(crafted["heavyball"]["precond_schedule"], bytes)
    crafted["heavyball"]["precond_schedule"] = b"no pickle"  # heavyball alone would fail on it, or run what it says
    opt.load_state_dict(crafted)
    assert opt.updates == 1


@pytest.mark.parametrize(
    "name",
    ["schedulefree.AdamWScheduleFree", "heavyball.AdamW", "pytorch_optimizer.ADOPT"],
)
def test_a_reset_is_refused_where_the_base_counts_in_its_groups(name: str) -> None:
    with pytest.raises(metaopt.SpecError, match="counts its updates in its groups"):
        stack(name, small_model(), "lookahead(k=3, pullback_momentum='reset')")


def test_a_pullback_is_refused_where_the_base_keeps_dicts() -> None:
    model = small_model()
    opt = stack("heavyball.AdamW", model, "lookahead(k=3, pullback_momentum='pullback')")
    with pytest.raises(metaopt.StepError, match="holds lists or dicts"):
        train("heavyball.AdamW", model, opt, 0, 1)
    assert opt.updates == 1  # the base has made it
