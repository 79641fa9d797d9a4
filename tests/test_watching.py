"""Hooks and the profiler see a stack's `step()` as they see torch's, though nothing is paid where no one looks."""

import inspect

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import metaopt


def made():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p, metaopt.build([p], "adamw | lookahead(k=2)")


@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
def test_a_hook_of_each_kind_fires_once_also_when_it_comes_and_goes_between_steps(kind):
    _, opt = made()
    seen = []

    def hook(*told):
        seen.append(told)

    register = {
        "pre": opt.register_step_pre_hook,
        "post": opt.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[kind]
    opt.step()
    handle = register(hook)
    opt.step()
    handle.remove()
    opt.step()
    assert seen == [(opt, (opt,), {})]
    assert opt.updates == 3


def test_a_pre_hook_may_replace_the_arguments():
    p, opt = made()

    def closure():
        return p.square().sum()

    opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert opt.step() == 3.0


def test_the_profiler_names_each_step_once_and_the_base_s_not_at_all():
    _, opt = made()
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        opt.step()
        opt.step()
    opt.step()
    names = [event.name for event in recorded.events() if event.name.startswith("Optimizer.step#")]
    assert names == ["Optimizer.step#Stack.step"] * 2


def test_the_step_keeps_its_signature_and_is_wrapped_once():
    _, opt = made()
    closure, keywords = inspect.signature(opt.step).parameters.values()
    assert closure.name == "closure" and keywords.kind is keywords.VAR_KEYWORD  # those go to the base
    assert inspect.signature(opt.step).parameters["closure"].default is None
    wrapped = type(opt).step
    made()
    assert type(opt).step is wrapped
