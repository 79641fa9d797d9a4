"""`metaopt train` under torchrun: ranks train what one process trains, speak with one voice, and end together."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from rank_runs import Together, _command, commands, trained
from reference_replicas import Rule, simulated

from metaopt.lab.batches import dealt
from metaopt.lab.checkpoint import found as newest_of
from metaopt.lab.checkpoint import load
from metaopt.lab.torchrun import separated
from metaopt.registry import registry

pytestmark = pytest.mark.slow

SPEC = "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(3e-3), 0.1)) | lookahead"
SMALL = {"width": 16, "context": 16, "batch_size": 8}

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*arguments, folder, ranks=2, more=()):
    """Run the real torchrun, with options as people write them."""
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), *more, "-m", "metaopt", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def losses_apart(one, other):
    """Return the largest difference between the losses of two runs."""
    return numpy.abs(numpy.subtract(one["losses"], other["losses"])).max()


def weights_apart(one, other):
    """Return the largest difference between the weights of two runs."""
    return max(numpy.abs(one["weights"][key] - other["weights"][key]).max() for key in one["weights"])


def test_the_command_works_under_torchrun_as_people_write_it(tmp_path):
    asked = ["train", "--problem", "charlm", "--stack", SPEC, "--steps", "4", "--log", "runs/x"]
    ended = torchrun(*asked, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["4 updates", "log and checkpoints"]
    assert "metaopt" not in ended.stderr
    assert len(list((tmp_path / "runs" / "x").glob("events*"))) == 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("dtype", "most"), [(None, 1e-5), (torch.float64, 1e-10)])
def test_ranks_train_what_one_process_trains(parallel, dtype, most):
    how = {"problem": SMALL, "steps": 12, "dtype": dtype}
    alone = trained(1, "charlm", SPEC, **how)[0]
    for size in (2, 4) if dtype is not None else (2,):
        ranks = trained(size, "charlm", SPEC, parallel=parallel, **how)
        assert losses_apart(ranks[0], alone) <= most
        for other in ranks[1:]:
            assert losses_apart(ranks[0], other) == weights_apart(ranks[0], other) == 0
            assert ranks[0]["evaluation"] == other["evaluation"]


def test_stacks_that_look_at_the_loss_or_evaluate_it_often_decide_alike():
    for spec in ("sam | sgd(lr=0.05)", "accumulate(2) | sgd(lr=0.05)", "lbfgs(lr=0.01, max_iter=3)"):
        how = {"problem": SMALL, "steps": 4, "dtype": torch.float64}
        alone, (one, other) = trained(1, "charlm", spec, **how)[0], trained(2, "charlm", spec, **how)
        assert losses_apart(one, alone) <= 1e-10 and weights_apart(one, alone) <= 1e-10, spec
        assert weights_apart(one, other) == 0


LOCAL = "sgd(lr=0.1, momentum=0.9) | outer(k=3, lr=0.7, momentum=0.9, across='replicas')"


def test_local_updates_are_their_simulation_and_send_nothing_between_outer_steps():
    how = {"problem": SMALL, "steps": 9, "dtype": torch.float64}
    replicas = trained(2, "charlm", LOCAL, parallel="local", **how)
    problem = registry.find("charlm", "problem").target(**SMALL)
    model = problem.model(0, "cpu").double()
    batches = problem.batches(0, "cpu")
    drawn = [next(batches) for _ in range(how["steps"])]
    names = [name for name, _ in model.named_parameters()]

    def gradients(worker, step, weights):
        own = dealt(drawn[step - 1], worker, 2, "charlm")
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights, strict=True):
                p.copy_(weight)
        return torch.autograd.grad(problem.loss(model, own), list(model.parameters()))

    starts = [p.detach().clone() for p in model.parameters()]
    expected = simulated(starts, 2, how["steps"], gradients, Rule(3, 0.7, 0.9), lr=0.1, momentum=0.9)[-1]
    for found in replicas:
        for name, weight in zip(names, expected[0], strict=True):
            assert numpy.abs(found["weights"][name] - weight.numpy()).max() <= 1e-12
    assert weights_apart(*replicas) == 0 and replicas[0]["evaluation"] == replicas[1]["evaluation"]
    # one for each outer step with all weights, and beside it whether a replica has to stop
    assert replicas[0]["sent"] == [8 * sum(w.numel() for w in starts), 4] * 3


def test_replicas_continue_bit_for_bit_and_others_take_the_outer_weights(tmp_path):
    def local(size, path, **how):
        more = {"problem": {**SMALL, "batch_size": 12}, "dtype": torch.float64, "steps": 9}
        return trained(size, "charlm", LOCAL, parallel="local", log=path, **more, **how)

    whole = local(2, tmp_path / "whole", checkpoint_every=4)
    step_4 = tmp_path / "whole" / "checkpoints" / "step-000000004"
    again = local(2, tmp_path / "again", resume=step_4)
    # in the middle of a period, each with weights and losses of its own
    assert whole[0]["losses"] != whole[1]["losses"]
    assert [found["losses"] for found in again] == [found["losses"][4:] for found in whole]
    assert weights_apart(again[0], whole[0]) == weights_apart(again[1], whole[0]) == 0
    three = local(3, tmp_path / "three", resume=step_4)
    assert [len(found["losses"]) for found in three] == [5] * 3
    assert weights_apart(three[0], three[1]) == weights_apart(three[0], three[2]) == 0


def one_voice(ended):
    """Return the one line of all ranks, none of which may have ended well."""
    assert all(status == 2 for status, _, _ in ended), ended
    assert not any(out for _, out, _ in ended)
    errors = "".join(errors for _, _, errors in ended)
    assert "Traceback" not in errors
    # torch may warn of the store that the first rank to end has kept
    (line,) = [line for line in errors.splitlines() if line.startswith("metaopt: ")]
    return line


def test_a_batch_that_ranks_cannot_share_is_one_line(tmp_path):
    line = one_voice(commands(3, ["train", "--problem=charlm", "--steps=2"], tmp_path))
    assert "a batch of charlm has 16 examples, which 3 ranks cannot share evenly" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--problem=noisy_quadratic"], "cannot be dealt over ranks"),
        (["--problem=xor", "--parallel=local"], "--parallel local needs a part that averages over replicas"),
        (["--problem=rosenbrock"], "cannot be dealt over ranks: expected tensors"),
        (["--problem=xor", "--stack=adm"], "adm"),
        (["--problem=xor", "--steps=0"], "--steps"),
        (["--problem=xor", "--device=nosuch"], "present: cpu"),
        (["--plugin=failing", "--problem=failing"], "RuntimeError: only here"),
    ],
)
def test_an_error_on_any_rank_is_one_line_and_ends_all(tmp_path, arguments, told):
    (tmp_path / "failing.py").write_text(FAILING)
    began = time.monotonic()
    assert told in one_voice(commands(2, ["train", *arguments], tmp_path))
    assert time.monotonic() - began < 60


FAILING = """
import os
from metaopt import hookimpl
from metaopt.problems.classification import Xor

