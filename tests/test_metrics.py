"""Metrics: what is measured stays on its device; a point is the mean since the point before."""

import copy
import gc
import math
import pickle
from pathlib import Path

import pytest
import torch
import warm
from clients.ranks import meet

import metaopt
from metaopt import LogError, Logger
from metaopt.measurements import Reading
from metaopt.metrics import Metrics, as_logger
from metaopt.testing.watching import waits_raise


class Memory(Logger):
    """Keeps what it is told."""

    def __init__(self):
        self.opened = []
        self.points = []
        self.closed = 0

    def open(self, *, step, tags, spec, hparams):
        self.opened.append((step, tuple(tags), spec, dict(hparams)))

    def scalars(self, step, values):
        self.points.append((step, dict(values)))

    def close(self):
        self.closed += 1


def train(metrics, losses, first=1):
    for update, loss in enumerate(losses, first):
        metrics.measure("train/loss", torch.tensor(loss))
        metrics.end_update(update)


def test_a_point_is_the_mean_since_the_point_before():
    log = Memory()
    metrics = Metrics(log, every=2)
    train(metrics, [1.0, 3.0, 5.0, 9.0, 100.0])
    assert log.points == [(2, {"train/loss": 2.0}), (4, {"train/loss": 7.0})]


def test_closing_writes_the_last_shorter_window_once():
    log = Memory()
    metrics = Metrics(log, every=2)
    train(metrics, [1.0, 3.0, 5.0])
    metrics.close()
    metrics.close()
    assert log.points[-1] == (3, {"train/loss": 5.0})
    assert log.closed == 1


def test_latest_is_of_the_last_update_not_of_the_window():
    metrics = Metrics(Memory(), every=10)
    train(metrics, [1.0, 3.0])
    assert metrics.latest() == {"train/loss": 3.0}


def test_latest_works_without_a_logger():
    metrics = Metrics()
    train(metrics, [1.0, 3.0])
    assert metrics.latest() == {"train/loss": 3.0}


def test_several_values_in_one_update_are_averaged():
    metrics = Metrics()
    metrics.measure("train/loss", 1.0)
    metrics.measure("train/loss", torch.tensor(4.0, dtype=torch.bfloat16))
    assert metrics.latest() == {"train/loss": 2.5}


def test_a_skipped_update_leaves_nothing():
    log = Memory()
    metrics = Metrics(log, every=1)
    metrics.measure("train/loss", math.inf)
    metrics.drop_update()
    train(metrics, [2.0])
    assert log.points == [(1, {"train/loss": 2.0})]


def test_a_tensor_changed_after_measuring_is_logged_as_it_was():
    metrics = Metrics()
    loss = torch.tensor(2.0, requires_grad=True)
    metrics.measure("train/loss", loss)
    with torch.no_grad():
        loss.mul_(100)
    assert metrics.latest() == {"train/loss": 2.0}


def test_float64_keeps_its_digits_beside_float32():
    metrics = Metrics()
    metrics.measure("a", torch.tensor(0.1, dtype=torch.float64))
    metrics.measure("b", torch.tensor(0.5))
    assert metrics.latest() == {"a": 0.1, "b": 0.5}


def test_a_window_longer_than_it_keeps_is_still_the_mean():
    log = Memory()
    train(Metrics(log, every=1000), [float(n) for n in range(1000)])
    assert log.points == [(1000, {"train/loss": 499.5})]


def test_measuring_never_reads_a_tensor():
    # a meta tensor has no values: whatever read it would raise
    metrics = Metrics(Memory(), every=10)
    for update in range(1, 10):
        metrics.measure("train/loss", torch.empty((), device="meta"))
        metrics.end_update(update)


@pytest.mark.cuda
def test_measuring_never_waits_for_a_gpu():
    log = Memory()
    metrics = Metrics(log, every=10)
    loss = torch.ones((), device="cuda")
    with waits_raise():
        for update in range(1, 22):
            metrics.measure("train/loss", loss)
            metrics.end_update(update)
    metrics.close()
    assert [step for step, _ in log.points] == [10, 20, 21]
    assert metrics.latest() == {"train/loss": 1.0}


def test_points_are_written_in_their_order_when_their_numbers_have_come(monkeypatch):
    has_come = []
    monkeypatch.setattr(Reading, "is_ready", lambda self: bool(has_come))
    log = Memory()
    metrics = Metrics(log, every=2)
    train(metrics, [1.0, 3.0, 5.0, 7.0, 9.0])
    assert log.points == []  # two points are on their way
    has_come.append(True)
    train(metrics, [11.0], first=6)
    assert log.points == [(2, {"train/loss": 2.0}), (4, {"train/loss": 6.0}), (6, {"train/loss": 10.0})]
    has_come.clear()
    train(metrics, [2.0, 4.0], first=7)
    metrics.close()
    assert log.points[3:] == [(8, {"train/loss": 3.0})]


