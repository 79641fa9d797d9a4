"""Search spaces may stand wherever a value may; what a search chose takes their place."""

import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import metaopt
from metaopt import adamw, choice, cosine, integers, log, lookahead, muon, partition, sgd, switch, uniform, warmup
from metaopt.specs.parsing import parse
from metaopt.specs.pipeline import as_pipeline
from metaopt.specs.spaces import spaces_of, with_values
from metaopt.specs.text import to_text

FULL = (
    "adamw(lr=log(0.0001, 0.1), weight_decay=log(0.001, 1.0), betas=(choice(0.9, 0.95), 0.999)) | "
    "lookahead(k=choice(5, 10), alpha=uniform(0.3, 1.0))"
)
EVERYWHERE = [
    FULL,
    "adamw(lr=warmup(schedule=cosine(start=log(0.0001, 0.1)), steps=0.05))",
    "adamw(lr=warmup(schedule=cosine(start=0.1), steps=choice(0.05, 10)))",
    "adamw(lr=warmup(schedule=log(0.0001, 0.1), steps=0.1))",
    "sgd(lr=sequence(log(0.001, 0.1), integers(3, 6), cosine(start=uniform(0.1, 0.2))))",
    "adamw(betas=(linear(start=uniform(0.8, 0.9), end=0.95), choice(0.99, 0.999)))",
    "adamw(betas=choice((0.9, 0.999), (0.95, 0.99)))",
    "sgd(lr=choice(0.1, cosine(start=0.2)))",
    "partition({'matrix': muon(lr=log(0.001, 0.1)), '*': adamw(lr=log(0.0001, 0.01)) | ema(decay=uniform(0.9, 0.99))})",
    "switch(adamw(lr=log(0.001, 0.1)), integers(3, 6), sgd(lr=uniform(0.1, 0.2)))",
    "accumulate(steps=integers(2, 4)) | sgd(lr=0.1) | lookahead(pullback_momentum=choice('none', 'reset'))",
    "adamw(lr=0.1) | lookahead(k=integers(2, 9), label='a') | lookahead(k=integers(20, 90), label='b')",
]


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))


def chosen(spec: Any, u: float) -> Any:
    pipeline = as_pipeline(spec)
    return with_values(pipeline, {path: space.value(u) for path, space in spaces_of(pipeline).items()})


# ---- text, data and objects


@pytest.mark.parametrize("text", EVERYWHERE)
def test_its_own_text_is_the_same_pipeline(text: str) -> None:
    pipeline = parse(text)
    assert spaces_of(pipeline)
    assert str(parse(str(pipeline))) == str(pipeline)
    assert parse(str(pipeline)) == pipeline
    if "ema" not in text and "accumulate" not in text:
        assert str(pipeline) == text


@pytest.mark.parametrize("text", EVERYWHERE)
@pytest.mark.parametrize("u", [0.0, 0.4, 1.0])
def test_chosen_values_make_a_stack(text: str, u: float) -> None:
    pipeline = chosen(text, u)
    assert not spaces_of(pipeline)
    net = model()
    parameters = [(n, p) for n, p in net.named_parameters() if p.dim() == 2 or "muon(" not in text or "'*'" in text]
    built = metaopt.build(parameters, str(pipeline), total_steps=20)
    assert str(built.spec) == str(pipeline)


def test_values_stand_where_their_spaces_stood() -> None:
    pipeline = parse(FULL)
    values = {"lr": 0.01, "weight_decay": 0.1, "betas[0]": 0.95, "lookahead.k": 10, "lookahead.alpha": 0.5}
    assert list(spaces_of(pipeline)) == list(values)
    expected = "adamw(lr=0.01, weight_decay=0.1, betas=(0.95, 0.999)) | lookahead(k=10, alpha=0.5)"
    assert with_values(pipeline, values) == parse(expected)


