"""The real TensorBoard server, for tests and for the pictures of the docs."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest

# the server reads event files in two ways, and users get either; by the second one all tests take twice the time
LOADERS = [pytest.param("--load_fast=false", marks=pytest.mark.slow), "--load_fast=auto"]


class Server:
    """A TensorBoard server on loopback."""

    def __init__(self, address):
        self.address = address

    def get(self, path, **query):
        url = f"{self.address}/data/{path}" + ("?" + urllib.parse.urlencode(query) if query else "")
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)

    def post(self, path, body):
        request = urllib.request.Request(
            f"{self.address}/data/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def differing(self):
        """Return the hyperparameters in which the runs that were read so far differ."""
        found = self.post("plugin/hparams/experiment", {"experimentName": ""}).get("hparamInfos", ())
        return [info["name"] for info in found if info.get("differs")]

    def points(self, run, tag):
        return [(step, value) for _, step, value in self.get("plugin/scalars/scalars", run=run, tag=tag)]


def wait_until(question):
    deadline = time.monotonic() + 60
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def tensorboard(logdir, *options):
    """Start `tensorboard --logdir` on a free port and wait until it has read the runs."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    log = logdir.parent / f"{logdir.name}.server"
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment)
    try:
        server = Server(_until(lambda: _address(log), process, log))
        _until(lambda: server.get("runs"), process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            # a server that is told to end while it still begins may miss it
            process.kill()
            process.wait()


def _address(log):
    found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
    return found and found.group()


def _until(question, process, log):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if answer := question():
                return answer
        except urllib.error.URLError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard did not come up:\n{log.read_text()}")
