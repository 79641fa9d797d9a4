"""What newcomers write at first: torch's style, another library's, a wrapper with a misspelt hook."""

import pytest
import torch

import metaopt
from metaopt import Group, Groups, Wrapper, hyper


def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 1)


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(model().parameters(), lr=0.1)


def train(opt: torch.optim.Optimizer) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


def test_an_optimizer_that_is_printed_names_the_base_and_hides_what_the_engine_keeps() -> None:
    opt = metaopt.wrap(sgd(), "lookahead(k=3)")
    train(opt)
    first = repr(opt).splitlines()[0]
    assert first == "Stack(lookahead(k=3) around SGD, updates=1"
    assert "metaopt." not in repr(opt)
    assert "    lr: 0.1" in repr(opt).splitlines()
    assert repr(metaopt.build(model().parameters(), "sgd(lr=0.1) | ema")).startswith("Stack(sgd(lr=0.1) | ema()")


def test_the_style_of_wrapping_classes_is_refused_with_the_line_to_write() -> None:
    with pytest.raises(metaopt.SpecError, match=r"write metaopt\.wrap\(optimizer, lookahead\(\.\.\.\)\)"):
        metaopt.lookahead(sgd(), k=5)
    with pytest.raises(metaopt.SpecError, match=r"write metaopt\.build\(model, adamw\(\.\.\.\)\)"):
        metaopt.adamw(model().parameters(), lr=1e-3)
    with pytest.raises(metaopt.SpecError, match=r"write wrap\(SGD\(model\.parameters\(\), \.\.\.\), \.\.\.\)"):
        metaopt.wrap(torch.optim.SGD, "lookahead")


def test_arguments_in_another_order_and_a_method_that_is_not_called_are_answered_with_what_to_write() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(metaopt.SpecError, match=r"got Parameter: build\(model, spec\) takes the model first"):
        metaopt.build("adamw(lr=1e-3)", list(model.parameters()))
    with pytest.raises(metaopt.SpecError, match=r"got Linear.*: build\(model, spec\) takes the model first"):
        metaopt.build("adamw(lr=1e-3)", model)
    with pytest.raises(metaopt.ParameterError, match=r"got method: call it, parameters\(\)"):
        metaopt.build(model.parameters, "adamw(lr=1e-3)")


@pytest.mark.parametrize("value", ["low", None, [1.0], torch.ones(2)])
def test_a_recorded_value_that_is_not_a_number_is_refused_and_leaves_no_trace(value: object) -> None:
    model = torch.nn.Linear(2, 1)
    opt = metaopt.build(model, "sgd(lr=0.1)")
    for names in ({"loss": value}, {"val/loss": value}):
        with pytest.raises(metaopt.LogError, match=r"loss .*number, (got|not)"):
            opt.record(names)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    assert not [tag for tag in opt.metrics() if tag.endswith("/loss")]


def test_a_wrapper_without_a_hook_is_warned_of_by_the_name_that_was_meant() -> None:
    class AfterStep(Wrapper):
        """Does nothing."""

        def after_step(self, group: Group) -> None: ...

    with pytest.warns(metaopt.MetaoptWarning, match="AfterStep defines no hook.*Did you mean after_update"):
        metaopt.wrap(sgd(), AfterStep())
    with pytest.warns(metaopt.MetaoptWarning, match="AfterStep defines no hook"):
        metaopt.build(model().parameters(), metaopt.sgd(lr=0.1) | AfterStep())


def test_all_groups_know_the_count_and_refer_to_each_group_for_the_rest() -> None:
    counts: list[int] = []

    class Before(Wrapper):
        """Notes the count before the update."""

        def on_gradients(self, groups: Groups) -> None:
            counts.append(groups.updates)

    class Behind(Wrapper):
        """Notes the count behind the update."""

        def after_updates(self, groups: Groups) -> None:
            counts.append(groups.updates)

    opt = metaopt.wrap(sgd(), Before() | Behind())
    train(opt)
    train(opt)
    assert counts == [0, 1, 1, 2]

    class Reads(Wrapper):
        """Reads what belongs to each group."""

        def on_gradients(self, groups: Groups) -> None:
            _ = groups.grads  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match=r"for group in groups: group\.grads"):
        train(metaopt.wrap(sgd(), Reads()))

    class Plain(Wrapper):
        """Has a plain attribute."""

        k: int = 5
        share: float = hyper(0.5, doc="a hyperparameter")

        def before_update(self, group: Group) -> None:
            _ = group.k

    with pytest.raises(AttributeError, match=r"read as self\.k, or declared"):
        train(metaopt.wrap(sgd(), Plain()))