@pytest.mark.parametrize("ends_by", ["a checkpoint", "an earlier checkpoint that is loaded", "flush"])
def test_what_is_on_its_way_is_written_before_anything_that_follows(ends_by, monkeypatch):
    monkeypatch.setattr(Reading, "is_ready", lambda self: False)
    log = Memory()
    metrics = Metrics(log, every=2)
    train(metrics, [1.0, 3.0])
    assert log.points == []
    if ends_by == "a checkpoint":
        metrics.write_points()
    elif ends_by == "flush":
        metrics.flush()
    else:
        train(metrics, [1.0], first=1)
        assert [step for step, *_ in log.opened] == [0, 0]
    assert log.points == [(2, {"train/loss": 2.0})]


def test_one_read_serves_all_tags_of_a_device(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    log = Memory()
    metrics = Metrics(log, every=3)
    for update in range(1, 4):
        metrics.measure("a", torch.tensor(float(update)))
        metrics.measure("b", torch.tensor(-float(update), dtype=torch.float64))
        metrics.end_update(update)
    assert reads == [(6,)]
    assert log.points == [(3, {"a": 2.0, "b": -2.0})]


def test_the_logger_hears_of_the_run_before_its_first_point():
    log = Memory()
    train(Metrics(log, tags=["train/loss"], spec=lambda: "sgd", hparams={"sgd.lr": 0.1}), [1.0])
    assert log.opened == [(0, ("train/loss",), "sgd", {"sgd.lr": 0.1})]


def test_a_run_that_goes_on_opens_after_its_checkpoint():
    log = Memory()
    train(Metrics(log), [1.0], first=41)
    assert [step for step, *_ in log.opened] == [40]


def test_a_count_that_goes_back_opens_again_and_drops_the_window():
    log = Memory()
    metrics = Metrics(log, every=5)
    train(metrics, [1.0] * 8)
    train(metrics, [2.0] * 5, first=6)
    assert [step for step, *_ in log.opened] == [0, 5]
    assert log.points == [(5, {"train/loss": 1.0}), (10, {"train/loss": 2.0})]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_writes_to_no_log(again):
    log = Memory()
    metrics = Metrics(log, every=1, spec=lambda: "sgd")
    train(metrics, [1.0])
    twin = again(metrics)
    train(twin, [7.0], first=2)
    assert twin.logger is None and len(log.points) == 1
    assert twin.latest() == {"train/loss": 7.0}


def test_a_value_of_several_numbers_is_refused():
    with pytest.raises(LogError, match=r"train/loss is measured as one real number.*\(3,\)"):
        Metrics().measure("train/loss", torch.ones(3))


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_log_every_must_count_updates(every):
    with pytest.raises(LogError, match="log_every"):
        Metrics(every=every)


def test_a_logger_that_fails_on_the_disk_raises_a_log_error():
    class Full(Memory):
        def scalars(self, step, values):
            raise OSError(28, "No space left on device")

    with pytest.raises(LogError, match=r"Full could not write update 1: .*No space left"):
        train(Metrics(Full(), every=1), [1.0])


def test_log_takes_a_logger_a_directory_or_nothing(tmp_path):
    made = []
    log = Memory()
    assert as_logger(None, made.append) is None
    assert as_logger(log, made.append) is log
    as_logger(tmp_path, made.append)
    as_logger("runs/x", made.append)
    assert made == [tmp_path, "runs/x"]


def test_what_cannot_be_logged_to_is_refused():
    with pytest.raises(LogError, match=r"log must be a directory.*got 3"):
        as_logger(3, Memory)


def test_only_rank_0_writes(tmp_path):
    ranks = [warm.context().Process(target=_two_ranks, args=(rank, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("wrote-*")) == ["wrote-0"]


def _two_ranks(rank, folder):
    meet(Path(folder, "meet"), rank)
    log = Memory()
    train(Metrics(log, every=1), [1.0])
    if log.points or log.opened:
        with open(f"{folder}/wrote-{rank}", "w"):
            pass
    torch.distributed.barrier()  # a rank that leaves while the other still connects breaks it
    torch.distributed.destroy_process_group()


def test_norms_of_parts_become_the_norm_of_the_whole_before_they_are_averaged():
    log = Memory()
    metrics = Metrics(log, every=2)
    for update, parts in enumerate([(3.0, 4.0), (6.0, 8.0)], 1):
        for part in parts:
            metrics.measure("lookahead/distance", torch.tensor(part), reduce="norm")
        metrics.end_update(update)
    assert metrics.latest() == {"lookahead/distance": 10.0}
    assert log.points == [(2, {"lookahead/distance": 7.5})]


def test_every_update_weighs_the_same_however_often_it_measured():
    log = Memory()
    metrics = Metrics(log, every=2)
    for value in (1.0, 3.0, 8.0):
        metrics.measure("train/loss", value)
    metrics.end_update(1)
    metrics.measure("train/loss", 2.0)
    metrics.end_update(2)
    assert log.points == [(2, {"train/loss": 3.0})]


def test_a_log_that_nobody_closes_is_written_to_its_end():
    log = Memory()
    metrics = Metrics(log, every=10)
    train(metrics, [1.0, 3.0])
    assert log.points == []
    del metrics
    gc.collect()
    assert (log.points, log.closed) == ([(2, {"train/loss": 2.0})], 1)


def test_a_log_that_cannot_be_written_at_the_end_is_told_in_one_line(capsys):
    class Full(Memory):
        def scalars(self, step, values):
            raise OSError(28, "No space left on device")

    metrics = Metrics(Full(), every=10)
    train(metrics, [1.0])
    del metrics
    gc.collect()
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "No space left" in told


def stack_with(log, spec="sgd(lr=0.1)", **options):
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return x, metaopt.build([x], spec, log=log, **options)


def quadratic(x, opt, scale):
    def closure():
        opt.zero_grad()
        loss = scale * x.square().sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("way", ["closure", "record"])
def test_the_loss_of_a_point_is_the_mean_over_its_updates_however_it_is_given(way):
    log = Memory()
    x, opt = stack_with(log, log_every=3)
    losses = []
    for _ in range(6):
        closure = quadratic(x, opt, 1.0)
        if way == "closure":
            losses.append(opt.step(closure).item())
        else:
            losses.append(closure())
            opt.record(loss=losses[-1])
            opt.step()
            losses[-1] = losses[-1].item()
    points = [values["train/loss"] for _, values in log.points]
    assert points == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert opt.metrics()["train/loss"] == pytest.approx(losses[-1])


def test_a_closure_that_returns_several_numbers_trains_all_the_same():
    x, opt = stack_with(Memory(), log_every=1)

    def closure():
        opt.zero_grad()
        losses = x.square()
        losses.sum().backward()
        return losses

    opt.step(closure)
    assert "train/loss" not in opt.metrics()


def test_closing_a_stack_writes_what_is_left_and_training_goes_on():
    log = Memory()
    x, opt = stack_with(log, log_every=10)
    loss = opt.step(quadratic(x, opt, 1.0)).item()
    opt.close()
    assert log.closed == 1
    assert log.points[-1][0] == 1 and log.points[-1][1]["train/loss"] == pytest.approx(loss)
    opt.step(quadratic(x, opt, 1.0))
    opt.close()
    assert (opt.updates, log.closed) == (2, 1)


def test_the_distance_of_lookahead_is_one_norm_over_all_its_pieces():
    # two groups and two dtypes: four pieces
    parameters = [torch.nn.Parameter(torch.full((n,), float(n), dtype=dtype)) for n, dtype in enumerate(
        [torch.float32, torch.float64, torch.float32, torch.float64], start=1
    )]  # fmt: skip
    log = Memory()
    opt = metaopt.build(
        [{"params": parameters[:2]}, {"params": parameters[2:]}], "sgd(lr=0.1) | lookahead(k=1)", log=log, log_every=1
    )
    for p in parameters:
        p.grad = torch.ones_like(p)
    opt.step()
    moved = 0.1 * math.sqrt(sum(p.numel() for p in parameters))
    assert log.points[0][1]["lookahead/distance"] == pytest.approx(moved)


def test_what_was_recorded_before_a_checkpoint_is_written_with_it():
    log = Memory()
    x, opt = stack_with(log, log_every=10)
    opt.step(quadratic(x, opt, 1.0))
    opt.record({"val/loss": torch.tensor(0.5)})
    assert log.points == []
    opt.state_dict()
    assert log.points == [(1, {"val/loss": 0.5})]
    opt.close()
    assert [step for step, values in log.points if "val/loss" in values] == [1]
