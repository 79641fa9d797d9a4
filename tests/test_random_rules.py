"""Rules that chance writes: with the library they leave the bits that they leave without it."""

import importlib.util
from random import Random
from typing import Any

import pytest
import torch

import metaopt
from metaopt import Group, Wrapper, anchor, elementwise, zeros
from metaopt.engine.fused import postponed
from metaopt.programs import kernels

if kernels() is None:
    absent = importlib.util.find_spec("metaopt_kernels") is None
    reason = "metaopt-kernels is not installed" if absent else "metaopt-kernels has no library here, or is turned off"
    pytest.skip(reason, allow_module_level=True)

SHAPES: list[tuple[int, ...]] = [(1,), (7,), (16,), (31,), (1000,), (33, 70)]
BASES = {
    "adamw": metaopt.adamw(lr=0.01),
    "adam": metaopt.adam(lr=0.01, weight_decay=0.1),
    "sgd": metaopt.sgd(lr=0.1, momentum=0.9),
}
# sums have other bits in another order, but for counts
OPERATIONS = (
    *("{} + {}", "{} - {}", "{} * {}", "{} * 0.5", "-{}", "torch.abs({})", "torch.lerp({}, {}, 0.3)"),
    *("torch.addcmul({}, {}, {})", "torch.where({} * {} > 0, {}, {})", "({} * {} <= 0) * -0.1", "{} / ({} * {} + 1.0)"),
    *("torch.addcmul({} * 0.9, {}, torch.mean({} > 0))", "torch.sqrt(torch.abs({}))", "torch.clamp({}, min=-0.5)"),
)


def written(random: Random, tensors: list[str]) -> str:
    """Return the text of a rule on these tensors: some operations on what there is, and where their results go."""
    known, lines = list(tensors), [f"def rule({', '.join(tensors)}):"]
    for i in range(random.randrange(5)):
        operation = random.choice(OPERATIONS)
        lines.append(f"    t{i} = {operation.format(*random.choices(known, k=operation.count('{}')))}")
        known.append(f"t{i}")
    # on the update, weights change by what is added to them
    may_change = [name for name in tensors if name != "param" or "update" not in tensors]
    changed = random.sample(may_change, random.randint(1, len(may_change)))
    # what comes out may be another tensor as it was, but for one that changes too: that a rule may not exchange
    outputs = {name: random.choice([each for each in known if each == name or each not in changed]) for name in changed}
    lines.append(f"    return {{{', '.join(f'{name!r}: {value}' for name, value in outputs.items())}}}")
    return "\n".join(lines)


def rule(text: str) -> Any:
    found: dict[str, Any] = {"torch": torch}
    exec(text, found)
    return elementwise(staticmethod(found["rule"]))


def part(random: Random) -> tuple[type[Wrapper], str]:
    """Return a part of one or two rules on the update, or behind it, and their text."""
    on_update = random.random() < 0.5
    tensors = ["param", "slow", "older", *(["update"] if on_update else [])]
    texts = [written(random, random.sample(tensors, len(tensors))) for _ in range(random.choice((1, 2)))]
    names = [f"rule{i}" for i in range(len(texts))]

    def act(self: Any, group: Group) -> None:
        for name in names:
            getattr(self, name)(group)

    body = {"slow": anchor(), "older": zeros(), **dict(zip(names, map(rule, texts), strict=True))}
    hook = "on_update" if on_update else "after_update"
    return type("Chance", (Wrapper,), {**body, hook: act, "__doc__": "Rules."}), "\n".join([hook, *texts])


def trained(spec: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    opt = metaopt.build(params, spec)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return [*params, *(value for p in params for value in opt.state[p].values())]


def stack(base: str, seed: int) -> tuple[Any, str]:
    """Return a base with one or two parts of chance behind it, and their text."""
    spec, texts = BASES[base], []
    for i in range(1 + seed % 2):
        chance, text = part(Random(1000 * seed + i))
        spec = spec | chance(label=f"chance{i}")
        texts.append(text)
    return spec, "\n".join(texts)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("seed", range(100))
def test_rules_of_chance_leave_the_same_bits(seed: int, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, text = stack(base, seed)
    found = trained(spec)
    monkeypatch.setattr(postponed, "kernels", lambda: None)
    for own, expected in zip(found, trained(spec), strict=True):
        assert torch.equal(own.nan_to_num(), expected.nan_to_num()), text
        assert torch.equal(own.isnan(), expected.isnan()), text


def test_most_rules_of_chance_join_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[bool] = []
    add = postponed.PostponedStep.add

    def added(self: postponed.PostponedStep, *args: Any, **keywords: Any) -> bool:
        joined.append(add(self, *args, **keywords))
        return joined[-1]

    monkeypatch.setattr(postponed.PostponedStep, "add", added)
    for seed in range(30):
        trained(stack("sgd", seed)[0])
    # not those with a square root, which torch may round in its own way, nor behind the base those with a sum
    assert sum(joined) > len(joined) / 2
