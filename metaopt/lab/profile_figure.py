"""The picture of several problems: a performance profile with the quartiles of its curves over resampled studies."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metaopt.lab import profiles
from metaopt.lab.figures import LEGEND, _bytes, _empty, _finished, _style, _wrapped


def profile(overall: Any) -> Figure:
    """Return the share of problems solved within each multiple of the best contender's evaluations."""
    taus = np.linspace(1.0, profiles.MOST, 121)
    shares = profiles.profile(profiles.ratios(overall.times), taus)
    low, high = profiles.profile_band(overall.times, taus)
    figure, axes = _empty(f"{len(overall.comparisons)} problems: performance profile, quartiles over resampled studies")
    for position, spec in enumerate(overall.specs):
        style = _style(position)
        label = f"{_wrapped(spec, LEGEND)} ({overall.scores[position].value:.2f})"
        axes.plot(taus, shares[position], label=label, markevery=(4 * (position % 5), 20), linewidth=1.8, **style)
        axes.fill_between(taus, low[position], high[position], color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="evaluations to the target, over the best contender's", ylabel="share of problems solved")
    axes.set(xlim=(1.0, profiles.MOST), ylim=(-0.03, 1.03))
    return _finished(figure, axes)


def picture(figure: Figure, form: str) -> bytes:
    """Return a picture as the content of a file: the same picture is the same file."""
    return _bytes(figure, form)
