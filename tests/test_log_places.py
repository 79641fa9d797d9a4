"""One directory, several writers; and tags and steps of the user's own."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import metaopt


def shown(root: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return what TensorBoard shows: by run and tag, steps and values."""
    read = EventMultiplexer().AddRunsFromDirectory(str(root)).Reload()
    return {
        run: {tag: [(e.step, e.value) for e in read.Scalars(run, tag)] for tag in tags["scalars"]}
        for run, tags in read.Runs().items()
    }


def stack(log: Any, **how: Any) -> metaopt.Stack:
    return metaopt.build(nn.Linear(2, 1), "sgd(lr=0.1)", log=log, log_every=5, **how)


def train(opt: metaopt.Stack, steps: int, loss: float = 1.0) -> None:
    for _ in range(steps):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        opt.record(loss=loss)
        opt.step()


# ---- several writers


@pytest.mark.parametrize("kind", ["directory", "writer", "jsonl", "logger"])
def test_two_stacks_that_log_to_one_place_are_refused_at_the_first_update(kind: str, tmp_path: Path) -> None:
    writer, logger = SummaryWriter(str(tmp_path / "w")), metaopt.jsonl(tmp_path / "one.jsonl")
    log = {
        "directory": lambda: tmp_path / "gan",
        "writer": lambda: writer,
        "jsonl": lambda: metaopt.jsonl(tmp_path / "gan.jsonl"),
        "logger": lambda: logger,
    }[kind]
    generator, discriminator = stack(log()), stack(log())
    train(generator, 1)
    with pytest.raises(metaopt.LogError, match=r"another stack of this program writes to .*opt\.close\(\)"):
        train(discriminator, 1)
    generator.close()
    train(discriminator, 5)
    discriminator.close()
    writer.close()


def test_stacks_with_directories_of_their_own_are_both_shown(tmp_path: Path) -> None:
    opts = [stack(tmp_path / name) for name in ("generator", "discriminator")]
    for loss, opt in enumerate(opts):
        train(opt, 5, float(loss))
        opt.close()
    found = shown(tmp_path)
    assert [found[run]["train/loss"] for run in ("generator", "discriminator")] == [[(5, 0.0)], [(5, 1.0)]]


def test_a_stack_that_is_built_again_takes_the_place_of_the_one_it_replaces(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        opt = stack(tmp_path)
        train(opt, 5)
        opt = stack(tmp_path)  # as in a notebook
        train(opt, 5, 2.0)
        opt.close()
    finally:
        gc.enable()
    assert shown(tmp_path)["."]["train/loss"] == [(5, 2.0)]


@pytest.mark.parametrize("points", [0, 1])
def test_a_directory_with_another_writer_s_event_files_is_refused(points: int, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(points):
            writer.add_scalar("val/accuracy", 0.5, step)
    with pytest.raises(metaopt.LogError, match=r"event files of another writer .*/metaopt, or that SummaryWriter"):
        stack(tmp_path)


def test_a_writer_that_comes_between_building_and_the_first_update_is_refused(tmp_path: Path) -> None:
    opt = stack(tmp_path)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("val/accuracy", 0.5, 0)
    with pytest.raises(metaopt.LogError, match="event files of another writer"):
        train(opt, 1)


def test_a_writer_that_comes_later_is_warned_of_once(tmp_path: Path) -> None:
    opt = stack(tmp_path)
    train(opt, 5)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("val/accuracy", 0.5, 0)
    with pytest.warns(metaopt.MetaoptWarning, match="another writer has begun to write") as told:
        train(opt, 10)
    assert len(told) == 1
    opt.close()


def test_a_run_goes_on_in_its_own_directory_and_in_the_other_s_writer(tmp_path: Path) -> None:
    opt = stack(tmp_path / "own")
    train(opt, 5)
    opt.close()
    again = stack(tmp_path / "own")
    again.load_state_dict(opt.state_dict())
    train(again, 5)
    again.close()
    assert shown(tmp_path)["own"]["train/loss"] == [(5, 1.0), (10, 1.0)]
    with SummaryWriter(str(tmp_path / "shared")) as writer:
        writer.add_scalar("val/accuracy", 0.5, 3)
        opt = stack(writer)
        train(opt, 5)
        opt.close()
    assert {"val/accuracy", "train/loss"} <= shown(tmp_path)["shared"].keys()


# ---- tags and steps of the user's own


def test_a_name_with_a_slash_is_a_tag_whose_points_stand_where_they_were_recorded(tmp_path: Path) -> None:
    opt = stack(tmp_path / "run")
    opt.record({"val/loss": 1.0})  # before the first update
    for epoch in range(2):
        train(opt, 7)
        opt.record({"val/loss": torch.tensor(0.5 - epoch / 4)}, accuracy=float(epoch))
    opt.close()
    found = shown(tmp_path)["run"]
    assert found["val/loss"] == [(0, 1.0), (7, 0.5), (14, 0.25)]
    assert found["train/loss"] == [(5, 1.0), (10, 1.0), (14, 1.0)]
    assert found["train/accuracy"] == [(10, 0.0)]  # a mean of what was measured since the point before
    assert opt.metrics()["val/loss"] == 0.25


def test_values_may_bring_their_step(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    opt = stack(metaopt.jsonl(path))
    train(opt, 5)
    opt.record({"epoch/accuracy": 0.5}, step=1)
    opt.record(accuracy=0.75, step=2)
    opt.close()
    points = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert points[1:] == [{"step": 1, "epoch/accuracy": 0.5}, {"step": 2, "train/accuracy": 0.75}]


def test_values_of_a_stack_without_a_log_are_in_its_metrics() -> None:
    opt = stack(None)
    opt.record({"val/loss": 2.0})
    assert opt.metrics()["val/loss"] == 2.0


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_a_step_that_is_not_a_count_is_refused(step: Any) -> None:
    with pytest.raises(metaopt.LogError, match=r"record\(\): step must be an integer >= 0, got"):
        stack(None).record({"val/loss": 1.0}, step=step)


def test_values_that_are_not_named_are_refused() -> None:
    with pytest.raises(metaopt.LogError, match=r"record\(\): values must be a dict of numbers by name, got float"):
        stack(None).record(1.0)
