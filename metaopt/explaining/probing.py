"""What a base or a wrapper does to gradients and weights, found by letting a scratch copy step, whatever its name."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from metaopt.engine.chain import RUN_FLAGS, Chain, ParamGroup
from metaopt.stack import Stack
from metaopt.torch_internals import without_step_hooks
from metaopt.wrapper import Wrapper

STEPS = 12
SHAPE = (4, 3)
# how far two updates may differ that count as the same
SAME = 0.05
FAR = 1e3
# the rate at which a base is tried
RATE = 1e-3
# sizes of gradients at which a wrapper may begin to act
SIZES = (1e-3, 1.0, 1e3, 1e6)


@dataclass(frozen=True)
class Character:
    """What a base with the hyperparameters of one group does.

    `ignores_scale`: gradients that are all as many times larger lead to the same updates (Adam). `rescales_decay`: what
    its `weight_decay` takes from the weights shrinks as gradients grow, so it is added to the gradient and divided with
    it (Adam, not AdamW). `orthogonalizes`: the update of a matrix has singular values of one size (Muon). `step_size`:
    the root mean square of an update at a rate of 1, under gradients of 1 that always point the same way.
    """

    ignores_scale: bool
    rescales_decay: bool
    orthogonalizes: bool
    step_size: float


class Characters:
    """The characters of bases, each tried once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Character | None] = {}

    def of(self, chain: Chain, entry: ParamGroup) -> Character | None:
        """Return what the base of a chain does with a group's hyperparameters, or None if it cannot be tried."""
        values = {k: v for k, v in entry.items() if k not in ("params", "param_names", "name", "lr", "weight_decay")}
        key = id(chain), repr({k: v for k, v in values.items() if "." not in k})
        if key not in self._found:
            self._found[key] = character(chain, entry)
        return self._found[key]


def character(chain: Chain, entry: ParamGroup) -> Character | None:
    """Return what the base of a chain does, or None where a scratch copy of it cannot be made or cannot step."""

    def last_update(factors: Sequence[float], decay: float = 0.0) -> torch.Tensor:
        optimizer, scratch = _scratch(chain, entry, decay)
        return _updates(optimizer, scratch, _gradients(factors))[-1]

    try:
        with _by_itself():
            usual = last_update([1.0] * STEPS)
            far = last_update([FAR] * STEPS)
            decayed = last_update([1.0] * STEPS, 0.1) - usual
            far_decayed = last_update([FAR] * STEPS, 0.1) - far
            optimizer, scratch = _scratch(chain, entry)
            steady = _updates(optimizer, scratch, _steady_gradients())[-1]
    except Exception:  # what a foreign class asks of its surroundings is not foreseeable; then nothing is said of it
        return None
    return Character(
        ignores_scale=_same(far, usual),
        rescales_decay=bool(far_decayed.norm() < 0.5 * decayed.norm()),
        orthogonalizes=_is_orthogonal(steady),
        step_size=float(steady.norm()) / steady.numel() ** 0.5 / RATE,
    )


def acts_in_vain(chain: Chain, entry: ParamGroup, wrapper: Wrapper) -> bool:
    """Tell whether a wrapper that makes some gradients smaller leaves every update of the base as it is.

    Gradients differ in size from update to update: Adam, which divides by their usual size, is held back by a clip that
    cuts the large ones; signs are not.
    """
    try:
        with _by_itself():
            tried = [_acts_and_changes(chain, entry, wrapper, size) for size in SIZES]
    except Exception:  # see above
        return False
    return any(acts for acts, _ in tried) and not any(changes for _, changes in tried)


