"""What a wrapper sees: one parameter group, and all groups at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

Reduce = Literal["mean", "norm"]


class _Log(ABC):
    """What groups and all groups together have in common: the log."""

    @property
    @abstractmethod
    def is_logged(self) -> bool:
        """Whether this update is logged: what costs extra to measure is measured only then."""

    def __getattr__(self, name: str) -> Any:  # hyperparameters and state, named by the wrapper's declarations
        raise AttributeError(name)

    @abstractmethod
    def push(self, name: str, value: torch.Tensor) -> None:
        """Append a 0-dim value to a `history`; the oldest value goes."""

    @property
    @abstractmethod
    def num_replicas(self) -> int:
        """How many replicas `mean_over_replicas` takes the mean over."""

    @abstractmethod
    def mean_over_replicas(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the means of tensors over the replicas, with one all-reduce for each bucket; alone, the tensors.

        The replicas are the processes of the group that `build(..., replicas=)` was given, or of the default group. All
        of them must call it, at the same step.
        """


class Group(_Log):
    """What a wrapper sees of one parameter group: aligned lists of local tensors of one device and dtype.

    Hyperparameters, counters, scalars and state are attributes under the names that the wrapper declared.
    """

    updates: int

    @property
    @abstractmethod
    def param_names(self) -> list[str]:
        """The names of the parameters: the user's, such as `blocks.0.weight`, or `#3`, its position in the run."""

    @property
    @abstractmethod
    def numels(self) -> list[int]:
        """How many elements the parameters have, over all shards."""

    @abstractmethod
    def base_setting(self, name: str, default: Any = None) -> Any:
        """Return an entry of the base's in the group, such as its `eps`, or the default if the base has none."""

    # of a block: where in the group's lists each of its tensors, or the tensor of its rows, is
    index: list[int]

    @property
    @abstractmethod
    def params(self) -> list[torch.Tensor]:
        """The parameters, or this process's part of each."""

    @abstractmethod
    def apply(self, rule: Any, numbers: Mapping[str, Any]) -> None:
        """Carry out a rule of elements (see `metaopt.elementwise`); a rule that is called with the group does so."""

    @abstractmethod
    def blocks(self) -> Sequence["Group"]:
        """Return the same in blocks that fit into a cache: several small tensors, or some rows of a large one."""

    @property
    @abstractmethod
    def grads(self) -> list[torch.Tensor]:
        """The gradients, aligned with `params`; a pending lazy scale has been multiplied in."""

    @property
    @abstractmethod
    def update(self) -> list[torch.Tensor]:
        """What is added to the weights, aligned with `params`: in `on_update`, `after_updates` and `observe`.

        Changes in place count. float32 for parameters of 16 bits: the difference of what the base has rounded its own
        step to and the weights before; the sum with the weights is rounded once.
        """

    @property
    @abstractmethod
    def base_lr(self) -> Any:
        """The base's learning rate for this update; raises StepError if the base has none."""

    @property
    @abstractmethod
    def maximize(self) -> bool:
        """Whether the base goes up these gradients (torch's `maximize=True`), so that less is worse."""

    @abstractmethod
    def norms(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        """Return the 2-norm of each tensor (aligned with `params`), reduced over shards, 0-dim, at least float32.

        With `rows`, one norm per index of the first dimension, shaped to broadcast; a vector counts as one row.
        """

    @abstractmethod
    def means(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        """Return the mean of each tensor, reduced over shards, at least float32; `rows` as for `norms`.

        Without `rows`, sums over a tensor's parts will do as well as its elements.
        """

    @abstractmethod
    def sum_over_shards(self, numbers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors of one shape, one for each parameter, plus those of its other shards: for counts and sums."""

    @abstractmethod
    def dots(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inner product (its real part) of each two tensors, reduced over shards, at least float32."""

    @abstractmethod
    def random_like(self, tensors: Any, distribution: Literal["normal", "uniform"] = "normal") -> Any:
        """Return noise for each of the tensors, a list aligned with `params` (or one of its tensors).

        The numbers depend only on the wrapper's `seed` and label, the count of updates, the parameter and how often
        this was called before in this `step()`: they are the same on all ranks, also for shards, and after a resume,
        whatever the order of the groups. A parameter is known by its name, or by its position if it has none. A GPU
        draws other numbers than a processor, and float64 others than float32. Standard normal, or uniform on [0, 1).
        """

    @abstractmethod
    def matrices(self) -> Sequence["Group"]:
        """Return the same without vectors and numbers, as a list of one group; of none if there is nothing else."""

    @abstractmethod
    def rows_of(self, tensors: list[torch.Tensor]) -> "Rows":
        """Return the rows of tensors (aligned with `params`); a vector is one row."""

    @abstractmethod
    def stack(self, numbers: list[torch.Tensor]) -> torch.Tensor:
        """Return 0-dim tensors, such as those of `norms` and `dots`, as one tensor."""

    @abstractmethod
    def multiply(self, tensors: list[torch.Tensor], numbers: torch.Tensor) -> None:
        """Multiply each tensor in place by its own number, such as `stack` returns."""

    @abstractmethod
    def multiples(self, tensors: list[torch.Tensor], numbers: torch.Tensor) -> list[torch.Tensor]:
        """Return each tensor times its own number, such as `stack` returns."""

    @abstractmethod
    def add_multiples(self, tensors: list[torch.Tensor], others: list[torch.Tensor], numbers: torch.Tensor) -> None:
        """Add other tensors in place, each times its own number."""

    @abstractmethod
    def copies(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies of tensors, by one call where each call costs a launch."""

    @abstractmethod
    def cast(self, tensors: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Return tensors in a dtype, float32 at least if none is given: the very same ones if they have it."""

    @abstractmethod
    def add(self, tensors: list[torch.Tensor], others: list[torch.Tensor], *, alpha: float = 1.0) -> None:
        """Add `alpha` times other tensors in place; if their dtypes differ, each sum is rounded once."""

    @abstractmethod
    def replace_grads(self, gradients: list[torch.Tensor]) -> None:
        """Let these be the gradients until the end of this `step()`; afterwards the parameters have none.

        A frozen parameter (without `requires_grad` and without a gradient) gets none.
        """

    @abstractmethod
    def clear_grads(self) -> None:
        """Take the gradients away: the next backward pass starts from none."""

    @property
    @abstractmethod
    def base_moments(self) -> dict[str, list[torch.Tensor]]:
        """The base's own moments by key, each aligned with `params` (see `moments`)."""

    @property
    @abstractmethod
    def mean_way(self) -> list[torch.Tensor]:
        """The way from the anchor that `across=` in the class statement names to the weights, aligned with `params`.

        With `across="replicas"` it is the mean over all replicas. In the dtype of the anchor.
        """

    @abstractmethod
    def set_params(self, tensors: list[torch.Tensor]) -> None:
        """Set the parameters to `tensors` (cast if dtypes differ); anchors nearer the base follow."""

    @abstractmethod
    def reset_base_state(self) -> None:
        """Forget the base's state of these parameters: its next update starts as if it were its first."""

    @abstractmethod
    def measure(self, name: str, value: torch.Tensor | float, reduce: Reduce = "mean") -> None:
        """Log `value` as `<label>/<name>`; never waits for the device.

        A group is one of several: what all of them measure in one update is averaged, or with "norm" is the norm of
        the whole that their norms belong to.
        """


class Rows(ABC):
    """The rows of several tensors, a row being an index of the first dimension; their numbers are one tensor.

    Two lists of tensors of the same shapes have their rows in the same order.
    """

    @abstractmethod
    def norms(self) -> torch.Tensor:
        """Return the 2-norm of each row, over all shards of it, in float32 at least."""

    @abstractmethod
    def means(self) -> torch.Tensor:
        """Return the mean of each row, over all shards of it, in float32 at least."""

    @abstractmethod
    def multiply(self, numbers: torch.Tensor) -> None:
        """Multiply each row of the tensors in place by its own number, once."""

    @abstractmethod
    def subtract(self, numbers: torch.Tensor) -> None:
        """Subtract from each row of the tensors in place its own number, once."""


class Groups(_Log):
    """All groups that a wrapper acts on at once: norms and decisions that are global.

    `updates` is the number of updates made, as on a `Group`.
    """

    updates: int

    @abstractmethod
    def __iter__(self) -> Iterator[Group]: ...

    @abstractmethod
    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm over all gradients, reduced over groups, devices and shards (0-dim)."""

    @abstractmethod
    def norm_of(self, name: str) -> torch.Tensor:
        """Return the 2-norm of "params", "grads", "update" or a slot, over groups, devices and shards (0-dim)."""

    @abstractmethod
    def dot(self, a: str, b: str) -> torch.Tensor:
        """Return the inner product (its real part) of two lists, named as for `norm_of`."""

    @abstractmethod
    def groups_with_state(self) -> Iterator[Group]:
        """Yield the groups with every parameter that has this wrapper's state, with or without a gradient now."""

    @abstractmethod
    def scale(self, factor: torch.Tensor | float) -> None:
        """Multiply all gradients by a number or a 0-dim factor, lazily: a fused base does it in its own pass."""

    @property
    @abstractmethod
    def has_logger(self) -> bool:
        """Whether the run has a log at all: a share of all updates is then measured at each of them."""

    @abstractmethod
    def measure(self, name: str, value: torch.Tensor | float) -> None:
        """Log `value` as `<label>/<name>`; never waits for the device."""

    @abstractmethod
    def buffers_kept(self) -> AbstractContextManager[None]:
        """Return a context for one more evaluation in `around`: what it writes to the model's buffers is undone.

        Statistics of batch norm then count a batch once.
        """

    @abstractmethod
    def measure_tensors(self, name: str, tensors: Sequence[str], values: torch.Tensor, most: int | None = None) -> None:
        """Log a number for each of many tensors as `<label>/<name>/<tensor>`; never waits for the device.

        With `most`, so many of the largest and of the smallest are written at a point, with their names.
        """

    @abstractmethod
    def measure_histogram(self, name: str, edges: Sequence[float], counts: torch.Tensor) -> None:
        """Log how many numbers lie between each two edges as `<label>/<name>`; never waits for the device."""

    @property
    @abstractmethod
    def step_weight(self) -> float | torch.Tensor:
        """How much the gradients of this step count beside those of other steps: 1.0, or what `opt.weigh` was given."""

    @property
    @abstractmethod
    def is_flush(self) -> bool:
        """Whether `opt.flush()` asks for an update of what was gathered; there may be no gradients then."""

    @abstractmethod
    def skip_update(self, reason: str) -> None:
        """Skip this update: nothing advances, and `opt.skipped` is `reason`. See `Wrapper.may_skip_updates`."""

    @abstractmethod
    def set_counter(self, name: str, value: int | float) -> None:
        """Set a counter or a number that the wrapper declares, in all groups."""

    @abstractmethod
    def change_lr(self, change: Callable[[float], float]) -> None:
        """Replace the base's learning rate of every group by `change(rate)`, at once.

        A schedule goes on by the same factor; a rate of 0 stays. Reads a rate that is a tensor from its device.
        """
