"""Passes over a user's data: each draws from its own seed, so that a batch depends only on its seed and number."""

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from metaopt.errors import ProblemError

# batches of validation or test data: more than that is taken for data without an end
MOST = 100_000


class OwnRandomNumbers:
    """Global random numbers of torch, numpy and Python inside the context; outside they go on as if nothing was drawn.

    Entered once more, the numbers continue.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own: list[Any] | None = None
        self._others: list[list[Any]] = []

    def __enter__(self) -> None:
        self._others.append(_states())
        if self._own is None:
            torch.default_generator.manual_seed(self._seed)
            random.seed(self._seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(self._seed % 2**32)
        else:
            _set_states(self._own)

    def __exit__(self, *raised: object) -> None:
        self._own = _states()
        _set_states(self._others.pop())


def _states() -> list[Any]:
    numpy = sys.modules.get("numpy")
    return [torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None]


def _set_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])


class Source:
    """Batches that can be passed over again and again: a loader, a list, or a function that returns one.

    A function that returns an iterator, such as a generator function, is called for each pass.
    """

    def __init__(self, given: Any, what: str) -> None:
        self._what = what
        self._make: Callable[[], Any] | None = None
        self._made: Any = None
        if callable(given) and not hasattr(given, "__iter__"):
            self._make = given
        elif not hasattr(given, "__iter__") or isinstance(given, Iterator):
            raise ProblemError(
                f"{what} must be something that can be begun again: a DataLoader, a list of batches, or a function "
                f"that returns one, got {type(given).__name__}"
            )
        else:
            self._made = given

    def once(self) -> Iterator[Any]:
        """Yield all batches in their order, the same ones each time. Raises ProblemError for data without an end."""
        for number, batch in enumerate(self._pass(0)):
            if number == MOST:
                raise ProblemError(f"{self._what} has more than {MOST} batches: give data that end")
            yield batch

    def endless(self, seed: int, start: int = 0) -> Iterator[Any]:
        """Yield batches without end, from number `start` on, pass after pass."""
        length = self._length()
        number, skipped = (0, start) if not length else divmod(start, length)
        while True:
            empty = True
            for batch in self._pass(1_000_003 * (seed + 1) + number):
                empty = False
                if skipped:
                    skipped -= 1
                else:
                    yield batch
            if empty:
                raise ProblemError(f"{self._what} must hold a batch or more, got none")
            number += 1

    def _length(self) -> int | None:
        """Return the number of batches in a pass where it is the same for each, or None."""
        data = self._data(OwnRandomNumbers(0))
        regular = isinstance(data, DataLoader) and type(data.batch_sampler) is BatchSampler
        return len(data) if regular or isinstance(data, list | tuple) else None

    def _pass(self, seed: int) -> Iterator[Any]:
        own = OwnRandomNumbers(seed)
        data = self._data(own)
        if isinstance(data, DataLoader):
            _seed_loader(data, seed)
        with own:
            batches = iter(data)
        while True:
            with own:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def _data(self, own: OwnRandomNumbers) -> Any:
        """Return what is passed over: an iterator anew, whose numbers are `own`, or what can be begun again."""
        if self._made is not None or self._make is None:
            return self._made
        # not by a pass's own seed: what a function splits or draws is split the same way for all of them
        with OwnRandomNumbers(0):
            made = self._make()
        if not hasattr(made, "__iter__"):
            raise ProblemError(f"{self._what}() must return batches, got {type(made).__name__}")
        if not isinstance(made, Iterator):
            self._made = made
            return made
        with own:
            return self._make()


def _seed_loader(loader: Any, seed: int) -> None:
    """Let generators that a loader brought with it draw by the seed of this pass."""
    for owner in (loader, loader.sampler, getattr(loader.sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(seed)
