"""torch's own optimizer database: every optimizer with every option set is the same inside a stack, bit for bit."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import metaopt

pytestmark = pytest.mark.slow

STEPS = 5
MATRICES = [(4, 3), (1, 4)]
SHAPES = [(4, 3), (4,), (2, 3, 2), (1,), ()]
BITWISE = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
Parameters = list[torch.nn.Parameter]
Make = Callable[[Parameters], torch.optim.Optimizer]


def inputs(info: OptimizerInfo) -> list[tuple[str, dict[str, Any]]]:
    found = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info, skip=("differentiable",))
    return [
        (each.desc, {key: value for key, value in each.kwargs.items() if key != "differentiable"}) for each in found
    ]


CASES = [
    pytest.param(info, kwargs, id=f"{info.optim_cls.__name__}, {desc}")
    for info in optim_db
    for desc, kwargs in inputs(info)
]


def dtypes(info: OptimizerInfo, kwargs: dict[str, Any]) -> list[torch.dtype]:
    """Return the dtypes that the bare optimizer takes with these options."""
    name = info.optim_cls.__name__
    found = [torch.float32, torch.float64]
    if name != "LBFGS":  # its line search overflows
        found.append(torch.bfloat16)
    if name not in ("LBFGS", "SparseAdam"):  # whose rates are zero in half precision
        found.append(torch.float16)
    if info.supports_complex and not kwargs.get("fused"):
        found.append(torch.complex64)
    return found


def parameters(info: OptimizerInfo, dtype: torch.dtype) -> Parameters:
    generator = torch.Generator().manual_seed(1)
    shapes = MATRICES if info.optim_cls.__name__ == "Muon" else SHAPES
    if info.only_supports_sparse_grads:
        shapes = [shape for shape in shapes if shape]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(info: OptimizerInfo, dtype: torch.dtype, make: Make) -> tuple[Parameters, torch.optim.Optimizer]:
    """Make some updates with gradients that follow from the weights, so that L-BFGS can search along a line."""
    params = parameters(info, dtype)
    opt = make(params)

    def closure(step: int) -> torch.Tensor:
        with torch.no_grad():
            for p in params:
                gradient = p * 0.5 + 0.1 * (step % 3)
                p.grad = gradient.to_sparse() if info.only_supports_sparse_grads else gradient
        losses = [(0.25 * p.abs().square() + 0.1 * (step % 3) * p.real).sum().double() for p in params]
        return torch.stack(losses).sum().detach()

    for step in range(2 if info.step_requires_closure else STEPS):
        if info.step_requires_closure:
            opt.step(lambda step=step: closure(step))  # type: ignore[misc]
        else:
            closure(step)
            opt.step()
    return params, opt


@pytest.mark.filterwarnings("ignore::UserWarning")  # of complex numbers made real, by torch itself
@pytest.mark.parametrize(("info", "kwargs"), CASES)
def test_an_identity_stack_is_the_bare_optimizer_bit_for_bit(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    part = metaopt.specs.pipeline.part(metaopt.registry.registry.name_of(info.optim_cls))

    def bare(params: Parameters) -> torch.optim.Optimizer:
        return info.optim_cls(params, **copy.deepcopy(kwargs))

    def wrapped(params: Parameters) -> torch.optim.Optimizer:
        return metaopt.wrap(bare(params), "lookahead(k=2, alpha=1.0)")

    def built(params: Parameters) -> torch.optim.Optimizer:
        return metaopt.build(params, part(**copy.deepcopy(kwargs)) | metaopt.lookahead(k=2, alpha=1.0))

    for dtype in dtypes(info, kwargs):
        stacks = [wrapped]
        if dtype == torch.float32:
            stacks.append(lambda params: metaopt.wrap(bare(params), []))
            # where the user does not choose how to run, a built stack does
            stacks += [built] if "fused" in kwargs or "fused" not in info.supported_impls else []
        expected, reference = run(info, dtype, bare)
        for make in stacks:
            found, opt = run(info, dtype, make)
            torch.testing.assert_close(found, expected, **BITWISE, msg=lambda m, dtype=dtype: f"{dtype}: {m}")
            assert _base_entries(opt) == _base_entries(reference)
            _assert_same_state(opt, reference)


def _base_entries(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "params" and "." not in k} for entry in opt.param_groups]


def _assert_same_state(opt: torch.optim.Optimizer, reference: torch.optim.Optimizer) -> None:
    found = {
        i: {key: value for key, value in held.items() if not key.startswith("lookahead.")}
        for i, held in opt.state_dict()["state"].items()
    }
    expected = reference.state_dict()["state"]
    assert {i for i, held in found.items() if held} == {i for i, held in expected.items() if held}
    for i, held in expected.items():
        torch.testing.assert_close(found[i], held, **BITWISE, msg=lambda m, i=i: f"state of {i}: {m}")


@pytest.mark.parametrize("info", [pytest.param(info, id=info.optim_cls.__name__) for info in optim_db])
def test_what_torch_refuses_the_stack_refuses(info: OptimizerInfo) -> None:
    part = metaopt.specs.pipeline.part(metaopt.registry.registry.name_of(info.optim_cls))
    refused = 0
    for case in info.optim_error_inputs_func("cpu", torch.float32):
        given = case.optimizer_error_input
        if case.error_on.name != "CONSTRUCTION_ERROR" or issubclass(case.error_type, Warning):
            continue
        params = parameters(info, torch.float32) if given.params is None else given.params
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(case.error_type):
                info.optim_cls(params, **given.kwargs)
            with pytest.raises(metaopt.MetaoptError):
                metaopt.build(params, part(**given.kwargs))
        refused += 1
    assert refused
