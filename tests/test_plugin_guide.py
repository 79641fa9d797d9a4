"""docs/plugins/package.md, run as it is written: the plugin is installed."""

import pytest
from documents import ROOT, blocks, python

PAGE = "docs/plugins/package.md"


@pytest.mark.slow
def test_the_guide_leads_from_an_empty_folder_to_a_listed_plugin(tmp_path):
    folder, installed = tmp_path / "metaopt-pull", tmp_path / "installed"
    folder.mkdir()
    for block in blocks(PAGE, "python") + blocks(PAGE, "toml"):
        name = block.partition("\n")[0].removeprefix("# ")
        (folder / name).write_text(block, encoding="utf-8")
    installing, proving = blocks(PAGE, "sh")
    install, listing, showing = installing.splitlines()
    testing, checking = proving.splitlines()
    # the page's own command, kept from the network and from the environment of the tests
    _, *arguments = install.split()
    python("-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--target", str(installed), folder=folder)
    (folder / "pull.py").unlink()  # what is used is what was installed
    commands = [listing, showing, "python use.py", testing.replace("pytest", "pytest -rs"), checking]
    program = f"import page_runner\nfor line in {commands}: page_runner.run_lines(line)"
    outputs = python("-c", program, folder=folder, path=[installed, ROOT / "tests"]).split("$ ")[1:]
    listed, shown, _, tested, checked = (output.partition("\n")[2] for output in outputs)
    assert "pull" in listed and "metaopt-pull" in listed
    assert "pull" in shown and "alpha" in shown
    assert "failed" not in tested
    # what says nothing about these parts is told, not hidden; the reference is no such thing for pull
    assert "it keeps no average" in tested
    assert checked.startswith("pull\n") and "FAILED" not in checked
