"""What `benchmarks.scaling` and `benchmarks.profile_tiny` see: memory taken for a moment, every call of an update."""

import sys
from collections import Counter

import pytest
import torch

from benchmarks import paths, profile_tiny, scaling
from benchmarks.bandwidth import Probe
from metaopt.engine.step import base_step
from metaopt.lab.shapes import make_tensor_set


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
def test_memory_that_is_taken_for_a_moment_is_seen_although_it_is_free_again() -> None:
    size = 64 * 2**20
    assert scaling.peak_bytes(lambda: torch.ones(size // 4)) > 0.9 * size
    assert scaling.peak_bytes(lambda: None) < 0.1 * size


def test_what_is_measured_is_a_line_of_the_table() -> None:
    rows = [*scaling.checkpoints(rounds=2), *scaling.many_groups(rounds=1), *scaling.building(rounds=1)]
    assert [at_most for _, at_most, _ in rows] == ["1.5", "1.3", "1.5", "1.3", "1.1", "40 ms"]
    assert all(measured[:1].isdigit() for *_, measured in rows)


def test_one_wrapper_and_an_author_s_rule_are_measured_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "make_tensor_set", lambda name: make_tensor_set("tiny"))
    monkeypatch.setattr(scaling, "Probe", lambda: Probe(size=2**20))
    rows = [*scaling.one_wrapper(rounds=1), *scaling.own_rule(rounds=1)]
    bytes_an_element = [float(measured.split("(")[1].split()[0]) for *_, measured in rows]
    # the weights or gradients read and written, those of two steps by accumulate, and the rule's own tensor likewise;
    # a pull is due every fifth update
    assert bytes_an_element == [8, 20, 8, 12, 12, 3, 16]


def test_the_table_of_paths_has_a_row_for_each_pair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["paths", "tiny", "--threads", "1"])
    paths.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if " ms |" in line]
    assert len(rows) == len(paths.PAIRS)


def test_every_call_of_a_cycle_of_updates_is_made_again_and_has_a_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_step, "kernels", lambda: None)  # a pass of the library is not a call of torch
    optim = profile_tiny.Optim()
    stack, hand = (profile_tiny.Contender(stack=stack) for stack in (True, False))
    for contender in (stack, hand):
        contender.microseconds(contender.step, 5)
    of_stack = Counter(purpose for purpose, *_ in profile_tiny.recorded(stack, optim))
    assert of_stack == {
        "AdamW's kernel": 5,
        "counting updates": 5,
        "the norm": 15,
        "the factor of the clip": 25,
        "the pull of every fifth update": 2,
    }
    # of torch's own optimizer only the kernel and the counts are called inside of it
    inside = Counter(purpose for purpose, is_inside, _ in profile_tiny.recorded(hand, optim) if is_inside)
    assert inside == {"AdamW's kernel": 5, "counting updates": 5}
    calls = [call for *_, call in profile_tiny.recorded(stack, optim)]
    before = [p.detach().clone() for p in stack.params]
    with torch.no_grad():
        profile_tiny.replay(calls)()
    assert not any(torch.equal(p, b) for p, b in zip(stack.params, before, strict=True))
