"""Gradient centralization: each unit's gradient loses its mean."""

from metaopt import Groups, Wrapper, hookimpl


class Centralize(Wrapper):
    """g_i <- g_i - mean(g_i) for each row i of tensors with two dimensions or more. arXiv:2004.01461

    A row is what one output unit has: an index of the first dimension (torch's transposed convolutions have their
    inputs there). Vectors stay as they are.
    """

    known_as = ("GC", "gradient_centralization", "use_gc")

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            for matrices in group.matrices():
                rows = matrices.rows_of(matrices.grads)
                rows.subtract(rows.means())


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"centralize": Centralize}