def test_paths_lead_through_schedules_partitions_and_labels() -> None:
    assert [list(spaces_of(parse(text))) for text in EVERYWHERE[1:6] + EVERYWHERE[8:]] == [
        ["lr.schedule.start"],
        ["lr.steps"],
        ["lr.schedule"],
        ["lr[0]", "lr[1]", "lr[2].start"],
        ["betas[0].start", "betas[1]"],
        ["matrix: lr", "*: lr", "*: ema.decay"],
        ["0: lr", "1", "2: lr"],
        ["accumulate.steps", "lookahead.pullback_momentum"],
        ["a.k", "b.k"],
    ]
    with pytest.raises(
        metaopt.SpecError, match=r"two parts have the hyperparameter lookahead.k: give one of them a la"
    ):
        spaces_of(parse("sgd(lr=0.1) | lookahead(k=integers(2, 9)) | lookahead(k=integers(2, 9))"))


OBJECTS = [
    (adamw(lr=log(1e-4, 1e-1), betas=(choice(0.9, 0.95), 0.999)) | lookahead(k=integers(2, 9)), 0),
    (adamw(lr=warmup(cosine(log(1e-4, 1e-1)), 0.05)), "adamw(lr=warmup(cosine(log(1e-4, 1e-1)), 0.05))"),
    (partition({"matrix": muon(lr=log(1e-3, 1e-1)), "*": sgd(lr=0.1)}), 0),
    (switch(sgd(lr=0.1), integers(3, 6), adamw(lr=uniform(0.1, 0.2))), 0),
]


@pytest.mark.parametrize(("written", "text"), OBJECTS)
def test_objects_mean_what_the_text_means(written: Any, text: Any) -> None:
    assert as_pipeline(written) == parse(text or str(written))
    assert spaces_of(as_pipeline(written))


DATA = """
- adamw:
    lr: {log: [1e-4, 0.1]}
    weight_decay: "log(1e-3, 1)"
    betas: [{choice: [0.9, 0.95]}, 0.999]
- lookahead:
    k: {choice: [5, 10]}
    alpha: {uniform: {low: 0.3, high: 1}}
"""


def test_lists_and_dicts_mean_what_the_text_means() -> None:
    data = yaml.safe_load(DATA)
    assert data[0]["adamw"]["lr"]["log"][0] == "1e-4"  # YAML 1.1
    assert as_pipeline(data) == as_pipeline(json.loads(json.dumps(data))) == parse(FULL)
    nested = [{"adamw": {"lr": {"warmup": [{"cosine": {"start": {"log": [1e-4, 0.1]}}}, 0.05]}}}]
    assert as_pipeline(nested) == parse(EVERYWHERE[1])
    words = [{"sgd": 0.1}, {"lookahead": {"pullback_momentum": {"choice": ["none", "reset"]}}}]
    assert as_pipeline(words) == parse("sgd(0.1) | lookahead(pullback_momentum=choice('none', 'reset'))")
    with pytest.raises(metaopt.SpecError, match="choice takes a list of values or a dict by name"):
        as_pipeline([{"adamw": {"lr": {"choice": "0.1"}}}])


def test_a_configured_optimizer_refuses_a_space() -> None:
    with pytest.raises(metaopt.SpecError, match="metaopt tune"):
        metaopt.Optimizer(model().parameters(), lr=0.1, spec="adamw | lookahead(k=choice(5, 10))")


# ---- nothing is built before values are chosen


@pytest.mark.parametrize("text", EVERYWHERE)
def test_build_says_which_value_is_missing_and_what_chooses_it(text: str) -> None:
    path, space = next(iter(spaces_of(parse(text)).items()))
    with pytest.raises(metaopt.SpecError) as refused:
        metaopt.build(model(), text, total_steps=20)
    told = str(refused.value)
    assert told.startswith(f"{path} must be a value to build a stack, got the search space {to_text(space, '')}:")
    assert told.endswith("metaopt tune SPEC --problem PROBLEM") and "\n" not in told


