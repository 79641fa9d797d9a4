"""A step that is captured into a CUDA graph is refused: a replay repeats the device's work, and nothing of Python's."""

from collections.abc import Iterator

from metaopt.engine.run.run import Run
from metaopt.errors import StepError
from metaopt.torch_internals import is_capturing
from metaopt.wrapper import Wrapper


def refuse_capture(run: Run) -> None:
    """Raise StepError if the update would go into a graph, of CUDA or of whatever accelerator has them."""
    kinds = run.find_accelerators() if run.accelerators is None else run.accelerators
    if any(map(is_capturing, kinds)):
        raise StepError(
            f"step() must be called outside a graph that is being captured (torch.cuda.graph): a replay would repeat "
            f"what Python has decided in this one update. That is {', '.join(dict.fromkeys(_decisions(run)))}. "
            f"Capture the forward and backward pass alone, and call step() after each replay"
        )


def _decisions(run: Run) -> Iterator[str]:
    """Yield in words what Python decides in an update of this run."""
    yield "the count of updates"
    for group in run.param_groups:
        for key in run.schedules_of(group):
            yield f"the scheduled {key}"
        for wrapper in run.structure.chain_of(group).ordered:
            if wrapper.acts_every is not None:
                yield f"when {wrapper.label} acts (every {group[f'{wrapper.label}.{wrapper.acts_every}']} updates)"
            elif _decides(wrapper):
                yield f"what {wrapper.label} does in which update"
    if run.stages is not None:
        yield "which base is stepped"


def _decides(wrapper: Wrapper) -> bool:
    return bool(wrapper.counters) or wrapper.may_skip_updates or wrapper.syncs_device
