"""Draw docs/tensorboard.png: a real run, looked at in TensorBoard with a headless Chromium.

`python docs/draw_tensorboard.py` needs the programs `chromium` and `tensorboard` on the path.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import metaopt

PAGE = Path(__file__).parent / "tensorboard.png"
ADAMW = "adamw(lr=warmup(cosine(5e-3), 0.1))"
STACKS = {"adamw": ADAMW, "adamw + lookahead": f"{ADAMW} | lookahead(k=5)"}
TAGS = ("train/loss", "train/grad_norm", "train/learning_rate", "lookahead/distance")
UPDATES = 300
PORT = 6047


def train(folder: Path, name: str, spec: str) -> None:
    """Train a small network on handwritten digits and log it."""
    problem = metaopt.digits()
    model = problem.model(seed=0)
    opt = metaopt.build(model.parameters(), spec, total_steps=UPDATES, log=str(folder / name), log_every=5)
    for _, batch in zip(range(UPDATES), problem.batches(seed=0), strict=False):
        opt.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        opt.record(loss=loss.detach())
        opt.step()
    opt.close()


def wait_until_it_answers(address: str, seconds: float = 60.0) -> None:
    """Return when TensorBoard has read the runs. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/data/runs") as answer:
                if len(json.loads(answer.read())) == len(STACKS):
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"no runs at {address} after {seconds} seconds")


def main() -> None:
    """Make the run, show it and take the picture."""
    browser = shutil.which("chromium") or sys.exit("this needs the program chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, spec in STACKS.items():
            train(folder, title, spec)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(PORT)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            address = f"http://localhost:{PORT}"
            wait_until_it_answers(address)
            options = [
                "--headless=new",
                "--enable-unsafe-swiftshader",
                "--no-sandbox",
                "--hide-scrollbars",
                f"--user-data-dir={folder / 'browser'}",
            ]
            options += ["--window-size=1110,760", "--virtual-time-budget=60000", f"--screenshot={PAGE.resolve()}"]
            shown = f"{address}/#scalars&_smoothingWeight=0&tagFilter={quote('|'.join(TAGS))}"
            subprocess.run([browser, *options, shown], check=True, timeout=120)
        finally:
            server.terminate()
            server.wait()
    print(f"{PAGE}: {PAGE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
