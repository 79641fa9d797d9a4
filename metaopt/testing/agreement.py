"""Checks against something known: the bare class, other dtypes and shapes, and the author's own reference."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from metaopt.engine.chain import RUN_FLAGS
from metaopt.engine.multi_base import Partitioner, Sequencer
from metaopt.errors import MetaoptError
from metaopt.stack import Stack
from metaopt.testing.comparing import same
from metaopt.testing.feeding import STEPS, Halves, own_random_numbers
from metaopt.testing.outcome import REPEATS, RESUMES, CheckFailed, NotApplicable, check, failing
from metaopt.testing.subject import StackSubject, Weights, checkpoint

FEW = 3
DTYPES = (torch.float64, torch.bfloat16, torch.complex64)
# what bases can, by their text: the same few stand under every wrapper
_known: dict[tuple[Any, ...], bool] = {}
SHAPES = ((), (1,), (3,), (4, 3), (3, 2, 2, 2))


def bare_optimizer(subject: StackSubject, parameters: Sequence[torch.Tensor], like: Stack) -> torch.optim.Optimizer:
    """Return the class of the part without a stack around it, run as the stack runs it (fused or not)."""
    given = dict(subject.part.arguments)
    given.update(
        {k: v for k, v in like.param_groups[0].items() if k in RUN_FLAGS and k in subject.part.hyperparameters}
    )
    if "fused" in given and subject.example.gradients == "sparse":
        given["fused"] = None  # as the stack does at its first step
    with own_random_numbers(0, subject.device):
        made: torch.optim.Optimizer = subject.entry.target(list(parameters), **given)
    return made


@check("optimizer", presumes=(REPEATS,))
def is_the_bare_class_bit_for_bit(subject: StackSubject) -> None:
    """A stack of the optimizer alone trains exactly like the class outside of metaopt."""
    if _is_made_of_others(subject):
        raise NotApplicable("it is made of other optimizers")
    model = subject.model()
    bare = bare_optimizer(subject, list(model.parameters()), subject.pair()[1])
    with failing(
        f"{subject.entry.target.__name__} outside of a stack",
        "A stack promises to be the optimizer, unchanged",
        "Make it work as any torch.optim.Optimizer does: step() runs under @torch.no_grad(), and calls the closure",
    ):
        alone = subject.train(model, bare, 0, STEPS)
    difference = subject.parting(subject.run.weights[1:], alone, 1)
    if difference:
        raise CheckFailed(
            f"{subject}: {difference} between the stack and {subject.entry.target.__name__} itself",
            "A stack promises to be the optimizer, unchanged",
            "Do everything in step(); do not override what torch.optim.Optimizer does for groups and state",
        )


@check("optimizer", presumes=(REPEATS, RESUMES))
def works_inside_wrappers(subject: StackSubject) -> None:
    """Inside clip_grad_norm and lookahead it trains, saves and loads; lookahead(alpha=1.0) changes nothing."""
    identity = f"{subject.text} | lookahead(k=2, alpha=1.0) | lookahead(k=1000, label='outer')"
    model, opt = subject.pair(spec=identity)
    difference = subject.parting(subject.run.weights[1:], subject.train(model, opt, 0, STEPS), 1)
    if difference:
        raise CheckFailed(
            f"{identity}: {difference} from {subject.text} alone",
            "A Lookahead with alpha=1 is the identity, and one that is never due as well",
            "Read p.grad and the parameters at every step, and keep nothing but what is in the groups and the state",
        )
    kept = [opt.state[p]["outer.slow"] for p in model.parameters()]
    wrapped = f"clip_grad_norm(0.1) | {subject.text} | lookahead(k=2)"
    around = StackSubject(subject.entry, subject.example, wrapped, subject.device)
    twin = around.resumed(around.run.checkpoints[FEW])
    difference = subject.parting(around.run.weights[FEW + 1 :], around.train(*twin, FEW, STEPS), FEW + 1)
    if difference or not same(kept, subject.run.weights[0]):
        what = (
            f"{wrapped}, saved after step {FEW} and loaded: {difference}"
            if difference
            else f"{identity}: the copy of the initial weights that the outer lookahead keeps was changed"
        )
        raise CheckFailed(
            what,
            "The slow weights and the optimizer's state lie beside each other in state[p]",
            "Name the entries of your own state when you read them; never loop over all that is in state[p]",
        )


@check("optimizer", "wrapper", presumes=(REPEATS, RESUMES))
def takes_every_dtype(subject: StackSubject) -> None:
    """float64, and what the base can of bfloat16 and complex numbers: trained, saved and loaded unrounded."""
    for dtype in DTYPES:
        if not _base_can(subject, dtype):
            continue
        with failing(
            f"over {dtype} parameters",
            "The base alone trains them, so users will",
            "Compute in the parameter's dtype; cast where state is kept in another (a wrapper: group.set_params casts)",
        ):
            model, opt = subject.pair(dtype)
            run = subject.train(model, opt, 0, FEW)
        _same_dtype(subject, model, run, dtype)
        _resumes_unrounded(subject, model, opt, dtype)


def _resumes_unrounded(subject: StackSubject, model: Halves, opt: Stack, dtype: torch.dtype) -> None:
    saved = checkpoint(model, opt)
    twin, other = subject.pair(dtype)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    expected, found = subject.train(model, opt, FEW, FEW + 2), subject.train(twin, other, FEW, FEW + 2)
    difference = subject.parting(expected, found, FEW + 1)
    if difference:
        raise CheckFailed(
            f"{subject} over {dtype} parameters, saved after step {FEW} and loaded: {difference}",
            "torch casts every floating entry of a loaded state to the parameter's dtype: wider ones come back rounded",
            "A wrapper: declare the slot with dtype='float32', and it is restored. An optimizer: keep its state in "
            "the parameter's dtype, or put it back in load_state_dict",
        )


def _is_made_of_others(subject: StackSubject) -> bool:
    return inspect.isclass(subject.entry.target) and issubclass(subject.entry.target, Partitioner | Sequencer)


def _base_can(subject: StackSubject, dtype: torch.dtype) -> bool:
    """Tell whether the base, without a wrapper, trains parameters of this dtype to finite values."""
    key = *_base_of(subject), dtype
    if key not in _known:
        _known[key] = _trains(subject, dtype)
    return _known[key]


def _trains(subject: StackSubject, dtype: torch.dtype) -> bool:
    model = subject.model(dtype)
    opt: Any = None
    try:
        if _is_made_of_others(subject):
            model, opt = subject.pair(dtype)
        elif subject.entry.kind == "optimizer":
            opt = bare_optimizer(subject, list(model.parameters()), subject.pair(dtype)[1])
        else:
            opt = subject.stack(list(model.named_parameters()), subject.base_alone)
        run = subject.train(model, opt, 0, FEW)
    except (CheckFailed, MetaoptError, RuntimeError, TypeError, ValueError):
        return False
    return all(bool(p.isfinite().all()) for p in run[-1])


def _same_dtype(subject: StackSubject, model: Halves, run: list[Weights], dtype: torch.dtype) -> None:
    for p in model.parameters():
        if p.dtype != dtype or not bool(p.isfinite().all()):
            raise CheckFailed(
                f"{subject} over {dtype} parameters gives {p.dtype} ones, or values that are not finite",
                "Mixed precision keeps each parameter in the dtype that the user chose",
                "Compute in the parameter's dtype and copy in place; keep eps representable (1e-8 is 0 in float16)",
            )


@check("optimizer", "wrapper", presumes=("changes_parameters",))
def takes_every_shape(subject: StackSubject) -> None:
    """Scalars, vectors, matrices and kernels, as far as the base can, beside each other in one group."""
    if subject.example.gradients == "sparse" or subject.example.parameters == "matrices":
        raise NotApplicable(
            f"it takes {subject.example.parameters} parameters with {subject.example.gradients} gradients"
        )
    shapes = [shape for shape in SHAPES if _base_moves(subject, shape)]
    if not shapes:
        raise NotApplicable("the base takes none of the shapes alone")
    problem = _moves(subject, shapes, None)
    if problem:
        raise CheckFailed(
            f"{subject} over parameters of the shapes {shapes}: {problem}",
            "Models hold scalars (temperatures), vectors (biases), matrices and convolution kernels in one group",
            "Treat each parameter by its own shape; a 0-dim one has no rows",
        )


def _base_of(subject: StackSubject) -> tuple[Any, ...]:
    fed = subject.example
    return str(subject.base_alone), subject.device, fed.parameters, fed.gradients, fed.closure


def _base_moves(subject: StackSubject, shape: tuple[int, ...]) -> bool:
    key = *_base_of(subject), shape
    if key not in _known:
        _known[key] = _moves(subject, [shape], subject.base_alone) == ""
    return _known[key]


def _moves(subject: StackSubject, shapes: Sequence[tuple[int, ...]], spec: Any) -> str:
    """Return what goes wrong when parameters of these shapes are trained, or an empty text."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(subject.device)) for shape in shapes]
    before = [p.detach().clone() for p in params]

    def loss() -> torch.Tensor:
        for p in params:
            p.grad = None
        total = torch.stack([(p - 0.3).square().sum() for p in params]).sum()
        total.backward(create_graph=subject.example.gradients == "graph")  # type: ignore[no-untyped-call]
        return total.detach()

    try:
        opt = subject.stack([(f"of shape {tuple(p.shape)}", p) for p in params], spec)
        for _ in range(FEW):
            if not subject.calls_closure:
                loss()
            opt.step(loss if subject.calls_closure else None)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    for p, old in zip(params, before, strict=True):
        if not bool(p.isfinite().all()):
            return f"the one of shape {tuple(p.shape)} is not finite"
        if same(p.detach(), old):
            return f"the one of shape {tuple(p.shape)} does not move"
    return ""
