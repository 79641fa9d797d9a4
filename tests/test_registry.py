"""Parts are found by name, lazily; a fault of a plugin is told and breaks nothing else."""

import sys
import types
from pathlib import Path

import pytest
import torch

import metaopt
from metaopt.registry import NAME, BrokenPlugin, Registry


class Mine(torch.optim.SGD):
    """Descend."""


class Other(torch.optim.SGD):
    """Descend too."""


def plugin(name: str, hook: str, offered: object) -> types.ModuleType:
    module = types.ModuleType(name)

    def implementation() -> object:
        return offered

    implementation.__name__ = hook
    setattr(module, hook, metaopt.hookimpl(implementation))
    return module


def test_every_optimizer_of_torch_is_there_under_its_lower_case_name() -> None:
    registry = Registry()
    expected = {"sgd", "adam", "adamw", "adagrad", "rmsprop", "adamax", "radam", "nadam", "adadelta", "asgd", "rprop",
                "lbfgs", "sparse_adam", "adafactor"} | ({"muon"} if "Muon" in vars(torch.optim) else set())  # fmt: skip
    assert expected <= set(registry.names("optimizer"))
    offered = {entry.target for entry in registry.entries("optimizer")}
    walked = {c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert walked - {torch.optim.Optimizer} <= offered


def test_every_name_is_well_formed_and_borne_once() -> None:
    names = Registry().names()
    assert len(names) == len(set(names))
    assert all(NAME.fullmatch(name) for name in names)


def test_every_part_says_what_it_is() -> None:
    assert [e.name for e in Registry().entries() if not e.description or e.description == "(no description)"] == []


def test_an_unknown_name_names_near_ones_and_the_list() -> None:
    with pytest.raises(metaopt.UnknownPart, match=r"Did you mean .*adam.* See: metaopt list optimizers"):
        Registry().find("adm", "optimizer")


@pytest.mark.parametrize(
    ("name", "plugin"),
    [
        ("mlflow", "mlflow"),
        ("wandb", "wandb"),
        ("optuna.tpe", "optuna"),
        ("pytorch_optimizer.lion", "pytorch-optimizer"),
    ],
)
def test_a_name_that_a_plugin_of_this_repository_offers_says_what_to_install(
    name: str, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaopt.registry.metadata.entry_points", lambda group: ())  # nothing is installed
    with pytest.raises(
        metaopt.UnknownPart, match=rf"metaopt-{plugin}, which is not installed: pip install -e plugins/me"
    ):
        Registry().find(name)


def test_a_plugin_of_this_repository_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    monkeypatch.setattr(registry, "broken", lambda: [BrokenPlugin("metaopt-mlflow", "ImportError: no numpy")])
    if "mlflow" in registry.names():
        pytest.skip("metaopt-mlflow is installed")
    with pytest.raises(metaopt.UnknownPart, match="which is installed and cannot be used: ImportError: no numpy"):
        registry.find("mlflow")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("AdamW", "adamw"), ("SGD", "sgd"), ("SparseAdam", "sparse_adam"), ("mine", "lab.mine"), ("Mine", "lab.mine")],
)
def test_a_name_written_as_a_class_or_without_its_package_is_understood(typed: str, meant: str) -> None:
    registry = Registry()
    registry.register(optimizers={"lab.mine": Mine})
    with pytest.raises(metaopt.UnknownPart, match=rf"Did you mean {meant}\? "):
        registry.find(typed)


def test_a_part_of_another_kind_says_which() -> None:
    with pytest.raises(metaopt.UnknownPart, match="'lookahead' is a wrapper, not an optimizer"):
        Registry().find("lookahead", "optimizer")


def test_a_registered_part_is_found_by_name_and_class() -> None:
    registry = Registry()
    registry.register(optimizers={"mine": Mine, "lab.mine": Other})
    assert registry.find("mine").target is Mine
    assert registry.name_of(Other) == "lab.mine"
    registry.register(optimizers={"mine": Mine})  # the same again is no conflict


