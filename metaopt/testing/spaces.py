"""Checks of search spaces: what they give for the numbers from 0 to 1, and that their text makes them again."""

import copy
import math
import pickle
import random
from typing import Any

from metaopt.space import Space
from metaopt.specs.parsing import parse_value
from metaopt.specs.text import to_text
from metaopt.testing.outcome import CheckFailed, check
from metaopt.testing.subject import Subject

POINTS = [i / 200 for i in range(201)]


class SpaceSubject(Subject):
    """A search space, made from its text."""

    def made(self) -> Space:
        """Return a new space object."""
        found = parse_value(self.text)
        if not isinstance(found, Space):
            raise CheckFailed(f"{self.text} is not a space", "It was registered as one", "Subclass metaopt.Space")
        return found

    def values(self) -> list[Any]:
        """Return the values of a new space at all points."""
        space, found = self.made(), []
        for u in POINTS:
            try:
                found.append(space.value(u))
            except Exception as error:
                raise CheckFailed(
                    f"{self}: the value at u = {u} raised {type(error).__name__}: {error}",
                    "A search may ask for any u from 0 to 1, both included",
                    "Give a value for every u in [0, 1]",
                ) from error
        return found


@check("space")
def gives_values_that_can_be_pasted(subject: SpaceSubject) -> None:
    """Every value from u = 0 to u = 1 can be written as text, and is finite if it is a number."""
    for u, value in zip(POINTS, subject.values(), strict=True):
        text = to_text(value, str(subject))
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckFailed(
                f"{subject}: the value at u = {u} is {text}", "No hyperparameter can have it", "Give finite numbers"
            )
        if isinstance(value, float) and len(text) > 12:
            raise CheckFailed(
                f"{subject}: the value at u = {u} is {text}",
                "What is found is printed for people to paste",
                "Round to as many digits as tell a thousandth of the space apart",
            )


@check("space", presumes=("gives_values_that_can_be_pasted",))
def gives_the_same_for_the_same_u(subject: SpaceSubject) -> None:
    """The same u gives the same value, in whatever order it is asked, from old and new objects."""
    expected = subject.values()
    space = subject.made()
    for position in random.Random(0).sample(range(len(POINTS)), len(POINTS)):
        value = space.value(POINTS[position])
        if type(value) is not type(expected[position]) or value != expected[position]:
            raise CheckFailed(
                f"{subject}: asked out of order, the value at u = {POINTS[position]} is {value!r}, not "
                f"{expected[position]!r}",
                "A search that is interrupted and continued would try other settings",
                "Compute the value from u alone; draw no random numbers",
            )


@check("space", presumes=("gives_values_that_can_be_pasted",))
def knows_its_options_and_ends(subject: SpaceSubject) -> None:
    """Options, if there are any, are the values that it gives; ends are among what a search can reach."""
    space = subject.made()
    options = space.options()
    if options is not None:
        # as many points as a space of many options needs, at the middle of each
        middles = [space.value((position + 0.5) / len(options)) for position in range(min(len(options), 1000))]
        if list(options[:1000]) != middles:
            raise CheckFailed(
                f"{subject}: the values at the middle of equal lengths of [0, 1] are not its options",
                "A search that counts options and one that draws u would search different spaces",
                "Return options[min(int(u * len(options)), len(options) - 1)] from value",
            )
    elif not set(space.ends()) <= set(subject.values()):
        raise CheckFailed(
            f"{subject}: its ends are {list(space.ends())!r}, which it never gives",
            "The ends are held against the bounds of a hyperparameter when a spec is read",
            "Return from ends() the least and the greatest value",
        )


@check("space", presumes=("gives_values_that_can_be_pasted", "gives_the_same_for_the_same_u"))
def text_rebuilds_the_space(subject: SpaceSubject) -> None:
    """Its text, a copy and a pickle give an equal space with the same values."""
    space = subject.made()
    text = to_text(space, str(subject))
    twins: dict[str, Any] = {
        f"the text {text!r}": parse_value(text),
        "copy.deepcopy": copy.deepcopy(space),
        "pickle": pickle.loads(pickle.dumps(space)),
    }
    for how, twin in twins.items():
        if twin != space or [twin.value(u) for u in POINTS] != subject.values():
            raise CheckFailed(
                f"{subject}: {how} gives another space: {twin!r}",
                "A search is known by its text and continued in another process",
                "Make every setting a hyperparameter with hyper(...); keep nothing else in the object",
            )


@check("space")
def is_refused_by_build(subject: SpaceSubject) -> None:
    """A stack cannot be built before a value is chosen; the error names the space and `metaopt tune`."""
    import torch

    import metaopt
    from metaopt.specs.pipeline import Part, Pipeline, part

    space = subject.made()
    bare: Part = part("sgd")
    pipeline = Pipeline((Part(bare.kind, bare.name, bare.target, {"lr": space}),))
    try:
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], pipeline)
    except metaopt.SpecError as error:
        if "metaopt tune" in str(error) and to_text(space, "sgd") in str(error):
            return
    raise CheckFailed(f"{subject}: sgd(lr={subject}) can be built", "A stack needs numbers", "Subclass metaopt.Space")
