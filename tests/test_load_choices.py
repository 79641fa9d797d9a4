"""Whose values are in force after a load: the rule, the choice, and what is said of it."""

import copy
import warnings
from typing import Any

import pytest
import torch
from small_runs import assert_same, everything, small_model, train

import metaopt


def stack_of(spec: str, total_steps: int | None = None, seed: int = 0, **rules: Any) -> tuple[Any, metaopt.Stack]:
    model = small_model(seed)
    return model, metaopt.build(metaopt.groups(model, **rules), spec, total_steps=total_steps)


def saved_after(spec: str, steps: int, total_steps: int | None = None, **rules: Any) -> dict[str, Any]:
    model, opt = stack_of(spec, total_steps, **rules)
    train(model, opt, range(steps))
    return copy.deepcopy(opt.state_dict())


THEN = "clip_grad_norm(1.0) | adamw(lr=0.01, weight_decay=0.1) | lookahead(k=5, alpha=0.5)"
NOW = "clip_grad_norm(0.1) | adamw(lr=0.002, weight_decay=0.1) | lookahead(k=7, alpha=0.5)"


def test_one_warning_lists_every_constant_that_differs_and_says_that_the_checkpoint_s_are_in_force() -> None:
    _, opt = stack_of(NOW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(saved_after(THEN, 3))
    (warning,) = caught
    expected = "clip_grad_norm.max_norm=1 (this stack: 0.1), lookahead.k=5 (this stack: 7), lr=0.01 (this stack: 0.002)"
    assert f"from the checkpoint: {expected}" in str(warning.message)
    assert "keep='live'" in str(warning.message)
    assert warning.filename == __file__
    assert warning.category is metaopt.MetaoptWarning
    (entry,) = opt.param_groups
    assert [entry[key] for key in ("clip_grad_norm.max_norm", "lookahead.k", "lr")] == [1.0, 5, 0.01]
    assert [(d.key, d.value) for d in opt.load_report.differences] == [
        ("clip_grad_norm.max_norm", 1.0),
        ("lookahead.k", 5),
        ("lr", 0.01),
    ]


@pytest.mark.parametrize(("keep", "values"), [("live", [0.1, 7, 0.002]), ("saved", [1.0, 5, 0.01])])
def test_a_choice_is_obeyed_without_a_warning_and_is_in_the_report(keep: Any, values: list[float]) -> None:
    model, opt = stack_of(NOW)
    opt.load_state_dict(saved_after(THEN, 3), keep=keep)
    (entry,) = opt.param_groups
    assert [entry[key] for key in ("clip_grad_norm.max_norm", "lookahead.k", "lr")] == values
    assert [d.value for d in opt.load_report.differences] == values
    train(model, opt, range(3, 8))
    assert opt.updates == 8


def test_a_client_that_loads_by_itself_obeys_what_the_stack_was_told() -> None:
    _, opt = stack_of(NOW)
    assert opt.resume_with(keep="live") is opt
    for loader in (opt, copy.deepcopy(opt)):
        loader.load_state_dict(state_dict=saved_after(THEN, 3))
        assert loader.param_groups[0]["lr"] == 0.002
    opt.load_state_dict(saved_after(THEN, 3), keep="saved")
    assert opt.param_groups[0]["lr"] == 0.01


def test_the_same_constants_are_loaded_without_a_word() -> None:
    for spec in (THEN, THEN.replace("lr=0.01", "lr=warmup(cosine(0.01), 2)")):
        _, opt = stack_of(spec, 20)
        opt.load_state_dict(saved_after(spec, 3, 20))
        assert opt.load_report.differences == []
        assert str(opt.load_report) == "taken: base, clip_grad_norm, lookahead"


def test_values_of_groups_are_listed_once_and_taken_group_by_group() -> None:
    then = {"*.bias": {"weight_decay": 0.0, "lr_scale": 0.5}}
    now = {"*.bias": {"weight_decay": 0.01, "lr_scale": 0.5}}
    spec = "adamw(lr=0.01, weight_decay=0.1)"
    _, opt = stack_of(spec, rules=now)
    with pytest.warns(UserWarning, match=r"from the checkpoint: weight_decay=0 \(this stack: 0.01\)\."):
        opt.load_state_dict(saved_after(spec, 3, rules=then))
    assert [entry["weight_decay"] for entry in opt.param_groups] == [0.0, 0.1]
    assert [entry["lr"] for entry in opt.param_groups] == [0.005, 0.01]


def test_the_factor_of_a_group_s_rate_goes_with_the_rate() -> None:
    spec = "adamw(lr=cosine(0.01))"
    saved = saved_after(spec, 3, 20, rules={"*.bias": {"lr_scale": 0.5}})
    _, opt = stack_of(spec, 20, rules={"*.bias": {"lr_scale": 0.1}})
    opt.load_state_dict(saved, keep="live")
    own = opt.param_groups[1]["lr"]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * own)
    _, opt = stack_of(spec, 20, rules={"*.bias": {"lr_scale": 0.1}})
    with pytest.warns(UserWarning, match=r"lr_scale=0.5 \(this stack: 0.1\)"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.5 * own)


