"""`metaopt eject` writes one file without metaopt that trains as the stack does, bit for bit, or says why not."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt
from metaopt.cli import main
from metaopt.ejecting.writing import LONGEST, eject
from metaopt.programs import kernels
from metaopt.registry import registry
from metaopt.specs.parsing import parse

TYPICAL = "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(1e-2), 0.1), weight_decay=0.1) | lookahead(k=3)"
RUN = 40


def required(declared: Any) -> Any:
    return "loss" if declared.type is str else 2 if declared.type is int else 0.1


def alone(entry: Any) -> str:
    """Return a stack with one wrapper around a base."""
    part = metaopt.specs.pipeline.part(entry.name)
    text = str(part(**{h.name: required(h) for h in part.hyperparameters.values() if h.required}))
    return f"{text} | adamw(lr=0.01)" if entry.target.runs_before_base() else f"adamw(lr=0.01) | {text}"


def made(text: str, params: Any) -> torch.optim.Optimizer:
    assert "metaopt" not in "".join(line for line in text.splitlines() if "import" in line)
    assert text.count("\n") <= LONGEST and max(map(len, text.splitlines())) <= 200
    namespace: dict[str, Any] = {}
    exec(compile(text, "ejected.py", "exec"), namespace)
    return namespace["make_optimizer"](params)


def net(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).to(dtype)


def trains_alike(text: str, spec: str, steps: int = RUN, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    # with the library, sums of rules on the update are added up in another order
    same = torch.allclose if kernels() is not None and re.search("floor|brake|trust", spec) else torch.equal
    ours, theirs = net(dtype), net(dtype)
    stack, other = metaopt.build(ours, spec, total_steps=RUN, **how), made(text, theirs.parameters())
    for step in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        for opt, model in ((stack, ours), (other, theirs)):
            opt.zero_grad()
            model(x).square().mean().mul(20.0 * (step % 3)).backward()
            if step % 4 == 1:  # a layer without a gradient for once
                model[0].bias.grad = None  # type: ignore[union-attr]
            opt.step()
        assert all(map(same, ours.parameters(), theirs.parameters())), step
    return stack, other, ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        "adamw(lr=0.01)",
        TYPICAL,
        "sgd(lr=0.01, momentum=0.9, nesterov=True) | lookahead | ema(decay=linear(0.5, 0.9))",
        "l2(0.1) | rmsprop(lr=0.01) | ema(0.9, warmup=True, label='mean')",
        "centralize | adam(lr=0.01) | cautious",
        "adamw(lr=sequence(0.1, 5, cosine(0.1)), betas=(0.8, 0.9)) | clip_update_norm(0.1)",
        "adamw(lr=0.01) | lookahead(k=2) | outer(k=6)",
        "monitor(alignment=True) | adamw(lr=0.01) | lookahead(k=2)",
    ],
)
def test_the_file_trains_as_the_stack_does(spec: str) -> None:
    text = eject(spec, RUN)
    assert ("    # left out, because it only looks: monitor\n" in text) == ("monitor" in spec)
    stack, other, ours, theirs = trains_alike(text, spec)
    if "lookahead" in spec or "ema" in spec:
        label = "mean" if "mean" in spec else next(w.label for w in stack.wrappers if w.label in ("lookahead", "ema"))
        with stack.averaged(label), other.averaged(label):
            assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


PARTITIONS = [
    "partition({'*.weight & matrix': muon(lr=0.02), '*': adamw(lr=0.01)})",
    "clip_grad_norm(1.0) | partition({'matrix': muon(lr=cosine(0.02)), '*': adamw(lr=0.01)})",
    "partition({'0.*': adamw(lr=cosine(0.01)) | lookahead(k=3), '*': sgd(lr=0.1)})",
    "partition({'matrix': sgd(lr=1e-3, momentum=0.9), 'vector': adamw(lr=0.01)}) | ema(0.9)",
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", PARTITIONS)
def test_a_partition_trains_as_the_stack_does(spec: str) -> None:
    text = eject(spec, RUN)
    ours, theirs = net(), net()
    stack, other = metaopt.build(ours, spec, total_steps=RUN), made(text, theirs.named_parameters())
    train(stack, ours, other, theirs, range(20))
    # a checkpoint goes on in another optimizer of the file
    again = net()
    again.load_state_dict(theirs.state_dict())
    resumed = made(text, again.named_parameters())
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    train(stack, ours, resumed, again, range(20, 30))
    for label in stack.averages:
        with stack.averaged(label), resumed.averaged(label):
            assert all(map(torch.equal, ours.parameters(), again.parameters()))
        assert all(map(torch.equal, ours.parameters(), again.parameters()))
    assert "Call `make_optimizer(params)` with\n`model.named_parameters()`." in text


def train(stack: Any, ours: Any, other: Any, theirs: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for opt, model in ((stack, ours), (other, theirs)):
            opt.zero_grad()
            model(x).square().mean().mul(20.0).backward()
            if step % 5 == 1:  # one of the bases has nothing to do
                for p in model[0].parameters():
                    p.grad = None
            opt.step()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters())), step


def test_an_average_that_no_part_keeps_is_refused() -> None:
    opt = made(eject("sgd(lr=0.1) | ema"), net().parameters())
    with pytest.raises(ValueError, match="no part of the optimizer is called lookahead"), opt.averaged("lookahead"):
        pass


def test_a_partition_names_the_parameters_that_no_pattern_chooses() -> None:
    opt = "partition({'matrix': sgd(lr=0.1), '*.bias': adamw(lr=0.01)})"
    with pytest.raises(ValueError, match="no pattern matches scale: give named parameters"):
        made(eject(opt), [*net().named_parameters(), ("scale", torch.nn.Parameter(torch.ones(())))])


BUILT_IN = [entry for entry in registry.entries("wrapper") if entry.origin == "metaopt"]


@pytest.mark.slow
@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda entry: entry.name)
def test_each_part_is_written_down_or_refused_with_the_reason(entry: Any) -> None:
    spec = alone(entry)
    try:
        text = eject(spec, RUN)
    except metaopt.SpecError as error:
        assert str(error).startswith("eject: ") and ("which an ejected file does not" in str(error))
        return
    trains_alike(text, spec)


def test_most_parts_can_be_written_down() -> None:
    refused = 0
    for entry in BUILT_IN:
        try:
            metaopt.ejecting.writing._check(parse(alone(entry)))
        except metaopt.SpecError:
            refused += 1
    assert refused < len(BUILT_IN) / 2


@pytest.mark.slow
def test_other_dtypes_train_alike_too() -> None:
    text = eject("clip_grad_norm(1.0) | sgd(lr=0.1) | lookahead(k=2, slow_dtype='float32')", RUN)
    spec = "clip_grad_norm(1.0) | sgd(lr=0.1) | lookahead(k=2, slow_dtype='float32')"
    trains_alike(text.replace(", fused=True", ""), spec, dtype=torch.bfloat16)


def test_the_norm_of_many_small_tensors_is_the_stack_s() -> None:
    spec = "clip_grad_norm(0.01) | adamw(lr=0.01)"
    shapes = [(3,), (2, 5), (), (2000,)] * 50
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    stack, other = metaopt.build(ours, spec), made(eject(spec), theirs)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        stack.step()
        other.step()
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.slow
def test_a_checkpoint_of_the_file_goes_on() -> None:
    text = eject(TYPICAL, RUN)
    _, other, _, theirs = trains_alike(text, TYPICAL, 10)
    again = net()
    again.load_state_dict(theirs.state_dict())
    opt = made(text, again.parameters())
    opt.load_state_dict(copy.deepcopy(other.state_dict()))
    for seed in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        for one, model in ((other, theirs), (opt, again)):
            one.zero_grad()
            model(x).square().mean().backward()
            one.step()
    assert all(map(torch.equal, again.parameters(), theirs.parameters()))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("sam | sgd(lr=0.1)", "sam evaluates the loss itself"),
        ("switch(sgd(lr=0.1), 5, adamw(lr=0.1))", "switch changes its base in mid-run"),
        ("partition({'*': sgd(lr=0.1), 'matrix': adamw})", "no parameter was found that 'matrix' chooses"),
        ("partition({'*': skip_nonfinite(patience=3) | sgd(lr=0.1)})", "write it before the partition"),
        ("partition({'*': sgd(lr=0.1) | lookahead}) | outer(k=6)", "write both inside"),
        ("adamw | lookahead(pullback_momentum='reset')", "resets the base's state"),
        ("gradient_noise(0.1) | sgd(lr=0.1)", "needs random_like"),
        ("zclip | sgd(lr=0.1)", "numbers of its own"),
        (torch.optim.SGD, "SGD"),
    ],
)
def test_what_cannot_be_written_down_is_refused(spec: Any, told: str) -> None:
    if isinstance(spec, type):

        class Own(spec):  # type: ignore[misc, valid-type]
            pass

        spec, told = Own, "Own is not a part of metaopt's own"
    with pytest.raises(metaopt.SpecError, match=told):
        eject(spec)


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(metaopt.SpecError, match="use fewer parts"):
        eject("clip_grad_norm(1.0) | decay(0.1) | adamw | cautious | lookahead | clip_update_rms(1.0) | ema | outer")


@pytest.mark.slow
def test_the_command_writes_a_file_that_runs_without_metaopt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eject", TYPICAL, "--steps", "40", "--out", str(tmp_path / "optimizer.py")])
    assert left.value.code == 0 and "wrote" in capsys.readouterr().out
    program = (
        "import sys; sys.modules['metaopt'] = None\nimport torch, optimizer\np = torch.nn.Parameter(torch.ones(3))\n"
        "opt = optimizer.make_optimizer([p])\np.grad = torch.ones(3)\nopt.step(); opt.step(); print(p.tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with pytest.raises(SystemExit) as left:
        main(["eject", TYPICAL])  # its schedule runs to the end of a run without one
    assert left.value.code == 2
