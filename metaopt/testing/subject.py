"""What is checked: one part, made as its example says, and fed as it needs to be."""

import copy
import inspect
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property
from typing import Any

import torch

import metaopt
from metaopt.errors import MetaoptError
from metaopt.hooks import Example
from metaopt.registry import Entry
from metaopt.specs.parsing import parse
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.stack import Stack
from metaopt.testing.comparing import by, same
from metaopt.testing.feeding import STEPS, Batch, Halves, make_batch, make_model, own_random_numbers
from metaopt.testing.outcome import CheckFailed
from metaopt.wrapper import Wrapper

Weights = list[torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """One part under check, with its example; `text` is the part as text, where its kind has one."""

    entry: Entry
    example: Example
    text: str
    device: torch.device

    def __str__(self) -> str:
        return self.text or self.entry.name

    @cached_property
    def faults(self) -> dict[str, bool]:
        """Whether it fails a check that others presume, as far as that was asked."""
        return {}


@dataclass(frozen=True)
class Run:
    """An uninterrupted run: the weights after 0, 1, ... steps and the checkpoints at each of them."""

    weights: list[Weights]
    checkpoints: list[dict[str, Any]]


class StackSubject(Subject):
    """An optimizer, or a wrapper around one base: `text` is the whole stack."""

    def model(self, dtype: torch.dtype = torch.float32) -> Halves:
        """Return a new model with the initial weights."""
        return make_model(self.example.gradients, self.example.parameters, dtype, self.device)

    def stack(self, parameters: Any, spec: Any = None) -> Stack:
        """Return a new stack over these parameters; a failure to make one is a failure of the part."""
        with own_random_numbers(0, self.device):
            return metaopt.build(parameters, self.text if spec is None else spec, total_steps=STEPS)

    def pair(self, dtype: torch.dtype = torch.float32, spec: Any = None) -> tuple[Halves, Stack]:
        """Return a new model and a new stack over it."""
        model = self.model(dtype)
        return model, self.stack(list(model.named_parameters()), spec)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The parts of the stack."""
        return parse(self.text)

    @property
    def position(self) -> int:
        """Where in the pipeline the part under check stands."""
        return next(i for i, part in enumerate(self.pipeline) if part.target is self.entry.target)

    @property
    def part(self) -> Part:
        """The part under check, as it stands in the pipeline."""
        return self.pipeline.parts[self.position]

    @property
    def label(self) -> str:
        """The label under which the part keeps its entries; empty for a base."""
        return "" if self.part.kind == "optimizer" else self.part.label or self.part.name.rpartition(".")[2]

    def wrapper_of(self, opt: Stack) -> Wrapper:
        """Return the wrapper under check in a stack."""
        return next(wrapper for wrapper in opt.wrappers if wrapper.label == self.label)

    def with_given(self, **values: Any) -> Pipeline:
        """Return the pipeline with other hyperparameters of the part under check."""
        parts = list(self.pipeline)
        parts[self.position] = changed(self.part, arguments={**self.part.arguments, **values})
        return Pipeline(tuple(parts))

    @property
    def base_alone(self) -> Pipeline:
        """The pipeline without the wrappers."""
        return Pipeline(tuple(part for part in self.pipeline if part.kind == "optimizer"))

    @cached_property
    def calls_closure(self) -> bool:
        """Whether the stack evaluates the loss itself."""
        _, opt = self.pair()
        around = any("around" in wrapper.implemented_hooks() for wrapper in opt.wrappers)
        return self.example.closure or opt.needs_closure or around

    def gradients(self, model: Halves, batch: Batch, halves: Sequence[int] = (0, 1)) -> torch.Tensor:
        """Set the gradients of one batch, those of the other half to None; return the loss."""
        model.zero_grad(set_to_none=True)
        if self.example.gradients == "dense":
            return model.differentiate(batch, halves)
        loss = model.loss(batch, halves)
        loss.backward(create_graph=self.example.gradients == "graph")  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, model: Halves, opt: Any, number: int, halves: Sequence[int] = (0, 1)) -> Any:
        """Make the step of this number; whatever it raises is a failure of the part."""
        batch = make_batch(model, number)
        try:
            # a part may draw random numbers from torch: those of a step depend on its number alone
            with own_random_numbers(number, self.device):
                if self.calls_closure:
                    return opt.step(lambda: self.gradients(model, batch, halves))
                self.gradients(model, batch, halves)
                return opt.step()
        except Exception as error:
            raise CheckFailed(
                f"step {number + 1} of {self} raised {type(error).__name__}{self._line_of(error)}: {str(error)[:300]}",
                "A training run would stop here",
                "Mend that line; where the part is right and needs to be fed otherwise, say so in its metaopt.Example "
                "(spec, parameters, gradients, closure)",
            ) from error

    def _line_of(self, error: BaseException) -> str:
        """Return ` at file.py:12` for the innermost line of the part's own file in a traceback, or an empty text."""
        source = inspect.getsourcefile(self.entry.target) if inspect.isclass(self.entry.target) else None
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
        return f" at {os.path.basename(lines[-1].filename)}:{lines[-1].lineno}" if lines else ""

    def train(self, model: Halves, opt: Any, first: int, last: int) -> list[Weights]:
        """Make the steps `first` to `last - 1`; return the weights after each."""
        found = []
        for number in range(first, last):
            self.step(model, opt, number)
            found.append(weights(model))
        return found

    @cached_property
    def run(self) -> Run:
        """The uninterrupted run, which others are compared with."""
        model, opt = self.pair()
        run = Run([weights(model)], [checkpoint(model, opt)])
        for number in range(STEPS):
            run.weights.extend(self.train(model, opt, number, number + 1))
            run.checkpoints.append(checkpoint(model, opt))
        return run

    def parting(self, run: list[Weights], other: list[Weights], first: int) -> str:
        """Return after which step two runs differ and by how much, `first` being the first step; or an empty text."""
        for number, (ours, theirs) in enumerate(zip(run, other, strict=True), first):
            for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                if not (same(a, b) or (self.example.tolerance and torch.allclose(a, b, 0, self.example.tolerance))):
                    return f"after step {number} parameter {position} differs{by(a, b)}"
        return ""

    def resumed(self, saved: dict[str, Any]) -> tuple[Halves, Stack]:
        """Return a new model and stack with a checkpoint loaded into both."""
        model, opt = self.pair()
        model.load_state_dict(saved["model"])
        opt.load_state_dict(copy.deepcopy(saved["opt"]))
        return model, opt


def weights(model: torch.nn.Module) -> Weights:
    """Return copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def checkpoint(model: torch.nn.Module, opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Return copies of both state dicts."""
    return {"model": copy.deepcopy(model.state_dict()), "opt": copy.deepcopy(opt.state_dict())}


def refused(error: BaseException) -> bool:
    """Tell whether an error is a refusal that metaopt or a part made on purpose."""
    return isinstance(error, MetaoptError) and not isinstance(error, CheckFailed)