@pytest.mark.parametrize("name", ["Mine", "a.b.c", "mi-ne", "", "1st", ".x", "mine "])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(metaopt.PluginError):
        Registry().register(optimizers={name: Mine})


def test_what_is_no_dict_of_classes_is_refused() -> None:
    with pytest.raises(metaopt.PluginError, match="optimizers is a dict of classes by name, not a list"):
        Registry().register(optimizers=[Mine])  # type: ignore[arg-type]
    with pytest.raises(metaopt.PluginError, match="'three' is an int"):
        Registry().register(optimizers={"three": 3})


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(metaopt.PluginError, match=r"'adamw'.*metaopt"):
        Registry().register(wrappers={"adamw": Mine})


def test_two_plugins_with_one_name_are_both_named_at_the_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in (("first_of_two", Mine), ("second_of_two", Other)):
        monkeypatch.setitem(sys.modules, name, plugin(name, "metaopt_optimizers", {"twice": target}))
    registry = Registry()
    registry.load_plugin_module("first_of_two")
    registry.load_plugin_module("second_of_two")
    assert registry.find("adamw")
    with pytest.raises(metaopt.PluginError, match="first_of_two and second_of_two"):
        registry.find("twice")


def test_a_misspelt_hook_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "misspelt", plugin("misspelt", "metaopt_optimisers", {}))
    with pytest.raises(metaopt.PluginError, match=r"metaopt_optimisers.*metaopt_optimizers"):
        Registry().load_plugin_module("misspelt")


def test_a_misspelt_method_of_an_object_is_an_error_too() -> None:
    class Plugin:
        @metaopt.hookimpl
        def metaopt_optimisers(self) -> dict[str, object]:
            return {}

    with pytest.raises(metaopt.PluginError, match=r"metaopt_optimisers.*metaopt_optimizers"):
        Registry()._take_plugin(Plugin(), "an object", "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (
            "from metaopt import hookimpl\n@hookimpl\ndef metaopt_optimizers():\n    raise KeyError('q')",
            "KeyError: 'q'",
        ),
        ("from metaopt import hookimpl\n@hookimpl\ndef metaopt_optimizers(x):\n    return {}", "without arguments"),
    ],
)
def test_whatever_a_plugin_does_instead_of_offering_parts_is_one_clear_error(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "does_otherwise.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "does_otherwise", raising=False)
    registry = Registry()
    for _ in range(2):  # a second try fails alike, and does not find half of it there
        with pytest.raises(metaopt.PluginError, match=f"does_otherwise.*{told}"):
            registry.load_plugin_module("does_otherwise")
    assert registry.find("adamw")
    monkeypatch.delitem(sys.modules, "does_otherwise", raising=False)


def test_a_path_in_place_of_a_module_is_told_the_module() -> None:
    with pytest.raises(metaopt.PluginError, match="such as mine, not a path"):
        Registry().load_plugin_module("folder/mine.py")


@pytest.mark.parametrize("offered", [None, [], {"x": 3}, {"X": Mine}])
def test_a_hook_that_returns_no_parts_is_an_error(offered: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "offers_nonsense", plugin("offers_nonsense", "metaopt_optimizers", offered))
    with pytest.raises(metaopt.PluginError, match="offers_nonsense"):
        Registry().load_plugin_module("offers_nonsense")


def test_a_plugin_that_raises_on_import_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('no luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(metaopt.PluginError, match=r"raises_on_import.*RuntimeError: no luck"):
        Registry().load_plugin_module("raises_on_import")


def test_an_installed_plugin_that_fails_is_recorded_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ill_plugin.py").write_text("raise RuntimeError('no luck')\n")
    info = tmp_path / "ill_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ill-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[metaopt]\nill = ill_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    assert registry.find("adamw")
    assert [(b.name, b.error) for b in registry.broken()] == [("ill-plugin", "RuntimeError: no luck")]
