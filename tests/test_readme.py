"""What README.md says exists and runs; so does what it hands on to the guides."""

import json
import re
import shlex

import page_runner
import pytest
from documents import ROOT, blocks
from warm import printed

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLIENTS = (ROOT / "docs" / "guides" / "clients.md").read_text(encoding="utf-8")
COMMANDS = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
SET_UP = [line for line in COMMANDS if line.startswith("python -m venv")]
PLUGIN = next(block for block in blocks("README.md", "python") if block.startswith("# pull.py"))


def test_two_commands_do_all_the_set_up():
    assert [line.split(" && ")[-1] for line in SET_UP] == [
        ".venv/bin/metaopt compare",
        ".venv/bin/python -m pytest -n 2",
    ]
    assert all("-c constraints.txt" in line for line in SET_UP)


@pytest.mark.parametrize("line", SET_UP)
def test_what_the_set_up_installs_exists(line):
    for word in shlex.split(line):
        if word.endswith(".txt") or word.startswith("plugins/"):
            assert (ROOT / word.partition("[")[0]).exists()


@pytest.mark.slow
def test_the_readme_does_what_it_says(tmp_path):
    shown = printed(page_runner.follow, str(ROOT / "README.md"), folder=tmp_path)
    assert "no difference of any size could be shown" in shown and "1 finding" in shown
    assert (tmp_path / "runs" / "xor").is_dir()


def test_every_other_command_of_the_readme_is_one_that_a_test_can_run():
    others = [line for line in COMMANDS if not page_runner.is_left_out(line)]
    assert len(others) >= 4 and all(line.startswith("metaopt ") for line in others)


def test_the_plugin_works_from_one_file(tmp_path):
    (tmp_path / "pull.py").write_text(PLUGIN, encoding="utf-8")
    use = (
        "import metaopt, torch; from metaopt.registry import registry; registry.load_plugin_module('pull')\n"
        "x = torch.nn.Parameter(torch.ones(2)); opt = metaopt.build([x], 'sgd(lr=0.1) | pull(k=1)')\n"
        "x.sum().backward(); opt.step(); print(x.tolist())"
    )
    # one step of 0.1, pulled half way back
    (tmp_path / "use.py").write_text(use, encoding="utf-8")
    values = json.loads(printed(page_runner.run_program, "use.py", folder=tmp_path, path=[tmp_path]))
    assert values == pytest.approx([0.95, 0.95])


def test_the_plugin_has_no_more_than_fifteen_lines():
    assert len([line for line in PLUGIN.splitlines()[1:] if line.strip()]) <= 15


def test_the_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 140


def test_the_name_on_the_index_is_explained():
    assert "metaopt-torch" in README and "unrelated" in README


def test_every_client_in_the_table_is_shown_by_a_test():
    header, *rows = [line for line in CLIENTS.splitlines() if line.startswith("| ")]
    assert header.startswith("| client, and the test that shows it | the line it needs |")
    shown = [re.search(r"\(`(tests/[^`]+)`\)", row) for row in rows]
    assert len(rows) > 10 and all(shown)
    assert all("\ndef test_" in (ROOT / link[1]).read_text(encoding="utf-8") for link in shown)


def test_what_the_map_for_contributors_names_exists():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("## The map")[2].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w/.]+)`", row.split(" | ")[0])]
    # a name without a folder is beside the one before it
    assert len(named) > 15
    assert [n for n in named if not ((ROOT / n).exists() or (ROOT / "metaopt" / n).exists())] == []
    for line in (line for block in blocks("CONTRIBUTING.md", "sh") for line in block.splitlines()):
        for word in shlex.split(line):
            if word.startswith(("tests/", "docs/", "plugins/")):
                assert (ROOT / word.partition("[")[0]).exists(), line
