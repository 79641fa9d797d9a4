"""Several bases in one stack: each parameter is updated as by its own part alone, and nothing leaks between them."""

import copy
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import metaopt

SPEC = """partition({
    '*.weight & matrix': muon(lr=cosine(0.02, steps=20)) | lookahead(k=2),
    '*': clip_grad_norm(0.1) | adamw(lr=0.01) | lookahead(k=3),
})"""


def small_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def train(model: torch.nn.Module, opts: list[torch.optim.Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        model.zero_grad()
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        for opt in opts:
            opt.step()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_every_part_updates_its_parameters_as_a_stack_of_its_own() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.build(model, SPEC)
    weights = [(n, p) for n, p in twin.named_parameters() if p.dim() == 2]
    biases = [(n, p) for n, p in twin.named_parameters() if p.dim() == 1]
    apart = [
        metaopt.build(weights, "muon(lr=cosine(0.02, steps=20)) | lookahead(k=2)"),
        metaopt.build(biases, "clip_grad_norm(0.1) | adamw(lr=0.01) | lookahead(k=3)"),
    ]
    train(model, [opt], 0, 13)
    train(twin, apart, 0, 13)
    assert same(model, twin)
    assert opt.updates == 13


def test_a_wrapper_around_acts_on_all_parts_together() -> None:
    model, twin = small_model(), small_model()
    parts = "partition({'*.weight': sgd(lr=0.5), '*': sgd(lr=0.5)})"
    opt = metaopt.build(model, f"clip_grad_norm(0.01) | {parts} | lookahead(k=2)")
    plain = metaopt.build(twin, "clip_grad_norm(0.01) | sgd(lr=0.5) | lookahead(k=2)")
    train(model, [opt], 0, 7)
    train(twin, [plain], 0, 7)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_factors_inside_and_around_multiply() -> None:
    model, twin = small_model(), small_model()
    inner = "clip_grad_norm(0.001, label='inner') | sgd(lr=0.5)"
    opt = metaopt.build(model, f"clip_grad_norm(0.01) | partition({{'*.weight': {inner}, '*': sgd(lr=0.5)}})")
    hand = torch.optim.SGD(twin.parameters(), lr=0.5)
    train(model, [opt], 0, 1)
    twin(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    torch.nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.dim() == 2], 0.001)
    hand.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_a_group_holds_its_own_part_s_hyperparameters_alone() -> None:
    opt = metaopt.build(small_model(), SPEC)
    muon, adamw = opt.param_groups
    assert "betas" not in muon and "momentum" not in adamw
    assert muon["metaopt.part"] == "*.weight & matrix" and adamw["metaopt.part"] == "*"
    assert "betas" not in opt.defaults and "momentum" not in opt.defaults and "lr" in opt.defaults
    assert (muon["lookahead.k"], adamw["lookahead.k"]) == (2, 3)


@pytest.mark.parametrize(
    ("patterns", "dealt"),
    [
        (["scalar", "vector", "matrix", "*"], {"gain": 0, "norm.weight": 1, "fc.weight": 2, "conv.weight": 3}),
        (["*.weight & vector", "*"], {"gain": 1, "norm.weight": 0, "norm.bias": 1, "fc.weight": 1}),
        (["*.weight", "matrix", "*"], {"gain": 2, "norm.weight": 0, "norm.bias": 2, "fc.weight": 0, "table": 1}),
        (["fc.* & *.weight&matrix", "[!f]*"], {"gain": 1, "fc.weight": 0, "conv.weight": 1}),
        (["*.Weight", "*"], None),  # capitals count
    ],
)
def test_the_first_pattern_of_which_every_term_fits_takes_the_parameter(patterns, dealt) -> None:
    shapes = {"gain": (), "norm.weight": (3,), "norm.bias": (3,), "fc.weight": (2, 3), "table": (4, 3)}
    shapes["conv.weight"] = (2, 3, 1, 1)
    used = list(shapes) if dealt is None else list(dealt)
    named = [(name, torch.nn.Parameter(torch.ones(shapes[name]))) for name in used]
    spec = "partition({" + ", ".join(f"{pattern!r}: sgd(lr=0.1)" for pattern in patterns) + "})"
    if dealt is None:
        with pytest.raises(metaopt.ParameterError, match="matches no parameter"):
            metaopt.build(named, spec)
        return
    found = {
        name: patterns.index(entry["metaopt.part"])
        for entry in metaopt.build(named, spec).param_groups
        for name in entry["param_names"]
    }
    assert found == dealt


def test_the_text_of_a_partition_builds_it_again() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.build(model, SPEC)
    again = metaopt.build(twin, str(opt.spec))
    assert str(again.spec) == str(opt.spec)
    train(model, [opt], 0, 7)
    train(twin, [again], 0, 7)
    assert same(model, twin)
    assert "0.02" in str(opt.spec)


def test_parts_as_objects_are_the_same_line() -> None:
    from metaopt import adamw, lookahead, muon, partition

    made = partition({"*.weight & matrix": muon(lr=0.02) | lookahead(k=2), "*": adamw(lr=0.01)})
    assert str(metaopt.build(small_model(), made).spec) == (
        "partition({'*.weight & matrix': muon(lr=0.02) | lookahead(k=2), '*': adamw(lr=0.01)})"
    )


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_checkpoint_a_copy_and_a_pickle_go_on_bit_for_bit(at: int) -> None:
    model = small_model()
    opt = metaopt.build(model, f"{SPEC} | ema(0.9)")
    train(model, [opt], 0, at)
    twins = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    loaded = small_model(1)
    loaded.load_state_dict(model.state_dict())
    resumed = metaopt.build(loaded, f"{SPEC} | ema(0.9)")
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, [opt], at, 12)
    for other, its in [*twins, (loaded, resumed)]:
        train(other, [its], at, 12)
        assert same(model, other)
        assert all(entry is own for chain in its.chains for entry, own in zip(
            chain.base.param_groups, [e for e in its.param_groups if chain.has_group(e)], strict=True))  # fmt: skip


