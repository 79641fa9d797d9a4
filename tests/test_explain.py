"""`metaopt.explain`: what is done to which parameters, and what looks like a mistake."""

import json

import pytest
import torch
import warm

import metaopt
from metaopt.errors import CheckpointError
from metaopt.explaining.report import explain_checkpoint


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 2, bias=False))


def codes(optimizer, beside=None, **how) -> set[str]:
    return {finding.code for finding in metaopt.explain(optimizer, beside, **how).findings}


def stepped(optimizer, net):
    net(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return optimizer


def test_a_plain_optimizer_with_a_chosen_rate_raises_no_finding():
    net = model()
    assert codes(torch.optim.AdamW(net.parameters(), lr=3e-4), net) == set()


def test_a_row_tells_parameters_rate_decay_and_state():
    net = model()
    optimizer = stepped(torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=0.1), net)
    (row,) = metaopt.explain(optimizer, net).rows
    assert (row.tensors, row.elements, row.rate, row.decay) == (2, 48, 0.01, 0.1)
    # exp_avg and exp_avg_sq in float32, and a step count per tensor
    assert row.state_bytes == 2 * 48 * 4 + 2 * 4


def test_there_is_a_row_per_group_with_its_name():
    net = model()
    groups = [{"params": net[0].parameters(), "name": "body"}, {"params": net[1].parameters(), "lr": 1.0}]
    rows = metaopt.explain(torch.optim.SGD(groups, lr=0.1)).rows
    assert [(row.group, row.rate) for row in rows] == [("body", 0.1), ("1", 1.0)]


def test_explaining_changes_nothing():
    net = model()
    stack = stepped(metaopt.build(net, "sgd(lr=0.1, momentum=0.9) | lookahead(k=2)"), net)
    before = repr(stack.state_dict())
    metaopt.explain(stack, net)
    assert repr(stack.state_dict()) == before


def test_a_stack_tells_what_is_done_in_which_order():
    stack = metaopt.build(model(), "clip_grad_norm(1.0) | sgd(lr=0.1) | lookahead(k=7)", total_steps=70)
    (row,) = metaopt.explain(stack).rows
    assert [part.partition("(")[0] for part in row.order] == ["clip_grad_norm", "SGD", "lookahead"]
    assert "k=7" in row.order[2]


def test_a_wrapped_optimizer_is_explained_as_well():
    net = model()
    stack = metaopt.wrap(torch.optim.SGD(net.parameters(), lr=0.1), "lookahead(k=3)")
    explanation = metaopt.explain(stack, net)
    assert "lookahead" in str(explanation)
    assert explanation.findings == ()


def test_the_peak_and_the_end_of_a_schedule_are_told():
    stack = metaopt.build(model(), "sgd(lr=warmup(cosine(0.5), 10))", total_steps=100)
    (row,) = metaopt.explain(stack).rows
    assert row.rate == 0.0
    assert row.peak == pytest.approx(0.5)
    assert row.end is not None and 0 < row.end < 0.01


def test_the_rate_of_a_torch_scheduler_has_no_known_end():
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for find_schedulers, told in ((False, "torch scheduler"), (True, "StepLR")):
        (row,) = metaopt.explain(optimizer, find_schedulers=find_schedulers).rows
        assert (row.peak, row.end) == (None, None)
        assert row.order[-1] == told
    del scheduler


def test_the_objects_of_the_process_are_looked_through_only_if_asked_for(monkeypatch):
    net = model()
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.1), metaopt.build(net, "sgd(lr=0.1) | lookahead")):
        looked = []
        monkeypatch.setattr("gc.get_objects", lambda *_, looked=looked: looked.append(1) or [])
        metaopt.explain(optimizer, net)
        assert looked == []
        metaopt.explain(optimizer, net, find_schedulers=True)
        assert looked == [1]


def test_a_parameter_in_no_group_is_found():
    net = model()
    assert "parameter-in-no-group" in codes(torch.optim.SGD(net[0].parameters(), lr=0.1), net)


def test_a_parameter_that_the_model_does_not_have_is_found():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net[1] = torch.nn.Linear(8, 2, bias=False)
    assert codes(optimizer, net) == {"parameter-in-no-group", "parameter-not-in-model"}


def test_a_parameter_in_two_groups_is_found():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    # torch refuses this in its constructor, but not later
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [net[0].weight]})
    assert "parameter-in-two-groups" in codes(optimizer, net)


def test_decay_on_a_bias_is_found_and_named():
    net = torch.nn.Linear(2, 2)
    (finding,) = metaopt.explain(torch.optim.AdamW(net.parameters(), lr=0.1), net).findings
    assert finding.code == "decay-on-1d"
    assert "bias" in finding.reason and "no_decay" in finding.fix


def test_a_frozen_parameter_is_found():
    net = model()
    net[0].weight.requires_grad_(False)
    assert codes(torch.optim.SGD(net.parameters(), lr=0.1), net) == {"frozen-parameter"}


