"""`metaopt train`: never lost, never half. The command is the real one, in a process of its own."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import warm

from metaopt import CheckpointError, ProblemError
from metaopt.cli import main
from metaopt.lab import checkpoint
from metaopt.lab.holding import held, scratch_of
from metaopt.lab.training import train
from metaopt.problems.classification import Xor
from metaopt.registry import registry

pytestmark = pytest.mark.slow

SPEC = "clip_grad_norm(1.0) | adamw(lr=0.003) | lookahead(k=5)"


def problem(name="xor"):
    return registry.find(name, "problem").target()


def command(log, *, steps, every=3, spec=SPEC, more=()):
    asked = ["train", "--problem=xor", f"--stack={spec}", f"--steps={steps}", f"--log={log}"]
    return [*asked, f"--checkpoint-every={every}", *more]


def checkpoints(log):
    return checkpoint.found(log / "checkpoints")


def last(log):
    return checkpoint.load(checkpoints(log)[0])


def tensors_of(path):
    """Return the file with the tensors of a checkpoint of one process."""
    return path / "__0_0.distcp"


def write_as_before(folder, step, content):
    """Write a checkpoint as one file, as earlier versions did."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"step-{step:09d}-{hashlib.sha256(buffer.getvalue()).hexdigest()}.pt"
    path.write_bytes(buffer.getvalue())
    return path


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def until(question, seconds=60.0):
    patience = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < patience, "nothing happened"
        time.sleep(0.002)


def one_line(errors):
    assert len(errors.splitlines()) == 1, errors
    assert "Traceback" not in errors
    return errors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Where a run of 300 steps ends that nothing happened to."""
    log = tmp_path_factory.mktemp("whole")
    train(problem(), SPEC, steps=300, log=log, checkpoint_every=3)
    return last(log)


# ---- a run that was stopped goes on bit for bit


def pytest_generate_tests(metafunc):
    if "part" in metafunc.fixturenames:
        metafunc.parametrize("part", range(metafunc.config.getoption("kills") // 10))


def test_a_run_killed_at_ten_random_moments_ends_where_the_uninterrupted_one_ends(tmp_path, part, uninterrupted):
    log = tmp_path / "killed"
    moments = random.Random(part)

    def newest():
        return [path.name for path in checkpoints(log)][:1]

    for _ in range(10):
        before = newest()
        run = warm.Command(command(log, steps=300, more=["--resume"]), tmp_path)
        # a kill counts once the process has gone on from where the last one stopped
        until(lambda before=before, run=run: newest() != before or not run.running())
        time.sleep(moments.uniform(0, 0.05))
        run.kill()
        assert run.process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
    status, _, errors = warm.run(command(log, steps=300, more=["--resume"]), tmp_path)
    # a machine that is slow sees how far the run is
    assert (status, [line for line in errors.splitlines() if not line.startswith("training ")]) == (0, [])
    assert equal(last(log), uninterrupted)


def test_a_run_killed_in_the_middle_of_a_checkpoint_goes_on_from_the_one_before(tmp_path):
    whole, log = tmp_path / "whole", tmp_path / "killed"
    train(problem(), SPEC, steps=12, log=whole, checkpoint_every=6)
    newest, before = checkpoints(whole)
    (log / "checkpoints").mkdir(parents=True)
    shutil.copytree(before, log / "checkpoints" / before.name)
    train_on = command(log, steps=12, every=6, more=["--resume"])
    half = tensors_of(newest).stat().st_size // 2
    assert warm.run(train_on, tmp_path, largest_file=half, dies_there=True)[0] == -signal.SIGXFSZ
    assert list((log / "checkpoints").glob("*.tmp")), "it was not killed while it wrote"
    assert [path.name for path in checkpoints(log)] == [before.name]
    assert warm.run(train_on, tmp_path)[::2] == (0, "")
    assert equal(last(log), last(whole))


class Noisy(Xor):
    """Draws from torch's own generator in every loss, as dropout does."""

    def loss(self, model, batch):
        return super().loss(model, batch) * (1.0 + 0.1 * torch.rand(()))


def test_a_resumed_run_draws_the_random_numbers_of_the_uninterrupted_one(tmp_path):
    whole = train(Noisy(), SPEC, steps=12, log=tmp_path / "whole", checkpoint_every=6)
    first = checkpoints(tmp_path / "whole")[1]
    resumed = train(Noisy(), SPEC, steps=12, log=tmp_path / "again", resume=first)
    assert equal(resumed.model.state_dict(), whole.model.state_dict())