def test_a_checkpoint_without_one_wrapper_of_one_part_loads_and_is_reported() -> None:
    model = small_model()
    less = metaopt.build(model, SPEC.replace(" | lookahead(k=3)", ""))
    train(model, [less], 0, 4)
    more = metaopt.build(model, f"{SPEC} | ema(0.9)")
    with pytest.warns(UserWarning, match="started fresh: ema"):
        more.load_state_dict(copy.deepcopy(less.state_dict()))
    assert more.updates == 4
    train(model, [more], 4, 8)


def test_a_checkpoint_with_other_parts_is_refused_and_nothing_changes() -> None:
    model = small_model()
    opt = metaopt.build(model, SPEC)
    train(model, [opt], 0, 3)
    before = copy.deepcopy(opt.state_dict())
    other = metaopt.build(small_model(), "partition({'*.bias': adamw(lr=0.1), '*.weight': adamw(lr=0.1)})")
    with pytest.raises(metaopt.CheckpointError):
        opt.load_state_dict(other.state_dict())
    assert str(opt.state_dict()) == str(before)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own checkpoint code
def test_distributed_checkpoint_makes_its_template_of_all_parts() -> None:
    model, twin = small_model(), small_model()
    opt, plain = metaopt.build(model, SPEC), metaopt.build(twin, SPEC)
    get_optimizer_state_dict(model, opt)
    train(model, [opt], 0, 5)
    train(twin, [plain], 0, 5)
    assert same(model, twin)
    fresh = small_model(2)
    fresh.load_state_dict(model.state_dict())
    resumed = metaopt.build(fresh, SPEC)
    set_optimizer_state_dict(fresh, resumed, copy.deepcopy(get_optimizer_state_dict(model, opt)))
    train(model, [opt], 5, 11)
    train(fresh, [resumed], 5, 11)
    assert same(model, fresh)


def test_a_torch_scheduler_drives_all_parts() -> None:
    opt = metaopt.build(small_model(), "partition({'*.weight': sgd(lr=0.1), '*': adamw(lr=0.01)})")
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.step()
    scheduler.step()
    assert [entry["lr"] for entry in opt.param_groups] == [0.05, 0.005]


def test_a_scheduler_that_cycles_momentum_is_refused_over_mixed_parts() -> None:
    opt = metaopt.build(small_model(), SPEC.replace("cosine(0.02, steps=20)", "0.02"))
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)


def test_a_new_group_goes_to_the_part_that_its_name_or_its_entry_says() -> None:
    model = small_model()
    opt = metaopt.build(model, SPEC)
    train(model, [opt], 0, 2)
    head = torch.nn.Linear(2, 2)
    opt.add_param_group({"params": [("head.weight", head.weight)]})
    opt.add_param_group({"params": [("head.bias", head.bias)], "metaopt.part": "*", "lookahead.k": 7})
    assert [entry["metaopt.part"] for entry in opt.param_groups[2:]] == ["*.weight & matrix", "*"]
    assert opt.param_groups[3]["lookahead.k"] == 7 and "momentum" in opt.param_groups[2]
    assert opt.param_groups[2]["metaopt.updates"] == 2
    for p in head.parameters():
        p.grad = torch.ones_like(p)
    before = head.weight.detach().clone()
    opt.step()
    assert not torch.equal(head.weight, before) and "momentum_buffer" in opt.state[head.weight]
    with pytest.raises(metaopt.ParameterError, match=r"metaopt\.part"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(metaopt.ParameterError, match="must be a part of this stack"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "metaopt.part": "nosuch"})


