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
    # modular addition is memorised long before it is generalised
    seen = list(itertools.islice(problem.batches(1), 10)) if name == "modular_addition" else None

    def loss() -> float:
        if seen is None:
            return problem.evaluate(model)["loss"]
        return sum(problem.loss(model, batch).item() for batch in seen)

    before = loss()
    for batch in itertools.islice(problem.batches(1), 40):
        opt.zero_grad()
        problem.loss(model, batch).backward()
        opt.step()
    assert loss() < before
    assert problem.evaluate(model, "test")["loss"] > 0
    assert problem.data_hash() == registry.find(name, "problem").target().data_hash()
    assert set(problem.targets) <= set(problem.evaluate(model))


@pytest.mark.parametrize("name", ["digits", "xor"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_hash_of_the_data_covers_every_split(name, split, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    problem = registry.find(name, "problem").target()
    original, known = problem.rows, problem.data_hash()

    def one_value_differs(wanted: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (tensor.clone() for tensor in original(wanted))
        if wanted == split:
            y[7] = 1 - y[7]
        return x, y

    monkeypatch.setattr(problem, "rows", one_value_differs)
    assert problem.data_hash() != known


def test_the_splits_of_digits_are_disjoint_and_whole() -> None:
    problem = registry.find("digits", "problem").target()
    images = [problem.rows(split)[0].flatten(1) for split in ("train", "validation", "test")]
    assert [len(split) for split in images] == [1000, 397, 400]
    # the 1797 images are all different
    assert len(torch.unique(torch.cat(images), dim=0)) == 1797


def test_rosenbrock_starts_where_it_says_and_other_seeds_beside_it() -> None:
    problem = registry.find("rosenbrock", "problem").target()
    starts = [next(problem.model(seed).parameters()).detach() for seed in range(4)]
    assert starts[0].tolist() == [-0.5, 0.5]
    assert all(0 < (start - starts[0]).norm() < 0.1 for start in starts[1:])


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_trains_on_every_device(name: str, device: torch.device) -> None:
    problem = registry.find(name, "problem").target()
    if device.type == "mps" and any(p.dtype == torch.float64 for p in problem.model(0).parameters()):
        pytest.skip("float64 does not exist there")
    model = problem.model(0, device)
    loss = problem.loss(model, next(problem.batches(0, device)))
    loss.backward()
    assert loss.device.type == device.type
    assert all(p.grad is not None and p.grad.device.type == device.type for p in model.parameters())
    assert problem.evaluate(model)["loss"] > 0
