"""SIGTERM as a wish: what Slurm, Kubernetes and spot machines send some time before they kill."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from metaopt.errors import MetaoptError


class Stopped(MetaoptError):
    """A run has ended early, with a checkpoint of its last step, because it was asked to."""


@contextmanager
def wishes_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM has come; only the main thread can hear it."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)
