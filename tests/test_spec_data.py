"""A stack may be written as lists and dicts, as configuration files give them, and means what the text means."""

import json
import tomllib
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import metaopt
from metaopt.specs.pipeline import as_pipeline

TEXT = (
    "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(3e-4, end=1e-5), 0.05), betas=(0.9, 0.95)) | lookahead(k=5) | "
    "lookahead(k=20, label='outer_one', slow_dtype='float32')"
)
YAML = """
- clip_grad_norm: 1.0
- adamw:
    lr: {warmup: [{cosine: {start: 3e-4, end: 1e-5}}, 0.05]}
    betas: [0.9, 0.95]
- lookahead: {k: 5}
- lookahead:
    k: 20
    label: outer_one
    slow_dtype: float32
"""
MIXED = """
- clip_grad_norm(1.0)
- adamw: {lr: "warmup(cosine(3e-4, end=1e-5), 0.05)", betas: "(0.9, 0.95)"}
- "lookahead(k=5) | lookahead(k=20, label='outer_one', slow_dtype='float32')"
"""
TOML = """
[[stack]]
clip_grad_norm = 1.0
[stack.adamw]
lr = "warmup(cosine(3e-4, end=1e-5), 0.05)"
betas = [0.9, 0.95]
[stack.lookahead]
k = 5
[[stack]]
lookahead = {k = 20, label = "outer_one", slow_dtype = "float32"}
"""


@pytest.mark.parametrize(
    "written",
    [
        yaml.safe_load(YAML),
        yaml.safe_load(MIXED),
        tomllib.loads(TOML)["stack"],
        json.loads(json.dumps(yaml.safe_load(YAML))),
        OmegaConf.create(YAML),
        tuple(yaml.safe_load(YAML)),
    ],
    ids=["yaml", "mixed", "toml", "json", "omegaconf", "tuple"],
)
def test_lists_and_dicts_mean_what_the_text_means(written: Any) -> None:
    assert str(as_pipeline(written)) == str(as_pipeline(TEXT))
    model = torch.nn.Linear(2, 2)
    opt = metaopt.build(model.named_parameters(), written, total_steps=100)
    assert str(opt.spec) == str(metaopt.build(model.named_parameters(), TEXT, total_steps=100).spec)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ({"adamw": None}, "adamw"),
        ({"adamw": {}, "lookahead": None}, "adamw | lookahead"),
        ({"adamw": 1}, "adamw(lr=1.0)"),
        ({"adamw": "1e-3"}, "adamw(lr=0.001)"),  # YAML 1.1 takes 1e-3 for text
        ({"adamw": {"lr": "cosine(1e-3, steps=9)"}}, "adamw(lr=cosine(start=0.001, steps=9))"),
        ({"sgd": {"lr": {"sequence": [0.1, 5, "cosine(0.1, steps=9)", 9, "1e-3"]}}},
         "sgd(lr=sequence(0.1, 5, cosine(start=0.1, steps=9), 9, 0.001))"),
        ({"adamw": None, "lookahead": {"pullback_momentum": "reset"}}, "adamw | lookahead(pullback_momentum='reset')"),
        ({"partition": {"*.weight & matrix": {"muon": 0.02}, "*": ["adamw", {"ema": 0.99}]}, "lookahead": [5, 0.8]},
         "partition({'*.weight & matrix': muon(lr=0.02), '*': adamw | ema(decay=0.99)}) | lookahead(5, alpha=0.8)"),
        ({"partition": {"parts": {"*": "sgd(lr=0.1)"}}}, "partition({'*': sgd(lr=0.1)})"),
    ],
)  # fmt: skip
def test_each_form_of_arguments(written: Any, text: str) -> None:
    assert str(as_pipeline(written)) == str(as_pipeline(text))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"adamv": {"lr": 0.1}}, "'adamv'. Did you mean adam"),
        ({"adamw": {"lrr": 0.1}}, "no hyperparameter 'lrr'"),
        ({"adamw": {"lr": -1.0}, "lookahead": {"k": 0}}, "k must be >= 1, got 0"),
        ({"adamw": {"lr": "fast"}}, "no part is called 'fast'"),
        ({"name": "adamw", "lr": 0.1}, r"written as {name: arguments}.*got 'name'"),
        ({"cosine": 0.1}, "cosine is a schedule"),
        ({"adamw": {"lr": {"lookahead": 5}}}, "'lookahead' is a wrapper, not a schedule"),
        ({"adamw": {"lr": {"cosine": 1.0, "steps": 5}}}, "a dict with one key"),
        ({"partition": "adamw"}, "partition takes a dict of pipelines"),
        ([["adamw", 5]], "expected text, metaopt's parts"),
        ([], "a stack needs a base"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_one_clear_error(written: Any, told: str) -> None:
    with pytest.raises(metaopt.MetaoptError, match=told):
        metaopt.build([torch.nn.Parameter(torch.ones(2))], written)


def test_a_list_that_holds_itself_is_refused() -> None:
    endless = yaml.safe_load("&a {partition: {'*': *a}}")
    with pytest.raises(metaopt.SpecError, match="nested too deeply"):
        as_pipeline(endless)
