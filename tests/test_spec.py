"""Any text is a pipeline or one clear error; what a pipeline prints builds it again."""

import dataclasses
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metaopt
from metaopt.specs.parsing import parse
from metaopt.specs.syntax import DEEPEST, LONGEST, MOST_PARTS

metaopt.adamw  # noqa: B018  the first look-up loads every part, which is not the parser's time

deadline = settings(deadline=None, max_examples=150)


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


@pytest.mark.parametrize(
    "text",
    ["adamw # no comments", "sgd(lr=f'x')", "lookahead(label=r'x') | adamw", "adamw(b'x')", "adamw'x'"],
)  # fmt: skip
def test_comments_and_all_but_plain_strings_are_refused(text: str) -> None:
    with pytest.raises(metaopt.SpecError):
        parse(text)


@pytest.mark.parametrize("inside", ["(" * 5000, "|" * 5000, "-" * 5000, "#", "\\'" * 500, '"' * 500, "[{(" * 300])
def test_what_stands_in_a_string_counts_for_no_limit(inside: str) -> None:
    for quote in ("'", "'''", '"', '"""'):
        if quote[0] not in inside:
            with pytest.raises(metaopt.MetaoptError, match="must be one of"):
                parse(f"lookahead(pullback_momentum={quote}{inside}{quote}) | adamw")
    assert str(parse("lookahead | adamw")) == "lookahead | adamw"


def test_brackets_behind_a_string_count_whatever_the_string_looks_like() -> None:
    for opening in ("'", '"', "'''", '"""', "#'\n", "f'", "'\\'"):
        with pytest.raises(metaopt.MetaoptError):
            parse("adamw(" + opening + "(" * 5000)


def test_so_many_parts_are_allowed_and_no_more() -> None:
    one = "clip_grad_value(1.0) | "
    assert len(parse(one * (MOST_PARTS - 1) + "sgd")) == MOST_PARTS
    with pytest.raises(metaopt.SpecError, match=f"more than {MOST_PARTS} parts"):
        parse(one * MOST_PARTS + "sgd")


def under_the_caret(text: str) -> str:
    """Return what the caret of the error for a text stands under."""
    with pytest.raises(metaopt.MetaoptError) as caught:
        parse(text)
    (note,) = caught.value.__notes__
    line, carets = note.splitlines()
    return line[carets.index("^") : carets.index("^") + carets.count("^")]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("adamw(lr=3e-4) | lookahed(k=5)", "lookahed"),
        ("  adamw(lr=3e-4) | lookahed(k=5)  ", "lookahed"),
        ("sgd(lr=cosin(0.1))", "cosin"),
        ("adamw | lookahead(k=5, alfa=0.5)", "alfa=0.5"),
        ("adamw | lookahead(k=0)", "k=0"),
        ("adamw | lookahead(k=linear(1, 5))", "k=linear(1, 5)"),
        ("adamw(lr=1 + 1)", "1 + 1"),
        ("adamw(lr=lambda: 1)", "lambda: 1"),
        ("adamw(lr=sgd)", "sgd"),
        ("adamw | 3 | lookahead", "3"),
        ("adamw | cosine(0.1)", "cosine(0.1)"),
        ("lookahead(5, 0.5, k=6) | adamw", "lookahead(5, 0.5, k=6)"),
        ("lookahead(label='é', k=0) | adamw", "k=0"),
        ("adamw(lr=f'{x}')", "f'{x}'"),
        ("partition({'a': adamw, 'a': sgd})", "'a'"),
        ("clip_grad_value(1.0) | " * 20 + "adamw(lr=oops)" + " | lookahead" * 20, "oops"),
    ],
)
def test_an_error_points_at_its_fault(text: str, fault: str) -> None:
    assert under_the_caret(text) == fault


def test_a_text_that_python_cannot_read_is_pointed_at_as_well() -> None:
    assert under_the_caret("adamw(lr=3e-4 | lookahead") == "("
    assert under_the_caret("adamw) | lookahead") == ")"


def test_the_message_itself_is_one_line_and_the_caret_is_right_in_a_text_of_several() -> None:
    with pytest.raises(metaopt.MetaoptError) as caught:
        parse("adamw(\n lr=cosin(0.1))")
    assert "\n" not in str(caught.value)
    assert under_the_caret("adamw(\n lr=cosin(0.1))") == "cosin"
    assert under_the_caret("clip_grad_norm(1.0)\r\n| adamw\n| lookahed(k=5)") == "lookahed"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n    ", "\t\n\t"])
def test_a_pipeline_may_be_written_in_several_lines(end: str) -> None:
    # as in a YAML block or between triple quotes, with the bar at either end of a line
    one = "clip_grad_norm(max_norm=1.0) | adamw(lr=0.1, betas=(0.9, 0.95)) | lookahead(k=7)"
    assert str(parse(one.replace(" | ", f"{end}| ") + end)) == one
    assert str(parse(end + one.replace(" | ", f" |{end}").replace(", ", f",{end}"))) == one


def test_the_end_of_a_line_separates_no_parts_and_ends_no_string() -> None:
    with pytest.raises(metaopt.SpecError, match="cannot be read"):
        parse("clip_grad_norm(1.0)\nadamw")
    with pytest.raises(metaopt.SpecError):
        parse("lookahead(label='a\nb') | adamw")


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
    assert [part.arguments for part in parse(text)] == [
        {key: value for key, value in part.arguments.items() if key in again.arguments}
        for part, again in zip(pipeline, parse(text), strict=True)
    ]


def test_schedules_survive_the_way_through_text() -> None:
    pipeline = metaopt.adamw(lr=metaopt.warmup(metaopt.cosine(3e-4), 0.05)) | metaopt.lookahead
    again = parse(str(pipeline))
    assert str(again) == str(pipeline)
    assert again.parts[0].arguments["lr"] == pipeline.parts[0].arguments["lr"]


def test_an_unregistered_class_has_no_text_but_a_repr() -> None:
    class Unseen(torch.optim.SGD):
        pass

    pipeline = metaopt.clip_grad_norm(1.0) | Unseen
    assert "Unseen" in repr(pipeline)
    with pytest.raises(metaopt.SpecError, match="Unseen"):
        str(pipeline)


def test_a_value_that_is_no_literal_has_no_text_but_a_repr() -> None:
    pipeline = dataclasses.replace(metaopt.adamw, arguments={"lr": object()}) | metaopt.lookahead
    assert "adamw" in repr(pipeline)
    with pytest.raises(metaopt.SpecError, match="lr"):
        str(pipeline)


def test_an_optimizer_in_place_of_parts_is_told_of_wrap():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(metaopt.SpecError, match=r"SGD is an optimizer that exists already: metaopt\.wrap"):
        metaopt.build([weight], torch.optim.SGD([weight], lr=0.1))
