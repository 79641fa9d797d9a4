"""docs/plugins/package.md, run as it is written: the plugin is installed."""

import pytest
from documents import blocks, python

PAGE = "docs/plugins/package.md"


@pytest.mark.slow
def test_the_guide_leads_from_an_empty_folder_to_a_listed_plugin(tmp_path):
    folder, installed = tmp_path / "metaopt-pull", tmp_path / "installed"
    folder.mkdir()
    for block in blocks(PAGE, "python") + blocks(PAGE, "toml"):
        name = block.partition("\n")[0].removeprefix("# ")
        (folder / name).write_text(block, encoding="utf-8")
    installing, proving = blocks(PAGE, "sh")
    install, *looks = installing.splitlines()
    # the page's own command, kept from the network and from the environment of the tests
    _, *arguments = install.split()
    python("-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--target", str(installed), folder=folder)
    outputs = []
    for look in looks:
        command, *arguments = look.split()
        assert command == "metaopt"
        outputs.append(python("-m", "metaopt", *arguments, folder=tmp_path, path=[installed]))
    assert len(outputs) == 2
    assert all("pull" in output for output in outputs)
    assert "metaopt-pull" in outputs[0]
    assert "alpha" in outputs[1]
    use = (folder / "use.py").read_text(encoding="utf-8")
    python("-c", use, folder=tmp_path, path=[installed])
    prove, check = proving.splitlines()
    tested = python("-m", *prove.split(), "-q", "-rs", "-p", "no:cacheprovider", folder=folder, path=[installed])
    assert "failed" not in tested
    # what says nothing about these parts is told, not hidden; the reference is no such thing for pull
    assert "it keeps no average" in tested
    checked = python("-m", *check.split(), folder=tmp_path, path=[installed])
    assert checked.startswith("pull\n") and "FAILED" not in checked