def test_wrap_and_wrapper_objects_refuse_a_space_too() -> None:
    net = model()
    for call in (
        lambda: metaopt.wrap(torch.optim.SGD(net.parameters()), "lookahead(k=choice(5, 10))"),
        lambda: metaopt.build(net, [sgd(lr=0.1), type(lookahead().build_wrapper())(k=integers(2, 5))]),
    ):
        with pytest.raises(metaopt.SpecError, match="metaopt tune"):
            call()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("given", [{"lr": log(1e-3, 1)}, {"lr": cosine(log(1e-3, 1))}, {"lookahead.k": choice(5, 6)}])
def test_a_parameter_group_takes_no_space(given: dict[str, Any]) -> None:
    net = model()
    with pytest.raises(metaopt.HyperparameterError, match=r"group 0.* sets .*a search space belongs into the spec"):
        metaopt.build([{"params": list(net.parameters()), **given}], "adamw | lookahead", total_steps=9)
    opt = metaopt.build(list(net[0].parameters()), "adamw | lookahead")  # type: ignore[index]
    with pytest.raises(metaopt.HyperparameterError, match="a search space belongs into the spec"):
        opt.add_param_group({"params": list(net[1].parameters()), **given})  # type: ignore[index]
    assert len(opt.param_groups) == 1


# ---- the ends are held against the bounds


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "lookahead(alpha=uniform(-0.3, 2))",
            "lookahead: alpha cannot be searched in uniform(-0.3, 2.0): alpha must be > 0, got -0.3",
        ),
        ("lookahead(k=choice(5, 0))", "lookahead: k cannot be searched in choice(5, 0): k must be >= 1, got 0"),
        (
            "lookahead(k=uniform(1, 2))",
            "lookahead: k cannot be searched in uniform(1.0, 2.0): k must be int, got 1.0; "
            "integers(low, high) gives whole numbers",
        ),
        (
            "lookahead(pullback_momentum=choice('none', 'rest'))",
            "lookahead: pullback_momentum cannot be searched in choice('none', 'rest'): pullback_momentum must be one "
            "of 'none', 'reset', 'pullback', got 'rest'",
        ),
        (
            "adamw(betas=log(1, 2))",
            "adamw: betas cannot be searched in log(1.0, 2.0): betas must be tuple or list, got 1.0",
        ),
        (
            "adamw(lr=cosine(choice(0.1, 'a')))",
            "cosine: start cannot be searched in choice(0.1, 'a'): start must be float, got 'a'",
        ),
        ("adamw(lr=choice(log(0.1, 1), 2))", "adamw: choice(log(0.1, 1.0), 2) must not hold another space"),
        (
            "adamw(lr=choice(cosine(log(0.1, 1)), 2))",
            "adamw: choice(Cosine(start=log(0.1, 1.0)), 2) must not hold another space",
        ),
        (
            "adamw(lr=log)",
            "adamw: a value must not be a part, got a space, log; a schedule or a space needs its brackets",
        ),
        ("adamw(lr=log(0, 1))", "log: low must be > 0, got 0.0"),
        ("adamw(lr=log(1, 1))", "log: high must be a finite number above low, got 1.0 and 1.0"),
        ("adamw(lr=uniform(2, 1))", "uniform: high must be a finite number above low, got 2.0 and 1.0"),
        ("adamw(lr=uniform(0, inf))", "uniform: high must be a finite number above low, got 0.0 and inf"),
        ("lookahead(k=integers(5, 5))", "integers: high must be above low, got 5 and 5"),
        ("adamw(lr=choice(1))", "choice takes two values or more, got 1: choice(0.9, 0.95)"),
        ("adamw(lr=choice(0.1, 0.2, 0.1))", "choice: each value is given once, got 0.1 twice"),
        ("adamw(lr=log(low=1))", "log needs high: the greatest value"),
    ],
)
def test_a_space_that_a_hyperparameter_cannot_have_is_refused_when_it_is_read(text: str, told: str) -> None:
    with pytest.raises(metaopt.MetaoptError) as refused:
        parse(text)
    assert str(refused.value) == told
    assert refused.value.__notes__  # carets under the fault