def test_a_bare_checkpoint_does_not_lose_a_factor_of_the_rate_under_a_schedule() -> None:
    model, opt = stack_of("adamw(lr=cosine(0.01))", 20, rules={"*.bias": {"lr_scale": 0.1}})
    bare = torch.optim.AdamW([{"params": group["params"]} for group in opt.param_groups], lr=0.01)
    train(model, bare, range(3))
    opt.load_state_dict(bare.state_dict(), keep="saved")
    assert opt.updates == 3
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * opt.param_groups[1]["lr"])


def test_what_decides_which_state_there_is_stays_and_is_warned_of_under_either_choice() -> None:
    _, opt = stack_of("adamw(lr=0.01) | ema(0.9, average_dtype='float32')")
    with pytest.warns(UserWarning, match="kept as this stack has it: ema.average_dtype='float32'"):
        opt.load_state_dict(saved_after("adamw(lr=0.01) | ema(0.9)", 3), keep="saved")


def test_a_rate_that_a_torch_scheduler_drives_is_no_difference_and_goes_on() -> None:
    def driven(lr: float) -> tuple[Any, metaopt.Stack, Any]:
        model, opt = stack_of(f"adamw(lr={lr}) | ema(0.9)")
        return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)

    model, opt, scheduler = driven(0.01)
    train(model, opt, range(6), after=scheduler.step)
    saved = copy.deepcopy((opt.state_dict(), scheduler.state_dict()))
    for keep in (None, "live", "saved"):
        _, again, late = driven(0.01)
        again.load_state_dict(saved[0], keep=keep)
        late.load_state_dict(saved[1])
        assert again.param_groups[0]["lr"] == opt.param_groups[0]["lr"] != 0.01
    _, other, late = driven(0.02)
    with pytest.warns(UserWarning, match=r"lr=0.00\d+ \(this stack: 0.02\)"):
        other.load_state_dict(saved[0])


def test_what_a_base_counts_in_its_groups_is_state_and_no_constant() -> None:
    schedulefree = pytest.importorskip("schedulefree")

    def made() -> tuple[Any, metaopt.Stack]:
        model = small_model()
        base = schedulefree.AdamWScheduleFree(model.named_parameters(), lr=0.01)
        opt = metaopt.wrap(base, "clip_grad_norm(1.0)")
        opt.train()
        return model, opt

    model, opt = made()
    train(model, opt, range(4))
    _, again = made()
    again.load_state_dict(copy.deepcopy(opt.state_dict()), keep="live")
    assert again.param_groups[0]["k"] == 4
    assert again.load_report.differences == []


@pytest.mark.parametrize("wrong", ["mine", True, 1])
def test_a_choice_that_does_not_exist_is_refused(wrong: Any) -> None:
    _, opt = stack_of(NOW)
    with pytest.raises(metaopt.CheckpointError, match="keep must be 'live', 'saved' or None"):
        opt.load_state_dict(saved_after(THEN, 3), keep=wrong)
    with pytest.raises(metaopt.CheckpointError, match="keep must be"):
        opt.resume_with(keep=wrong)


# ---- another length of the run

COSINE = "adamw(lr=cosine(0.01)) | ema(0.9)"


def test_a_run_is_extended_on_request_with_the_schedules_of_the_longer_one() -> None:
    saved = saved_after(COSINE, 20, 20)
    model, opt = stack_of(COSINE, 40)
    before = everything(model, opt)
    with pytest.raises(metaopt.CheckpointError, match="extend=True"):
        opt.load_state_dict(saved)
    assert_same(everything(model, opt), before)
    opt.load_state_dict(saved, extend=True)
    assert opt.updates == 20
    assert opt.param_groups[0]["lr"] == pytest.approx(metaopt.cosine(0.01)(20, 40))
    assert "total_steps: 20 extended to 40" in str(opt.load_report)
    assert "from this stack's schedule after 20 updates: lr=0.005" in str(opt.load_report)
    train(model, opt, range(20, 40))
    assert opt.param_groups[0]["lr"] == pytest.approx(0.0)
    _, longer = stack_of(COSINE, 40)
    longer.load_state_dict(opt.state_dict())  # saved again, it is the longer run's


