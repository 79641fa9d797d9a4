"""What the benchmarks measure: contenders that compute the same, numbers that mean what they say."""

import sys
import types

import pytest
import torch

from benchmarks import contenders as contenders_module
from benchmarks import measure as measure_module
from benchmarks.baselines import Update
from benchmarks.clock import sample
from benchmarks.contenders import Contender, chosen_baseline, find_baselines, make_contenders, stack_contender
from benchmarks.measure import least_bytes, make_runner, measure, time_contenders
from benchmarks.targets import Settings, check_targets, wrappers_alone
from benchmarks.training_step import text_model
from metaopt.lab.shapes import make_tensor_set, shapes_of
from metaopt.testing.watching import waits_raise

WHOLE = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"


@pytest.fixture(scope="module")
def tiny():
    return make_tensor_set("tiny")


def updated(make, tensors, updates=12):
    """Return the parameters after updates with gradients that change, some above the clipping threshold, some below."""
    parameters = tensors.parameters()
    update = make(parameters)
    for number in range(updates):
        random = torch.Generator().manual_seed(number)
        for _, p in parameters:
            p.grad = torch.randn(p.shape, generator=random) * (0.05 if number % 3 else 0.001)
        update.step()
    return [p.detach() for _, p in parameters]


def distance(a, b):
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("spec", [WHOLE, "sgd(lr=0.1, momentum=0.9) | lookahead(k=3, alpha=0.8)"])
def test_every_contender_computes_what_its_equal_stack_computes(tiny, spec):
    found, _ = make_contenders([spec])
    stacks = {equal: updated(stack_contender(equal).make, tiny) for equal in {c.equal for c in found}}
    assert {"stack", "torch", "torch-foreach", "torch-fused", "expert-lookahead", "pytorch-optimizer"} <= {
        c.key for c in found
    }
    for contender in found:
        assert distance(updated(contender.make, tiny), stacks[contender.equal]) < 1e-7, contender.key
    # the pulls and the clipping matter, or the line above would hold for anything
    with_pulls, without = (stacks[equal] for equal in sorted(stacks, key=lambda equal: "lookahead" not in equal))
    assert distance(with_pulls, without) > 1e-4


def test_clipping_baselines_is_the_stack_s_clipping(tiny):
    clipped, plain = ("clip_grad_norm(1.0) | sgd(lr=0.1)", "sgd(lr=0.1)")
    baselines, _ = find_baselines(clipped)
    stack = updated(stack_contender(clipped).make, tiny)
    assert {contender.key for contender in baselines} >= {"torch", "expert"}
    for contender in baselines:
        assert distance(updated(contender.make, tiny), stack) < 1e-7, contender.key
    assert distance(updated(stack_contender(plain).make, tiny), stack) > 1e-4


def test_the_shape_sets_are_those_that_the_targets_name():
    sizes = {
        name: (len(shapes), sum(torch.Size(shape).numel() for _, shape in shapes))
        for name, shapes in ((name, shapes_of(name)) for name in ("tiny", "transformer", "large", "many"))
    }
    assert sizes["tiny"][0] == 6
    assert sizes["transformer"][0] == 148 and abs(sizes["transformer"][1] / 25e6 - 1) < 0.02
    assert sizes["large"] == (12, 12 * 4096 * 1024)
    assert sizes["many"] == (1000, 16000)


def test_the_transformer_s_shapes_are_those_of_the_model_whose_pass_is_timed():
    model = [(name, tuple(p.shape)) for name, p in text_model().named_parameters()]
    # how many characters the text has depends on the Python
    assert model[0][0] == "token.weight" and model[1:] == shapes_of("transformer")[1:]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        # per element: weight, gradient and two moments read, weight and two moments written
        ("adamw", 7.0),
        ("clip_grad_norm(1.0) | adamw", 8.0),
        # every fifth update reads and writes weights and slow weights
        ("adamw | lookahead(k=5)", 7.8),
        (WHOLE, 8.8),
        # the outer one overwrites the inner slow weights, which it need not read: 4 words of the inner, 5 of the outer
        ("adamw | lookahead(k=1) | lookahead(k=1, label='outer')", 16.0),
        ("clip_grad_value(1.0) | sgd(lr=0.1)", 5.0),
        ("sgd(lr=0.1, momentum=0.9)", 5.0),
    ],
)
def test_the_bytes_at_least_are_those_of_the_formula(tiny, spec, words):
    moved = sum(least_bytes(tiny, spec).values())
    # one count of updates per tensor, read and written, is no tensor of the formula
    assert moved / tiny.bytes == pytest.approx(words, abs=1e-3)


def test_the_bytes_of_a_wrapper_are_told_apart_from_those_of_the_base(tiny):
    moved = least_bytes(tiny, WHOLE)
    assert moved["lookahead"] == pytest.approx(0.8 * tiny.bytes)
    assert moved["clip_grad_norm"] == pytest.approx(tiny.bytes)


@pytest.mark.slow
def test_state_and_temporary_memory_are_those_of_the_formula(tiny):
    found, _ = make_contenders([WHOLE])
    result = measure(tiny, found, "torch-fused", rounds=1)
    counters = 4 * result.tensors
    held = {row.key: row.state_bytes for row in result.rows}
    assert held["stack"] == held["expert-lookahead"] == 3 * tiny.bytes + counters
    assert held["torch-fused"] == held["expert"] == 2 * tiny.bytes + counters
    taken = {row.key: row.temporary_bytes for row in result.rows}
    # torch's multi-tensor AdamW holds a copy of everything for a moment; the stack nothing but a few numbers
    assert taken["torch-foreach"] >= tiny.bytes
    assert taken["stack"] < 1024


