"""The bytes that an update must move at least, seen by watching a stack make its updates."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

BASE = ""
# these give an argument's shape to a new tensor and do not read it
_SHAPES_ALONE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_")
# these write their first argument without reading it
_OVERWRITES = ("copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_")

Span = tuple[int, int]


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which bytes of parameters, gradients and state are read and written, by the part that did it.

    Inside one part a byte is read once and written once, however often it is touched: that is what a part that keeps
    all in registers would move. Between parts it is counted again, because a part such as clipping by a norm ends
    before the next begins. Temporaries do not count, nor does the base's writing of gradients: no update needs that.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.part = BASE
        self._spans: dict[tuple[str, int, bool], list[Span]] = defaultdict(list)
        self._gradients: set[int] = set()
        self._held: set[int] = set()
        self._keeper: dict[int, str] = {}

    def watch(self, step: Callable[[], Any], before: Callable[[], Any], updates: int) -> dict[str, float]:
        """Make updates; return the mean bytes of one by part, the base's under the empty label."""
        total: dict[str, float] = defaultdict(float)
        with _marked(self.stack, self):
            for _ in range(updates):
                before()
                self._look()
                with self:
                    step()
                for (part, _, _), spans in self._spans.items():
                    total[part] += _length(spans) / updates
                self._spans.clear()
        return dict(total)

    def _look(self) -> None:
        parameters = [p for entry in self.stack.param_groups for p in entry["params"]]
        self._gradients = {_storage(p.grad) for p in parameters if p.grad is not None}
        state = (v for held in self.stack.state.values() for v in held.values() if isinstance(v, torch.Tensor))
        self._held = {_storage(t) for t in (*parameters, *state)} | self._gradients
        labels = {wrapper.label for wrapper in _wrappers(self.stack)}
        self._keeper = {
            _storage(value): label
            for held in self.stack.state.values()
            for key, value in held.items()
            if isinstance(value, torch.Tensor) and (label := key.partition(".")[0]) in labels
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        name = schema.name.partition("::")[2]
        if view or name.startswith(_SHAPES_ALONE):
            return out
        # what the engine copies into a wrapper's state, it copies for that wrapper
        part = self._keeper.get(_storage(args[0]), BASE) if self.part == BASE and name == "copy_" else self.part
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else (kwargs or {}).get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not (writes and (name in _OVERWRITES or argument.is_out))
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    self._note(tensor, part, reads, writes)
        return out

    def _note(self, tensor: torch.Tensor, part: str, reads: bool, writes: bool) -> None:
        storage = _storage(tensor)
        if storage not in self._held:
            return
        begin = int(tensor.storage_offset()) * tensor.element_size()
        span = (begin, begin + int(tensor.numel()) * tensor.element_size())
        if reads:
            self._spans[part, storage, False].append(span)
        if writes and not (part == BASE and storage in self._gradients):
            self._spans[part, storage, True].append(span)


@contextmanager
def _marked(stack: Stack, traffic: Traffic) -> Iterator[None]:
    """Let `traffic` know whose turn it is: every wrapper's methods say so for the time of the context."""
    marked: list[tuple[Wrapper, str]] = []
    for wrapper in _wrappers(stack):
        for method in wrapper.implemented_hooks() & {"on_gradients", "before_update", "after_update"}:
            wrapper.__dict__[method] = _saying(traffic, wrapper.label, getattr(wrapper, method))
            marked.append((wrapper, method))
    try:
        yield
    finally:
        for wrapper, method in marked:
            del wrapper.__dict__[method]


def _wrappers(stack: Stack) -> list[Wrapper]:
    return [*stack.wrappers, *(wrapper for chain in stack.chains for wrapper in chain.wrappers)]


def _saying(traffic: Traffic, label: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        traffic.part, outer = label, traffic.part
        try:
            return method(*args, **kwargs)
        finally:
            traffic.part = outer

    return call


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _length(spans: list[Span]) -> int:
    """Return how many bytes the spans cover together."""
    total = end = 0
    for begin, stop in sorted(spans):
        total += max(0, stop - max(begin, end))
        end = max(end, stop)
    return total
