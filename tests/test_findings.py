"""What `metaopt.explain` finds in sizes, in the order of parts and in layers that do not suit a base."""

import pytest
import torch

import metaopt


def matrices(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((0.1 * torch.randn(16, 16, generator=generator)).to(dtype)) for _ in range(2)]


def findings(spec: str, params: object = None, total_steps: int | None = None, model: object = None) -> dict[str, str]:
    opt = metaopt.build(matrices() if params is None else params, spec, total_steps=total_steps)
    return {finding.code: str(finding) for finding in metaopt.explain(opt, model).findings}


# ---- rates


@pytest.mark.parametrize("spec", ["adamw(lr=10.0)", "sgd(lr=10.0)", "muon(lr=5.0, weight_decay=0.0)", "adamw(lr=1.0)"])
def test_a_rate_that_moves_weights_by_more_than_their_size_is_found(spec: str) -> None:
    assert set(findings(spec)) == {"rate-too-high"}


@pytest.mark.parametrize(
    "spec",
    [
        "adamw(lr=1e-2)",
        "sgd(lr=1.0, momentum=0.9)",
        "muon(lr=0.02, weight_decay=0.0)",
        "adadelta(lr=1.0)",
        "rprop(lr=1e-2)",
        "adamw(lr=1.0) | mechanic",  # it scales the update
        "lbfgs(lr=1.0)",
    ],
)
def test_a_usual_rate_is_not(spec: str) -> None:
    assert findings(spec) == {}


def test_a_rate_that_a_schedule_will_reach_counts_now() -> None:
    assert set(findings("adamw(lr=warmup(3.0, 10))", total_steps=100)) == {"rate-too-high"}


def test_each_group_is_judged_by_its_own_weights() -> None:
    large = torch.nn.Parameter(torch.full((4, 4), 50.0))
    groups = [{"params": matrices(), "lr": 1e-3}, {"params": [large], "lr": 1.0}]
    assert findings("adamw(lr=1e-3)", groups) == {}


# ---- 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_that_16_bits_round_away_are_found(dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.ones(8, 4, dtype=dtype))]
    opt = metaopt.build(weights, "adamw(lr=1e-5, weight_decay=0.0)")
    (finding,) = metaopt.explain(opt).findings
    assert finding.code == "update-rounded-away" and "100%" in finding.reason and "float32" in finding.fix
    for _ in range(20):
        weights[0].grad = torch.ones_like(weights[0])
        opt.step()
    assert (weights[0] == 1).all()


def test_updates_that_16_bits_can_hold_are_not() -> None:
    assert findings("adamw(lr=1e-2, weight_decay=0.0)", matrices(torch.bfloat16)) == {}
    assert findings("adamw(lr=1e-5)", matrices(torch.float32)) == {}


# ---- averages


def test_an_average_that_is_longer_than_the_run_is_found() -> None:
    told = findings("adamw(lr=1e-3) | ema", total_steps=500)["average-longer-than-run"]
    assert f"{0.999**500:.0%}" in told and "ema(0.98)" in told


@pytest.mark.parametrize(
    "spec", ["ema(warmup=True)", "ema(0.99)", "ema(0.98, every=2)", "ema(decay=linear(0.9, 0.999))", "lookahead"]
)
def test_an_average_that_forgets_the_first_weights_in_time_is_not(spec: str) -> None:
    assert findings(f"adamw(lr=1e-3) | {spec}", total_steps=500) == {}


@pytest.mark.parametrize("spec", ["ema(0.9, start=500)", "tail_average(start=600)"])
def test_an_average_that_begins_after_the_run_is_found(spec: str) -> None:
    assert set(findings(f"adamw(lr=1e-3) | {spec}", total_steps=500)) == {"average-never-begins"}


@pytest.mark.parametrize("spec", ["ema(0.9, every=7)", "tail_average(every=7)", "lawa(k=7, n=3)"])
def test_an_average_that_moves_no_weights_may_end_inside_its_cycle(spec: str) -> None:
    assert findings(f"adamw(lr=1e-3) | {spec}", total_steps=500) == {}


