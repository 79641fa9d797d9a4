"""Convolutions for bases that take matrices."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from metaopt import Example, SpecError, Wrapper, hookimpl

Optimizer = torch.optim.Optimizer


class Flatten(Wrapper):
    """W of shape (n, a, b, ...) is the matrix (n, a b ...) to the base, as Muon's author treats convolutions.

    A row is what one output unit has. Tensors of two dimensions or fewer stay as they are. State that is shaped like
    the matrix has the parameter's shape outside of the base's step. kellerjordan.github.io/posts/muon
    """

    known_as = ("flatten_conv", "use_conv_muon")

    @classmethod
    def runs_before_base(cls) -> bool:
        return True

    def adapt_base(self, base: type[Optimizer]) -> type[Optimizer]:
        adapted: type[Optimizer] = _cached(base)
        return adapted


def _flattening(kind: type[Optimizer]) -> type[Optimizer]:
    """Return a subclass that sees matrices in the place of parameters with more dimensions."""
    bare = kind.step
    while getattr(bare, "hooked", False):  # the stack's own step calls the hooks
        bare = bare.__wrapped__  # type: ignore[attr-defined]

    class Flattening(kind):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            given = list(params)
            groups = given if given and isinstance(given[0], dict) else [{"params": given}]
            own = [list(group["params"]) for group in groups]
            flat = [[_matrix(p) for p in members] for members in own]
            pairs = [dict(group, params=members) for group, members in zip(groups, flat, strict=True)]
            super().__init__(pairs, *args, **kwargs)
            for group, members, matrices in zip(self.param_groups, own, flat, strict=True):
                group["params"] = members
                self._rename(zip(matrices, members, strict=True))

        def step(self, closure: Any = None, **keywords: Any) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with self._flattened():
                returned = bare(self, **keywords)
            return returned if closure is None else loss

        @contextmanager
        def _flattened(self) -> Iterator[None]:
            """Let the groups and the state hold matrices."""
            own = [group["params"] for group in self.param_groups]
            flat = [[_matrix(p) for p in members] for members in own]
            pairs = [pair for members in zip(own, flat, strict=True) for pair in zip(*members, strict=True)]
            for group, matrices in zip(self.param_groups, flat, strict=True):
                group["params"] = matrices
            for p, matrix in pairs:
                if matrix is not p and p.grad is not None:
                    matrix.grad = p.grad.reshape(matrix.shape)
            self._rename(pairs)
            try:
                yield
            finally:
                for group, members in zip(self.param_groups, own, strict=True):
                    group["params"] = members
                self._rename((matrix, p) for p, matrix in pairs)
                for p, matrix in pairs:
                    if matrix is not p and not matrix._is_view():  # a copy: the memory is in another order
                        p.detach().copy_(matrix.detach().reshape(p.shape))

        def _rename(self, pairs: Any) -> None:
            """Hand the state of each first tensor to the second, in its shape."""
            for old, new in pairs:
                if old is not new and old in self.state:
                    held = self.state.pop(old)
                    self.state[new] = {key: _shaped(value, old.shape, new.shape) for key, value in held.items()}

    closure = inspect.signature(bare).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise SpecError(f"flatten: {kind.__name__} evaluates the loss itself, with the model's own parameters")
    Flattening.__name__, Flattening.__doc__ = kind.__name__, kind.__doc__
    # found again by `__getattr__` below
    Flattening.__module__, Flattening.__qualname__ = __name__, _path(kind)
    Flattening.__signature__ = inspect.signature(kind)
    return Flattening


# copies of a stack have the very class of the original
_cached: Any = functools.cache(_flattening)


def _matrix(p: torch.Tensor) -> torch.Tensor:
    """Return a parameter as a matrix that shares its memory, or where the order of that forbids it a copy."""
    if p.dim() <= 2:
        return p
    shape = (p.shape[0], p[0].numel() if p.shape[0] else 0)
    try:
        return p.detach().view(shape).requires_grad_(p.requires_grad)
    except RuntimeError:  # channels_last
        return p.detach().reshape(shape).clone().requires_grad_(p.requires_grad)


def _shaped(value: Any, old: torch.Size, new: torch.Size) -> Any:
    return value.reshape(new) if isinstance(value, torch.Tensor) and value.shape == old else value


def _path(kind: type[Optimizer]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}".replace(".", "/")


def __getattr__(name: str) -> Any:
    """Return the subclass of a class by its path: a copy of a stack in another process asks for it here."""
    module, colon, kind = name.replace("/", ".").partition(":")
    if not colon:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = import_module(module)
    return _cached(functools.reduce(getattr, kind.split("."), found))


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"flatten": Flatten}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"flatten": Example("flatten", bases=("sgd(lr=0.1, momentum=0.9)",))}
