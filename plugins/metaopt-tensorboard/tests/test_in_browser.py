"""The pages of TensorBoard as a person sees them, in the Chromium that is installed.

Pictures of what was looked at are kept in `build/screenshots` of the checkout.
"""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tensorboard_server import tensorboard, wait_until
from torch.utils.tensorboard import SummaryWriter

import metaopt
from metaopt.lab import compare

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it drives the browser")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: these tests look at pages in it"),
    pytest.mark.slow,
]

playwright.expect.set_options(timeout=40_000)
PICTURES = Path(__file__).parents[3] / "build" / "screenshots"
# what TensorBoard loads into the tab
ENTRY = "data/plugin_entry.html?name=metaopt_stack"
UPDATES = 60
ADAMW = "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(0.01), 0.1)) | lookahead(k={k})"
RUNS = {
    "adamw": ADAMW.format(k=6),
    "adamw slow": ADAMW.format(k=10),
    "partition": "partition({'*.weight': sgd(lr=0.1, momentum=0.9), '*': adamw(lr=0.01) | ema(0.9)})",
}
# what a log may try: each would set the title of a page that took it for markup
MARKUP = "<img src=x onerror=\"top.document.title='taken'\">"
SCRIPT = "<script>top.document.title='taken'</script>"
HOSTILE = {
    "spec": SCRIPT,
    "parts": [
        {
            "name": MARKUP,
            "label": SCRIPT,
            "kind": f'x" onclick="{MARKUP}',
            "hyperparameters": {MARKUP: SCRIPT},
            "scheduled": {"lr": MARKUP},
            "branches": {SCRIPT: [{"name": MARKUP, "measures": [MARKUP]}]},
        }
    ],
}
COMPARED = ["sgd", "sgd | lookahead"]
VERDICTS = {
    "baseline": "sgd(lr=0.1)",
    "metric": "test/loss",
    "rows": [
        {"contender": "sgd(lr=0.1)", "difference": 0, "low": None, "high": None, "p": None, "verdict": "baseline"},
        {"contender": "adamw", "difference": -0.2, "low": -0.3, "high": -0.1, "p": 0.002, "verdict": "better"},
        {"contender": "adam", "difference": 0.1, "low": 0.05, "high": 0.15, "p": 0.004, "verdict": "worse"},
        {"contender": MARKUP, "difference": 0.0, "low": -0.1, "high": "Infinity", "p": 0.9, "verdict": SCRIPT},
    ],
}


def train(directory, spec):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    with closing(metaopt.build(model, spec, total_steps=UPDATES, log=directory, log_every=3)) as stack:
        for _ in range(UPDATES):
            stack.zero_grad()
            inputs = torch.randn(32, 8)
            loss = (model(inputs) - inputs.sum(1, keepdim=True).sin()).square().mean()
            loss.backward()
            stack.record(loss=loss)
            stack.step()


