"""Any text gives a stack or a MetaoptError, never another exception, and never takes more than a second."""

import ast
import contextlib
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import metaopt
from metaopt.hyperparameters import Hyperparameter
from metaopt.registry import registry
from metaopt.specs.pipeline import part

WORDS = ["adamw", "sgd", "lookahead", "clip_grad_norm", "cosine", "warmup", "lr", "k", "label", "inf", "nan", "0.1",
         "5", "1e400", "-", "|", "(", ")", "[", "]", ",", "=", ".", "*", "**", "'x'", "None", "True", "\n", " ", "\0",
         "lambda", ":", "é", "__class__", "#", ";", "{", "}"]  # fmt: skip
VALUES = ["0", "-0.0", "1", "-1", "2", "10", "0.5", "0.9", "1e-3", "1e-320", "1e308", "1e400", "-1e400", "inf", "-inf",
          "1" + "0" * 400, "-1" + "0" * 400, "2147483648", "9223372036854775808", "1_0", "1j", "True", "None", "''",
          "'x'", "'reset'", "'float32'", "b'x'", "()", "[]", "(0.9, 0.99)", "[0.9]", "((1,),)", "{}", "{'*': adamw}",
          "adamw", "x"]  # fmt: skip
VALID = [
    "clip_grad_norm(1.0) | adamw(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1) | lookahead(k=5, alpha=0.5)",
    "sgd(lr=warmup(cosine(0.1, steps=100), 10), momentum=0.9) | lookahead | lookahead(k=3, label='outer')",
    "clip_grad_norm(1.0, norm_type=inf) | sgd(lr=sequence(constant(0.1), 5, linear(0.1, 0.0, steps=5), 5, 0.0))",
    "partition({'*.weight': muon(lr=0.02), '*': adamw(lr=3e-4) | ema(0.99)}) | lookahead(alpha=linear(0.5, 0.8))",
]
# every part of metaopt's own; those of a bridge are many, and their constructors another package's
OWN = {kind: [e.name for e in registry.entries(kind) if e.origin == "metaopt"] for kind in ("optimizer", "wrapper")}
SCHEDULES = registry.names("schedule")
MODEL = list(torch.nn.Linear(3, 2).named_parameters())
metaopt.build(MODEL, "adamw")  # the first one imports much of torch, which is not the time of a text

many = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


def built_or_refused(text: str) -> metaopt.Stack | None:
    begun = time.process_time()
    stack = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about values that it takes all the same
        try:
            stack = metaopt.build(MODEL, text, total_steps=100)
        except metaopt.MetaoptError as error:
            assert str(error)
    assert time.process_time() - begun < 1.0
    return stack


def fitting(declared: Hyperparameter) -> list[str]:
    """Return those of the values that a hyperparameter allows."""
    found = []
    for text in VALUES:
        with contextlib.suppress(ValueError, SyntaxError, metaopt.MetaoptError):
            declared.validate(ast.literal_eval(text), where=declared.name)
            found.append(text)
    return found


def calls(names: list[str], values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Write a registered name with some of its own hyperparameters, and some that it has not."""

    @st.composite
    def call(draw: st.DrawFn) -> str:
        name = draw(st.sampled_from(names))
        hyperparameters = part(name).hyperparameters
        if draw(st.integers(0, 2)):  # more often than not as its declarations ask, so that much of it builds
            required = [keyword for keyword, declared in hyperparameters.items() if declared.required]
            keywords = draw(st.lists(st.sampled_from(list(hyperparameters)), max_size=2)) if hyperparameters else []
            chosen = {keyword: fitting(hyperparameters[keyword]) for keyword in [*required, *keywords]}
            given = [f"{keyword}={draw(st.sampled_from(texts))}" for keyword, texts in chosen.items() if texts]
        else:
            known = [*hyperparameters, "label", "bogus"]
            keywords = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
            given = [*draw(st.lists(values, max_size=2)), *(f"{keyword}={draw(values)}" for keyword in keywords)]
        return f"{name}({', '.join(given)})" if given else name

    return call()


plain = st.sampled_from(VALUES)
scheduled = st.recursive(plain, lambda inner: st.one_of(plain, calls(SCHEDULES, inner)), max_leaves=4)
wrappers = st.lists(calls(OWN["wrapper"], scheduled), max_size=2)
pipelines = st.tuples(wrappers, calls(OWN["optimizer"], scheduled), wrappers).map(
    lambda parts: " | ".join([*parts[0], parts[1], *parts[2]])
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Take a pipeline and cut, repeat, move or insert pieces of it."""
    text = draw(st.one_of(st.sampled_from(VALID), pipelines))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 8)))
        piece = draw(
            st.one_of(
                st.just(""),
                st.just(text[begin:end] * draw(st.sampled_from([2, 40]))),
                st.sampled_from([*WORDS, *VALUES]),
                st.text(max_size=3),
            )
        )
        text = text[:begin] + piece + text[end:]
    return text


@pytest.mark.slow
@many
@given(st.text())
def test_any_text(text: str) -> None:
    built_or_refused(text)


@many
@given(st.lists(st.sampled_from(WORDS), max_size=30).map("".join))
@example("adamw(lr=1e400)")
@example("adamw(lr=" + "9" * 5000 + ")")
@example("adamw(lr=-True)")
@example("adamw(lr=(1)(2))")
def test_any_words_of_the_language(text: str) -> None:
    built_or_refused(text)


@pytest.mark.slow
@many
@given(pipelines)
@example("sgd(lr=cosine(1" + "0" * 400 + "))")
@example("sgd(lr=cosine_restarts(0.1, first=1" + "0" * 400 + "))")
@example("sgd(lr=cyclic(0.1, 0.2, down=1" + "0" * 400 + "))")
@example("sgd(lr=noam(warmup=1" + "0" * 400 + "))")
@example("adamw(betas=(0.9, 0.9, 0.95))")
@example("rprop(capturable=True) | lookahead(pullback_momentum='reset')")
@example("lookahead(label=5) | adamw")
@example("adam(betas=[])")
@example("switch")
@example("adamw | lawa(k=1, n=2147483648)")
@example("zclip(warmup=2147483648) | adamw")
@example("skip_spikes(window=9223372036854775808) | sgd(lr=0.1)")
@example("sgd(lr=sequence(0.1, (1,), 0.2))")
def test_any_parts_with_any_values_and_what_builds_prints_text_that_builds_it_again(text: str) -> None:
    stack = built_or_refused(text)
    if stack is not None:
        again = built_or_refused(str(stack.spec))
        assert again is not None and str(again.spec) == str(stack.spec)


@pytest.mark.slow
@many
@given(mutated())
@example('"\\' * 30_000)
@example("'" * 60_000)
def test_any_pipeline_that_was_damaged(text: str) -> None:
    built_or_refused(text)


def test_a_setting_that_no_step_can_work_with_is_torch_s_to_refuse_at_the_first_step() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        opt = metaopt.build([p], "adamw(betas=(0.9, 0.9, 0.95))")
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="too many values"):
            opt.step()


def test_the_pipelines_that_are_damaged_are_whole_before() -> None:
    for text in VALID:
        shapes = [(f"layer.{name}", p) for name, p in MODEL]
        assert metaopt.build(shapes, text, total_steps=100)
