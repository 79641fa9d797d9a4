"""The contract of what acts on the update: on_update, after_updates, scalars, histories, noise, computed averages."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch

import metaopt
from metaopt.construction.run_description import _hyperparameters
from metaopt.engine.views import blocks as engine_blocks
from metaopt.engine.views.group_view import GroupView

Params = list[torch.nn.Parameter]


def weights(number: int = 3, dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)) for _ in range(number)]


def set_gradients(params: Params, at: int) -> None:
    generator = torch.Generator().manual_seed(100 + at)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(opt: metaopt.Stack, params: Params, steps: range) -> None:
    for at in steps:
        set_gradients(params, at)
        opt.step()


def copies(params: Params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def same(left: list[torch.Tensor] | Params, right: list[torch.Tensor] | Params) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def two_groups(params: Params, parts: object, lr: float = 0.1) -> metaopt.Stack:
    return metaopt.wrap(torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=lr), parts)


class Halve(metaopt.Wrapper):
    """u <- u / 2."""

    def on_update(self, group: metaopt.Group) -> None:
        torch._foreach_mul_(group.update, 0.5)


class HalveEvery(metaopt.Wrapper, every="k"):
    """u <- u / 2 at every k-th update."""

    k: int = metaopt.hyper(2, ge=1)

    def on_update(self, group: metaopt.Group) -> None:
        torch._foreach_mul_(group.update, 0.5)


class HalveAll(metaopt.Wrapper):
    """u <- u / 2, all groups at once."""

    def after_updates(self, groups: metaopt.Groups) -> None:
        for group in groups:
            torch._foreach_mul_(group.update, 0.5)


class Numbers(metaopt.Wrapper):
    """Counts in every kind of number, and keeps the last norms."""

    n: int = metaopt.hyper(2, ge=1, per_group=False)
    whole = metaopt.scalar(1.0, per="run")
    own = metaopt.scalar(2.0)
    each = metaopt.scalar(0.5, per="parameter")
    sizes = metaopt.history("n", per="run")

    def after_updates(self, groups: metaopt.Groups) -> None:
        groups.whole.add_(1.0)
        groups.push("sizes", groups.norm_of("update"))
        for group in groups:
            group.own.mul_(2.0)
            torch._foreach_add_(group.each, 1.0)


class Midway(metaopt.Wrapper):
    """Shows the mean of the weights and a slow average: a tensor that is nowhere in the state."""

    slow = metaopt.start()
    before = metaopt.previous()

    def after_update(self, group: metaopt.Group) -> None:
        torch._foreach_lerp_(group.slow, group.before, 0.5)

    def averaged(self, group: metaopt.Group) -> list[torch.Tensor]:
        return list(torch._foreach_add(group.slow, group.params))


class Fails(metaopt.Wrapper):
    """Raises at its n-th call."""

    n: int = metaopt.hyper(1)
    kept = metaopt.zeros()
    calls = 0

    def on_update(self, group: metaopt.Group) -> None:
        type(self).calls += 1
        if type(self).calls == self.n:
            raise ArithmeticError("on the update")


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    Fails.calls = 0


# ---- on_update and after_updates


@pytest.mark.parametrize("part", [Halve, HalveAll])
@pytest.mark.parametrize("block", [12, 1 << 19])
def test_half_an_update_is_half_the_rate(
    part: Callable[[], metaopt.Wrapper], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_blocks, "CPU_BLOCK", block)
    params, plain = weights(), weights()
    train(two_groups(params, part()), params, range(4))
    bare = torch.optim.AdamW([{"params": plain}], lr=0.05, weight_decay=0.01)
    for at in range(4):
        set_gradients(plain, at)
        bare.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-6)


def test_a_part_that_is_due_every_second_time_leaves_the_other_updates() -> None:
    params, rates = weights(), [0.1, 0.05, 0.1, 0.05]
    plain = weights()
    bare = torch.optim.SGD(plain, lr=0.1)
    train(metaopt.wrap(torch.optim.SGD(params, lr=0.1), HalveEvery(2)), params, range(4))
    for at, rate in enumerate(rates):
        bare.param_groups[0]["lr"] = rate
        set_gradients(plain, at)
        bare.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-6)


def test_a_late_momentum_of_a_fused_base_begins_also_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_blocks, "CPU_BLOCK", 24)
    params, plain = weights(), weights()
    runs = [
        (params, metaopt.wrap(torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True), Halve())),
        (plain, metaopt.wrap(torch.optim.SGD(plain, lr=0.1, momentum=0.9), Halve())),
    ]
    for members, opt in runs:
        for at in range(4):
            set_gradients(members, at)
            if at < 2:
                members[1].grad = None
            opt.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-6)


def test_a_keyword_that_the_base_does_not_take_is_refused_also_with_parts_on_the_update() -> None:
    params = weights()
    opt = metaopt.wrap(torch.optim.AdamW(params, lr=0.1), Halve())
    set_gradients(params, 0)
    with pytest.raises(TypeError):
        opt.step(unknown=1)


def test_the_moments_are_there_at_the_first_update() -> None:
    class Sums(metaopt.Wrapper):
        """Adds each moment up."""

        sums = metaopt.moments()

        def on_update(self, group: metaopt.Group) -> None:
            for key, moments in group.base_moments.items():
                torch._foreach_add_(group.sums[key], moments)

    params = weights()
    opt = metaopt.wrap(torch.optim.AdamW(params, lr=0.1), Sums())
    train(opt, params, range(1))
    for p in params:
        assert opt.state[p]["sums.sums.exp_avg"].any()
        assert torch.equal(opt.state[p]["sums.sums.exp_avg"], opt.state[p]["exp_avg"])


# ---- an update that fails


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_that_fails_leaves_the_weights_and_whole_state(compiled: bool) -> None:
    params = weights()
    opt = metaopt.wrap(torch.optim.AdamW(params, lr=0.1), metaopt.accumulate(1) | Fails())
    before = copies(params)
    set_gradients(params, 0)
    step = torch.compile(opt.step, backend="eager") if compiled else opt.step
    with pytest.raises(ArithmeticError):
        step()
    assert same(before, params)
    assert opt.updates == 0
    assert all(p.grad is None for p in params)  # what was lent for the update
    assert all(opt.state[p].keys() >= {"exp_avg", "accumulate.sum", "fails.kept"} for p in params)
    torch.compiler.reset()


def test_a_part_that_fails_between_two_blocks_leaves_groups_and_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_blocks, "CPU_BLOCK", 12)
    params = weights()
    opt = metaopt.wrap(torch.optim.AdamW(params, lr=0.1), Fails(2))
    before = copies(params)
    set_gradients(params, 0)
    with pytest.raises(ArithmeticError):
        opt.step()
    assert len(opt.param_groups[0]["params"]) == 3
    assert [torch.equal(a, b) for a, b in zip(before, params, strict=True)] == [False, True, True]
    assert params[2] not in opt.state
    train(opt, params, range(1))
    assert all(opt.state[p].keys() >= {"exp_avg", "fails.kept"} for p in params)


def test_a_part_that_fails_behind_the_update_does_not_take_it_back() -> None:
    params, twin = weights(), weights()
    opt = metaopt.wrap(torch.optim.SGD(params, lr=0.1), metaopt.lookahead(k=5) | Fails())
    set_gradients(params, 0)
    with pytest.raises(ArithmeticError):
        opt.step()
    train(metaopt.wrap(torch.optim.SGD(twin, lr=0.1), metaopt.lookahead(k=5)), twin, range(1))
    assert opt.updates == 1
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q)


# ---- numbers and histories


def test_numbers_of_the_run_stay_one_after_a_load_and_in_copies() -> None:
    params, others = weights(), weights()
    opt, fresh = two_groups(params, Numbers()), two_groups(others, Numbers())
    train(opt, params, range(3))
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    for run in (fresh, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        run.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        first, second, added = run.param_groups
        assert first["numbers.whole"] is second["numbers.whole"] is added["numbers.whole"]
        assert first["numbers.whole"] is not opt.param_groups[0]["numbers.whole"]
        assert first["numbers.sizes"] is added["numbers.sizes"]
        assert [float(g["numbers.own"]) for g in run.param_groups] == [16.0, 16.0, 2.0]
        assert float(first["numbers.whole"]) == 4.0
        assert [float(s["numbers.each"]) for s in run.state.values()] == [3.5] * 3


def test_a_history_holds_the_last_values_oldest_first() -> None:
    params = weights()
    opt = two_groups(params, Numbers())
    norms = []
    for at in range(3):
        before = copies(params)
        train(opt, params, range(at, at + 1))
        changes = [(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)]
        norms.append(float(torch.cat(changes).norm()))
        kept = opt.param_groups[0]["numbers.sizes"].tolist()
        assert math.isnan(kept[0]) == (at == 0)
        assert kept[1] == pytest.approx(norms[-1], rel=1e-5)
    assert kept == pytest.approx(norms[1:], rel=1e-5)


def test_a_checkpoint_without_the_part_starts_its_numbers_fresh() -> None:
    params, others = weights(), weights()
    opt = two_groups(params, Numbers())
    train(opt, params, range(3))
    bare = torch.optim.AdamW([{"params": others[:1]}, {"params": others[1:]}], lr=0.1)
    with pytest.warns(UserWarning, match="started fresh: numbers"):
        opt.load_state_dict(bare.state_dict())
    for group in opt.param_groups:
        assert float(group["numbers.whole"]) == 1.0
        assert float(group["numbers.own"]) == 2.0
        assert group["numbers.sizes"].isnan().all()


def test_reset_state_sets_numbers_to_what_they_were_at_first() -> None:
    params = weights()
    opt = two_groups(params, Numbers())
    train(opt, params, range(3))
    opt.reset_state("numbers")
    assert float(opt.param_groups[1]["numbers.own"]) == 2.0
    assert opt.param_groups[0]["numbers.sizes"].isnan().all()
    train(opt, params, range(1))
    assert float(opt.state[params[0]]["numbers.each"]) == 1.5


def test_numbers_on_the_device_are_no_hyperparameters() -> None:
    assert [key for key in _hyperparameters(two_groups(weights(), Numbers())) if "numbers" in key] == ["numbers.n"]


# ---- noise


class Jitter(metaopt.Wrapper):
    """u <- u + noise."""

    def on_update(self, group: metaopt.Group) -> None:
        torch._foreach_add_(group.update, group.random_like(group.update))


def test_noise_follows_names_and_updates_and_not_the_order_of_groups() -> None:
    def run(order: list[int], params: Params) -> metaopt.Stack:
        groups = [{"params": [(f"layer{i}", params[i])]} for i in order]
        return metaopt.wrap(torch.optim.SGD(groups, lr=0.1), Jitter())

    params, others, third = weights(), weights(), weights()
    opt, other = run([0, 1, 2], params), run([2, 0, 1], others)
    train(opt, params, range(2))
    train(other, others, range(2))
    assert same(params, others)
    with torch.no_grad():
        for p, q in zip(third, params, strict=True):
            p.copy_(q)
    resumed = run([0, 1, 2], third)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, params, range(2, 4))
    train(resumed, third, range(2, 4))
    assert same(params, third)


# ---- averages that are computed


def test_a_computed_average_is_shown_and_survives_a_checkpoint_from_inside() -> None:
    params = weights()
    opt = metaopt.wrap(torch.optim.AdamW(params, lr=0.1), Midway())
    train(opt, params, range(3))
    before = copies(params)
    expected = [opt.state[p]["midway.slow"] + p.detach() for p in params]
    with opt.averaged():
        shown, saved = copies(params), copy.deepcopy(opt.state_dict())
    assert same(shown, expected)
    assert same(before, params)
    others = [torch.nn.Parameter(w.clone()) for w in shown]
    resumed = metaopt.wrap(torch.optim.AdamW(others, lr=0.1), Midway())
    resumed.load_state_dict(saved)
    with resumed.averaged():
        assert same(shown, others)
        resumed.load_state_dict(saved)  # the model was loaded as well: it holds the average
    assert same(before, others)
    assert set(resumed.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "midway.slow"}
    train(opt, params, range(3, 5))
    train(resumed, others, range(3, 5))
    assert same(params, others)


def test_an_average_without_state_shows_the_weights_before_the_first_update() -> None:
    class Twice(metaopt.Wrapper):
        """Shows the weights doubled."""

        def averaged(self, group: metaopt.Group) -> list[torch.Tensor]:
            return list(torch._foreach_mul(group.params, 2.0))

    params = weights()
    opt = metaopt.wrap(torch.optim.AdamW(params, lr=0.1), Twice())
    set_gradients(params, 0)
    before = copies(params)
    with opt.averaged():
        assert same(before, params)
    assert not opt.state
    opt.step()
    before = copies(params)
    with opt.averaged():
        assert same([2.0 * w for w in before], params)
    assert same(before, params)


# ---- what is kept on another device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_what_all_groups_change_of_a_tensor_in_main_memory_is_kept() -> None:
    class Sums(metaopt.Wrapper):
        """seen <- seen + 2 g, in main memory."""

        seen = metaopt.zeros(device="cpu")

        def on_gradients(self, groups: metaopt.Groups) -> None:
            for group in groups:
                torch._foreach_add_(group.seen, group.grads)
            for group in groups:
                torch._foreach_add_(group.seen, group.grads)

    class Moves(metaopt.Wrapper):
        """way <- way + u, in main memory."""

        way = metaopt.zeros(device="cpu")

        def after_updates(self, groups: metaopt.Groups) -> None:
            for group in groups:
                torch._foreach_add_(group.way, group.update)

    params = [torch.nn.Parameter(p.detach().cuda()) for p in weights()]
    opt = metaopt.wrap(torch.optim.SGD(params, lr=0.5), Sums() | Moves())
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    saved = opt.state_dict()["state"]
    for entries in saved.values():
        assert entries["sums.seen"].device.type == "cpu"
        assert torch.equal(entries["sums.seen"], torch.full((4, 3), 4.0))
        torch.testing.assert_close(entries["moves.way"], torch.full((4, 3), -1.0), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("way", ["whole", "blocks", "blocks of blocks"])
def test_what_is_changed_of_blocks_of_a_fetched_tensor_is_kept(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(view: GroupView, key: str, originals: list[torch.Tensor]) -> list[torch.Tensor]:
        if key not in view._fetched:  # as from another device, of which there may be none here
            copies = [original.clone() for original in originals]
            view._fetched[key] = copies, originals, [copy._version for copy in copies]
        return view._fetched[key][0]

    class Sums(metaopt.Wrapper, elementwise=way == "blocks of blocks"):
        """seen <- seen + 2 w."""

        seen = metaopt.zeros(device="cpu")

        def after_update(self, group: metaopt.Group) -> None:
            for part in [group] if way == "whole" else group.blocks():
                torch._foreach_add_(part.seen, part.params)
                torch._foreach_add_(part.seen, part.params)

    monkeypatch.setattr(GroupView, "_fetch", fetch)
    monkeypatch.setattr(engine_blocks, "CPU_BLOCK", 5)
    params = weights()
    opt = metaopt.wrap(torch.optim.SGD(params, lr=0.5), Sums())
    expected = [torch.zeros_like(p) for p in params]
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        expected = [seen + p.detach() + p.detach() for seen, p in zip(expected, params, strict=True)]
    assert same([opt.state[p]["sums.seen"] for p in params], expected)


def test_what_is_logged_is_known_before_the_base_too() -> None:
    seen: set[int] = set()

    class Early(metaopt.Wrapper, every="k"):
        k: int = metaopt.hyper(1)

        def on_update(self, group: metaopt.Group) -> None:
            if group.is_logged:
                seen.add(group.updates + 1)

    params = weights()
    opt = metaopt.build(params, metaopt.sgd(lr=0.1) | Early(), log_every=4)
    train(opt, params, range(9))
    assert seen == {4, 8}
