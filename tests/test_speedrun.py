"""`metaopt export --form speedrun` puts a stack into the training script of modded-nanogpt's optimization track."""

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt
from metaopt.cli import main
from metaopt.ejecting.speedrun import training_script
from metaopt.errors import SpecError

# the track's script in small: its sections, its names and what its loop calls, without its data, model and processes
SCRIPT = '''"""
train_gpt_simple.py
"""

import torch
from torch import Tensor, nn
from torch.optim import AdamW


########################################
#             Architecture             #
########################################

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8).bfloat16()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.proj = nn.Linear(8, 7)

    def forward(self, inputs: Tensor, targets: Tensor):
        x = self.embed(inputs).float()
        for block in self.blocks:
            x = x + block(x).relu()
        return nn.functional.cross_entropy(self.proj(x), targets, reduction="sum")


########################################
#              Optimizer               #
########################################

class Muon(torch.optim.Optimizer):
    pass


########################################
#                Setup                 #
########################################

model = GPT()
num_trials = 1

for _ in range(num_trials):


    ########################################
    #       Init & Optim Hyperparams       #
    ########################################

    # we want to minimize this
    train_steps = 30

    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(std=0.3)

    # create the optimizer(s)
    optimizer1 = AdamW(model.parameters(), lr=0.1)
    optimizers = [optimizer1]

    def set_hparams(step, cooldown_frac=0.7):
        for opt in optimizers:
            opt.param_groups[0]["lr"] = 0.1


    ########################################
    #        Training and Validation       #
    ########################################

    losses = []
    for step in range(train_steps):
        inputs = torch.randint(7, (16,), generator=torch.Generator().manual_seed(step))
        loss = model(inputs, (inputs + 1) % 7)
        loss.backward()
        losses.append(loss.item())
        set_hparams(step)
        for opt in optimizers:
            opt.step()
        model.zero_grad(set_to_none=True)
'''

BASELINE = (
    "partition({'blocks.* & matrix': muon(lr=wsd(0.02, decay=0.7), weight_decay=0.05), "
    "'*': adamw(lr=cosine(0.01), betas=(0.8, 0.95), eps=1e-10)})"
)


@pytest.mark.parametrize(
    "spec", ["adamw(lr=0.01)", BASELINE, "clip_grad_norm(100.0) | adamw(lr=warmup(cosine(0.01), 5))"]
)
def test_the_script_trains_as_the_stack_does_bit_for_bit(spec: str) -> None:
    script: dict[str, Any] = {}
    exec(compile(training_script(spec, SCRIPT, 20), "train.py", "exec"), script)
    original: dict[str, Any] = {}
    exec(compile(SCRIPT.partition("\nfor _ in range")[0], "train.py", "exec"), original)
    model = original["GPT"]()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.3)
    opt = metaopt.build(model.named_parameters(), spec, total_steps=20)
    for step in range(20):
        inputs = torch.randint(7, (16,), generator=torch.Generator().manual_seed(step))
        loss = model(inputs, (inputs + 1) % 7)
        loss.backward()
        opt.step()
        assert loss.item() == script["losses"][step], step
        opt.zero_grad()
    assert len(script["losses"]) == 20
    assert all(map(torch.equal, model.parameters(), script["model"].parameters()))


def test_nothing_but_two_sections_is_changed_and_no_library_is_imported() -> None:
    written = training_script(BASELINE, SCRIPT)
    for title in ("Architecture", "Setup", "Training and Validation"):
        assert section(written, title) == section(SCRIPT, title)
    kept = section(SCRIPT, "Init & Optim Hyperparams").partition("    # create the optimizer(s)")[0]
    assert section(written, "Init & Optim Hyperparams").strip("\n").startswith(kept.strip("\n"))
    modules = {node.module for node in ast.walk(ast.parse(written)) if isinstance(node, ast.ImportFrom)}
    modules |= {a.name for node in ast.walk(ast.parse(written)) if isinstance(node, ast.Import) for a in node.names}
    assert {str(name).split(".")[0] for name in modules} <= {"torch", *sys.stdlib_module_names}
    assert "class Muon" not in written


def section(script: str, title: str) -> str:
    _, _, rest = script.partition(f" {title} ")
    return rest.partition("#\n")[2].partition("########\n")[2].partition("####")[0].strip()


@pytest.mark.parametrize(
    ("spec", "script", "told"),
    [
        ("sgd(lr=0.1)", SCRIPT.replace(" Optimizer ", " Other "), "without a section 'Optimizer'"),
        ("sgd(lr=0.1)", SCRIPT.replace("# create the optimizer(s)", ""), r"without '# create the optimizer\(s\)'"),
        ("sgd(lr=0.1)", SCRIPT.replace("train_steps = 30", "n = 30"), "without 'train_steps = ...'"),
        ("sgd(lr=0.1)", SCRIPT.replace("class GPT", "class Stack"), "has Stack already"),
        ("sam | sgd(lr=0.1)", SCRIPT, "evaluates the loss itself"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, script: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        training_script(spec, script)


def test_the_command_takes_the_tracks_own_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, out = tmp_path / "train_gpt_simple.py", tmp_path / "train_gpt_mine.py"
    own.write_text(SCRIPT)
    command = ["export", "adamw(lr=0.01) | lookahead", "--form", "speedrun"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--into", str(own), "--steps", "25", "--out", str(out)])
    assert not ended.value.code
    assert "train_steps = 25" in out.read_text()
    assert "# The script evaluates the weights that are trained, not the average of lookahead." in out.read_text()
    capsys.readouterr()
    for more, told in (((), "--into"), (("--into", str(tmp_path / "none.py")), "cannot be read")):
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
