"""Which curves of a run belong to which of its parts."""

import re
from collections.abc import Iterator, Mapping, Sequence

from metaopt_tensorboard.descriptions import RATE, Json


def flat(parts: Sequence[Json]) -> Iterator[Json]:
    """Return the parts and those of their branches."""
    for part in parts:
        yield part
        for branch in part["branches"]:
            yield from flat(branch["parts"])


def find_rates(parts: Sequence[Json], tags: set[str], branch: str | None = None) -> None:
    """Give a base that has the parameters of a branch the rate that is logged for these."""
    own = f"{RATE}/group {branch}"
    for part in parts:
        if part["branches"]:  # each has bases of its own
            part["measures"] = [tag for tag in part["measures"] if tag != RATE]
        for row in part["hyperparameters"]:
            if row["tag"] == RATE and own in tags:
                row["tag"] = own
                part["measures"] = [tag for tag in part["measures"] if tag != RATE]
        for inner in part["branches"]:
            find_rates(inner["parts"], tags, inner["pattern"])


def owned_tags(part: Json, tags: Sequence[str]) -> list[str]:
    """Return the tags of what a part measures: those that it names, those below them, and those that bear its label."""
    named = {*part["measures"], part["label"]}
    drawn = {row["tag"] for row in part["hyperparameters"]}
    ways = {tag: [tag[: slash.start()] for slash in re.finditer("/", tag)] for tag in tags}
    return [tag for tag in tags if tag not in drawn and (tag in part["measures"] or not named.isdisjoint(ways[tag]))]


def curves_of(tags: Sequence[str], points: Mapping[str, list[list[float]]], label: str) -> list[Json]:
    """Return curves as the page takes them, named without the label of their part."""
    return [{"tag": tag, "name": tag.removeprefix(f"{label}/"), "points": points.get(tag, [])} for tag in tags]
