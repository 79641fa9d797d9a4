"""plugins/README.md, run as it stands."""

import pytest
from documents import blocks, python

PAGE = "plugins/README.md"


@pytest.mark.slow
def test_the_guide_leads_from_an_empty_folder_to_a_listed_plugin(tmp_path):
    folder, installed = tmp_path / "metaopt-pull", tmp_path / "installed"
    folder.mkdir()
    for block in blocks(PAGE, "python") + blocks(PAGE, "toml"):
        name = block.partition("\n")[0].removeprefix("# ")
        (folder / name).write_text(block, encoding="utf-8")
    install, *looks = blocks(PAGE, "sh")[0].splitlines()
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
