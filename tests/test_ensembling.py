"""Snapshots are taken where cycles end, survive a resume, and an ensemble averages their predictions."""

import copy
from pathlib import Path

import pytest
import torch

import metaopt


class Net(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def batch(number: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(number))


def train(model: torch.nn.Module, opt: metaopt.Stack, first: int, last: int) -> dict[int, dict[str, torch.Tensor]]:
    """Make some steps; return the model's state after each."""
    states = {}
    for number in range(first, last):
        opt.zero_grad()
        model(batch(number)).square().mean().backward()
        opt.step()
        states[opt.updates] = copy.deepcopy(model.state_dict())
    return states


def saved(directory: Path) -> list[int]:
    return [int(file.stem.removeprefix("snapshot-")) for file in sorted(directory.iterdir())]


@pytest.mark.parametrize(
    ("rate", "ends"),
    [
        ("cosine_restarts(0.1, first=5)", [5, 10, 15, 20, 23]),
        ("cosine_restarts(0.1, first=3, mult=2)", [3, 9, 21, 23]),
        # the update at the lowest rate is the last of its cycle
        ("cyclic(0.01, 0.1, up=3)", [7, 13, 19, 23]),
        ("warmup(cosine_restarts(0.1, first=6), 4)", [10, 16, 22, 23]),
        ("sequence(cosine(0.1), 8, cosine(0.05), 8, cosine(0.02))", [8, 16, 23]),
        # a warm-up from 0 begins each cycle: the update at a rate of 0 moves nothing
        ("sequence(cosine(0.1), 8, warmup(cosine(0.1), 3))", [9, 23]),
        ("cosine(0.1)", [23]),
    ],
)
def test_a_snapshot_is_taken_where_a_cycle_ends(rate: str, ends: list[int], tmp_path: Path) -> None:
    model = Net()
    opt = metaopt.build(model, f"sgd(lr={rate})", total_steps=23)
    metaopt.save_snapshots(opt, model, tmp_path / "new" / "snapshots")
    states = train(model, opt, 0, 23)
    assert saved(tmp_path / "new" / "snapshots") == ends
    for t in ends:
        found = torch.load(tmp_path / "new" / "snapshots" / f"snapshot-{t:08d}.pt", weights_only=True)
        assert found.keys() == states[t].keys() and all(torch.equal(found[k], v) for k, v in states[t].items())


def test_without_a_schedule_a_number_of_updates_is_a_cycle_and_skipped_steps_do_not_count(tmp_path: Path) -> None:
    model = Net()
    opt = metaopt.build(model, "accumulate(2) | adamw(lr=0.01)")
    handle = metaopt.save_snapshots(opt, model, tmp_path, every=3)
    train(model, opt, 0, 14)
    assert opt.updates == 7 and saved(tmp_path) == [3, 6]
    handle.remove()
    train(model, opt, 14, 20)
    assert saved(tmp_path) == [3, 6]


def test_a_resumed_run_writes_the_same_files_and_another_run_none(tmp_path: Path) -> None:
    spec, whole, parted = "sgd(lr=cosine_restarts(0.1, first=4))", tmp_path / "whole", tmp_path / "parted"
    model = Net()
    opt = metaopt.build(model, spec, total_steps=20)
    metaopt.save_snapshots(opt, model, whole)
    train(model, opt, 0, 20)
    model = Net()
    opt = metaopt.build(model, spec, total_steps=20)
    metaopt.save_snapshots(opt, model, parted)
    train(model, opt, 0, 9)
    state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, 9, 14)  # lost
    model = Net(1)
    opt = metaopt.build(model, spec, total_steps=20)
    metaopt.save_snapshots(opt, model, parted)
    model.load_state_dict(state[0])
    opt.load_state_dict(state[1])
    train(model, opt, 9, 20)
    assert saved(whole) == saved(parted) == [4, 8, 12, 16, 20]
    for file in whole.iterdir():
        a, b = (torch.load(folder / file.name, weights_only=True) for folder in (whole, parted))
        assert all(torch.equal(a[key], b[key]) for key in a)
    opt = metaopt.build(Net(), spec, total_steps=20)
    metaopt.save_snapshots(opt, model, whole)
    with pytest.raises(metaopt.ParameterError, match="an earlier run"):
        train_one(opt)
    assert saved(whole) == [4, 8, 12, 16, 20]


def train_one(opt: metaopt.Stack) -> None:
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()


def test_an_ensemble_is_the_mean_of_the_predictions(tmp_path: Path) -> None:
    model = Net()
    opt = metaopt.build(model, "sgd(lr=cosine_restarts(0.5, first=4))", total_steps=16)
    metaopt.save_snapshots(opt, model, tmp_path)
    states = train(model, opt, 0, 16)
    x, members = batch(99), []
    for t in (4, 8, 12, 16):
        member = Net(7)
        member.load_state_dict(states[t])
        members.append(member.eval()(x).detach())
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(metaopt.ensemble(model, tmp_path)(x), sum(members) / 4)
    torch.testing.assert_close(metaopt.ensemble(model, tmp_path, last=2)(x), sum(members[2:]) / 2)
    files = [tmp_path / "snapshot-00000004.pt", str(tmp_path / "snapshot-00000012.pt")]
    torch.testing.assert_close(metaopt.ensemble(model, files)(x), (members[0] + members[2]) / 2)
    predict = metaopt.ensemble(model, tmp_path, output=torch.nn.Softmax(dim=-1))
    torch.testing.assert_close(predict(x), sum(m.softmax(-1) for m in members) / 4)
    torch.testing.assert_close(predict(x).sum(-1), torch.ones(8))
    assert not any(p.requires_grad for p in predict.parameters()) and model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_wrong_uses_are_told(tmp_path: Path) -> None:
    model = Net()
    opt = metaopt.build(model, "sgd(lr=0.1)")
    for wrong, match in (
        (lambda: metaopt.save_snapshots(opt, model, tmp_path), "every="),
        (lambda: metaopt.save_snapshots(opt, model, tmp_path, every=0), "every must be"),
        (lambda: metaopt.save_snapshots(model, opt, tmp_path, every=1), "takes a stack and a model"),
        (lambda: metaopt.ensemble(model, tmp_path), "holds no snapshots"),
        (lambda: metaopt.ensemble(model, tmp_path, last=0), "last must be"),
    ):
        with pytest.raises(metaopt.ParameterError, match=match):
            wrong()
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "snapshot-00000001.pt")
    with pytest.raises(metaopt.CheckpointError, match="not a snapshot of this model"):
        metaopt.ensemble(model, tmp_path)

    class Returns(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(x)}

    returns = Returns(2, 2)
    with pytest.raises(metaopt.ParameterError, match="say what to average"):
        metaopt.ensemble(returns, tmp_path)(torch.ones(1, 2))
    metaopt.ensemble(returns, tmp_path, output=lambda returned: returned["logits"])(torch.ones(1, 2))