def test_what_a_killed_run_left_half_written_is_removed_at_the_next_start(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    scratch_of(folder / "step-000000100-0.pt").write_bytes(b"half a checkpoint")
    (folder / "notes.tmp").write_text("not ours")
    train(problem(), SPEC, steps=5, log=tmp_path, resume=True)
    assert {path.name for path in [*folder.glob("*.tmp"), *folder.glob(".*.tmp")]} == {"notes.tmp"}


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path, uninterrupted):
    log = tmp_path / "run"
    run = warm.Command(command(log, steps=300), tmp_path)
    until(lambda: len(checkpoints(log)) == 2)
    run.kill(signal.SIGINT)
    status, _, errors = run.end()
    told = one_line(errors)
    assert status == 130
    assert "interrupted" in told and "--resume" in told and checkpoints(log)[0].name in told
    assert warm.run(command(log, steps=300, more=["--resume"]), tmp_path)[0] == 0
    assert equal(last(log), uninterrupted)


BEGINNING = """
import pathlib
from metaopt import hookimpl
from metaopt.problems.classification import Xor

class Beginning(Xor):
    '''Leaves a file when its training has begun.'''

    def loss(self, model, batch):
        pathlib.Path("began").touch()
        return super().loss(model, batch)

@hookimpl
def metaopt_problems():
    return {"beginning": Beginning}
"""


def test_a_run_says_where_it_is_and_one_that_is_not_there_that_it_begins_anew(tmp_path, capsys):
    for more in (["--resume"], ["--resume"]):
        with pytest.raises(SystemExit) as ended:
            main(command(tmp_path / "run", steps=6, more=more))
        assert not ended.value.code
    out, err = capsys.readouterr()
    assert out.count(f"tensorboard --logdir {tmp_path / 'run'}") == 2
    assert err.splitlines() == [f"metaopt: {tmp_path / 'run'} holds no checkpoint: the run begins anew"]


def test_an_interrupted_run_without_a_log_says_that_nothing_was_saved(tmp_path):
    (tmp_path / "beginning.py").write_text(BEGINNING)
    run = warm.Command(["train", "--plugin=beginning", "--problem=beginning", "--steps=1000000"], tmp_path)
    until((tmp_path / "began").exists)
    run.kill(signal.SIGINT)
    status, _, errors = run.end()
    assert status == 130
    assert "nothing was saved: give --log" in one_line(errors)


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    log = tmp_path / "run"
    with held(log / "checkpoints", "checkpoints"):
        status, _, errors = warm.run(command(log, steps=6), tmp_path)
    assert status == 2
    assert "another process" in one_line(errors)


# ---- what goes wrong is told in one line, and the last checkpoint is whole


def stopped(log, tmp_path, *, told, more=(), largest_file=None):
    """Train to step 60, then on to 90 under some evil; return what was told. The checkpoint of step 60 is left."""
    before = checkpoints(log)[0]
    status, out, errors = warm.run(command(log, steps=90, more=more), tmp_path, largest_file=largest_file)
    assert (status, out) == (2, "")
    assert told in one_line(errors)
    assert before in checkpoints(log) and checkpoint.is_whole(before)
    return errors


@pytest.fixture
def begun(tmp_path):
    """A run of 90 steps that was killed after the checkpoint of step 60."""
    log = tmp_path / "begun"
    run = warm.Command(command(log, steps=90), tmp_path)
    until(lambda: any("step-000000060" in path.name for path in checkpoints(log)))
    run.kill()
    for path in checkpoints(log):
        if int(path.name.split("-")[1]) > 60:
            shutil.rmtree(path)
    return log


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path, begun):
    whole = tmp_path / "whole"
    train(problem(), SPEC, steps=90, log=whole, checkpoint_every=3)
    size = tensors_of(checkpoints(begun)[0]).stat().st_size
    errors = stopped(begun, tmp_path, told="File too large", more=["--resume"], largest_file=size - 100)
    assert "The newest whole checkpoint" in errors and checkpoints(begun)[0].name in errors
    assert not list((begun / "checkpoints").glob("*.tmp")), "half a checkpoint stayed on the full disk"
    assert warm.run(command(begun, steps=90, more=["--resume"]), tmp_path)[0] == 0
    assert equal(last(begun), last(whole))