def test_integers_may_be_given_for_a_float() -> None:
    assert chosen("adamw(eps=integers(1, 3))", 0.0) == parse("adamw(eps=1)")


# ---- the values themselves


@given(st.floats(1e-12, 1e6), st.floats(1.0001, 1e12), st.floats(0, 1))
def test_log_gives_factors_evenly_in_few_digits(low: float, factor: float, u: float) -> None:
    space = log(low, low * factor)
    value = space.value(u)
    assert low <= value <= low * factor
    exact = low * factor**u
    assert math.isclose(math.log(value / exact) / math.log(factor), 0, abs_tol=2e-3)
    # one of the ends is as the user wrote it
    assert len(f"{value!r}".partition("e")[0].replace(".", "").strip("0")) <= 10 or value in (low, low * factor)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(0, 1))
def test_uniform_gives_values_evenly(low: float, length: float, u: float) -> None:
    space = uniform(low, low + length)
    value = space.value(u)
    assert low <= value <= low + length
    assert abs(Fraction(value) - Fraction(low) - Fraction(u) * Fraction(length)) <= Fraction(length) / 900


@given(st.integers(-50, 50), st.integers(1, 50))
def test_integers_and_choices_give_each_value_as_often(low: int, more: int) -> None:
    count = more + 1
    points = [(i + 0.5) / (4 * count) for i in range(4 * count)]
    whole, listed = integers(low, low + more), choice(*range(low, low + count))
    assert [whole.value(u) for u in points] == [listed.value(u) for u in points]
    assert [whole.value(u) for u in points] == [low + i // 4 for i in range(4 * count)]
    assert (whole.value(0.0), whole.value(1.0)) == (low, low + more)


# ---- plugins


class Halves(metaopt.Space):
    """x(u) = first, first / 2, first / 4, ..."""

    ordered = True
    first: float = metaopt.hyper(1.0, gt=0.0, doc="the greatest value")
    many: int = metaopt.hyper(4, ge=2, doc="how many")

    def options(self) -> list[float]:
        return [self.first / 2**i for i in range(self.many)]

    def value(self, u: float) -> float:
        return self.options()[min(int(u * self.many), self.many - 1)]


def test_a_space_of_ones_own_is_a_part_like_the_others() -> None:
    metaopt.register(spaces={"halves": Halves})
    pipeline = parse(
        "sgd(lr=halves(0.8), momentum=halves(many=3)) | lookahead(alpha=halves)".replace("=halves)", "=1.0)")
    )
    assert str(pipeline) == "sgd(lr=halves(0.8), momentum=halves(1.0, 3)) | lookahead(alpha=1.0)"
    assert str(chosen(pipeline, 0.5)) == "sgd(lr=0.2, momentum=0.5) | lookahead(alpha=1.0)"
    results = [result for case in metaopt.testing.cases("halves") for result in metaopt.testing.prove(case)]
    assert {result.status for result in results} == {"passed"} and len(results) == 5


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("gives_values_that_can_be_pasted", lambda u: u / 3),
        ("gives_values_that_can_be_pasted", lambda u: math.inf if u == 1 else 0.5),
        ("gives_the_same_for_the_same_u", lambda u, seen=[]: seen.append(u) or len(seen)),
        ("knows_its_options_and_ends", lambda u: 2 if u == 0 else 1),
    ],
)
def test_the_checks_find_a_broken_space(check: str, broken: Any) -> None:
    class Broken(metaopt.Space):
        """x(u)."""

        def options(self) -> Any:
            return [1, 2] if "options" in check else None

        def value(self, u: float) -> Any:
            return broken(u)

    metaopt.register(spaces={"broken_space": Broken})
    case = metaopt.testing.cases("broken_space")[0]
    results = {result.check: result.status for result in metaopt.testing.prove(case)}
    assert results[check] == "failed"