class Failing(Xor):
    '''Fails on rank 1, at its ninth loss.'''
    losses = 0

    def loss(self, model, batch):
        self.losses += 1
        if os.environ.get("RANK") == "1" and self.losses == 9:
            raise RuntimeError("only here")
        return super().loss(model, batch)

@hookimpl
def metaopt_problems():
    return {"failing": Failing}
"""


def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    running = Together(2, _command, ["train", "--problem=xor", "--steps=10000000"], str(tmp_path))
    while not (tmp_path / "rank1.err").exists():
        time.sleep(0.01)
    time.sleep(2)
    running.processes[1].kill()
    running.end()
    assert [process.exitcode for process in running.processes] == [2, -signal.SIGKILL]
    assert "another rank has ended" in (tmp_path / "rank0.err").read_text()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("torchrun -m metaopt train --log x", "torchrun -m -- metaopt train --log x"),
        ("/bin/torchrun --module metaopt train", "/bin/torchrun --module -- metaopt train"),
        ("/lib/run.py --nproc-per-node 2 --no-python metaopt", "/lib/run.py --nproc-per-node 2 --no-python -- metaopt"),
        ("torchrun -m -- metaopt train", "torchrun -m -- metaopt train"),
        ("torchrun -m other --log x", "torchrun -m other --log x"),
        ("torchrun script.py -m metaopt", "torchrun script.py -m metaopt"),
        ("pytest -m metaopt", "pytest -m metaopt"),
    ],
)
def test_only_a_torchrun_that_starts_metaopt_is_read_otherwise(written, read):
    assert separated(written.split()) == read.split()


# ---- checkpoints


def run_of(ranks, path, parallel="ddp", **how):
    return trained(ranks, "charlm", SPEC, parallel=parallel, log=path, problem=SMALL, dtype=torch.float64, **how)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 12 steps by two FSDP ranks, with checkpoints of the steps 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_of(2, folder, "fsdp", steps=12, checkpoint_every=5)[0]


@pytest.mark.parametrize(("size", "parallel"), [(1, "ddp"), (2, "ddp"), (4, "fsdp")])
def test_a_checkpoint_of_two_ranks_is_continued_by_other_ranks(tmp_path, saved, size, parallel):
    folder, whole = saved
    again = run_of(size, tmp_path, parallel, steps=12, resume=folder / "checkpoints" / "step-000000005")[0]
    assert len(again["losses"]) == 7
    assert numpy.abs(numpy.subtract(again["losses"], whole["losses"][5:])).max() <= 1e-10
    assert weights_apart(again, whole) <= 1e-10


def test_the_same_ranks_continue_bit_for_bit(tmp_path, saved):
    folder, whole = saved
    again = run_of(2, tmp_path, "fsdp", steps=12, resume=folder / "checkpoints" / "step-000000005")
    assert again[0]["losses"] == whole["losses"][5:]
    assert weights_apart(again[0], whole) == weights_apart(again[1], whole) == 0


def test_four_ranks_continue_bit_for_bit(tmp_path):
    whole = run_of(4, tmp_path / "whole", steps=8, checkpoint_every=3)[0]
    step_3 = tmp_path / "whole" / "checkpoints" / "step-000000003"
    again = run_of(4, tmp_path / "again", steps=8, resume=step_3)[0]
    assert again["losses"] == whole["losses"][3:]
    assert weights_apart(again, whole) == 0


DYING = """
import os, signal
from metaopt import hookimpl
from metaopt.problems.classification import Xor

