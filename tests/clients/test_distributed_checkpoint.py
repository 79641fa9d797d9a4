"""Distributed checkpoint: what it takes of a stack is everything, and taking it changes nothing."""

import copy
import itertools
from typing import Any

import pytest
import torch
from clients.ranks import Outcomes, on_two_ranks
from clients.training import assert_same, small_model, train, weights
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import metaopt

# k=3: a checkpoint after update 4 is in the middle of a cycle
pytestmark = pytest.mark.slow

SPEC = "clip_grad_norm(0.5) | adamw(lr=warmup(cosine(0.05), 3)) | lookahead(k=3)"
SPECS = (
    SPEC,
    "adagrad(lr=0.05) | lookahead(k=3, pullback_momentum='pullback')",
    "sgd(lr=0.05) | lookahead(k=3, slow_dtype='float32') | lookahead(k=6, label='outer')",
    # at update 4 the base has just been made to begin anew
    "adamw(lr=0.05) | lookahead(k=2, pullback_momentum='reset')",
)
# torch cannot load the fourth, whole and flattened, into any optimizer
OPTIONS = [
    StateDictOptions(),
    StateDictOptions(flatten_optimizer_state_dict=True),
    StateDictOptions(full_state_dict=True),
]


def stack_over(model: nn.Module, spec: str = SPEC) -> metaopt.Stack:
    return metaopt.build(model, spec, total_steps=12)


def sharded(seed: int = 0) -> nn.Module:
    model = small_model(seed)
    fully_shard(model[0])
    return fully_shard(model)


def save(model: nn.Module, opt: metaopt.Stack, folder: str, **how: Any) -> None:
    state = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
    dcp.save(state, checkpoint_id=folder, **how)


def load(model: nn.Module, opt: metaopt.Stack, folder: str, **how: Any) -> None:
    state = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
    dcp.load(state, checkpoint_id=folder, **how)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"])


@on_two_ranks
def test_a_run_loaded_in_mid_cycle_continues_bit_for_bit() -> None:
    for number, spec in enumerate(SPECS):
        model, again = sharded(), sharded(seed=1)
        opt = stack_over(model, spec)
        train(model, opt, 0, 4)
        save(model, opt, f"cycle{number}")
        resumed = stack_over(again, spec)
        load(again, resumed, f"cycle{number}")
        assert resumed.updates == 4
        for m, o in ((model, opt), (again, resumed)):
            train(m, o, 4, 10)
        assert_same(weights(again), weights(model))


@on_two_ranks
def test_every_form_of_the_state_dict_continues_bit_for_bit() -> None:
    for spec, options in itertools.product(SPECS, OPTIONS):
        model, again = sharded(), sharded(seed=1)
        opt, resumed = stack_over(model, spec), stack_over(again, spec)
        train(model, opt, 0, 4)
        # torch does not copy tensors at load
        taken, state = copy.deepcopy(get_state_dict(model, opt, options=options))
        set_state_dict(again, resumed, model_state_dict=taken, optim_state_dict=state, options=options)
        for m, o in ((model, opt), (again, resumed)):
            train(m, o, 4, 10)
        assert_same(weights(again), weights(model))


@on_two_ranks
def test_a_whole_state_dict_is_handed_out_from_the_first_rank() -> None:
    model, again = sharded(), sharded(seed=1)
    opt, resumed = stack_over(model), stack_over(again)
    train(model, opt, 0, 4)
    taken, state = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(state) == (torch.distributed.get_rank() == 0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, taken, options=options)
    set_optimizer_state_dict(again, resumed, copy.deepcopy(state), options=options)
    for m, o in ((model, opt), (again, resumed)):
        train(m, o, 4, 10)
    assert_same(weights(again), weights(model))


@on_two_ranks
def test_taking_the_state_dict_changes_neither_weights_nor_run() -> None:
    for spec, options, at in itertools.product(SPECS, OPTIONS, (0, 4)):
        model, twin = sharded(), sharded()
        opt, plain = stack_over(model, spec), stack_over(twin, spec)
        train(model, opt, 0, at)
        train(twin, plain, 0, at)
        get_state_dict(model, opt, options=options)
        assert opt.updates == at
        assert_same(weights(model), weights(twin))
        train(model, opt, at, 8)
        train(twin, plain, at, 8)
        assert_same(weights(model), weights(twin))


@on_two_ranks
def test_a_checkpoint_from_before_the_first_update_starts_the_run() -> None:
    for number, spec in enumerate(SPECS):
        model, again = sharded(), sharded(seed=1)
        opt, fresh = stack_over(model, spec), stack_over(again, spec)
        save(model, opt, f"fresh{number}")
        load(again, fresh, f"fresh{number}")
        assert fresh.updates == 0
        for m, o in ((model, opt), (again, fresh)):
            train(m, o, 0, 8)
        assert_same(weights(again), weights(model))


@on_two_ranks
def test_two_ranks_continue_what_one_process_began() -> None:
    for number, spec in enumerate(SPECS):
        model, again = small_model(), sharded(seed=1)
        opt, resumed = stack_over(model, spec), stack_over(again, spec)
        train(model, opt, 0, 4)
        if torch.distributed.get_rank() == 0:
            save(model, opt, f"one{number}", no_dist=True)
        torch.distributed.barrier()
        load(again, resumed, f"one{number}")
        for m, o in ((model, opt), (again, resumed)):
            train(m, o, 4, 10)
        torch.testing.assert_close(weights(again), weights(model))


@on_two_ranks
def test_two_ranks_save_in_mid_cycle() -> None:
    for number, spec in enumerate(SPECS):
        model = sharded()
        opt = stack_over(model, spec)
        train(model, opt, 0, 4)
        save(model, opt, f"two{number}")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # that is what the test does
@pytest.mark.parametrize("number", range(len(SPECS)))
def test_one_process_continues_what_two_ranks_began(outcomes: Outcomes, number: int) -> None:
    test_two_ranks_save_in_mid_cycle(outcomes)
    whole, model = small_model(), small_model(seed=1)
    uninterrupted, resumed = stack_over(whole, SPECS[number]), stack_over(model, SPECS[number])
    load(model, resumed, f"{outcomes.folder}/two{number}", no_dist=True)
    train(whole, uninterrupted, 0, 10)
    train(model, resumed, 4, 10)
    torch.testing.assert_close(weights(model), weights(whole))
