"""What README.md says exists and runs."""

import json
import re
import runpy
import shlex

import pytest
from documents import ROOT, blocks, python

from metaopt.spec import parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
SET_UP = [line for line in COMMANDS if line.startswith("python -m venv")]
USE = [line for line in COMMANDS if line not in SET_UP]
PLUGIN, PROGRAM = blocks("README.md", "python")


def test_two_commands_do_all_the_set_up():
    assert [line.split(" && ")[-1] for line in SET_UP] == [
        ".venv/bin/metaopt compare",
        ".venv/bin/python -m pytest -n 2",
    ]
    assert all("-c constraints.txt" in line for line in SET_UP)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_what_the_readme_links_to_exists(target):
    assert target.startswith("https://") or (ROOT / target).exists()


@pytest.mark.parametrize("line", SET_UP)
def test_what_the_set_up_installs_exists(line):
    for word in shlex.split(line):
        if word.endswith(".txt") or word.startswith("plugins/"):
            assert (ROOT / word).exists()


def test_the_program_runs(tmp_path):
    assert "adamw(" in python("-c", PROGRAM, folder=tmp_path)


def test_the_plugin_works_from_one_file(tmp_path):
    (tmp_path / "pull.py").write_text(PLUGIN, encoding="utf-8")
    use = (
        "import metaopt, torch; from metaopt.registry import registry; registry.load_plugin_module('pull')\n"
        "x = torch.nn.Parameter(torch.ones(2)); opt = metaopt.build([x], 'sgd(lr=0.1) | pull(k=1)')\n"
        "x.sum().backward(); opt.step(); print(x.tolist())"
    )
    # one step of 0.1, pulled half way back
    values = json.loads(python("-c", use, folder=tmp_path, path=[tmp_path]))
    assert values == pytest.approx([0.95, 0.95])


@pytest.mark.slow
@pytest.mark.parametrize("line", USE, ids=lambda line: " ".join(line.split()[:2]))
def test_the_command_runs(line, tmp_path):
    command, *arguments = shlex.split(line)
    assert command == "metaopt"
    if arguments[0] == "compare":  # shorter: what is tested is that the line is understood and works
        arguments = ["5" if word == "100" else word for word in arguments] + ["--seeds", "2", "--lrs", "2"]
    assert python("-m", "metaopt", *arguments, folder=tmp_path).strip()


def test_the_measured_comparison_is_the_example_s():
    found = runpy.run_path(str(ROOT / "examples" / "compare_charlm.py"), run_name="read")
    rows = [line for line in README.splitlines() if line.startswith("| adamw")]
    assert [row.removeprefix("| ").partition(" | ")[0].replace("\\|", "|") for row in rows] == [
        str(parse(spec)) for spec in found["CONTENDERS"]
    ]
    budget, seeds = re.search(r"--steps (\d+) --seeds (\d+)", found["FULL"]).groups()
    assert f"{budget} gradient evaluations per run" in README and seeds == "10"


def test_the_name_on_the_index_is_explained():
    assert "metaopt-torch" in README and "unrelated" in README


def test_the_plugin_has_no_more_than_fifteen_lines():
    assert len([line for line in PLUGIN.splitlines() if line.strip()]) <= 15


def test_every_client_in_the_table_is_shown_by_a_test():
    table = README.partition("When not to use it")[0]
    header, *rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert header.startswith("| client, and the test that shows it | the line it needs |")
    shown = [re.search(r"\]\((tests/[^)]+)\)", row) for row in rows]
    assert len(rows) > 10 and all(shown)
    assert all("\ndef test_" in (ROOT / link[1]).read_text(encoding="utf-8") for link in shown)
