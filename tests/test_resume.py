"""A run saved at any step and continued in a new process ends bit for bit where the uninterrupted one ends."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import resume_worker
import warm
from documents import python

from metaopt.registry import registry
from metaopt.specs import parsing, pipeline

OFFERED = [entry.name for entry in registry.entries("optimizer") if entry.origin == "metaopt"]
PARTS = {name: pipeline.part(name) for name in OFFERED}
BASES = [name for name, part in PARTS.items() if not (part.is_partition or part.is_sequence)]
BASE_SPECS = {"muon": "muon(lr=0.01)", "lbfgs": "lbfgs(lr=0.1, max_iter=3)", "sgd": "sgd(lr=0.1, momentum=0.9)"}
SPECS = [BASE_SPECS.get(name, name) for name in BASES] + [
    f"clip_grad_norm(0.5) | {BASE_SPECS.get(name, name)} | lookahead(k=3)" for name in BASES if name != "lbfgs"
]
SPECS += [
    "lbfgs(lr=0.1, max_iter=3) | lookahead(k=3)",
    "adamw(lr=0.01) | lookahead(k=3, pullback_momentum='reset')",
    "adagrad(lr=0.01) | lookahead(k=3, pullback_momentum='reset')",
    "adamw(lr=0.01) | lookahead(k=3, pullback_momentum='pullback')",
    "sgd(lr=0.1, momentum=0.9) | lookahead(k=3, pullback_momentum='pullback') | lookahead(k=6, label='outer')",
    "clip_grad_value(0.1) | adam(lr=0.01) | lookahead(k=2, alpha=1.5)",
    "clip_grad_norm(0.5) | switch(adamw(lr=0.01), 5, sgd(lr=0.1, momentum=0.9)) | lookahead(k=3)",
    "clip_grad_norm(0.5) | partition({'*weight': sgd(lr=0.1, momentum=0.9) | lookahead(k=2), '*': adamw}) | ema(0.9)",
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_resumed_at_every_step_in_a_new_process(spec: str, tmp_path: Path) -> None:
    expected = resume_worker.save_at_every_step(spec, tmp_path / "saved.pt")
    for step, found in warm.called(resume_worker.resume_from_every_step, tmp_path / "saved.pt").items():
        assert found == expected, f"saved at step {step}"


@pytest.mark.slow
def test_resumed_at_every_step_by_an_interpreter_that_starts_from_nothing(tmp_path: Path) -> None:
    expected = resume_worker.save_at_every_step(SPECS[-1], tmp_path / "saved.pt")
    printed = python(resume_worker.__file__, str(tmp_path / "saved.pt"), folder=tmp_path)
    assert json.loads(printed) == {str(step): expected for step in range(1, resume_worker.STEPS + 1)}


@pytest.mark.parametrize("spec", SPECS)
def test_copies_and_pickles_continue_like_the_original(spec: str) -> None:
    model, opt = resume_worker.make(spec)
    resume_worker.train(model, opt, 0, 7)
    twins = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    resume_worker.train(model, opt, 7, 12)
    for twin_model, twin_opt in twins:
        assert twin_opt.state is twin_opt.base.state
        assert twin_opt.param_groups is twin_opt.base.param_groups
        resume_worker.train(twin_model, twin_opt, 7, 12)
        assert resume_worker.weights(twin_model) == resume_worker.weights(model)


@pytest.mark.parametrize("spec", SPECS)
def test_the_spec_s_text_rebuilds_the_stack(spec: str) -> None:
    model, opt = resume_worker.make(spec)
    again_model, again = resume_worker.make(str(opt.spec))
    assert str(again.spec) == str(opt.spec)
    resume_worker.train(model, opt, 0, 8)
    resume_worker.train(again_model, again, 0, 8)
    assert resume_worker.weights(again_model) == resume_worker.weights(model)


@pytest.mark.parametrize("name", BASES)
def test_an_identity_stack_is_the_bare_optimizer_bit_for_bit(name: str) -> None:
    spec = BASE_SPECS.get(name, name)
    for suffix in ("", " | lookahead(k=3, alpha=1.0)"):
        model, opt = resume_worker.make(spec + suffix)
        bare_model, built = resume_worker.make(spec)
        part = pipeline.part(name)
        options = dict(parsing.parse(spec).parts[0].arguments)
        if "fused" in part.hyperparameters:
            options["fused"] = True
        bare = part.target(bare_model.parameters(), **options)
        resume_worker.train(model, opt, 0, 10)
        bare.spec = built.spec
        resume_worker.train(bare_model, bare, 0, 10)
        assert resume_worker.weights(model) == resume_worker.weights(bare_model), suffix
