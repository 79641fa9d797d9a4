"""Draw the pictures of the TensorBoard guide: real runs, looked at in TensorBoard with the Chromium that is installed.

`python docs/draw_tensorboard.py [runs|comparison]` needs `chromium` and `plugins/metaopt-tensorboard[test]`.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

import metaopt

DOCS = Path(__file__).parent
UPDATES = 300
RATE = "warmup(cosine(5e-3), 0.1)"
STACKS = {
    "adamw": f"clip_grad_norm(1.0) | adamw(lr={RATE}) | monitor",
    "adamw + lookahead": f"clip_grad_norm(1.0) | adamw(lr={RATE}) | lookahead(k=5) | monitor",
}
SCALARS = "train/loss|train/grad_norm|train/learning_rate|lookahead/distance"
COMPARED = ["sgd(momentum=0.9)", "sgd(momentum=0.9) | lookahead", "adamw"]


def train(folder: Path, name: str, spec: str) -> None:
    """Train a small network on handwritten digits and log it."""
    problem = metaopt.digits()
    model = problem.model(seed=0)
    opt = metaopt.build(model, spec, total_steps=UPDATES, log=str(folder / name), log_every=5)
    for _, batch in zip(range(UPDATES), problem.batches(seed=0), strict=False):
        opt.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        opt.record(loss=loss.detach())
        opt.step()
    opt.close()


def compare(folder: Path) -> None:
    """Make a small comparison on the same digits."""
    stacks = [word for spec in COMPARED for word in ("-o", spec)]
    size = ["--problem", "digits", "--steps", "60", "--studies", "8", "--trials", "2", "--jobs", "1"]
    subprocess.run([sys.executable, "-m", "metaopt", "compare", *size, *stacks, "--out", str(folder)], check=True)


@contextlib.contextmanager
def tensorboard(folder: Path, runs: int) -> Iterator[str]:
    """Yield the address of a server that has read so many runs. Raises TimeoutError."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    log = folder.with_suffix(".server")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
            with contextlib.suppress(OSError):
                if found and len(_json(f"{found[0]}/data/runs")) >= runs:
                    yield found[0]
                    return
            time.sleep(0.5)
        raise TimeoutError(f"TensorBoard has not read {folder} after 60 seconds")
    finally:
        server.terminate()
        server.wait()


def _json(address: str) -> Any:
    with urllib.request.urlopen(address) as answer:
        return json.loads(answer.read())


def draw(page: Page, name: str) -> None:
    """Save the window as a picture of the guide."""
    path = DOCS / f"{name}.png"
    page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size} bytes")


def show(page: Page, address: str, runs: list[str]) -> None:
    """Open the tab "Stack" with these runs."""
    page.goto(f"{address}/#metaopt_stack")
    tab = page.frame_locator("iframe[src*=metaopt_stack]")
    tab.get_by_role("button", name=runs[0], exact=True).click()
    for run in runs[1:]:
        tab.get_by_label(f"Show {run}", exact=True).check()
    tab.locator("main[aria-busy=false] h2").nth(len(runs) - 1).wait_for()


def draw_runs(page: Page, folder: Path) -> None:
    """Take the pictures of single runs."""
    for title, spec in STACKS.items():
        train(folder, title, spec)
    with tensorboard(folder, len(STACKS)) as address:
        page.set_viewport_size({"width": 1280, "height": 760})
        page.goto(f"{address}/#scalars&_smoothingWeight=0&tagFilter={SCALARS}")
        page.wait_for_timeout(8000)  # charts are drawn one after the other, by a worker
        draw(page, "tensorboard")
        page.set_viewport_size({"width": 1280, "height": 820})
        show(page, address, ["adamw + lookahead"])
        draw(page, "tensorboard-stack")
        show(page, address, list(STACKS))
        draw(page, "tensorboard-stacks")


def draw_comparison(page: Page, folder: Path) -> None:
    """Take the pictures of a comparison: medians in their bands, and the verdicts."""
    compare(folder)
    with tensorboard(folder / "tensorboard", len(COMPARED) + 1) as address:
        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(f"{address}/#custom_scalars")
        chart = page.locator("tf-custom-scalar-margin-chart-card", has_text="validation/loss").first
        chart.locator("path.area").nth(len(COMPARED) - 1).wait_for()
        page.wait_for_timeout(2000)  # axes follow the data
        draw(page, "tensorboard-bands")
        page.set_viewport_size({"width": 1280, "height": 400})
        show(page, address, ["comparison"])
        draw(page, "tensorboard-comparison")


def main() -> None:
    """Make the runs, look at them and take the pictures: of `runs`, of a `comparison`, or both."""
    browser = shutil.which("chromium") or sys.exit("this needs the program chromium")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as started:
        page = started.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        for what, drawn in (("runs", draw_runs), ("comparison", draw_comparison)):
            if what in (sys.argv[1:] or [what]):
                drawn(page, Path(name) / what)


if __name__ == "__main__":
    main()
