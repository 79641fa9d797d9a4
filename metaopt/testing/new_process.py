"""Continuing runs in new processes: one server imports torch once and forks a clean process for every request."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from metaopt.errors import MetaoptError
from metaopt.hooks import Example
from metaopt.registry import registry
from metaopt.testing.feeding import STEPS
from metaopt.testing.outcome import CheckFailed
from metaopt.testing.subject import StackSubject, Weights


class Server:
    """A process that has imported torch and the installed plugins, but has made no optimizer."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "metaopt.testing.new_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=env,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            told = self.errors.read().decode(errors="replace").strip().splitlines()
            raise MetaoptError(f"the new process ended: {told[-1] if told else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # a busy machine: nobody needs its answer any more
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


_server: Server | None = None


def continue_from_every_step(subject: StackSubject) -> dict[int, list[Weights]]:
    """Load, in a new process, the checkpoint of every step but the last, and train on; return the weights by step."""
    global _server
    if _server is None or _server.process.poll() is not None:
        _server = Server()
        atexit.register(_server.close)
    with tempfile.TemporaryDirectory() as folder:
        saved, answered = Path(folder, "saved.pt"), Path(folder, "answered.pt")
        torch.save(dict(enumerate(subject.run.checkpoints[:-1])), saved)
        example = subject.example
        answer = _server.ask(
            {
                "name": subject.entry.name,
                "kind": subject.entry.kind,
                "origin": subject.entry.origin,
                "module": subject.entry.target.__module__,
                "class": subject.entry.target.__qualname__,
                "text": subject.text,
                "example": [example.parameters, example.gradients, example.closure],
                "device": str(subject.device),
                "saved": str(saved),
                "answered": str(answered),
            }
        )
        if "error" in answer:
            raise CheckFailed(
                f"{subject}, loaded in a new process, failed with {answer['error']}",
                "A run that stops is continued by a process that has only the checkpoint and the plugin",
                "Offer the part from a module that a new process can import (plugin=..., --plugin), and keep only "
                "tensors, numbers, text and containers of these in the state",
            )
        found: dict[int, list[Weights]] = torch.load(answered, weights_only=True)
        return found


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        _make_known(request)
        parameters, gradients, closure = request["example"]
        example = Example(parameters=parameters, gradients=gradients, closure=closure)
        entry = registry.find(request["name"], request["kind"])
        subject = StackSubject(entry, example, request["text"], torch.device(request["device"]))
        saved = torch.load(request["saved"], weights_only=True)
        found = {step: subject.train(*subject.resumed(at), step, STEPS) for step, at in saved.items()}
        torch.save(found, request["answered"])
    except Exception as error:  # whatever a part raises is what the other side asked for
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return {}


def _make_known(request: dict[str, Any]) -> None:
    if request["name"] in registry.names(request["kind"]):
        return
    if request["origin"] != "this program":
        registry.load_plugin_module(request["origin"])
        return
    made = import_module(request["module"])
    for name in request["class"].split("."):
        made = getattr(made, name)
    registry.register(**{f"{request['kind']}s": {request["name"]: made}})


def serve() -> None:
    """Answer requests from standard input, each in a process of its own where the system can fork."""
    # what a plugin prints must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    registry.names()
    _import_the_rest_of_torch()
    for line in sys.stdin:
        if not hasattr(os, "fork"):
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()
            continue
        child = os.fork()
        if child == 0:
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            answers.write(json.dumps({"error": f"the process ended with status {status}"}) + "\n")
            answers.flush()


def _import_the_rest_of_torch() -> None:
    """Step once, before any fork: torch imports half of itself at its first step, and every child would do so anew."""
    x = torch.nn.Parameter(torch.ones(2))
    x.grad = torch.ones(2)
    torch.optim.SGD([x], lr=0.1).step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
