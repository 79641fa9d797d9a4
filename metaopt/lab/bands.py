"""The band around a median: quartiles over studies, some of which may have diverged."""

import math
from collections.abc import Sequence

import numpy as np


def quartiles(studies: Sequence[Sequence[float]] | Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the lower quartile, the median and the upper quartile over the first axis.

    Each is a value of a study, or the mean of the two on either side where the place is between them. Values may be
    infinite: those of numpy's methods that interpolate give nan for them.
    """
    ordered = np.sort(np.asarray(studies, dtype=float), axis=0)
    places = [len(ordered) * share for share in (0.25, 0.5, 0.75)]
    return np.array([(ordered[math.ceil(place) - 1] + ordered[math.floor(place)]) / 2 for place in places])
