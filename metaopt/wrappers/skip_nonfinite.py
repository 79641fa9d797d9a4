"""No update from gradients that are not finite."""

import math

from metaopt import Groups, StepError, Wrapper, counter, hookimpl, hyper


class SkipNonfinite(Wrapper):
    """The update is skipped where a gradient is NaN or infinite; `patience` of them in a row are an error.

    It decides on the largest magnitude of all gradients, over all shards, and waits for it: once per update. It takes
    the gradients of a skipped update away, or a loop that adds up gradients would add to them; those of the error stay.
    """

    known_as = ("apply_if_finite", "skip_nan", "skip_not_finite")
    may_skip_updates = True
    syncs_device = True

    patience: int = hyper(
        ge=1,
        doc="how many such updates in a row are too many",
        known_as=("max_consecutive_errors",),
        per_group=False,
    )
    in_a_row = counter("how many updates were skipped since the last one that was made")

    def on_gradients(self, groups: Groups) -> None:
        largest = float(groups.norm(math.inf))
        if math.isfinite(largest):
            if groups.in_a_row:
                groups.set_counter("in_a_row", 0)
            return
        skipped = groups.in_a_row + 1
        groups.set_counter("in_a_row", skipped)
        if skipped >= groups.patience:
            raise StepError(
                f"{self.label}: gradients were not finite {skipped} times in a row (patience={groups.patience}): "
                f"lower the learning rate, clip the gradients, or look at the data of these steps"
            )
        for group in groups:
            group.clear_grads()
        groups.skip_update("gradients that are not finite")


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"skip_nonfinite": SkipNonfinite}