class Dying(Xor):
    '''Kills rank 1 at its 25th loss, in the first life.'''
    losses = 0

    def loss(self, model, batch):
        self.losses += 1
        life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if (os.environ["RANK"], self.losses, life) == ("1", 25, 0):
            with open("deaths", "a") as file:
                file.write("1")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)

@hookimpl
def metaopt_problems():
    return {"dying": Dying}
"""


def test_ranks_that_are_killed_and_started_again_end_bit_for_bit(tmp_path):
    asked = ["--stack", SPEC, "--steps", "40", "--checkpoint-every", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = commands(2, ["train", "--problem=xor", *asked, f"--log={whole}"], tmp_path)
    assert [status for status, _, _ in ended] == [0, 0], ended
    (tmp_path / "dying.py").write_text(DYING)
    again = ["train", "--plugin", "dying", "--problem", "dying", *asked, "--log", killed]
    torch_run = torchrun(*again, folder=tmp_path, more=["--max-restarts", "3"])
    assert torch_run.returncode == 0, torch_run.stderr
    assert (tmp_path / "deaths").read_text() == "1"
    one, other = (load(newest_of(log / "checkpoints")[0]) for log in (whole, killed))
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_random_ranks_that_are_killed_at_random_times_end_bit_for_bit(tmp_path, request):
    kills = request.config.getoption("--rank-kills")
    # another number of kills is another series
    chosen = random.Random(kills)
    asked = ["train", "--problem=xor", "--stack", SPEC, "--steps=120", "--checkpoint-every=5"]
    began = time.monotonic()
    ended = commands(2, [*asked, f"--log={tmp_path / 'whole'}"], tmp_path)
    length = time.monotonic() - began
    assert [status for status, _, _ in ended] == [0, 0], ended
    whole = load(newest_of(tmp_path / "whole" / "checkpoints")[0])
    killed = in_a_row = run = resumed = 0
    while killed < kills or in_a_row:
        log = tmp_path / f"killed-{run}"
        began = time.monotonic()
        running = Together(2, _command, [*asked, f"--log={log}"], str(tmp_path), restarts=in_a_row)
        resumed += in_a_row > 0 and bool(newest_of(log / "checkpoints"))
        # no more than four in a row, so that each run comes to its end
        if killed < kills and in_a_row < 4:
            time.sleep(chosen.uniform(0.0, length))
        victim = running.processes[chosen.randrange(2)]
        if killed < kills and in_a_row < 4 and victim.exitcode is None:
            victim.kill()
            killed, in_a_row = killed + 1, in_a_row + 1
            # as torchrun does, which ends those that have not ended by themselves
            for process in running.processes:
                process.join(10)
                process.kill()
            continue
        running.end()
        if not in_a_row:
            length = min(length, time.monotonic() - began)  # most kills are to come before the end
        assert [process.exitcode for process in running.processes] == [0, 0]
        end = load(newest_of(log / "checkpoints")[0])
        assert all(torch.equal(end["model"][key], whole["model"][key]) for key in whole["model"])
        run, in_a_row = run + 1, 0
    print(f"{killed} kills in {run} runs; {resumed} restarts went on from a checkpoint")


def test_sigterm_on_one_rank_stops_all_at_the_same_step_with_a_checkpoint(tmp_path):
    log = tmp_path / "run"
    asked = ["train", "--problem=xor", "--steps=1000000", f"--log={log}", "--checkpoint-every=3"]
    running = Together(2, _command, asked, str(tmp_path))
    while not newest_of(log / "checkpoints"):
        time.sleep(0.01)
    os.kill(running.processes[1].pid, signal.SIGTERM)
    running.end()
    assert [process.exitcode for process in running.processes] == [143, 143]
    path = newest_of(log / "checkpoints")[0]
    told = "".join((tmp_path / f"rank{rank}.err").read_text() for rank in (0, 1))
    assert told.count("metaopt: interrupted: after step") == 1
    assert path.name in told and "The same command with --resume continues" in told