def test_averages_of_one_label_are_shown_together() -> None:
    model = small_model()
    opt = metaopt.build(model, "partition({'*.weight': sgd(lr=0.1) | ema(0.9), '*': sgd(lr=0.1) | ema(0.5)})")
    train(model, [opt], 0, 3)
    fast = [p.detach().clone() for p in model.parameters()]
    with opt.averaged():
        assert all(not torch.equal(p, f) for p, f in zip(model.parameters(), fast, strict=True))
    assert all(torch.equal(p, f) for p, f in zip(model.parameters(), fast, strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("partition({'*.weight': adamw})", "no part takes 0.bias"),
        ("partition({'*': adamw, 'head.*': sgd})", "matches no parameter"),
        ("partition({'*': adamw | adamw})", "one base"),
        ("partition({'*': partition({'*': adamw})})", "write all parts in one"),
        ("partition({'*': lbfgs})", "cannot be one of several bases"),
        ("partition({'*': sam | adamw})", "which all parts share"),
        ("partition({'*': accumulate(2) | adamw})", "which all parts count"),
        ("partition({'*': adamw | lookahead}) | lookahead", "label="),
        ("partition({'*': adamw, '*': sgd})", "twice"),
        ("partition({'* &': adamw})", "one side"),
        ("partition({1: adamw})", "does not allow"),
        ("partition({**adamw})", "does not allow"),
        ("partition({})", "dict of pipelines"),
        ("partition('*')", "dict of pipelines"),
        ("adamw({'a': sgd})", "does not allow"),
        ("partition", "parts"),
    ],
)
def test_a_mistake_in_a_partition_is_one_clear_sentence(spec: str, message: str) -> None:
    with pytest.raises(metaopt.MetaoptError, match=message):
        metaopt.build(small_model(), spec)


def test_parameters_without_names_cannot_be_partitioned() -> None:
    with pytest.raises(metaopt.ParameterError, match="chooses by name"):
        metaopt.build(small_model().parameters(), "partition({'*': adamw})")


def test_a_step_without_gradients_for_one_part_updates_the_others() -> None:
    model = small_model()
    opt = metaopt.build(model, "partition({'*.weight': clip_grad_norm(1.0) | adamw, '*': clip_grad_norm(1.0) | adamw})")
    weight, bias = model[0].weight, model[0].bias
    before = weight.detach().clone()
    bias.grad = torch.ones_like(bias)
    opt.step()
    assert torch.equal(weight, before) and opt.updates == 1


def test_a_factor_of_gradients_that_were_not_there_does_not_reach_what_is_lent_in_their_place() -> None:
    def end(spec: str, *, clip_each: bool) -> list[torch.Tensor]:
        x, y = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
        opt = metaopt.build([("x", x), ("y", y)], spec)
        # y has no gradient when the window ends, at which x alone is clipped
        for gradients in ((3.0, 4.0), (100.0, None)):
            for p, g in zip((x, y), gradients, strict=True):
                p.grad = None if g is None else torch.tensor([g], dtype=torch.float64)
            if clip_each:
                torch.nn.utils.clip_grad_norm_([x, y], 1.0)
            opt.step()
        return [x.detach(), y.detach()]

    parts = "partition({'x': sgd(lr=1.0), 'y': sgd(lr=1.0)})"
    found = end(f"clip_grad_norm(1.0) | accumulate(2) | {parts}", clip_each=False)
    torch.testing.assert_close(found, end(f"accumulate(2) | {parts}", clip_each=True))
    torch.testing.assert_close(found[1], torch.full_like(found[1], -0.4))


def test_a_new_group_that_says_its_part_needs_no_names_and_may_come_from_a_generator() -> None:
    opt = metaopt.build(small_model(), SPEC)
    head, tail = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    opt.add_param_group({"params": head.parameters(), "metaopt.part": "*"})
    opt.add_param_group({"params": tail.named_parameters(prefix="tail")})
    assert [len(entry["params"]) for entry in opt.param_groups[2:]] == [2, 1]
    assert [entry["metaopt.part"] for entry in opt.param_groups[2:]] == ["*", "*.weight & matrix"]
    for p in [*head.parameters(), *tail.parameters()]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert "exp_avg" in opt.state[head.bias] and "momentum_buffer" in opt.state[tail.weight]
    with pytest.raises(metaopt.ParameterError, match=r"metaopt\.part"):
        opt.add_param_group({"params": torch.nn.Linear(2, 2).parameters()})
