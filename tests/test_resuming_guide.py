"""docs/guides/resuming.md, run as it is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from documents import blocks

from metaopt.cli import main

PAGE = "docs/guides/resuming.md"


@pytest.mark.filterwarnings("ignore:loaded a checkpoint that differs")
def test_the_programs_do_what_the_page_says(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for program in blocks(PAGE, "python"):
        exec(compile(program, PAGE, "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    first, lower, longer, count = printed
    assert first == "taken: base, clip_grad_norm, lookahead"
    assert f"{lower}\n" in blocks(PAGE, "text")[0]
    assert longer.split()[0] == "20"
    assert count == "30"


def test_the_commands_print_what_the_page_shows(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks(PAGE, "python")[0], PAGE, "exec"), names)
    bare = torch.optim.AdamW(names["model"].parameters(), lr=1e-2)
    names["train"](names["model"], bare, 30)
    torch.save(bare.state_dict(), "old.pt")
    (dry,) = [line for line in blocks(PAGE, "sh")[0].splitlines() if "--dry-run" in line]
    arguments = dry.replace("metaopt ", "", 1).replace('"', "\0")
    head, spec, rest = arguments.split("\0")
    with pytest.raises(SystemExit) as ended:
        main([*head.split(), spec, *rest.split()])
    assert not ended.value.code
    assert capsys.readouterr().out == blocks(PAGE, "text")[1]
