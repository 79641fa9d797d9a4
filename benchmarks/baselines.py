"""What people write by hand today: torch's clipping and optimizer, the expert's folded factor, a Lookahead."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from metaopt.lab.shapes import NamedParameters
from metaopt.schedule import Schedule
from metaopt.specs.pipeline import Pipeline

# how torch runs an optimizer, not what it computes
RUN_FLAGS = frozenset(["foreach", "fused", "capturable", "differentiable"])


class Update(ABC):
    """Something that updates parameters: `step()` is timed, `kept_tensors()` are kept from one to the next."""

    @abstractmethod
    def step(self) -> Any:
        """Make one update from the gradients that the parameters hold."""

    @abstractmethod
    def kept_tensors(self) -> Iterable[torch.Tensor]:
        """Return the tensors kept from one update to the next, parameters and gradients aside."""

    def close(self) -> None:  # noqa: B027 - most write nowhere
        """Write what is left to a log."""


@dataclass(frozen=True)
class Recipe:
    """`clip_grad_norm(max_norm, norm_type) | base(**given) | lookahead(k, alpha)` as data; None: no such part."""

    base: type[torch.optim.Optimizer]
    given: Mapping[str, Any]
    max_norm: float | None = None
    norm_type: float = 2.0
    k: int | None = None
    alpha: float = 0.5

    def optimizer(self, parameters: NamedParameters, **run: Any) -> torch.optim.Optimizer:
        """Return the base alone, run as asked."""
        return self.base([p for _, p in parameters], **self.given, **run)


def find_recipe(pipeline: Pipeline) -> Recipe | None:
    """Return the recipe of a pipeline that people write by hand, None for any other."""
    names = [part.name for part in pipeline]
    bases = [part for part in pipeline if part.kind == "optimizer"]
    if len(bases) != 1:
        return None
    base = bases[0]
    wanted = [name for name in ("clip_grad_norm", base.name, "lookahead") if name in names]
    if names != wanted or not base.target.__module__.startswith("torch.optim."):
        return None
    values = {
        part.name: {n: part.arguments.get(n, h.default) for n, h in part.hyperparameters.items()} for part in pipeline
    }
    if any(isinstance(value, Schedule) for given in values.values() for value in given.values()):
        return None
    clip, pull = values.get("clip_grad_norm", {}), values.get("lookahead", {})
    if pull and (pull["pullback_momentum"] != "none" or pull["slow_dtype"] is not None):
        return None
    return Recipe(
        base=base.target,
        given={name: value for name, value in base.arguments.items() if name not in RUN_FLAGS},
        max_norm=clip.get("max_norm"),
        norm_type=clip.get("norm_type", 2.0),
        k=pull.get("k"),
        alpha=pull.get("alpha", 0.5),
    )


class ByTorch(Update):
    """`clip_grad_norm_`, then the optimizer, as torch's own documentation shows them."""

    def __init__(self, recipe: Recipe, parameters: NamedParameters, **run: Any) -> None:
        self.optimizer = recipe.optimizer(parameters, **run)
        self.parameters = [p for _, p in parameters]
        self.max_norm, self.norm_type = recipe.max_norm, recipe.norm_type

    def step(self) -> None:
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, self.norm_type)
        self.optimizer.step()

    def kept_tensors(self) -> Iterable[torch.Tensor]:
        yield from _tensors(self.optimizer.state)


class ByExpert(Update):
    """The fused optimizer, which divides by the factor in its own pass, and a pull in two multi-tensor calls."""

    def __init__(self, recipe: Recipe, parameters: NamedParameters, *, pull: bool) -> None:
        self.optimizer = recipe.optimizer(parameters, fused=True)
        self.parameters: list[torch.Tensor] = [p for _, p in parameters]
        self.max_norm, self.norm_type = recipe.max_norm, recipe.norm_type
        self.k, self.alpha, self.updates = recipe.k, recipe.alpha, 0
        # the slow weights begin where training begins; copied after the first pull they would miss it
        self.slow = [p.detach().clone() for p in self.parameters] if pull else []

    @torch.no_grad()
    def step(self) -> None:
        if self.max_norm is not None:
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters if p.grad is not None], self.norm_type
            )
            # the kernel divides by it: max(1, (norm + 1e-6) / max_norm)
            self.optimizer.grad_scale = ((norm + 1e-6) / self.max_norm).clamp_(min=1.0)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.updates += 1
        if self.slow and self.k is not None and self.updates % self.k == 0:
            torch._foreach_lerp_(self.slow, self.parameters, self.alpha)
            torch._foreach_copy_(self.parameters, self.slow)

    def kept_tensors(self) -> Iterable[torch.Tensor]:
        yield from _tensors(self.optimizer.state)
        yield from self.slow


class ByPackage(Update):
    """`clip_grad_norm_`, then the default optimizer in the Lookahead of another package."""

    def __init__(self, recipe: Recipe, parameters: NamedParameters, lookahead: Callable[..., Any]) -> None:
        self.base = recipe.optimizer(parameters)
        self.lookahead = lookahead(self.base, k=recipe.k, alpha=recipe.alpha)
        self.parameters = [p for _, p in parameters]
        self.max_norm, self.norm_type = recipe.max_norm, recipe.norm_type
        # timm copies its slow weights at its first pull, which then pulls nothing: it is given those of the beginning,
        # after the base's first update, because a base makes its own state only where none is
        late = hasattr(self.lookahead, "sync_lookahead")
        self.beginning = [p.detach().clone() for p in self.parameters] if late else []

    def step(self) -> None:
        self._update()
        if self.beginning:
            for p, slow in zip(self.parameters, self.beginning, strict=True):
                self.base.state[p].setdefault("lookahead_slow_buff", slow)
            self.beginning = []

    def _update(self) -> None:
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, self.norm_type)
        self.lookahead.step()

    def kept_tensors(self) -> Iterable[torch.Tensor]:
        yield from _tensors(self.base.state)
        yield from _tensors(self.lookahead.state)


def _tensors(state: Mapping[Any, Any]) -> Iterable[torch.Tensor]:
    for entries in state.values():
        for value in entries.values():
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, torch.Tensor):
                    yield item
