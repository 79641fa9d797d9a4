"""The documentation has a page for everything that is public or registered, and its links lead somewhere."""

import re

import pytest
from documents import ROOT
from site_pages import architecture, formula, links, pages, parts, plot, tables

import metaopt
import metaopt.testing
from metaopt.docstrings import meanings
from metaopt.registry import registry

API = sorted((ROOT / "docs" / "api").glob("*.md"))


def test_every_public_name_is_in_the_reference():
    written = re.findall(r"^::: (metaopt\.\S+)$", "\n".join(page.read_text(encoding="utf-8") for page in API), re.M)
    public = {f"metaopt.{name}" for name in metaopt._HOMES}
    public |= {f"metaopt.testing.{name}" for name in metaopt.testing.__all__ if name != "CHECKS"}
    # these need a trainer's package, so that metaopt itself does not offer them
    public |= {f"metaopt.callbacks.{trainer}.EvaluateAverage" for trainer in ("lightning", "transformers")}
    assert len(written) == len(set(written)), "a name is on two pages"
    assert public - set(written) == set(), "write `::: NAME` on the page of docs/api that it belongs to"
    assert set(written) - public == set(), "these are not public names"


def test_every_built_in_part_is_in_the_navigation():
    shown = {name for kind in parts.navigation() for members in kind.values() for entry in members for name in entry}
    assert shown == {entry.name for entry in registry.entries() if entry.origin == "metaopt"} | {"mlflow", "wandb"}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_logger_of_a_plugin_has_a_page_without_its_library(name):
    (entry,) = [entry for entry in parts.entries() if entry.name == name]
    page = parts.page(entry)
    assert f"pip install -e plugins/metaopt-{name}" in page and "`run='metaopt'`" in page and "goes on" in page


@pytest.mark.parametrize("entry", parts.entries(), ids=lambda entry: entry.name)
def test_every_part_says_what_it_does_and_what_it_takes(entry):
    assert parts.summary(entry).strip(".")
    if entry.kind in ("wrapper", "schedule", "problem"):
        taken = metaopt.specs.pipeline.part(entry.name).hyperparameters
        assert all(h.doc or meanings(entry.target).get(h.name) for h in taken.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lookahead", "muon", "cosine", "jsonl", "xor"])
def test_a_page_has_a_rule_a_use_and_a_picture(name):
    page = parts.page(registry.find(name))
    assert page.startswith(f"# {name}\n")
    if name != "jsonl":
        assert "## Use" in page and '<svg viewBox="0 0' in page
    if name in ("lookahead", "muon"):
        assert 'class="rule"' in page and "arxiv.org" in page
        assert "| bfloat16 parameters | yes |" in page and "times the bytes of the parameters" in page


def test_the_state_of_a_lookahead_is_one_copy():
    page = parts.page(registry.find("lookahead"))
    assert "| `lookahead.slow` | 1 |" in page


def test_the_command_line_page_has_every_command():
    page = pages.generated_without_parts()["api/command-line.md"]
    commands = {file.stem for file in (ROOT / "metaopt" / "cli").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"^## metaopt (\w+)$", page, re.M)) == commands
    assert "| `NAME` |" in page and "--resume" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m <- b1 m + g^2", "<p><i>m</i> ← <i>b</i><sub>1</sub> <i>m</i> + <i>g</i><sup>2</sup></p>"),
        ("slow <- slow - alpha g; w <- slow", "<p>slow ← slow − α <i>g</i></p>\n<p><i>w</i> ← slow</p>"),
        ("u <- u / max(1, weight_decay)", "<p><i>u</i> ← <i>u</i> / max(1, <code>weight_decay</code>)</p>"),
        (
            "w <- w - lr w, then Adam's: v <- 1e-6 v",
            "<p><i>w</i> ← <i>w</i> − lr <i>w</i>, then Adam's:</p>\n<p><i>v</i> ← 1e-6 <i>v</i></p>",
        ),
        ("sum <- 0 at every `step()`", "<p>sum ← 0 at every <code>step()</code></p>"),
        ("x_0 <- s^(t - 1)", "<p><i>x</i><sub>0</sub> ← <i>s</i><sup><i>t</i> − 1</sup></p>"),
    ],
)
def test_a_formula_is_set_as_mathematics(text, expected):
    assert formula.typeset(text, frozenset({"weight_decay"})) == expected


