"""Lightning: validate, test, checkpoint and finish by an average."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from metaopt.callbacks import Shown, stacks_with_average
from metaopt.errors import StepError
from metaopt.stack import Stack

# the weights that train, in a checkpoint whose state_dict is the average
TRAINED = "metaopt.trained_state_dict"


class EvaluateAverage(Callback):
    """Evaluate, keep the best and export by an average of a stack.

    Validation, test and prediction see the average, so `ModelCheckpoint(monitor="val_loss")` keeps the best by it. The
    `state_dict` of every checkpoint is the average, for `load_from_checkpoint`; the weights that train stand beside it,
    and `fit(ckpt_path=...)` with this callback continues with them. At the end of `fit` the model holds the average,
    unless `final=False`. `label` chooses one of several averages, as for `opt.averaged(label)`.

    Lightning does not ask callbacks about checkpoints with `save_weights_only=True`: those have the weights that train.
    """

    def __init__(self, label: str | None = None, *, final: bool = True) -> None:
        self.label = label
        self.final = final
        self._shown: Shown | None = None

    # ---- evaluation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise StepError if no optimizer keeps the average."""
        self._stacks(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the average, if there is one: there is none outside `fit`."""
        if trainer.optimizers:
            self._leave()
            self._shown = Shown(self._stacks(trainer), self.label, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the weights back."""
        self._leave()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the weights back, also where an evaluation fails."""
        self._leave()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        if self.final:
            Shown(self._stacks(trainer), self.label, pl_module).leave_and_keep()

    # ---- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average into the checkpoint's `state_dict`, and the weights that train beside it."""
        if not trainer.optimizers or self._shown is not None:
            return
        trained = {key: value.clone() for key, value in checkpoint["state_dict"].items()}
        shown = Shown(self._stacks(trainer), self.label, pl_module)
        try:
            average = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {key: value.clone() for key, value in average.items()}
            checkpoint[TRAINED] = trained
        finally:
            shown.leave()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give the model the weights that train: Lightning has loaded the average by now."""
        if TRAINED in checkpoint:
            trainer.strategy.load_model_state_dict({"state_dict": checkpoint[TRAINED]}, strict=True)

    def _stacks(self, trainer: Trainer) -> list[Stack]:
        try:
            return stacks_with_average(trainer.optimizers, self.label)
        except StepError:
            self._shown = None
            raise

    def _leave(self) -> None:
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.leave()
