"""The distribution: what an editable install of a checkout leads to, and what wheel and sdist hold."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from documents import ROOT

import metaopt

pytestmark = pytest.mark.slow
BUILD = "import sys; from hatchling import build; print(getattr(build, 'build_' + sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout in a folder called `metaopt`."""
    folder = tmp_path_factory.mktemp("beside") / "metaopt"
    left_out = shutil.ignore_patterns("__pycache__", ".*", "build", "tests", "docs", "plugins", "benchmarks", "dist")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def built(checkout: Path, kind: str, out: Path) -> Path:
    ran = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.split()[-1]


def test_a_script_beside_an_editable_checkout_imports_the_package(checkout: Path, tmp_path: Path) -> None:
    # python takes the folder of the checkout for a namespace package only if no path leads to a package
    with zipfile.ZipFile(built(checkout, "editable", tmp_path)) as wheel:
        wheel.extractall(tmp_path / "site")
    script = checkout.parent / "beside.py"
    script.write_text("import site, sys\nsite.addsitedir(sys.argv[1])\nimport metaopt\nprint(metaopt.__file__)\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-S", str(script), str(tmp_path / "site")], env=environment, capture_output=True, text=True,
        cwd=checkout.parent, check=False,
    )  # fmt: skip
    assert ran.stdout.split() == [str(checkout / "metaopt" / "__init__.py")], ran.stderr


def test_wheel_and_sdist_hold_every_module_and_the_types(checkout: Path, tmp_path: Path) -> None:
    modules = {f"metaopt/{f.relative_to(ROOT / 'metaopt')}" for f in (ROOT / "metaopt").rglob("*.py*")}
    modules = {name for name in modules if "__pycache__" not in name} | {"metaopt/py.typed"}
    with zipfile.ZipFile(built(checkout, "wheel", tmp_path)) as wheel:
        held = set(wheel.namelist())
    assert {name for name in held if name.startswith("metaopt/")} == modules
    with tarfile.open(built(checkout, "sdist", tmp_path)) as sdist:
        own = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules | {"pyproject.toml", "README.md", "LICENSE"} <= own


def test_the_version_is_written_once() -> None:
    assert metaopt.__version__ == built_version()


def built_version() -> str:
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    return ProjectMetadata(str(ROOT), PluginManager()).version
