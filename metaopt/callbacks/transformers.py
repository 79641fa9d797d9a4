"""The Hugging Face Trainer: evaluate, save and finish by an average."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metaopt.callbacks import Shown, stacks_with_average


class EvaluateAverage(TrainerCallback):
    """Evaluate, keep the best and export by an average of the stack.

    The model holds the average while the Trainer evaluates and saves, so `load_best_model_at_end` chooses and loads the
    best average, and `model.safetensors` in every checkpoint is an average. The weights that train are then in
    `optimizer.pt`, and `train(resume_from_checkpoint=...)` with this callback continues with them. At the end of
    training the model holds the average, unless `final=False`. `label` chooses one of several averages, as for
    `opt.averaged(label)`.
    """

    def __init__(self, label: str | None = None, *, final: bool = True) -> None:
        self.label = label
        self.final = final
        self._shown: Shown | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Take the weights back out of a checkpoint; raise StepError if the optimizer keeps no such average."""
        for stack in stacks_with_average([given["optimizer"]], self.label):
            stack.zero_grad()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Show the average if the Trainer is about to evaluate or to save."""
        if self._shown is None and (control.should_evaluate or control.should_save):
            self._shown = Shown(stacks_with_average([given["optimizer"]], self.label), self.label, given["model"])

    on_epoch_end = on_step_end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Give the weights back."""
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.leave()

    on_epoch_begin = on_step_begin

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Leave the average in the model: the best one if the Trainer has loaded it, or the last one."""
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self._shown is None and self.final and not best:
            self._shown = Shown(stacks_with_average([given["optimizer"]], self.label), self.label, given["model"])
        shown, self._shown = self._shown, None
        if shown is not None:
            if self.final or best:
                shown.leave_and_keep()
            else:
                shown.leave()