def write(directory, curves=(), **texts):
    """Write a log as any program can."""
    with SummaryWriter(str(directory)) as writer:
        for name, content in texts.items():
            writer.add_text(f"metaopt/{name}", json.dumps(content))
        for tag, points in dict(curves).items():
            for step, value in enumerate(points):
                writer.add_scalar(tag, value, step)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("looked at") / "runs"
    for name, spec in RUNS.items():
        train(logdir / name, spec)
    write(logdir / MARKUP, {MARKUP: [1.0, float("nan"), float("inf"), 2.0]}, stack=HOSTILE)
    write(logdir / "comparison", verdicts=VERDICTS)
    compare(COMPARED, problem="noisy_quadratic", studies=3, trials=2, steps=20, jobs=1, out=logdir / "real")
    with tensorboard(logdir, "--reload_interval=1") as running:
        running.logdir = logdir
        # every run is there, and read far enough
        count = len(RUNS) + 2 + len(COMPARED) + 1
        wait_until(lambda: len(running.get("runs")) >= count and "lookahead.k" in running.differing())
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # in a container the sandbox cannot start; the only pages are those of the test's own server
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Page:
    """A page of TensorBoard in a window of its own."""

    def __init__(self, browser, server, page):
        self._server = server
        self.window = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.window.set_default_timeout(40_000)
        self.errors, self.asked = [], []
        self.window.on("pageerror", lambda error: self.errors.append(error))
        self.window.on("request", lambda request: self.asked.append(request.url))
        self.window.goto(f"{server.address}/{page}")
        self.stack = self.window.frame_locator("iframe[src*=metaopt_stack]") if "#" in page else self.window

    def choose(self, *runs):
        """Show these runs, given in the order in which they are listed, and wait until they are."""
        first, *others = runs
        self.stack.get_by_role("button", name=first, exact=True).click()
        for run in others:
            self.stack.get_by_label(f"Show {run}", exact=True).check()
        playwright.expect(self.stack.locator("main[aria-busy=false]")).to_be_attached()
        playwright.expect(self.stack.locator("main h2")).to_have_text(list(runs))

    def keep(self, name):
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.window.screenshot(path=PICTURES / f"{name}.png")

    def close(self):
        self.window.close()
        assert self.errors == []
        # offline: nothing is loaded from elsewhere
        assert [url for url in self.asked if not url.startswith((self._server.address, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def tab(browser, server):
    """TensorBoard with the tab open. It takes seconds to come up: all tests look at the same one."""
    with closing(Page(browser, server, "#metaopt_stack")) as opened:
        yield opened


def test_one_run_is_shown_from_gradients_to_parameters(tab):
    tab.choose("adamw")
    flow = tab.stack.locator(".flow")
    assert (
        flow.locator("> *").first.inner_text() == "gradients" and flow.locator("> *").last.inner_text() == "parameters"
    )
    parts = flow.locator("article.part")
    assert parts.evaluate_all("all => all.map(part => part.querySelector('h3').firstChild.textContent)") == [
        "clip_grad_norm",
        "adamw",
        "lookahead",
    ]
    assert parts.nth(2).locator("tr[data-name=k] td").inner_text() == "6"
    rate = parts.nth(1).locator("tr[data-name=lr]")
    assert "cosine" in rate.inner_text() and "now" in rate.inner_text()
    # a curve has a point for each point of the log
    assert rate.locator("svg path").get_attribute("d").count("L") == UPDATES / 3 - 1
    assert parts.nth(2).locator("[data-tag='lookahead/distance'] svg").is_visible()
    tab.keep("one run")


def test_a_click_enlarges_a_curve_and_another_makes_it_small(tab):
    tab.choose("adamw")
    curve = tab.stack.locator("[data-tag='train/loss']")
    small = curve.locator("svg").bounding_box()["height"]
    curve.click()
    assert curve.locator("svg").bounding_box()["height"] > 4 * small
    assert f"update {UPDATES}" in curve.locator("svg").text_content()
    curve.click()
    assert curve.locator("svg").bounding_box()["height"] == small


def test_settings_that_were_left_at_their_defaults_are_behind_a_click(tab):
    tab.choose("adamw")
    lookahead = tab.stack.locator("article.part").nth(2)
    assert lookahead.locator("tr:visible").evaluate_all("all => all.map(row => row.dataset.name)") == ["k"]
    lookahead.get_by_text("all settings").click()
    playwright.expect(lookahead.locator("tr[data-name=alpha]")).to_be_visible()
    tab.keep("all settings")
    # it stays open while others are looked at
    tab.choose("partition")
    tab.choose("adamw")
    playwright.expect(lookahead.locator("tr[data-name=alpha]")).to_be_visible()
    lookahead.get_by_text("all settings").click()
    playwright.expect(lookahead.locator("tr[data-name=alpha]")).to_be_hidden()


def test_two_stacks_are_beside_each_other_and_what_differs_is_marked(tab):
    tab.choose("adamw", "adamw slow")
    grid = tab.stack.locator(".grid")
    marked = grid.locator("tr.differs")
    assert [row.strip().split() for row in marked.all_inner_texts()] == [["k", "6"], ["k", "10"]]
    assert grid.locator("article").count() == 6
    tab.keep("two runs")
    tab.stack.get_by_label("only parts that differ").check()
    assert grid.locator("article h3").evaluate_all("all => all.map(h => h.firstChild.textContent)") == ["lookahead"] * 2


def test_parts_that_one_stack_lacks_are_rows_of_their_own(tab):
    tab.choose("adamw", "partition")
    grid = tab.stack.locator(".grid")
    assert grid.locator(".absent").all_inner_texts()[:1] == ["no clip_grad_norm"]
    assert grid.locator("h4").all_inner_texts() == ["*.weight", "*", "*"]
    tab.keep("two bases")


def test_a_partition_is_shown_with_its_branches(tab):
    tab.choose("partition")
    branches = tab.stack.locator(".branch")
    assert branches.locator("h4").all_inner_texts() == ["*.weight", "*"]
    assert branches.nth(1).locator("article").count() == 2
    tab.keep("partition")


def test_the_verdicts_of_a_comparison_are_drawn(tab):
    tab.choose("comparison")
    rows = tab.stack.locator("tr.verdict")
    playwright.expect(rows).to_have_count(4)
    assert rows.locator("td.word").all_inner_texts() == ["baseline", "better", "worse", SCRIPT]
    zero, *bars = (rows.nth(1).locator("line").nth(i).bounding_box() for i in range(4))
    low, high = min(bar["x"] for bar in bars), max(bar["x"] + bar["width"] for bar in bars)
    assert low < high < zero["x"]  # better: the whole interval is left of zero
    assert rows.nth(2).locator("circle").bounding_box()["x"] > zero["x"]
    assert rows.nth(3).locator("line.bar").count() == 2  # an end that is infinite is open
    tab.keep("verdicts")


def test_markup_in_a_log_stays_text(tab):
    tab.choose(MARKUP)
    text = tab.stack.locator("main").inner_text()
    assert text.count(MARKUP) >= 4 and text.count(SCRIPT) >= 3
    assert tab.stack.locator("main img, main script, nav img, nav script, [onclick], [onerror]").count() == 0
    assert tab.stack.locator("svg circle.broken").count() == 2  # nan and infinity
    tab.keep("markup")
    tab.choose(MARKUP, "adamw")
    assert tab.window.title() == "TensorBoard"


def test_the_tab_follows_light_and_dark_mode(tab):
    tab.choose("adamw", "adamw slow")
    body = tab.stack.locator("body")
    playwright.expect(body).to_have_css("background-color", "rgb(255, 255, 255)")
    for mode, color in (("Dark", "rgb(48, 48, 48)"), ("Light", "rgb(255, 255, 255)")):
        tab.window.locator("app-header-dark-mode-toggle button").click()
        tab.window.get_by_role("menuitem", name=mode).click()
        playwright.expect(body).to_have_css("background-color", color)
        tab.keep(f"two runs, {mode.lower()}")


def test_the_hparams_tab_has_the_columns_that_differ(tab):
    tab.window.get_by_role("tab", name="HParams").click()
    for name, is_a_column in (("lookahead.k", True), ("lr", True), ("amsgrad", False)):
        box = tab.window.get_by_role("checkbox", name=name, exact=True)
        playwright.expect(box).to_be_checked(checked=is_a_column)
    tab.keep("hparams")
    tab.window.get_by_role("tab", name="Stack").click()


def test_the_custom_scalars_tab_opens_as_a_dashboard(tab):
    tab.window.get_by_role("tab", name="Custom Scalars").click()
    page = tab.window.locator("tf-custom-scalar-dashboard")
    for section in ("training", "rates", "clipping", "slow weights"):
        playwright.expect(page.get_by_role("button", name=section).first).to_be_visible()
    # curves are drawn, not only their frames: the losses of all runs
    playwright.expect(page.get_by_text(f"Matches ({len(RUNS)})").first).to_be_visible()
    tab.keep("custom scalars")
    tab.window.get_by_role("tab", name="Stack").click()


def test_a_comparison_opens_as_bands_around_medians(tab, server):
    assert [run for run in server.get("runs") if "real" in run] == [
        f"real/tensorboard/{name}" for name in ("1-sgd", "2-sgd-lookahead", "comparison")
    ]
    tab.window.get_by_role("tab", name="Custom Scalars").click()
    page = tab.window.locator("tf-custom-scalar-dashboard")
    playwright.expect(page.get_by_role("button", name="validation: median and quartiles of 3 studies")).to_be_visible()
    band = page.locator("tf-custom-scalar-margin-chart-card", has_text="validation/loss").first
    playwright.expect(band.get_by_text(f"Matches ({len(COMPARED)})")).to_be_visible()
    band.scroll_into_view_if_needed()
    # an area is drawn for each contender, with a line
    areas = band.locator("path.area")
    playwright.expect(areas).to_have_count(len(COMPARED))
    assert all(d.count("L") > 20 for d in areas.evaluate_all("all => all.map(path => path.getAttribute('d'))"))
    tab.keep("a comparison, its bands")
    tab.window.get_by_role("tab", name="Stack").click()


def test_the_pictures_of_a_comparison_are_images(tab):
    tab.window.get_by_role("tab", name="Images").click()
    page = tab.window.locator("tf-image-dashboard")
    for name in ("curves", "differences", "sensitivity"):
        picture = page.locator("tf-image-loader", has_text=f"metaopt/{name}").locator("img")
        playwright.expect(picture).to_be_visible()
        playwright.expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("image => image.naturalWidth") > 500
    tab.keep("a comparison, its pictures")
    tab.window.get_by_role("tab", name="Stack").click()


def test_a_reload_shows_a_run_that_has_come(tab, server):
    tab.choose("adamw")
    before = len(server.get("runs"))
    train(Path(server.logdir) / "zz later", RUNS["adamw slow"])
    wait_until(lambda: len(server.get("runs")) > before)
    tab.window.locator("app-header button.reload-button").click()
    tab.choose("adamw", "zz later")


def test_what_a_person_sees_first(server, browser):
    with closing(Page(browser, server, ENTRY)) as page:
        playwright.expect(page.stack.locator("main h2")).to_have_text(["comparison"])


def test_a_hundred_runs_stay_usable(browser, tmp_path):
    logdir = tmp_path / "runs"
    for number in range(100):
        stack = {"spec": f"sgd(lr={number})", "parts": [{"name": "sgd", "hyperparameters": {"lr": number}}]}
        write(logdir / f"run {number}", {f"layers/{i}": [1.0, 2.0] for i in range(20)}, stack=stack)
    with tensorboard(logdir) as large, closing(Page(browser, large, ENTRY)) as tab:
        wait_until(lambda: len(large.get("runs")) == 100)
        tab.window.reload()
        playwright.expect(tab.stack.locator("nav li")).to_have_count(100)
        # one run is shown, and only that was asked for
        playwright.expect(tab.stack.locator("main h2")).to_have_text(["run 0"])
        assert {url for url in tab.asked if "/stack?" in url} == {
            f"{large.address}/data/plugin/metaopt_stack/stack?run=run+0"
        }
        assert tab.stack.locator("nav li .run").nth(2).inner_text() == "run 2"  # numbers count as numbers
        tab.stack.get_by_label("Filter runs").fill("lr=42)")
        assert tab.stack.locator("nav li .run").all_inner_texts() == ["run 42"]
        tab.stack.get_by_label("Filter runs").fill("")
        for number in range(1, 9):
            tab.stack.get_by_label(f"Show run {number}", exact=True).check()
        playwright.expect(tab.stack.locator("main .message").first).to_have_text("6 of 9 chosen runs are shown.")
        tab.stack.get_by_text("12 more").first.click()
        playwright.expect(tab.stack.locator(".curve")).to_have_count(20 + 5 * 8)
        tab.keep("a hundred runs")