def test_a_client_extends_a_run_if_the_stack_was_told_so() -> None:
    _, opt = stack_of(COSINE, 40)
    opt.resume_with(extend=True).load_state_dict(saved_after(COSINE, 20, 20))
    assert opt.total_steps == opt.param_groups[0]["metaopt.total_steps"] == 40


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("adamw(lr=0.01) | ema(0.9)", 5),
        ("adamw(lr=warmup(constant(0.01), 9)) | ema(0.9)", 5),
        ("adamw(lr=cosine(0.01, steps=15)) | ema(0.9)", 5),
        # the parts of the run in which the lengths differ are over, or both are to come alike
        ("adamw(lr=warmup(constant(0.01), 0.25)) | ema(0.9)", 12),
    ],
)
@pytest.mark.parametrize("length", [10, 40])
def test_another_length_is_loaded_without_a_word_if_no_value_to_come_depends_on_it(
    spec: str, steps: int, length: int
) -> None:
    _, opt = stack_of(spec, length)
    opt.load_state_dict(saved_after(spec, steps, 20))
    assert opt.load_report.differences == []
    assert opt.total_steps == length


@pytest.mark.parametrize(
    "spec", ["adamw(lr=wsd(0.01, decay=0.2)) | ema(0.9)", "adamw(lr=warmup(constant(0.01), 0.25))"]
)
def test_another_length_is_refused_while_a_value_to_come_depends_on_it(spec: str) -> None:
    _, opt = stack_of(spec, 40)
    with pytest.raises(metaopt.CheckpointError, match=r"total_steps=20.*total_steps=40"):
        opt.load_state_dict(saved_after(spec, 3, 20))


# ---- the count


@pytest.mark.parametrize(
    "made",
    [
        lambda params: torch.optim.AdamW(params, lr=0.01),
        lambda params: torch.optim.Adagrad(params, lr=0.01),
        lambda params: torch.optim.RMSprop(params, lr=0.01),
    ],
)
def test_a_bare_checkpoint_goes_on_at_the_count_of_the_base(made: Any) -> None:
    model = small_model()
    bare = made(model.parameters())
    train(model, bare, range(30))
    opt = metaopt.wrap(made(small_model().parameters()), "ema(0.9)")
    with pytest.warns(UserWarning, match="updates: 30, as the base counts them"):
        opt.load_state_dict(bare.state_dict())
    assert opt.updates == 30
    assert opt.load_report.counted == "base"


def test_the_count_is_that_of_the_parameter_with_the_most_updates() -> None:
    model = small_model()
    bare = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, bare, range(3))
    for step in range(4):
        train(model, bare, [step], call=lambda: (setattr(model[0].weight, "grad", None), bare.step()))
    _, opt = stack_of("adamw(lr=cosine(0.01))", 20)
    opt.load_state_dict(bare.state_dict(), keep="saved")
    assert opt.updates == 7
    assert opt.param_groups[0]["lr"] == pytest.approx(metaopt.cosine(0.01)(7, 20))


@pytest.mark.parametrize(("name", "count"), [("Prodigy", 7), ("ScheduleFreeAdamW", 7), ("MADGRAD", 0)])
def test_a_base_counts_as_one_step_of_it_shows(name: str, count: int) -> None:
    kind = getattr(pytest.importorskip("pytorch_optimizer"), name)
    model = small_model()
    bare = kind(model.parameters(), lr=0.01)
    train(model, bare, range(7))  # the first begins to count at 1; the last counts beside its parameters' state
    opt = metaopt.wrap(kind(small_model().parameters(), lr=0.01), "clip_grad_norm(1.0)")
    with pytest.warns(UserWarning):
        opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert (opt.updates, opt.load_report.counted) == (count, "base" if count else "nowhere")


def test_an_interval_of_a_bare_base_is_not_taken_for_its_count() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    model = small_model()
    bare = pytorch_optimizer.Ranger(model.parameters(), lr=0.01, k=6)
    train(model, bare, range(2))
    opt = metaopt.wrap(pytorch_optimizer.Ranger(model.parameters(), lr=0.01, k=6), "clip_grad_norm(1.0)")
    with pytest.warns(UserWarning):
        opt.load_state_dict(bare.state_dict())
    assert opt.updates == 2