def test_a_disk_too_full_for_the_log_is_one_line(tmp_path, begun):
    stopped(begun, tmp_path, told=str(begun), more=["--resume"], largest_file=1)


def test_a_log_directory_that_disappears_is_one_line(tmp_path):
    log = tmp_path / "run"
    run = warm.Command(command(log, steps=1_000_000), tmp_path)
    until(lambda: checkpoints(log))
    until(lambda: shutil.rmtree(log, ignore_errors=True) or not run.running())
    status, _, errors = run.end()
    assert status == 2
    assert str(log) in one_line(errors)
    assert not checkpoints(log)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    readonly = tmp_path / "readonly"
    readonly.mkdir(mode=0o555)
    if os.geteuid() == 0:  # whom no mode keeps out; the kernel's own tree does
        readonly = Path("/sys/kernel")
    status, _, errors = warm.run(command(readonly / "run", steps=6), tmp_path)
    assert status == 2
    assert str(readonly / "run") in one_line(errors)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    log = tmp_path / "run"
    asked = ["train", "--problem=rosenbrock", "--stack=sgd(lr=10.0)", "--steps=50", f"--log={log}"]
    status, _, errors = warm.run([*asked, "--checkpoint-every=1"], tmp_path)
    assert status == 2
    assert "lower lr" in one_line(errors) and checkpoints(log)[0].name in errors
    assert all(checkpoint.is_whole(path) for path in checkpoints(log))


def test_weights_that_are_not_finite_are_found_without_a_log():
    with pytest.raises(ProblemError, match="not finite"):
        train(problem("rosenbrock"), "sgd(lr=10.0)", steps=50)


HUNGRY = """
import torch
from metaopt import hookimpl
from metaopt.problems.classification import Xor

class Hungry(Xor):
    '''Wants more memory than there is from its seventh loss on.'''
    losses = 0

    def loss(self, model, batch):
        self.losses += 1
        if self.losses == 7:
            {}
        return super().loss(model, batch)

@hookimpl
def metaopt_problems():
    return {{"hungry": Hungry}}
"""


@pytest.mark.parametrize("want", ["torch.empty(10**15)", "bytearray(10**17)"])
def test_memory_that_runs_out_is_one_line_and_names_the_last_checkpoint(tmp_path, want):
    (tmp_path / "hungry.py").write_text(HUNGRY.format(want))
    log = tmp_path / "run"
    asked = ["train", "--plugin=hungry", "--problem=hungry", "--steps=50", f"--log={log}", "--checkpoint-every=3"]
    status, _, errors = warm.run(asked, tmp_path)
    assert status == 2
    assert "out of memory" in one_line(errors)
    assert "step-000000006" in errors and checkpoint.is_whole(checkpoints(log)[0])


def test_what_an_optimizer_of_its_own_raises_is_one_line(tmp_path):
    status, _, errors = warm.run(["train", "--problem=xor", "--stack=sparse_adam", "--steps=5"], tmp_path)
    assert status == 2
    assert "sparse_adam cannot train xor: RuntimeError" in one_line(errors)


# ---- checkpoints


