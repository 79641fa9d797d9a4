import random
import subprocess
import sys
import time

import pytest
import torch

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


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_random_moments_ends_where_the_uninterrupted_one_ends(tmp_path, part):
    steps, every = 1000, 3
    train(xor(), SPEC, steps=steps, log=tmp_path / "whole", checkpoint_every=every)
    log = tmp_path / "killed"
    command = [sys.executable, "-m", "metaopt", "train", "--problem=xor", f"--stack={SPEC}", f"--steps={steps}"]
    command += [f"--log={log}", f"--checkpoint-every={every}", "--resume"]
    moments = random.Random(part)

    def newest():
        return [path.name for path in checkpoint.found(log / "checkpoints")][:1]

    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, patience = newest(), time.monotonic() + 60
        # a kill counts once the process has gone on from where the last one stopped
        while newest() == before and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert equal(last(tmp_path / "whole"), last(log))


def test_a_device_that_does_not_exist_is_one_clear_sentence(tmp_path):
    with pytest.raises(ProblemError, match="present: cpu"):
        train(xor(), SPEC, steps=2, device="nosuch")


def test_weights_that_are_not_finite_are_found_without_a_log():
    with pytest.raises(ProblemError, match="not finite"):
        train(registry.find("rosenbrock", "problem").target(), "sgd(lr=10.0)", steps=50)
