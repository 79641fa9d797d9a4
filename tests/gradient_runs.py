"""Stacks with a part on gradients or updates, over tensors of all shapes in two groups with values of their own."""

import random
from collections.abc import Callable, Sequence

import reference_gradients as plain
import torch

import metaopt
from metaopt.registry import registry

SHAPES = ((4, 3), (3,), (), (2, 2, 2), (0,), (5, 1), (1,))
GROUPS = ((0, 1, 2), (3, 4, 5, 6))
STEPS = 14
# what each of the two groups is given; what acts on all groups at once is the same in both
PARTS: dict[str, tuple[type[plain.Rule], dict, dict]] = {
    "mars": (plain.Mars, {"gamma": 0.1, "beta1": 0.9}, {"gamma": 0.5, "beta1": 0.8}),
    "grokfast": (plain.Grokfast, {"alpha": 0.8, "lamb": 3.0}, {"alpha": 0.5, "lamb": 0.5}),
    "orthograd": (plain.Orthograd, {}, {}),
    "gradient_noise": (plain.GradientNoise, {"eta": 0.3, "gamma": 0.55}, {"eta": 1.0, "gamma": 1.5}),
    "magma": (plain.Magma, {"keep": 0.5, "tau": 0.3}, {"keep": 0.8, "smoothing": 0.6, "beta": 0.5}),
    "zclip": (plain.Zclip, *[{"alpha": 0.8, "warmup": 4, "z_thresh": 1.2}] * 2),
    "zclip mean": (plain.Zclip, *[{"alpha": 0.8, "warmup": 3, "z_thresh": 1.0, "mode": "mean"}] * 2),
    "zclip max": (plain.Zclip, *[{"alpha": 0.8, "warmup": 3, "z_thresh": 1.0, "mode": "max"}] * 2),
    "mechanic": (plain.Mechanic, *[{"s_init": 1e-2, "num_betas": 4, "weight_decay": 0.1}] * 2),
    "mechanic from afar": (plain.Mechanic, {}, {}),
}
BASES = {
    "sgd": ("sgd()", {}),
    "momentum": ("sgd(momentum=0.9)", {"momentum": 0.9}),
    "adam": ("adam()", {}),
    "adamw": ("adamw(weight_decay=0.1)", {"weight_decay": 0.1}),
}
Gradient = Callable[[int, torch.Tensor], torch.Tensor]


def stack_text(part: str, base: str, given: dict | None = None) -> str:
    name = part.split()[0]
    arguments = ", ".join(f"{key}={value!r}" for key, value in (given or {}).items())
    wrapper = f"{name}({arguments})"
    before = registry.find(name, "wrapper").target.runs_before_base()
    return f"{wrapper} | {base}" if before else f"{base} | {wrapper}"


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gradient(step: int) -> Gradient:
    """Return the gradients of a quadratic with noise, four times as large in every fifth step."""

    def of(i: int, w: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * step + i)
        return (0.7 * w + 0.5 * torch.randn(w.shape, generator=generator, dtype=w.dtype)) * (
            4.0 if step % 5 == 4 else 1
        )

    return of


def presence(step: int, *, uneven: bool) -> list[bool]:
    drawn = random.Random(step)
    return [not uneven or i == step % len(SHAPES) or drawn.random() < 0.6 for i in range(len(SHAPES))]


def build(
    part: str, base: str, values: Sequence[torch.Tensor], order: Sequence[Sequence[int]] = GROUPS, lr: float = 0.1
) -> tuple[dict[int, torch.nn.Parameter], metaopt.Stack]:
    """Return the parameters by number, and a stack over them in these groups, each with its own hyperparameters."""
    _, *given = PARTS[part]
    name = part.split()[0]
    shared = registry.find(name, "wrapper").target.hyperparameters
    params = {i: torch.nn.Parameter(w.clone()) for i, w in enumerate(values)}
    entries = []
    for members in order:
        own = GROUPS.index(tuple(sorted(members)))
        apart = {f"{name}.{key}": value for key, value in given[own].items() if shared[key].per_group}
        entry = {"params": [(f"p{i}", params[i]) for i in members], "lr": lr / (1 + own), **apart}
        entries.append(entry)
    together = {key: value for key, value in given[0].items() if not shared[key].per_group}
    return params, metaopt.build(entries, stack_text(part, BASES[base][0], together))


def step(params: dict[int, torch.nn.Parameter], opt: metaopt.Stack, number: int, *, uneven: bool) -> None:
    present = presence(number, uneven=uneven)
    for i, p in params.items():
        p.grad = gradient(number)(i, p.detach()) if present[i] else None
    opt.step()