class Recorded(Update):
    """Spoils its gradients, as clipping does, and notes what it was given and in which order."""

    def __init__(self, name, parameters, calls):
        self.name, self.parameters, self.calls = name, parameters, calls

    def step(self):
        self.calls.append(self.name)
        self.seen = [p.grad.clone() for _, p in self.parameters]
        for _, p in self.parameters:
            p.grad.zero_()

    def kept_tensors(self):
        return []


def test_small_tensors_are_made_anew_on_the_way_and_every_round_counts(tiny):
    made = []

    def make(parameters):
        made.append(parameters)
        return Recorded("a", parameters, [])

    runners, _ = time_contenders(tiny, [Contender("a", "a", "adamw", make), stack_contender("adamw")], rounds=6)
    assert len(made) == 4
    assert [len(runner.samples) for runner in runners.values()] == [6, 6]


def test_a_package_that_is_not_installed_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(contenders_module.PACKAGES, "timm", "no_such_package_anywhere")
    found, notes = find_baselines(WHOLE)
    assert "timm" not in {contender.key for contender in found}
    assert "timm is not installed: its Lookahead is left out" in notes


def test_a_package_that_copies_its_slow_weights_late_is_given_the_right_ones(tiny, monkeypatch):
    class Late(torch.optim.Optimizer):
        """As timm's: the slow weights are copied at the first pull, in the base's own state."""

        def __init__(self, base, alpha, k):
            self.base, self.alpha, self.k, self.updates = base, alpha, k, 0
            self.param_groups, self.state = base.param_groups, {}

        def sync_lookahead(self):
            for p in self.param_groups[0]["params"]:
                slow = self.base.state[p].setdefault("lookahead_slow_buff", p.detach().clone())
                slow.lerp_(p.detach(), self.alpha)
                p.data.copy_(slow)

        def step(self):
            self.base.step()
            self.updates += 1
            if self.updates % self.k == 0:
                self.sync_lookahead()

    monkeypatch.setitem(sys.modules, "late_package", types.SimpleNamespace(Lookahead=Late))
    monkeypatch.setitem(contenders_module.PACKAGES, "timm", "late_package")
    found, _ = find_baselines(WHOLE)
    late = next(contender for contender in found if contender.key == "timm")
    assert distance(updated(late.make, tiny), updated(stack_contender(WHOLE).make, tiny)) < 1e-7


def test_the_baseline_is_fused_torch_or_the_one_asked_for():
    found, _ = make_contenders([WHOLE, "sgd(lr=0.1)"])
    assert chosen_baseline(found, None) == "torch-fused"
    assert chosen_baseline(found, "clip_grad_norm(1.0) | adamw | lookahead()") == "stack"
    assert chosen_baseline(found, "sgd(lr=0.1)") == "stack-2"
    assert chosen_baseline(found, "torch-fused-2") == "torch-fused-2"


def test_a_set_that_does_not_fit_the_memory_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(measure_module, "_free_bytes", lambda device: 2**20)
    with pytest.raises(measure_module.ProblemError, match=r"tiny needs about .* GB are free: choose smaller"):
        measure(tiny, [stack_contender(WHOLE)], "stack", rounds=1)


def test_a_target_says_what_was_measured_and_whether_it_is_met():
    verdicts = list(check_targets(Settings(rounds=2, sets=("tiny",), only=("2", "4"))))
    assert [(v.target, v.where, v.at_most) for v in verdicts] == [("2", "tiny", 0.40), ("4", "tiny", 1.05)]
    assert all(v.met == (v.measured <= v.at_most) for v in verdicts)


def test_every_wrapper_that_has_an_update_of_its_own_is_among_the_targets():
    found = {name: text for name, text, _ in wrappers_alone()}
    assert found["lookahead"] == "adamw | lookahead"
    assert found["clip_grad_norm"] == "clip_grad_norm(max_norm=0.1) | adamw"
    assert found["clip_grad_value"] == "clip_grad_value(clip_value=0.1) | adamw"
    assert found["accumulate"] == "accumulate(steps=2) | adamw"


@pytest.mark.cuda
@pytest.mark.parametrize("spec", [WHOLE, "adamw | lookahead(k=5)"])
def test_no_update_on_cuda_waits_for_the_device(spec):
    tensors = make_tensor_set("tiny", "cuda")
    runner = make_runner(tensors, stack_contender(spec))
    for _ in range(6):
        tensors.restore(runner.parameters)
        runner.update.step()
    with waits_raise():
        for _ in range(10):
            tensors.restore(runner.parameters)
            runner.update.step()


@pytest.mark.cuda
def test_on_cuda_events_measure_the_device_and_launches_are_counted():
    tensors = make_tensor_set("large", "cuda")
    found, _ = make_contenders([WHOLE], "cuda")
    result = measure(tensors, found, "torch-fused", rounds=2)
    rows = {row.key: row for row in result.rows}
    assert all(row.launches >= 1 for row in rows.values())
    # a launch is far shorter than the work it starts: a clock on the host alone would tell the two to be equal
    assert rows["torch-fused"].host_seconds.median < rows["torch-fused"].seconds.median
    buffer = torch.empty(2**28, device="cuda")
    assert sample(torch.device("cuda"), lambda: None, buffer.zero_, 3).device > 0
