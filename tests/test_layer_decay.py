"""Learning rates that fall layer by layer toward the input, for any model."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import metaopt
from metaopt.construction.layers import layers_by_patterns


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)


class Vit(nn.Module):
    """As a vision transformer is written: tokens, patches, blocks, norm, head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


class Resnet(nn.Module):
    """As a residual network is written: a stem, stages of blocks, a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = (nn.Sequential(*[self.block() for _ in range(2)]) for _ in range(2))
        self.fc = nn.Linear(4, 2)

    def block(self) -> nn.Module:
        block = nn.Module()
        block.conv1, block.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        block.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        return block


class Plain(nn.Module):
    """Without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)


def scales(groups: list[dict]) -> dict[str, float]:  # type: ignore[type-arg]
    return {name: group["lr_scale"] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Vit, {"cls_token": 4, "patch_embed": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 0, "head": 0}),
        (Resnet, {"conv1": 5, "bn1": 5, "layer1.0": 4, "layer1.1": 3, "layer2.0": 2, "layer2.1": 1, "fc": 0}),
        (Plain, {"hidden": 1, "norm": 1, "out": 0}),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4)), {"0": 1, "1": 1, "3": 0}),
    ],
)
def test_each_layer_has_the_rate_of_its_distance_from_the_last(
    model: Callable[[], nn.Module], expected: dict[str, int]
) -> None:
    found = scales(metaopt.groups(model(), layer_decay=0.5))
    for name, scale in found.items():
        (distance,) = [distance for start, distance in expected.items() if f"{name}.".startswith(f"{start}.")]
        assert scale == 0.5**distance, name


def test_the_rates_of_the_stack_are_those_and_follow_a_schedule() -> None:
    model = Vit(1)
    opt = metaopt.build(metaopt.groups(model, layer_decay=0.5, no_decay="1d"), "adamw(lr=cosine(1.0))", total_steps=2)
    assert [group["name"] for group in opt.param_groups] == [
        "layer 0", "layer 0 no_decay", "layer 1", "layer 1 no_decay", "layer 2", "layer 2 no_decay"
    ]  # fmt: skip
    assert [group["lr"] for group in opt.param_groups] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.125, 0.125, 0.25, 0.25, 0.5, 0.5])
    assert [group["weight_decay"] for group in opt.param_groups[:2]] == [1e-2, 0.0]


def test_a_rule_s_own_scale_is_multiplied() -> None:
    groups = metaopt.groups(Vit(1), {"head.*": {"lr_scale": 10.0}, "blocks.*": {"lr_scale": 3.0}}, layer_decay=0.5)
    found = scales(groups)
    assert found["head.weight"] == 10.0 and found["blocks.0.attn.weight"] == 1.5 and found["cls_token"] == 0.25
    assert [g["name"] for g in groups] == ["head.* layer 2", "blocks.* layer 1", "layer 0", "layer 2"]


def test_patterns_say_which_layers_there_are() -> None:
    layers = ["*embed*", "cls_token", "blocks.#.*", "*"]
    found = scales(metaopt.groups(Vit(12), layer_decay=0.5, layers=layers))
    assert found["patch_embed.proj.weight"] == 0.5**14 and found["cls_token"] == 0.5**13
    assert found["blocks.2.attn.weight"] == 0.5**10 and found["blocks.10.attn.weight"] == 0.5**2
    assert found["norm.weight"] == 1.0
    nested = [f"stages.{i}.blocks.{j}.weight" for i in range(2) for j in range(3)]
    assert layers_by_patterns(["stages.#.blocks.#.*"], nested) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"layer_decay": 1.5}, "layer_decay must be a number > 0 and <= 1, got 1.5"),
        ({"layer_decay": 0}, "got 0"),
        ({"layer_decay": "0.5"}, "got '0.5'"),
        ({"layers": ["*"]}, "layers are for layer_decay"),
        ({"layer_decay": 0.5, "layers": "*"}, "must be a list of globs"),
        ({"layer_decay": 0.5, "layers": ["blocks.#.*"]}, "no pattern of layers matches cls_token"),
        ({"layer_decay": 0.5, "layers": ["*", "block.#.*"]}, r"'block\.#\.\*' of layers matches no parameter"),
    ],
)
def test_layers_that_do_not_fit_are_refused(given: dict, told: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(metaopt.ParameterError, match=told):
        metaopt.groups(Vit(), **given)


def test_one_layer_for_all_changes_nothing() -> None:
    assert set(scales(metaopt.groups(Vit(), layer_decay=1.0)).values()) == {1.0}