# ---- two decays, and parts in front of accumulate


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("decay(0.1) | adamw(lr=1e-3)", ["weight_decay=0.01 of AdamW", "decay.weight_decay=0.1", "weight_decay=0.0"]),
        ("l2(1e-4) | sgd(lr=0.1, weight_decay=1e-4)", ["weight_decay=0.0001 of SGD", "l2.weight_decay=0.0001"]),
        ("decay(0.1) | adamw(lr=1e-3, weight_decay=0.0) | cautious_decay(0.1)", ["cautious_decay.weight_decay=0.1"]),
    ],
)
def test_two_decays_of_the_same_weights_are_found(spec: str, told: list[str]) -> None:
    found = findings(spec)
    assert set(found) == {"decay-twice"}
    assert all(words in found["decay-twice"] for words in told)


@pytest.mark.parametrize("spec", ["decay(0.1) | adamw(lr=1e-3, weight_decay=0.0)", "adamw(lr=1e-3) | mechanic"])
def test_one_decay_is_not(spec: str) -> None:
    assert findings(spec) == {}


def test_two_decays_of_different_groups_are_not() -> None:
    first, second = matrices()
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second], "decay.weight_decay": 0.0}]
    assert findings("decay(0.1) | adamw(lr=1e-3)", groups) == {}


@pytest.mark.parametrize(
    "part", ["clip_grad_norm(1.0)", "clip_grad_value(1.0)", "adaptive_grad_clip", "grokfast", "zclip", "mars"]
)
def test_a_part_that_acts_on_every_batch_of_a_window_is_found(part: str) -> None:
    found = findings(f"{part} | accumulate(4) | sgd(lr=1e-3)")
    assert set(found) == {"acts-before-the-sum"} and "behind accumulate" in found["acts-before-the-sum"]


@pytest.mark.parametrize(
    "before",
    [
        "accumulate(4) | clip_grad_norm(1.0)",
        "centralize | accumulate(4)",  # linear: the mean of what it makes is what it makes of the mean
        "l2(1e-4) | accumulate(4)",
        "skip_nonfinite(3) | accumulate(4)",
        "clip_grad_norm(1.0)",
    ],
)
def test_a_part_for_which_that_makes_no_difference_is_not(before: str) -> None:
    assert findings(f"{before} | sgd(lr=1e-3)") == {}


# ---- layers


class LanguageModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.block = torch.nn.Linear(8, 8, bias=False)
        self.readout = torch.nn.Linear(8, 50, bias=False)


MUON = "partition({{'{}': adamw(lr=3e-4, weight_decay=0.0), 'matrix': muon(lr=0.02), '*': sgd(lr=0.1)}})"


def test_an_embedding_and_a_head_under_muon_are_found_by_the_model() -> None:
    model = LanguageModel()
    spec = "partition({'matrix': muon(lr=0.02), '*': adamw(lr=3e-4, weight_decay=0.0)})"
    told = findings(spec, model, model=model)["embedding-or-head"]
    assert "table.weight, readout.weight" in told and "block" not in told and "norm" not in told
    assert "embedding-or-head" not in findings(spec.replace("muon(lr=0.02)", "adamw(lr=1e-3)"), model, model=model)
    assert "embedding-or-head" not in findings(MUON.format("[tr]*"), model, model=model)


def test_without_the_model_they_are_known_by_their_names() -> None:
    names = ["wte.weight", "h.0.attn.weight", "h.0.output.dense.weight", "lm_head.weight", "embed_tokens.weight"]
    named = [(name, torch.nn.Parameter(0.1 * torch.randn(8, 8))) for name in names]
    told = findings("muon(lr=0.02)", named)["embedding-or-head"]
    assert "wte.weight, lm_head.weight, embed_tokens.weight" in told and "attn" not in told and "dense" not in told


def test_a_base_that_makes_updates_orthogonal_is_known_by_what_it_does() -> None:
    class Renamed(torch.optim.Muon):
        """Muon under another name."""

    head = [("head.weight", torch.nn.Parameter(torch.randn(8, 8)))]
    assert "Renamed" in str(metaopt.explain(Renamed(head, lr=0.02)).findings)
    for base in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor):
        assert "embedding-or-head" not in str(metaopt.explain(base(head, lr=0.02)).findings)


def test_a_model_on_the_meta_device_and_an_empty_group_are_explained() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(4, 4, bias=False)
    assert metaopt.explain(torch.optim.AdamW(model.parameters(), lr=0.1), model).findings == ()
    assert metaopt.explain(torch.optim.AdamW([{"params": []}], lr=0.1)).findings == ()
