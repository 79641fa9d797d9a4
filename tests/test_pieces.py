"""Tensors that are larger than a cache are treated in parts: which, must not be seen in the numbers."""

import pytest
import torch

import metaopt
from benchmarks.targets import wrappers_alone
from metaopt.engine.step import base_step
from metaopt.engine.views import blocks as engine_blocks
from metaopt.engine.views.group_view import GroupView

SHAPES = ((7, 3), (5,), (4, 2, 2), (), (9, 1))
SPECS = [text for _, text, _ in wrappers_alone() if text is not None]
CUT = [spec for spec in SPECS if metaopt.build([torch.zeros(1)], spec).wrappers[0].elementwise]


def run(spec: str, monkeypatch: pytest.MonkeyPatch, most: int) -> tuple[list[torch.Tensor], int]:
    """Return the weights after some updates by pieces of at most so many elements, and how many pieces were made."""
    monkeypatch.setattr(engine_blocks, "CPU_BLOCK", most)
    # the optional library makes no views
    monkeypatch.setattr(base_step, "kernels", lambda: None)
    made = 0
    init = GroupView.__init__

    def counting(self: GroupView, *args: object, **kwargs: object) -> None:
        nonlocal made
        made += 1
        init(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupView, "__init__", counting)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    opt = metaopt.build(weights, spec)
    for _ in range(30):  # outer acts every 28 updates
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        opt.step()
    monkeypatch.undo()
    return [p.detach() for p in weights], made


@pytest.mark.parametrize("spec", SPECS)
def test_parts_of_tensors_add_up_to_the_whole(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, few = run(spec, monkeypatch, 1 << 20)
    for most in (1, 4, 10):
        cut, many = run(spec, monkeypatch, most)
        assert many > few or spec not in CUT
        for a, b in zip(cut, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_some_wrappers_treat_tensors_in_parts() -> None:
    assert len(CUT) >= 3


def test_the_index_of_a_block_is_that_of_its_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halve(metaopt.Wrapper, elementwise=True):
        """w <- w / 2, by the index of each block."""

        def after_update(self, group: metaopt.Group) -> None:
            halves = [p / 2 for p in group.params]
            for block in group.blocks():
                block.set_params([halves[i] for i in block.index])

    monkeypatch.setattr(engine_blocks, "CPU_BLOCK", 4)
    weights = [torch.nn.Parameter(torch.arange(1.0, n + 1)) for n in (3, 12, 2)]
    opt = metaopt.build(weights, metaopt.specs.pipeline.as_pipeline("sgd(lr=1.0)") | Halve())
    for p in weights:
        p.grad = torch.zeros_like(p)
    opt.step()
    for p in weights:
        torch.testing.assert_close(p.detach(), torch.arange(1.0, len(p) + 1) / 2)
