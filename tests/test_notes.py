"""What a plugin says of a class that it offers unchanged: a note and other names, for `metaopt show` and for errors."""

import pytest

import metaopt
from metaopt.cli import main
from metaopt.registry import Registry, registry


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["show", *arguments])
    assert not exit.value.code
    return " ".join(capsys.readouterr().out.split())


def test_show_says_what_torch_s_nesterov_is(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "sgd")
    assert "nesterov=True is exact Nesterov momentum" in out
    assert "seen in the shifted variable y = theta - lr m v" in out
    assert "elsewhere called MomentumSGD" in out


def test_another_name_of_an_unchanged_class_leads_to_it() -> None:
    with pytest.raises(metaopt.UnknownPart, match="no optimizer is called 'MomentumSGD'; here it is sgd"):
        registry.find("MomentumSGD", "optimizer")


PLUGIN = """
from metaopt import Example, hookimpl
import torch

@hookimpl
def metaopt_optimizers():
    return {"plain_descent": torch.optim.SGD}

@hookimpl
def metaopt_examples():
    return {"plain_descent": [
        Example("plain_descent(lr=0.1)", note="It goes where the gradient points from.", known_as=("GradientDescent",)),
        Example("plain_descent(lr=0.2)", note="It goes where the gradient points from."),
    ]}
"""


def test_a_third_party_says_the_same_way_what_its_class_does_not(tmp_path, monkeypatch) -> None:
    (tmp_path / "noted_descent.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = Registry()
    own.load_plugin_module("noted_descent")
    assert own.notes("plain_descent") == ("It goes where the gradient points from.",)
    with pytest.raises(metaopt.UnknownPart, match="here it is plain_descent"):
        own.find("GradientDescent")


def test_a_part_without_a_note_is_shown_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert registry.notes("xor") == () and registry.known_as(registry.find("xor")) == ()
    assert "elsewhere called" not in shown(capsys, "xor")
