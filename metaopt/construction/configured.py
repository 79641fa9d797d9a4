"""An optimizer class for programs that take the path of a class and its arguments from a configuration."""

from typing import Any

from metaopt.construction.building import stack_arguments
from metaopt.construction.run_description import describe_run
from metaopt.specs.data import with_hyperparameters
from metaopt.specs.pipeline import as_pipeline
from metaopt.stack import Stack


class Optimizer(Stack):
    """A stack as a class, `metaopt.Optimizer(params, lr=1e-3, spec="adamw | lookahead", weight_decay=0.1)`.

    For Hydra's `_target_`, LightningCLI's `class_path`, the Trainer's `optimizer_cls_and_kwargs` and whatever else
    takes a class and its arguments; in your own program `metaopt.build` reads better.

    Args:
        params: a module, parameters, `(name, parameter)` pairs or group dicts.
        lr: the base's learning rate, a number or a schedule; None: what the spec or the base says.
        spec: the stack, as text, or as lists and dicts from YAML, TOML or JSON.
        total_steps: the length of the run in updates, for schedules that run to its end.
        log: a directory, a SummaryWriter or a Logger, written every `log_every` updates (50).
        log_every: updates between two points of the log.
        exact: run the base as torch does by default; see `metaopt.build`.
        hyperparameters: more of the base's, such as `weight_decay`, or with a label in front those of any part, such as
            `**{"lookahead.k": 5}`.

    Raises:
        MetaoptError: for a spec that cannot be built, and for a hyperparameter that the spec gives already.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = None,
        spec: Any = "adamw",
        *,
        total_steps: int | None = None,
        log: Any = None,
        log_every: int | None = None,
        exact: bool = False,
        **hyperparameters: Any,
    ) -> None:
        given = hyperparameters if lr is None else {"lr": lr, **hyperparameters}
        pipeline = with_hyperparameters(as_pipeline(spec), given)
        super().__init__(**stack_arguments(params, pipeline, total_steps, log, log_every, exact))
        describe_run(self)
