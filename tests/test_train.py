import pytest

from metaopt import CheckpointError, ProblemError
from metaopt.lab import checkpoint
from metaopt.lab.train import train
from metaopt.registry import registry

SPEC = "clip_grad_norm(1.0) | adamw(lr=0.003) | lookahead(k=5)"


def xor():
    return registry.find("xor", "problem").target()


def last(folder):
    return checkpoint.load(checkpoint.found(folder / "checkpoints")[0])


def test_damaged_checkpoint_is_refused_and_the_newest_whole_one_named(tmp_path):
    train(xor(), SPEC, steps=20, log=tmp_path, checkpoint_every=10)
    newest, older = checkpoint.found(tmp_path / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=older.name):
        train(xor(), SPEC, steps=20, log=tmp_path, resume=True)


def test_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(ProblemError, match="lower lr"):
        problem = registry.find("rosenbrock", "problem").target()
        train(problem, "sgd(lr=10.0)", steps=50, log=tmp_path, checkpoint_every=1)
    assert all(checkpoint.is_whole(path) for path in checkpoint.found(tmp_path / "checkpoints"))