def test_citations_are_links():
    text = "v <- g. arXiv:1207.0580 (doi:10.1137/0330046), jmlr.org/papers/v12/duchi11a."
    assert [address for _, address in formula.papers(text)] == [
        "https://arxiv.org/abs/1207.0580",
        "https://doi.org/10.1137/0330046",
        "https://jmlr.org/papers/v12/duchi11a",
    ]
    assert formula.without_papers("v <- g (arXiv:1207.0580, arXiv:1207.0581), then w. doi:10.1/2") == "v <- g, then w"


def test_a_spec_in_a_table_has_no_backslashes():
    shown = tables.with_pipes(r"<p>\|</p><table><tr><td><code>adamw \| ema</code></td></tr></table>")
    assert shown == r"<p>\|</p><table><tr><td><code>adamw | ema</code></td></tr></table>"


def test_an_option_is_not_broken_at_its_hyphens():
    shown = tables.with_whole_words("<code>--lr-min</code> <code>k</code> <code>metaopt list -x</code>")
    assert shown == '<code class="word">--lr-min</code> <code>k</code> <code>metaopt list -x</code>'


def test_a_chart_draws_what_is_finite():
    drawn = plot.chart({"a": [(0, 1.0), (1, float("nan")), (2, 10.0)]}, x="t", y="v", log=True)
    assert drawn.count('<path class="line') == 1 and "nan" not in drawn
    with pytest.raises(ValueError, match="nothing of a can be drawn"):
        plot.chart({"a": [(0, -1.0)]}, x="t", y="v", log=True)


def test_dead_links_and_what_is_loaded_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.html").write_text('<h1 id="top"></h1><a href="../index.html#here">back</a>', encoding="utf-8")
    (tmp_path / "index.html").write_text(
        '<p id="here"></p><a href="a/b.html#top">1</a><a href="a/b.html#gone">2</a><a href="c.html">3</a>'
        '<script src="https://cdn.example/x.js"></script><a href="https://example.org">4</a>',
        encoding="utf-8",
    )
    assert list(links.problems(tmp_path)) == [
        "index.html loads https://cdn.example/x.js, which is not part of the site",
        "index.html links to a/b.html#gone, which has no such anchor",
        "index.html links to c.html, which does not exist",
    ]


def pages_of_the_repository():
    """Return the Markdown pages that a reader of the repository may open."""
    folders = ["plugins", "plugins/*", "kernels"]
    return sorted(
        [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(f for g in folders for f in ROOT.glob(f"{g}/README.md"))]
    )


def headings(page):
    """Return the anchors of a page, as the repository and the site name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {title.replace(" ", "-") for title in plain} & {re.sub(r"[\s-]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", pages_of_the_repository(), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere_in_the_repository_and_on_the_site(page):
    docs = ROOT / "docs"
    on_site = {str(path.relative_to(docs)) for path in docs.rglob("*") if path.is_file()}
    replaced = {"parts/index.md", *pages.generated_without_parts()}
    if str(page.relative_to(ROOT)).removeprefix("docs/") in replaced:
        on_site = set()  # the site has another page in its place
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", text)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: not in the repository"
        if on_site and docs in page.parents:
            assert docs in target.parents, f"{link}: not on the site"
        if anchor:
            assert anchor in headings(target), f"{link}: no such heading"


def test_the_changelog_s_links_lead_to_pages_of_the_site():
    page = pages.generated_without_parts()["changelog.md"]
    found = re.findall(r"\[([^]]+\.md)\]\(([^)]+)\)", page)
    assert found and all(text == link and (ROOT / "docs" / link).exists() for text, link in found)


def test_the_architecture_is_drawn_without_a_script():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = architecture.with_drawings(page)
    assert "```mermaid" not in drawn and drawn.count("<rect") == len(architecture.read(page).labels) > 15
    graph = architecture.read("flowchart TD\n  a[one]\n  b[two]\n  c[three]\n  a --> b\n  b --> c\n  a --> c\n")
    assert architecture.layers(graph) == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(ValueError, match="in a circle"):
        architecture.layers(architecture.read("  a[one]\n  b[two]\n  a --> b\n  b --> a\n"))
