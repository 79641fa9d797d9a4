"""Which layer of a model a parameter belongs to, 0 nearest the input: by the order of the modules, or by patterns."""

import re
from collections.abc import Sequence
from fnmatch import translate
from itertools import groupby

from metaopt.errors import ParameterError, did_you_mean


def layers_in_order(names: Sequence[str], dimensions: Sequence[int]) -> list[int]:
    """Return the layer of every parameter, given in the order in which the model defines its modules.

    A module with a number in its name (`blocks.3`, `layer1.0`, `0`) is a layer; modules without one that follow each
    other are a layer together: those before the blocks, and those after. In a model without numbers, each module that
    holds parameters is a layer. Modules with vectors only, such as norms, belong to the layer before them.
    """
    numbered = any(_block(name) for name in names)
    keys = [_block(name) if numbered else name.rpartition(".")[0] for name in names]
    depths: list[int] = []
    known: dict[str, int] = {}
    deepest = -1
    for key, run in groupby(zip(keys, dimensions, strict=True), lambda pair: pair[0]):
        sizes = [dimension for _, dimension in run]
        if key in known and key:  # a block whose parameters do not follow each other
            depth = known[key]
        elif deepest >= 0 and max(sizes) <= 1:
            depth = deepest
        else:
            depth = deepest = deepest + 1
        known[key] = depth
        depths += [depth] * len(sizes)
    return depths


def _block(name: str) -> str:
    """Return the name of the outermost numbered module that holds a parameter: `blocks.3.attn.qkv` -> `blocks.3`."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found.group() if found else ""


def layers_by_patterns(patterns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the layer of every parameter by globs from the input to the output; the first that matches counts.

    Each number that a `#` stands for is a layer. Raises ParameterError.
    """
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ParameterError(
            f"groups: layers must be a list of globs, such as ['*embed*', 'blocks.#.*', '*'], got {patterns!r:.60}"
        )
    number = "\0"  # a character that no name holds
    globs = [translate(pattern.replace("#", number)) for pattern in patterns]
    wanted = [re.compile(glob.replace(re.escape(number), r"(\d+)")) for glob in globs]
    places = []
    for name in names:
        found = ((i, wanted[i].match(name)) for i in range(len(wanted)))
        place = next(((i, *map(int, match.groups())) for i, match in found if match), None)
        if place is None:
            raise ParameterError(f"groups: no pattern of layers matches {name}: add one, such as '*' at the end")
        places.append(place)
    for i, pattern in enumerate(patterns):
        if all(place[0] != i for place in places):
            raise ParameterError(
                f"groups: the pattern {pattern!r} of layers matches no parameter that an earlier one left."
                f"{did_you_mean(pattern, names)}"
            )
    ranks = {place: rank for rank, place in enumerate(sorted(set(places)))}
    return [ranks[place] for place in places]
