"""Any text is a pipeline or one clear error; what a pipeline prints builds it again."""

import math
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import metaopt
from metaopt.spec import DEEPEST, LONGEST, Pipeline, parse

WORDS = ["adamw", "sgd", "lookahead", "clip_grad_norm", "cosine", "warmup", "lr", "k", "label", "inf", "nan", "0.1",
         "5", "1e400", "-", "|", "(", ")", "[", "]", ",", "=", ".", "*", "**", "'x'", "None", "True", "\n", " ", "\0",
         "lambda", ":", "é", "__class__", "#", ";", "{", "}"]  # fmt: skip

metaopt.adamw  # noqa: B018  the first look-up loads every part, which is not the parser's time

deadline = settings(deadline=None, max_examples=150)


def parsed_or_refused(text: str) -> None:
    begun = time.perf_counter()
    try:
        assert isinstance(parse(text), Pipeline)
    except metaopt.MetaoptError as error:
        assert str(error)
    assert time.perf_counter() - begun < 1.0


@deadline
@given(st.text())
def test_any_text_is_a_pipeline_or_a_metaopt_error(text: str) -> None:
    parsed_or_refused(text)


@deadline
@given(st.lists(st.sampled_from(WORDS), max_size=30).map("".join))
@example("adamw(lr=1e400)")
@example("adamw(lr=" + "9" * 5000 + ")")
@example("adamw(lr=-True)")
@example("adamw(lr=(1)(2))")
def test_any_words_of_the_language_are_a_pipeline_or_a_metaopt_error(text: str) -> None:
    parsed_or_refused(text)


@pytest.mark.parametrize(
    "text",
    ["(" * 5000, "[" * (DEEPEST + 1), "-" * 60_000 + "1", "adamw|" * 10_000, "a." * 20_000 + "a", "x" * (LONGEST + 1),
     "adamw" + "(" * 199 + ")" * 199, "adamw | " * 5000 + "adamw", "é" * LONGEST],
)  # fmt: skip
def test_huge_or_deep_text_is_refused_within_a_second(text: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(metaopt.MetaoptError):
        metaopt.build([torch.nn.Parameter(torch.ones(2))], text)
    assert time.perf_counter() - begun < 1.0


@pytest.mark.parametrize(
    "text",
    ["adamw(lr=1+1)", "adamw(lr=[x for x in y])", "adamw(lr=lambda: 1)", "__import__('os')", "adamw.__class__.x", "3",
     "adamw(**{})", "adamw(*(1, 2))", "adamw; sgd", "adamw = 3", "adamw or sgd", "f'{adamw}'", "adamw & sgd", "cosine",
     "adamw(lr=-'x')", "adamw(lr=~1)", "adamw[0]", "", "   ", "cosine(1e-3)", "adamw | 3", "(adamw, sgd)"],
)  # fmt: skip
def test_text_that_is_no_pipeline_is_refused(text: str) -> None:
    with pytest.raises(metaopt.MetaoptError):
        parse(text)


def test_an_unknown_part_names_the_near_ones_and_how_to_list() -> None:
    with pytest.raises(metaopt.UnknownPart, match="adam") as caught:
        parse("adm(lr=1e-3)")
    assert "'adm'" in str(caught.value)
    assert "metaopt list" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "adamw",
        "adamw(lr=0.0003)",
        "adamw(betas=(0.9, 0.95))",
        "clip_grad_norm(max_norm=1.0) | adamw(lr=0.1) | lookahead(k=7)",
        "sgd(lr=0.1) | lookahead | lookahead(k=3, label='outer')",
        "clip_grad_norm(max_norm=1.0, norm_type=inf) | sgd",
    ],
)
def test_what_a_pipeline_prints_is_what_it_was_written_as(text: str) -> None:
    assert str(parse(text)) == text


@deadline
@given(
    lr=st.floats(min_value=0, max_value=1e3, allow_nan=False),
    k=st.integers(min_value=1, max_value=10**6),
    norm=st.one_of(st.just(math.inf), st.floats(min_value=1, max_value=1e6)),
)
def test_text_and_objects_mean_the_same(lr: float, k: int, norm: float) -> None:
    pipeline = metaopt.clip_grad_norm(1.0, norm_type=norm) | metaopt.adamw(lr=lr) | metaopt.lookahead(k=k)
    text = str(pipeline)
    assert str(parse(text)) == text
    assert [part.given for part in parse(text)] == [
        {key: value for key, value in part.given.items() if key in again.given}
        for part, again in zip(pipeline, parse(text), strict=True)
    ]


def test_schedules_survive_the_way_through_text() -> None:
    pipeline = metaopt.adamw(lr=metaopt.warmup(metaopt.cosine(3e-4), 0.05)) | metaopt.lookahead
    again = parse(str(pipeline))
    assert str(again) == str(pipeline)
    assert again.parts[0].given["lr"] == pipeline.parts[0].given["lr"]


def test_an_unregistered_class_has_no_text_but_a_repr() -> None:
    class Unseen(torch.optim.SGD):
        pass

    pipeline = metaopt.clip_grad_norm(1.0) | Unseen
    assert "Unseen" in repr(pipeline)
    with pytest.raises(metaopt.SpecError, match="Unseen"):
        str(pipeline)


def test_a_value_that_is_no_literal_has_no_text_but_a_repr() -> None:
    pipeline = metaopt.adamw(lr=torch.tensor(0.1)) | metaopt.lookahead
    assert "adamw" in repr(pipeline)
    with pytest.raises(metaopt.SpecError, match="lr"):
        str(pipeline)
