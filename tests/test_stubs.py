"""Editors, type checkers and interactive shells know the parts: their arguments, their words, and mistakes in them."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT

import metaopt
from metaopt.cli import main
from metaopt.registry import registry
from metaopt.stubs import stub

STUB = ROOT / "metaopt" / "__init__.pyi"


def test_the_stub_is_what_the_registry_says() -> None:
    assert STUB.read_text() == stub(built_in=True), "run: python -m metaopt stubs --built-in --out ."


def test_the_stub_has_every_public_name_and_every_part() -> None:
    names = set()
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.AnnAssign):
            names.add(node.target.id)  # type: ignore[union-attr]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname}
    own = {entry.name for entry in registry.entries() if entry.origin == "metaopt"}
    assert {*metaopt._HOMES, *own, "__version__"} <= names
    assert {name for name in dir(metaopt) if not name.startswith("_")} >= own


def test_the_command_writes_a_stub_with_the_parts_of_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "offers_mine.py").write_text(
        "import torch\nfrom metaopt import hookimpl\n"
        "class Mine(torch.optim.SGD):\n    def __init__(self, params, lr: float = 0.1, *, blur: int = 3):\n"
        "        super().__init__(params, lr)\n"
        "@hookimpl\ndef metaopt_optimizers():\n    return {'mine_of_stubs': Mine}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    with pytest.raises(SystemExit) as left:
        main(["stubs", "--plugin", "offers_mine", "--out", str(tmp_path / "typings")])
    assert left.value.code == 0
    text = (tmp_path / "typings" / "metaopt" / "__init__.pyi").read_text()
    assert "def __call__(self, lr: _Rate = 0.1, blur: int = 3) -> _Part:" in text
    assert "mine_of_stubs: _MineOfStubs" in text and "__getattr__" not in text
    ast.parse(text)


CHECKED = """
import metaopt
from metaopt import adamw, lookahead, cosine

reveal_type(adamw(lr=1e-3))
reveal_type(adamw | lookahead(k=5))
reveal_type(cosine(0.1))
reveal_type(metaopt.build)
reveal_type(metaopt.Optimizer([], lr=0.1).updates)
adamw(lr=cosine(1e-3), betas=(0.9, 0.95))
metaopt.partition({"*": adamw})
metaopt.of_a_plugin(3)
lookahead(kk=5)
lookahead(k="five")
lookahead(pullback_momentum="reste")
cosine()
"""


@pytest.mark.slow
def test_mypy_knows_the_parts_and_finds_mistakes(tmp_path: Path) -> None:
    (tmp_path / "checked.py").write_text(CHECKED)
    # torch itself is large and not what is looked at here
    (tmp_path / "mypy.ini").write_text("[mypy]\nmypy_path=" + str(ROOT) + "\n[mypy-torch.*]\nfollow_imports=skip\n")
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path / "cache"),
         "--follow-imports=silent", "checked.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [line.partition(": ")[2] for line in ran.stdout.splitlines()]
    revealed = [line for line in found if "Revealed type" in line]
    assert ["Part" in revealed[0], "Pipeline" in revealed[1], "Schedule" in revealed[2]] == [True] * 3, ran.stdout
    assert "def (" in revealed[3] and '"int"' in revealed[4].replace("builtins.", "")
    errors = [line for line in found if line.startswith("error")]
    assert [line.rpartition("[")[2] for line in errors] == ["call-arg]", "arg-type]", "arg-type]", "call-arg]"]
    assert '"kk"' in errors[0]


def test_a_shell_shows_the_signature_and_the_words_of_a_part() -> None:
    assert list(inspect.signature(metaopt.lookahead).parameters)[:2] == ["k", "alpha"]
    assert inspect.signature(metaopt.lookahead).parameters["label"].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(metaopt.adamw).parameters["lr"].default == 1e-3
    assert inspect.getdoc(metaopt.lookahead) == inspect.getdoc(registry.find("lookahead").target)
    assert "slow + alpha" in (inspect.getdoc(metaopt.lookahead(k=3)) or "")
    for entry in registry.entries():
        if entry.origin == "metaopt":
            inspect.signature(metaopt.specs.pipeline.part(entry.name))
    assert inspect.getdoc(metaopt.specs.pipeline.Part) and inspect.signature(metaopt.specs.pipeline.Part)


def test_completion_shows_what_a_user_needs_and_hides_the_engine() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([p], "adamw | lookahead")
    shown = {name for name in dir(opt) if not name.startswith("__")}
    needed = {"step", "zero_grad", "state_dict", "load_state_dict", "load_report", "param_groups", "state", "averaged",
              "spec", "updates", "skipped", "record", "metrics", "close", "scheduler", "add_param_group", "base",
              "register_step_post_hook"}  # fmt: skip
    assert needed <= shown
    assert not [name for name in shown if name.startswith("_")]
    assert not shown & {"chain_of", "chains", "profile_hook_step", "OptimizerPreHook", "description"}
    assert len(shown) < 60
