"""A stack as a submission to AlgoPerf, for PyTorch: one file, without metaopt."""

from typing import Any

from metaopt.ejecting.branches import branches_of
from metaopt.ejecting.writing import eject_for_any_length, small_stack
from metaopt.errors import SpecError
from metaopt.specs.pipeline import as_pipeline

# the names and arguments are those of AlgoPerf's submission functions (algoperf/spec.py)
FUNCTIONS = '''
# AlgoPerf's batch sizes for its baselines; another one is yours to choose
BATCH_SIZES = {{
    "criteo1tb": 262144,
    "fastmri": 32,
    "finewebedu_lm": 64,
    "imagenet_resnet": 1024,
    "imagenet_resnet_gelu": 512,
    "imagenet_resnet_silu": 512,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "ogbg": 512,
    "wmt": 128,
    "mnist": 16,
    "cifar": 16384,
}}


def get_batch_size(workload_name: str) -> int:
    """Return the global batch size of a workload."""
    if workload_name not in BATCH_SIZES:
        raise ValueError(f"Unsupported workload name: {{workload_name}}")
    return BATCH_SIZES[workload_name]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> Any:
    """Return the optimizer, whose schedules are as long as the workload's budget of steps."""
    return {{"optimizer": make_optimizer(model_params.{members}(), workload.step_hint), "shown": ExitStack()}}


def update_params(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: Any,
    loss_type: Any,
    optimizer_state: Any,
    eval_results: Any,
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> Any:
    """Make one update; return the state of the optimizer, the parameters and the state of the model."""
    from algoperf import spec

    optimizer_state["shown"].close()  # what was evaluated makes way for what is trained
    optimizer, model = optimizer_state["optimizer"], current_param_container
    model.train()
    optimizer.zero_grad()
    logits, new_model_state = workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=spec.ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=True,
        dropout_rate=getattr(hyperparameters, "dropout_rate", 0.0),
    )
    found = workload.loss_fn(
        label_batch=batch["targets"],
        logits_batch=logits,
        mask_batch=batch.get("weights"),
        label_smoothing=getattr(hyperparameters, "label_smoothing", 0.0),
    )
    summed, examples = found["summed"], found["n_valid_examples"]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.nn import all_reduce

        summed, examples = all_reduce(summed), all_reduce(examples)
    (summed / examples).backward()
    optimizer.step()
    return optimizer_state, model, new_model_state


def prepare_for_eval(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: Any,
    eval_results: Any,
    global_step: int,
    rng: Any,
) -> Any:
    """Put the weights that are to be evaluated into the model, until the next update."""
{shown}    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: Any,
    input_queue: Any,
    optimizer_state: Any,
    current_param_container: Any,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> Any:
    """Return the next batch of the queue."""
    return next(input_queue)
'''
SHOWN = """    optimizer_state["shown"].close()
    optimizer_state["shown"].enter_context(optimizer_state["optimizer"].averaged({label!r}))
"""


def submission(spec: Any) -> str:
    """Return a stack as the file `submission.py` of AlgoPerf. Raises SpecError for what `metaopt eject` cannot do."""
    members = "named_parameters" if branches_of(as_pipeline(spec)) else "parameters"
    text = eject_for_any_length(spec, "export --form algoperf")
    stack = small_stack(spec)
    if stack.averages and stack.default_average is None:
        raise SpecError(
            f"export: the bases keep different averages, {' and '.join(stack.averages)}: keep one, behind the partition"
        )
    shown = "" if stack.default_average is None else SHOWN.format(label=stack.default_average)
    first = "from __future__ import annotations\n\n"
    text = text.replace(first, f"{first}from contextlib import ExitStack\n", 1)
    return f"{text}\n{FUNCTIONS.format(shown=shown, members=members)}"
