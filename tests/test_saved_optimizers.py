"""`metaopt diff` and `metaopt migrate`: what is in a checkpoint file, and what another stack would take of it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_same, assert_same_weights, small_model, train

import metaopt
from metaopt.cli import main
from metaopt.lab.migrate import migrate
from metaopt.lab.saved_optimizers import read


def command(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


def bare(folder: Path, steps: int = 4, **options: Any) -> tuple[Any, Any, Path]:
    model = small_model()
    opt = torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **options})
    train(model, opt, range(steps))
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict(), "epoch": 3}, folder / "old.pt")
    return model, opt, folder / "old.pt"


def stacked(folder: Path, spec: str, steps: int = 4, total_steps: int | None = None, **rules: Any) -> Path:
    model = small_model()
    opt = metaopt.build(metaopt.groups(model, **rules), spec, total_steps=total_steps)
    train(model, opt, range(steps))
    torch.save(opt.state_dict(), folder / "stack.pt")
    return folder / "stack.pt"


# ---- migrate


def test_a_bare_checkpoint_becomes_one_of_a_stack_and_the_run_goes_on_at_its_count(tmp_path: Path, capsys: Any) -> None:
    model, opt, file = bare(tmp_path)
    spec = "adamw(lr=warmup(cosine(0.01), 2)) | lookahead(k=3)"
    status, printed, _ = command(capsys, "migrate", file, "--stack", spec, "--total-steps", 20)
    assert status == 0
    assert "updates     4, as the base counts them" in printed
    assert "taken       step of 4, exp_avg of 4, exp_avg_sq of 4" in printed
    assert "begun anew  lookahead" in printed
    made = torch.load(tmp_path / "old.migrated.pt", weights_only=True)
    assert made.keys() == {"model", "optimizer", "epoch"}
    assert_same(made["optimizer"]["state"], opt.state_dict()["state"])
    twin = small_model()
    twin.load_state_dict(made["model"])
    again = metaopt.build(twin, spec, total_steps=20)
    again.load_state_dict(made["optimizer"])
    assert again.updates == 4
    directly = metaopt.build(model, spec, total_steps=20)
    with pytest.warns(UserWarning, match="started fresh: lookahead"):
        directly.load_state_dict(opt.state_dict())
    train(model, directly, range(4, 9))
    train(twin, again, range(4, 9))
    assert_same_weights(twin, model)


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    _, _, file = bare(tmp_path)
    before = file.read_bytes()
    said = command(capsys, "migrate", file, "--stack", "adamw | ema", "--dry-run")[1].splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]
    done = command(capsys, "migrate", file, "--stack", "adamw | ema")[1].splitlines()
    assert said[:-1] == done[:-1]
    assert said[-1] == "nothing was written"
    assert file.read_bytes() == before


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    _, _, file = bare(tmp_path)
    status, _, error = command(capsys, "migrate", file, "--stack", "adamw", "--out", file)
    assert (status, len(error.splitlines())) == (2, 1)
    assert "exists already" in error


def test_parts_that_go_are_dropped_from_the_file_and_constants_are_chosen(tmp_path: Path) -> None:
    file = stacked(tmp_path, "clip_grad_norm(1.0) | adamw(lr=0.01, weight_decay=0.1) | lookahead(k=3)", no_decay="1d")
    made = migrate(read(file), "adamw(lr=0.002, weight_decay=0.3) | ema", keep="live")
    lines = made.lines()
    assert "dropped     lookahead.slow of 4" in lines
    assert "value       lr=0.002 (checkpoint: 0.01), the stack's" in lines
    # what the groups of the file do not share is theirs
    assert [group["weight_decay"] for group in made.state_dict()["param_groups"]] == [0.1, 0.0]
    assert {group["lr"] for group in made.state_dict()["param_groups"]} == {0.002}
    assert not any(key.startswith("lookahead") for held in made.state_dict()["state"].values() for key in held)
    assert {group["lr"] for group in migrate(read(file), "adamw(lr=0.002)").state_dict()["param_groups"]} == {0.01}


def test_a_stack_goes_back_to_the_bare_optimizer(tmp_path: Path) -> None:
    file = stacked(tmp_path, "adamw(lr=0.01) | ema")
    migrate(read(file), "adamw").write(tmp_path / "bare.pt")
    opt = torch.optim.AdamW(small_model().named_parameters(), lr=0.01)
    opt.load_state_dict(torch.load(tmp_path / "bare.pt", weights_only=True))
    assert {float(held["step"]) for held in opt.state.values()} == {4.0}
    assert opt.param_groups[0]["lr"] == 0.01


def test_another_base_is_refused_and_the_reason_told(tmp_path: Path, capsys: Any) -> None:
    _, _, file = bare(tmp_path)
    status, _, error = command(capsys, "migrate", file, "--stack", "sgd(lr=0.1, momentum=0.9)", "--dry-run")
    assert status == 2
    assert "another base than SGD" in error


def test_a_longer_run_needs_to_be_asked_for(tmp_path: Path, capsys: Any) -> None:
    file = stacked(tmp_path, "adamw(lr=cosine(0.01))", total_steps=20)
    asked = ["migrate", file, "--stack", "adamw(lr=cosine(0.01))", "--total-steps", 40, "--dry-run"]
    assert "extend" in command(capsys, *asked)[2]
    assert "extended    from 20 to 40 updates" in command(capsys, *asked, "--extend")[1]


def test_tensors_that_are_taken_are_those_of_the_file_in_their_own_dtype(tmp_path: Path) -> None:
    model = small_model(dtype=torch.bfloat16)
    opt = metaopt.build(model.named_parameters(), "adamw(lr=0.01) | lookahead(k=3, slow_dtype='float32')")
    train(model, opt, range(4))
    torch.save({"opt": opt.state_dict()}, tmp_path / "old.pt")
    made = migrate(read(tmp_path / "old.pt"), "adamw | lookahead(k=3, slow_dtype='float32') | ema").state_dict()
    assert_same(made["state"], opt.state_dict()["state"])


# ---- clients


def test_lightning_s_file(tmp_path: Path, capsys: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_model()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=3, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(12, 3), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = read(tmp_path / "last.ckpt")
    assert (saved.client, saved.steps, saved.place) == ("Lightning", 3, ("optimizer_states", 0))
    spec = "sgd(lr=cosine(0.01), momentum=0.9) | ema"
    status, printed, _ = command(capsys, "migrate", tmp_path / "last.ckpt", "--stack", spec, "--total-steps", 10)
    assert (status, "updates     3, as Lightning counts them" in printed) == (0, True)
    made = torch.load(tmp_path / "last.migrated.ckpt", weights_only=True)
    assert made["optimizer_states"][0]["param_groups"][0]["metaopt.updates"] == 3
    assert made["state_dict"].keys() == trainer.model.state_dict().keys()


def test_accelerate_s_folder(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = small_model()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    train(model, opt, range(4))
    accelerator.save_state(str(tmp_path / "state"))
    saved = read(tmp_path / "state")
    assert (saved.client, saved.file.name) == ("Accelerate", "optimizer.bin")
    made = migrate(saved, "adamw(lr=cosine(0.01)) | ema", total_steps=10)
    assert made.stack.updates == 4
    made.write(saved.file)
    metaopt_model = small_model()
    stack = metaopt.build(metaopt_model.parameters(), "adamw(lr=cosine(0.01)) | ema", total_steps=10)
    again = accelerate.Accelerator(cpu=True)
    prepared = again.prepare(metaopt_model, stack)
    again.load_state(str(tmp_path / "state"))
    assert stack.updates == 4
    assert_same_weights(prepared[0], model)


def test_the_trainer_s_folder(tmp_path: Path) -> None:
    _, opt, _ = bare(tmp_path)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "max_steps": 20}))
    saved = read(tmp_path)
    assert (saved.client, saved.steps, saved.file.name) == ("Hugging Face Trainer", 4, "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text("{half a fi")
    assert read(tmp_path).steps is None


def test_metaopt_train_s_folder_is_read_and_left_to_its_own_resume(tmp_path: Path, capsys: Any) -> None:
    run = ["train", "--problem", "xor", "--steps", 6, "--checkpoint-every", 3, "--log", tmp_path / "run"]
    assert command(capsys, *run, "--stack", "adamw(lr=0.01)")[0] == 0
    saved = read(tmp_path / "run")
    assert saved.client == "metaopt train"
    assert "updates     6" in command(capsys, "migrate", tmp_path / "run", "--stack", "adamw | ema", "--dry-run")[1]
    assert "--resume --keep live" in command(capsys, "migrate", tmp_path / "run", "--stack", "adamw | ema")[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"w": torch.ones(2)}}, "holds no optimizer"),
        ({"a": {"state": {}, "param_groups": []}, "b": {"state": {}, "param_groups": []}}, "2 optimizers (0: a, 1: b)"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(content: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    for arguments in (["diff", tmp_path / "other.pt", tmp_path / "other.pt"], ["migrate", tmp_path / "other.pt"]):
        more = ["--stack", "adamw"] if arguments[0] == "migrate" else []
        status, _, error = command(capsys, *arguments, *more)
        assert (status, len(error.splitlines())) == (2, 1)
        assert message in error
    assert "has neither optimizer.pt nor optimizer.bin" in command(capsys, "diff", tmp_path, tmp_path)[2]
    assert "cannot be read" in command(capsys, "diff", tmp_path / "none.pt", tmp_path / "none.pt")[2]


# ---- diff


def test_two_files_that_continue_alike_are_the_same(tmp_path: Path, capsys: Any) -> None:
    file = stacked(tmp_path, "adamw(lr=0.01) | ema")
    status, printed, _ = command(capsys, "diff", file, file)
    assert (status, printed.splitlines()[-1]) == (0, "the two are the same")
    assert "torch, 4 parameters in 1 group, 4 updates; state: step, exp_avg, exp_avg_sq, ema.average" in printed


def test_every_way_in_which_two_files_differ_has_a_line(tmp_path: Path, capsys: Any) -> None:
    first = stacked(tmp_path, "adamw(lr=0.01) | lookahead(k=3)", total_steps=20)
    saved = torch.load(first, weights_only=True)
    (group,) = saved["param_groups"]
    changed = copy.deepcopy(saved)
    (other,) = changed["param_groups"]
    other.update({"lr": 0.02, "metaopt.updates": 5, "metaopt.total_steps": 40, "metaopt.labels": "ema"})
    other["param_names"] = ["new", *group["param_names"][1:]]
    changed["state"][3]["exp_avg"] += 0.5
    del changed["state"][2]["lookahead.slow"]
    torch.save(changed, tmp_path / "second.pt")
    status, printed, _ = command(capsys, "diff", first, tmp_path / "second.pt")
    assert status == 1
    assert printed.splitlines()[2:] == [
        "updates     4 -> 5",
        "total_steps 20 -> 40",
        "parts gone  lookahead",
        "parts new   ema",
        "gone        0.weight",
        "new         new",
        "value       lr: 0.01 -> 0.02",
        "state       step: 1 of 4 differ; 1 only in one file, or of another shape",
        "state       exp_avg: 2 of 4 differ, by at most 0.5; 1 only in one file, or of another shape",
        "state       exp_avg_sq: 1 of 4 differ; 1 only in one file, or of another shape",
        "state       lookahead.slow: 2 of 4 differ; 2 only in one file, or of another shape",
    ]


def test_files_without_names_and_with_other_groups_cannot_be_compared_by_parameter(tmp_path: Path, capsys: Any) -> None:
    _, _, file = bare(tmp_path)
    other = stacked(tmp_path, "adamw(lr=0.01)", no_decay="1d")
    assert "cannot be compared: they have other groups, and no names" in command(capsys, "diff", file, other)[1]


def test_other_groups_of_the_same_parameters_are_compared_by_name(tmp_path: Path, capsys: Any) -> None:
    one = stacked(tmp_path, "adamw(lr=0.01, weight_decay=0.1)")
    (tmp_path / "two").mkdir()
    two = stacked(tmp_path / "two", "adamw(lr=0.01, weight_decay=0.1)", no_decay="1d")
    printed = command(capsys, "diff", one, two)[1]
    assert "parameters  are in another grouping" in printed
    assert "value       weight_decay in group no_decay: 0.1 -> 0" in printed


# ---- train --resume


def trained(capsys: Any, folder: Path, *more: object) -> tuple[int, str, str]:
    return command(capsys, "train", "--problem", "xor", "--checkpoint-every", 4, "--log", folder, *more)


def test_a_run_is_resumed_with_another_stack_or_more_steps_if_that_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    old = ["--stack", "adamw(lr=cosine(0.01))"]
    new = ["--stack", "clip_grad_norm(1.0) | adamw(lr=cosine(0.002), weight_decay=0.1)"]
    assert trained(capsys, tmp_path, *old, "--steps", 8)[0] == 0
    refused = trained(capsys, tmp_path, *new, "--steps", 8, "--resume")
    assert (refused[0], "--keep live" in refused[2]) == (2, True)
    refused = trained(capsys, tmp_path, *old, "--steps", 16, "--resume")
    assert (refused[0], "--extend" in refused[2]) == (2, True)
    refused = trained(capsys, tmp_path, *old, "--steps", 4, "--resume", "--extend")
    assert (refused[0], "give --steps 8 or more" in refused[2]) == (2, True)
    assert "give --resume" in trained(capsys, tmp_path / "other", *old, "--steps", 8, "--extend")[2]
    done = trained(capsys, tmp_path, *new, "--steps", 16, "--resume", "--keep", "live", "--extend")
    assert (done[0], "16 updates" in done[1]) == (0, True)
    assert "weight_decay=0.1 (checkpoint: 0.01)" in done[2]
    assert "8 extended to 16" in done[2]
    # the run is now this one: its own resume goes on without a choice
    assert trained(capsys, tmp_path, *new, "--steps", 16, "--resume")[0] == 0