def test_a_damaged_checkpoint_is_refused_and_the_newest_whole_one_named(tmp_path):
    train(problem(), SPEC, steps=20, log=tmp_path, checkpoint_every=10)
    newest, older = checkpoints(tmp_path)
    tensors_of(newest).write_bytes(tensors_of(newest).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=older.name) as caught:
        train(problem(), SPEC, steps=20, log=tmp_path, resume=True)
    assert f"{newest} is damaged: delete it" in str(caught.value)
    shutil.rmtree(newest)
    assert train(problem(), SPEC, steps=20, log=tmp_path, resume=True).stack.updates == 20


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_crafted_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    assert checkpoint.is_whole(write_as_before(folder, 7, {"run": {}, "step": 7, "model": Dangerous()}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(problem(), SPEC, steps=20, log=tmp_path / "run", resume=True)
    train(problem(), SPEC, steps=5, log=tmp_path / "other")
    (path,) = checkpoints(tmp_path / "other")
    for name in (".metadata", "rest.pt"):
        crafted = tmp_path / "run" / "checkpoints" / "step-000000009"
        shutil.copytree(path, crafted, dirs_exist_ok=True)
        (crafted / name).write_bytes(pickle.dumps(Dangerous()))
        sums = {file.name: checkpoint.sha256(file) for file in crafted.iterdir() if file.name != "manifest.json"}
        (crafted / "manifest.json").write_text(json.dumps({"files": sums}))
        with pytest.raises(CheckpointError, match="cannot be read"):
            train(problem(), SPEC, steps=20, log=tmp_path / "run", resume=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [{"step": 3}, [1, 2], {"run": 5, "step": "x", "model": {}, "stack": {}, "random": {}}]
)
def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(tmp_path, content):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write_as_before(folder, 3, content)
    with pytest.raises(CheckpointError):
        train(problem(), SPEC, steps=20, log=tmp_path, resume=True)


def test_a_checkpoint_of_an_earlier_version_is_continued_bit_for_bit(tmp_path):
    whole = train(problem(), SPEC, steps=12, log=tmp_path / "whole", checkpoint_every=7)
    content = checkpoint.load(checkpoints(tmp_path / "whole")[1])
    folder = tmp_path / "old" / "checkpoints"
    folder.mkdir(parents=True)
    write_as_before(folder, 7, {**content, "random": content["random"][0]})
    resumed = train(problem(), SPEC, steps=12, log=tmp_path / "old", resume=True)
    assert equal(resumed.model.state_dict(), whole.model.state_dict())
    assert equal(last(tmp_path / "old"), last(tmp_path / "whole"))


def test_the_newest_checkpoints_are_kept_and_one_that_was_not_published_is_none(tmp_path):
    train(problem(), SPEC, steps=20, log=tmp_path, checkpoint_every=4, kept=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000020", "step-000000016"]
    (tmp_path / "checkpoints" / "newest").write_text("step-000000016\n")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000016"]
    assert train(problem(), SPEC, steps=20, log=tmp_path, resume=True, kept=1).stack.updates == 20
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000020"]


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(tmp_path):
    whole, log = tmp_path / "whole", tmp_path / "run"
    run = warm.Command(command(log, steps=1_000_000, every=7), tmp_path)
    until(lambda: len(checkpoints(log)) == 2)
    run.kill(signal.SIGTERM)
    status, _, errors = run.end()
    assert status == 143
    assert checkpoints(log)[0].name in one_line(errors) and "--resume continues" in errors
    made = last(log)["step"]
    train(problem(), SPEC, steps=made, log=whole, checkpoint_every=made)
    assert equal(last(whole)["model"], last(log)["model"])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(problem(), SPEC, steps=4, log=tmp_path)
    for changed in ({"seed": 1}, {"steps": 5}):
        with pytest.raises(CheckpointError, match=f"another run: {next(iter(changed))}"):
            train(problem(), SPEC, **{"steps": 4, "log": tmp_path, "resume": True, **changed})
    with pytest.raises(CheckpointError, match="holds a run already: give --resume"):
        train(problem(), SPEC, steps=4, log=tmp_path)


# ---- devices


def test_a_run_trains_and_resumes_on_every_device(tmp_path, device):
    whole = train(problem(), SPEC, steps=12, device=str(device), log=tmp_path / "whole", checkpoint_every=6)
    first = checkpoints(tmp_path / "whole")[1]
    resumed = train(problem(), SPEC, steps=12, device=str(device), log=tmp_path / "again", resume=first)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert one.device.type == device.type
        assert torch.equal(one, other)


def test_a_schedule_ends_with_the_run_where_gradients_are_accumulated(tmp_path):
    opt = train(problem(), "accumulate(4) | sgd(lr=linear(0.1, 0.0))", steps=40, log=tmp_path, checkpoint_every=7).stack
    assert (opt.updates, opt.total_steps, opt.param_groups[0]["lr"]) == (10, 10, 0.0)
    train(problem(), "accumulate(4) | sgd(lr=linear(0.1, 0.0))", steps=40, log=tmp_path, resume=True)
    with pytest.raises(ProblemError, match="than --steps 3"):
        train(problem(), "accumulate(4) | sgd(lr=linear(0.1, 0.0))", steps=3)


def test_a_device_that_does_not_exist_is_one_clear_sentence(tmp_path):
    status, _, errors = warm.run(["train", "--problem=xor", "--device=nosuch"], tmp_path)
    assert status == 2
    assert "present: cpu" in one_line(errors)
