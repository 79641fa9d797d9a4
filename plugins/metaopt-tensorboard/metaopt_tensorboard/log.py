"""The event files, through TensorBoard's data provider."""

import re
from collections.abc import Sequence
from typing import Any

from tensorboard.data import provider

# torch's writer puts this behind the tag of a text
SUFFIX = "/text_summary"
# points of one curve: as many as its width on the screen can show
POINTS = 200


class Log:
    """The event files as TensorBoard has read them, for one request."""

    def __init__(self, data: provider.DataProvider, ctx: Any, experiment: str) -> None:
        self._data = data
        self._of: dict[str, Any] = {"ctx": ctx, "experiment_id": experiment}

    def texts(self, runs: Sequence[str] | None, tags: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return the newest text of each run and tag."""
        wanted = provider.RunTagFilter(runs=runs, tags=text_tags(tags))
        found = self._data.read_tensors(**self._of, plugin_name="text", run_tag_filter=wanted, downsample=1)
        return {
            run: {tag.removesuffix(SUFFIX): _text(points[-1].numpy) for tag, points in its.items() if points}
            for run, its in found.items()
            if any(its.values())
        }

    def scalar_tags(self, run: str) -> list[str]:
        """Return the tags of a run's scalars, in order."""
        wanted = provider.RunTagFilter(runs=[run])
        found = self._data.list_scalars(**self._of, plugin_name="scalars", run_tag_filter=wanted)
        return sorted(found.get(run, {}), key=_natural)

    def points(self, run: str, tags: Sequence[str]) -> dict[str, list[list[float]]]:
        """Return some points of each curve, the last among them."""
        if not tags:
            return {}
        wanted = provider.RunTagFilter(runs=[run], tags=tags)
        found = self._data.read_scalars(**self._of, plugin_name="scalars", run_tag_filter=wanted, downsample=POINTS)
        return {tag: [[point.step, point.value] for point in its] for tag, its in found.get(run, {}).items()}


def text_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags under which writers store these texts."""
    return [*tags, *(f"{tag}{SUFFIX}" for tag in tags)]


def _natural(tag: str) -> list[tuple[int, str]]:
    """Return what sorts `layer 2` before `layer 10`."""
    return [(int(word) if word.isdecimal() else -1, word) for word in re.split(r"(\d{1,18})", tag)]


def _text(array: Any) -> str:
    """Return the first string of a text summary, which may have any shape."""
    flat = array.reshape(-1)
    first = flat[0] if flat.size else ""
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
