"""Every registered problem: deterministic, seekable, and it can be trained and evaluated."""

import itertools

import pytest
import torch

import metaopt
from metaopt.registry import registry

PROBLEMS = registry.names("problem")


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_seed_fixes_weights_and_batches_and_leaves_the_global_generator(name: str) -> None:
    problem = registry.find(name, "problem").target()
    before = torch.get_rng_state()
    first, second = problem.model(3), problem.model(3)
    assert torch.equal(torch.get_rng_state(), before)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    from_start = list(itertools.islice(problem.batches(3), 5))
    resumed = list(itertools.islice(problem.batches(3, start=3), 2))
    torch.testing.assert_close(from_start[3:], resumed, rtol=0, atol=0) if from_start[0] is not None else None


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_few_updates_lower_the_loss(name: str) -> None:
    problem = registry.find(name, "problem").target()
    model = problem.model(1)
    opt = metaopt.build(model.named_parameters(), "clip_grad_norm(1.0) | adamw(lr=3e-3, weight_decay=0.0)")
    before = problem.evaluate(model)["loss"]
    for batch in itertools.islice(problem.batches(1), 40):
        opt.zero_grad()
        problem.loss(model, batch).backward()
        opt.step()
    assert problem.evaluate(model)["loss"] < before
    assert problem.evaluate(model, "test")["loss"] > 0
    assert problem.data_hash() == registry.find(name, "problem").target().data_hash()
    assert set(problem.targets) <= set(problem.evaluate(model))
