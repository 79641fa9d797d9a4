"""Another base from some update on, in one stack."""

from typing import Any

from metaopt import Example, Sequencer, SpecError, hookimpl

LATER = {"state_is_whole_at_the_first_step": "what the next base keeps is made when its turn comes"}


class Switch(Sequencer):
    """switch(a, n, b, m, ..., z): a is the base for n updates, b for m more, ..., z to the end. arXiv:1712.07628

    What the next base keeps is made at the change; wrappers around the switch go on with what they have. A length is a
    number of updates or, below 1, a share of the run. A schedule inside counts from the change:
    `switch(adamw(lr=1e-3), 2000, sgd(lr=cosine(0.1), momentum=0.9)) | ema`.
    """

    known_as = ("SWATS", "switch optimizer", "SwitchOptimizer", "Adam then L-BFGS")

    def __init__(self, *members: Any) -> None:
        if len(members) < 3 or len(members) % 2 == 0:
            raise SpecError(
                f"switch takes base, updates, base, ..., base: an odd number of values from 3 up, got {len(members)}"
            )
        self.stages = tuple(members[::2])
        self.lengths = tuple(members[1::2])

    def begins(self, run: int | None) -> list[int]:
        found = [0]
        for length in self.lengths:
            whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
            if not whole and not (isinstance(length, float) and 0.0 < length < 1.0):
                raise SpecError(
                    f"switch: the length of a stage must be a number of updates from 1 up, or a share of the run below "
                    f"1, got {length!r}"
                )
            if not whole and run is None:
                raise SpecError(f"switch: {length} is a share of the run: give total_steps as well")
            found.append(found[-1] + (length if whole else max(1, round(length * (run or 0)))))
        late = [begin for begin in found if run is not None and begin >= run]
        if late:
            raise SpecError(
                f"switch: a base begins after {late[0]} updates, but the run has {run}: shorten what comes before it"
            )
        return found


@hookimpl
def metaopt_optimizers() -> dict[str, type[Sequencer]]:
    return {"switch": Switch}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {
        "switch": [
            Example("switch(adamw(lr=0.01), 3, sgd(lr=0.1, momentum=0.9))", expected_failures=LATER),
            Example(
                "switch(sgd(lr=cosine(0.1)), 2, adagrad(lr=0.01) | lookahead(k=2, label='own'), 2, adam(lr=0.01))",
                expected_failures=LATER,
            ),
        ]
    }