def test_a_default_rate_is_found_unless_it_was_chosen_or_scheduled():
    net = model()
    assert codes(torch.optim.Adam(net.parameters())) == {"default-rate"}
    assert codes(metaopt.build(net, "adam")) == {"default-rate"}
    assert codes(metaopt.build(net, "adam(lr=1e-3)")) == set()
    scheduled = torch.optim.Adam(net.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(scheduled, factor=1.0)
    assert codes(scheduled) == set()
    del scheduler


def test_a_scheduler_of_another_optimizer_is_found():
    net = model()
    forgotten = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(forgotten, 10)
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    assert codes(other, find_schedulers=True) == {"scheduler-of-another-optimizer"}
    assert codes(forgotten, find_schedulers=True) == set()
    del scheduler


def test_the_scheduler_of_a_base_that_was_wrapped_later_is_no_other():
    net = model()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 10)
    stack = metaopt.wrap(base, "lookahead")
    assert codes(stack) == codes(stack, find_schedulers=True) == set()
    assert metaopt.explain(stack).rows[0].order[-1] == "torch scheduler"
    del scheduler


def test_a_schedule_and_a_torch_scheduler_together_are_found():
    stack = metaopt.build(model(), "sgd(lr=cosine(0.1))", total_steps=10)
    scheduler = torch.optim.lr_scheduler.StepLR(stack, 10)
    assert "two-drivers" in codes(stack) & codes(stack, find_schedulers=True)
    del scheduler


def test_a_run_that_ends_inside_a_cycle_is_found():
    assert codes(metaopt.build(model(), "sgd(lr=0.1) | lookahead(k=5)", total_steps=101)) == {"ends-inside-cycle"}
    assert codes(metaopt.build(model(), "sgd(lr=0.1) | lookahead(k=5)", total_steps=100)) == set()


@pytest.mark.parametrize(("steps", "code"), [(50, "schedule-shorter-than-run"), (200, "schedule-longer-than-run")])
def test_a_schedule_of_another_length_than_the_run_is_found(steps, code):
    assert codes(metaopt.build(model(), f"sgd(lr=cosine(0.1, steps={steps}))", total_steps=100)) == {code}


def test_a_warm_up_that_stays_at_its_highest_is_as_long_as_the_run():
    assert codes(metaopt.build(model(), "sgd(lr=warmup(0.1, 50))", total_steps=100)) == set()


def test_a_stack_is_explained_in_the_middle_of_a_run():
    net = model()
    stack = metaopt.build(net, "sgd(lr=0.1) | lookahead(k=2)", total_steps=10)
    for _ in range(3):
        stepped(stack, net)
    explanation = metaopt.explain(stack, net)
    assert explanation.updates == 3
    assert "3 of 10" in str(explanation)
    with stack.averaged():
        assert "inside-averaged" in codes(stack)


def test_json_holds_the_rows_and_the_findings():
    told = json.loads(metaopt.explain(torch.optim.Adam(model().parameters())).to_json())
    assert told["rows"][0]["rate"] == 0.001
    assert set(told["findings"][0]) == {"code", "reason", "fix"}


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_is_explained(tmp_path, nested):
    net = model()
    stack = stepped(metaopt.build(net, "adam(lr=0.1) | lookahead(k=2)", total_steps=10), net)
    state = stack.state_dict()
    torch.save({"model": net.state_dict(), "optimizer_states": [state]} if nested else state, tmp_path / "c.pt")
    explanation = explain_checkpoint(tmp_path / "c.pt")
    assert (explanation.updates, explanation.total_steps) == (1, 10)
    (row,) = explanation.rows
    assert row.order[1:] == ("lookahead",)
    assert (row.elements, row.state_bytes) == (48, metaopt.explain(stack).rows[0].state_bytes)


class Dangerous:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    torch.save({"state": {}, "param_groups": [], "extra": Dangerous()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError):
        explain_checkpoint(tmp_path / "c.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_file_without_an_optimizer_is_an_error(tmp_path):
    torch.save({"model": model().state_dict()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="does not hold the state_dict of an optimizer"):
        explain_checkpoint(tmp_path / "c.pt")


def test_the_command_explains_a_spec_with_the_state_it_will_keep(tmp_path):
    status, out, _ = warm.run(["explain", "adamw | lookahead", "--steps", "101", "--json"], tmp_path)
    assert status == 0
    told = json.loads(out)
    assert {finding["code"] for finding in told["findings"]} == {"default-rate", "ends-inside-cycle"}
    assert told["rows"][0]["state_bytes"] > 3 * 256 * 4


def test_a_model_that_is_none_is_refused():
    with pytest.raises(metaopt.ParameterError, match=r"model must be a torch\.nn\.Module, got list"):
        metaopt.explain(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), [1])
