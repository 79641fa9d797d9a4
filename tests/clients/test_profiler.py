"""What torch's profilers see of a stack."""

import gc

import torch
from small_runs import small_model, train
from torch.profiler import ProfilerActivity, profile

import metaopt

SPEC = "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=2)"


def names_and_counts(opt: torch.optim.Optimizer, model: torch.nn.Module, steps: int) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        train(model, opt, range(steps))
    return {event.key: event.count for event in seen.key_averages() if event.key.startswith("Optimizer.")}


def test_a_step_bears_the_stack_s_name_and_is_recorded_once() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), SPEC)
    expected = {"Optimizer.step#Stack.step": 3, "Optimizer.zero_grad#Stack.zero_grad": 3}
    assert names_and_counts(opt, model, 3) == expected


def test_the_bare_base_bears_its_own_name_also_after_one_was_wrapped() -> None:
    model = small_model()
    train(model, metaopt.build(model.named_parameters(), SPEC), range(1))
    bare = torch.optim.AdamW(model.parameters())
    assert names_and_counts(bare, model, 2)["Optimizer.step#AdamW.step"] == 2


def test_the_memory_profiler_tells_state_from_gradients_and_parameters() -> None:
    from torch.profiler._memory_profiler import Category

    torch.manual_seed(0)
    model = torch.nn.Linear(64, 48)
    opt = metaopt.build(model.named_parameters(), SPEC)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True) as seen:
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(2, 64)).square().sum().backward()
            opt.step()
    memory = seen._memory_profile()
    weight = model.weight.numel() * 4
    kept = {
        key
        for _, _, (key, version), size in memory.timeline
        if size == weight and memory._categories.get(key, version) == Category.OPTIMIZER_STATE
    }
    # both moments of the weight, and its slow copy
    assert len(kept) >= 3
    assert opt.state[model.weight].keys() == {"step", "exp_avg", "exp_avg_sq", "lookahead.slow"}