def test_a_base_that_does_not_count_is_said_to_begin_at_0_and_the_count_can_be_set() -> None:
    model = small_model()
    bare = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, bare, range(30))
    model, opt = stack_of("sgd(lr=cosine(0.01), momentum=0.9)", 60)
    with pytest.warns(UserWarning, match=r"does not say how many were made; set opt\.updates"):
        opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert opt.updates == 0
    opt.updates = 30
    assert {entry["metaopt.updates"] for entry in opt.param_groups} == {30}
    assert opt.param_groups[0]["lr"] == pytest.approx(metaopt.cosine(0.01)(30, 60))
    train(model, opt, range(1))
    assert opt.updates == 31
    for wrong in (-1, 1.5, True, None, "30"):
        with pytest.raises(metaopt.StepError, match="updates must be an integer from 0 up, got"):
            opt.updates = wrong
    assert opt.updates == 31


# ---- the version of the format


def test_the_checkpoint_carries_the_version_of_its_format_and_a_later_one_is_refused() -> None:
    saved = saved_after(THEN, 3)
    assert {entry["metaopt.format"] for entry in saved["param_groups"]} == {2}
    model, opt = stack_of(THEN)
    before = everything(model, opt)
    for later in (3, "two"):
        changed = copy.deepcopy(saved)
        changed["param_groups"][0]["metaopt.format"] = later
        with pytest.raises(metaopt.CheckpointError, match=f"format {later!r}, .* formats up to 2"):
            opt.load_state_dict(changed)
    assert_same(everything(model, opt), before)
    del saved["param_groups"][0]["metaopt.format"]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["metaopt.format"] == 2


# ---- what is no other setting


def test_a_rate_that_was_lowered_in_the_run_is_no_other_setting() -> None:
    model, opt = stack_of("adamw(lr=0.01) | ema(0.9)")
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    train(model, opt, range(3), after=lambda: scheduler.step(1.0))
    assert opt.param_groups[0]["lr"] < 0.01
    _, again = stack_of("adamw(lr=0.01) | ema(0.9)")
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    _, later = stack_of("adamw(lr=0.01) | ema(0.9)")
    later.load_state_dict(copy.deepcopy(again.state_dict()), keep="live")
    assert later.param_groups[0]["lr"] == 0.01


def test_a_rate_that_was_set_by_hand_before_the_load_is_reported() -> None:
    saved = saved_after("adamw(lr=0.01) | ema(0.9)", 3)
    _, opt = stack_of("adamw(lr=0.01) | ema(0.9)")
    opt.param_groups[0]["lr"] = 0.001
    with pytest.warns(UserWarning, match=r"lr=0.01 \(this stack: 0.001\)"):
        opt.load_state_dict(copy.deepcopy(saved))
    opt.param_groups[0]["lr"] = 0.001
    opt.load_state_dict(saved, keep="live")
    assert opt.param_groups[0]["lr"] == 0.001


def test_the_other_setting_is_told_at_every_resume_until_the_choice_is_made() -> None:
    saved = saved_after("adamw(lr=0.01) | ema(0.9)", 3)
    for _ in range(2):
        _, opt = stack_of("adamw(lr=0.001) | ema(0.9)")
        with pytest.warns(UserWarning, match=r"lr=0.01 \(this stack: 0.001\)"):
            opt.load_state_dict(saved)
        saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved, keep="saved")
    _, other = stack_of("adamw(lr=0.001) | ema(0.9)")
    other.load_state_dict(saved, keep="live")
    _, again = stack_of("adamw(lr=0.001) | ema(0.9)")
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    assert again.param_groups[0]["lr"] == 0.001


def test_a_rate_left_by_a_schedule_is_told_where_there_is_no_schedule_any_more() -> None:
    _, opt = stack_of("adamw(lr=0.01) | ema(0.9)")
    with pytest.warns(UserWarning, match=r"lr=0.005 \(this stack: 0.01\)"):
        opt.load_state_dict(saved_after("adamw(lr=cosine(0.01)) | ema(0.9)", 10, 20))


def test_a_schedule_without_a_value_at_the_loaded_count_leaves_everything_as_it_was() -> None:
    saved = saved_after("adamw(lr=0.1)", 6)
    ends = False

    def decay(updates: int) -> float:
        if ends and updates > 4:
            raise ValueError("no value")
        return 0.9 / (updates + 1)

    model = small_model()
    opt = metaopt.build(metaopt.groups(model), metaopt.adamw(lr=0.1) | metaopt.ema(decay=decay))
    twin = small_model()
    plain = metaopt.build(metaopt.groups(twin), metaopt.adamw(lr=0.1) | metaopt.ema(decay=decay))
    train(model, opt, range(2))
    train(twin, plain, range(2))
    ends = True
    with pytest.raises(ValueError, match="no value"):
        opt.load_state_dict(saved)
    train(model, opt, range(2, 4))
    train(twin, plain, range(2, 4))
    assert_same(everything(model, opt), everything(twin, plain))
