"""Every page of the documentation does what it says: its programs run and its commands succeed."""

import re

import page_runner
import pytest
from documents import ROOT
from warm import printed

PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page_runner.blocks(page.read_text("utf-8"))]
OWN_TEST = {"package.md"}  # tests/test_plugin_guide.py
RUN = [
    page
    for page in PAGES
    if page.name not in OWN_TEST
    and any(language in ("python", "sh") for language, _ in page_runner.blocks(page.read_text("utf-8")))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_the_page_does_what_it_says(page, tmp_path):
    printed(page_runner.follow, str(page), folder=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_a_piece_to_read_is_python_too(page):
    for language, code in page_runner.blocks(page.read_text("utf-8")):
        if language == "py":
            compile(code, str(page), "exec")


def test_a_command_that_fails_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```sh\nmetaopt show nothing_of_this_name\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="exit 2"):
        printed(page_runner.follow, str(page), folder=tmp_path)


def test_a_program_that_fails_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n1. a list\n\n    ```python\n    assert x == 2\n    ```\n", encoding="utf-8"
    )
    with pytest.raises(AssertionError, match="assert x == 2"):
        printed(page_runner.follow, str(page), folder=tmp_path)


def test_what_is_left_out_is_only_what_a_test_cannot_do():
    commands = [
        line
        for page in PAGES
        for kind, code in page_runner.blocks(page.read_text("utf-8"))
        if kind == "sh"
        for line in page_runner.lines(code)
    ]
    assert commands
    known = re.compile(r"(metaopt|pytest|python \S+\.py)\b")
    assert [c for c in commands if not (known.match(c) or page_runner.is_left_out(c))] == []