def _acts_and_changes(chain: Chain, entry: ParamGroup, wrapper: Wrapper, size: float) -> tuple[bool, bool]:
    """Tell whether a wrapper makes a gradient of about this size smaller, and whether it changes an update."""
    sizes = [size * factor for factor in (1.0, FAR, 1.0 / FAR)] * (STEPS // 3)
    alone, scratch = _scratch(chain, entry)
    expected = _updates(alone, scratch, _gradients(sizes))
    base, scratch = _scratch(chain, entry, wrapper=wrapper)
    left: list[float] = []
    found = _updates(Stack(base, [wrapper]), scratch, _gradients(sizes), left)
    given = [size * torch.Size(SHAPE).numel() ** 0.5 for size in sizes]
    acts = any(after < 0.9 * before for after, before in zip(left, given, strict=True))
    return acts, not all(map(_same, found, expected))


def _scratch(
    chain: Chain, entry: ParamGroup, decay: float = 0.0, wrapper: Wrapper | None = None
) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """Return a new base with a group's hyperparameters over a small matrix, and the matrix."""
    kind = type(chain.base)
    names = inspect.signature(kind).parameters.keys() - RUN_FLAGS
    own = {key: _number(value) for key, value in entry.items() if key in names and key != "params"}
    own |= {key: value for key, value in (("lr", RATE), ("weight_decay", decay)) if key in own}
    scratch = torch.linspace(0.5, 1.5, torch.Size(SHAPE).numel(), dtype=torch.float64).reshape(SHAPE).requires_grad_()
    wrappers = {} if wrapper is None else {k: v for k, v in entry.items() if k.startswith(f"{wrapper.label}.")}
    return kind([{"params": [scratch], **wrappers}], **own), scratch


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _gradients(factors: Sequence[float]) -> Iterator[torch.Tensor]:
    """Yield gradients of unrelated directions, each as long as a matrix of ones times its factor."""
    generator = torch.Generator().manual_seed(0)
    for factor in factors:
        direction = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        yield direction * (factor * direction.numel() ** 0.5 / direction.norm())


def _steady_gradients() -> Iterator[torch.Tensor]:
    """Yield the same gradient again and again: all elements positive and near 1, so nearly of rank 1."""
    (noise,) = _gradients([1.0])
    for _ in range(STEPS):
        yield 1.0 + 0.1 * noise


def _is_orthogonal(update: torch.Tensor) -> bool:
    """Return whether an update under steady gradients has singular values of about one size."""
    singular = torch.linalg.svdvals(update)
    return bool(singular[-1] > 0.5 * singular[0])


def differs_for_parts(entry: ParamGroup, wrapper: Wrapper) -> bool:
    """Return whether it matters that a wrapper acts on each of several gradients instead of on their mean."""
    if wrapper.active_slots() or wrapper.scalars or wrapper.counters:
        return True  # what it remembers is of single gradients
    own = {key: value for key, value in entry.items() if key.startswith(f"{wrapper.label}.")}

    def filtered(gradient: torch.Tensor) -> torch.Tensor:
        scratch = torch.linspace(0.5, 1.5, gradient.numel(), dtype=gradient.dtype).reshape(SHAPE).requires_grad_()
        base = torch.optim.SGD([{"params": [scratch], **own}], lr=1.0)
        return _updates(Stack(base, [wrapper]), scratch, iter([gradient.clone()]))[0]

    try:
        with _by_itself():
            pairs = [(size * a, size * b) for size in SIZES for a, b in [tuple(_gradients([1.0, 3.0]))]]
            return not all(_same((filtered(a) + filtered(b)) / 2, filtered((a + b) / 2)) for a, b in pairs)
    except Exception:  # see above
        return False


def _updates(
    optimizer: torch.optim.Optimizer,
    scratch: torch.Tensor,
    gradients: Iterator[torch.Tensor],
    left: list[float] | None = None,
) -> list[torch.Tensor]:
    """Return what each update adds; `left` receives the norm of each gradient as the update left it."""
    found = []
    step = _without_hooks(optimizer)
    for gradient in gradients:
        before = scratch.detach().clone()
        scratch.grad = gradient
        step()
        found.append(scratch.detach() - before)
        if left is not None:
            left.append(float(scratch.grad.norm()))
    return found


def _without_hooks(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    # hooks that a client put on every optimizer of the process are not meant for a scratch copy
    plain = without_step_hooks(type(optimizer).step)
    return lambda: plain(optimizer)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(expected.norm() > 0 and (found - expected).norm() <= SAME * expected.norm())


@contextmanager
def _by_itself() -> Iterator[None]:
    """Leave the random numbers as they are, and compile nothing for a few steps of a few numbers."""
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        torch.manual_seed(0)
        yield
