"""The optimizers of the package pytorch-optimizer, unchanged, under `pytorch_optimizer.<name>`."""

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytorch_optimizer
import torch

from metaopt import Example, hookimpl

# ---- how each is made when `metaopt check` proves it, and what it cannot do, with the reason

NEEDS: dict[str, Mapping[str, Any]] = {
    "adahessian": {"gradients": "graph"},
    "adashift": {"spec": "pytorch_optimizer.adashift(keep_num=2)"},
    "alig": {"closure": True},
    "bsam": {"spec": "pytorch_optimizer.bsam(num_data=100)", "closure": True},
    "kron": {"tolerance": 1e-6},  # products of its small matrices are rounded now this way, now that
    "lorarite": {"parameters": "matrices"},
    "ranger21": {"spec": "pytorch_optimizer.ranger21(num_iterations=100)"},
    "sara": {"spec": "pytorch_optimizer.sara(lr=0.01, threshold=10.0)"},
    "sophiah": {"gradients": "graph"},
    "spectralsphere": {
        "spec": "pytorch_optimizer.spectralsphere(solver_max_iterations=5, power_iteration_steps=2)",
        "parameters": "matrices",
    },
}

# what these read from the device in Python at every update
READS = {
    "adagc": "the norm of each gradient",
    "adamp": "the cosine of each gradient and parameter",
    "alice": "a scale of each parameter",
    "alig": "the loss and the norm of all gradients",
    "asgd": "norms of parameters and gradients",
    "avagrad": "the norm of its second moments",
    "dadaptadagrad": "its estimate of the distance",
    "dadaptadam": "its estimate of the distance",
    "dadaptadan": "its estimate of the distance",
    "dadaptlion": "its estimate of the distance",
    "dadaptsgd": "its estimate of the distance",
    "nero": "the scale of each parameter",
    "prodigy": "its estimate of the distance",
    "racs": "the norm of each gradient",
    "ranger21": "the sum of all second moments",
    "sara": "how many weights its masks let through",
    "sgdp": "the cosine of each gradient and parameter",
    "sgdsai": "the spread of each gradient",
    "spam": "how many weights its masks let through",
    "spectralsphere": "every step of its root finding",
    "stablespam": "how many gradients are spikes",
    "swats": "a product of each gradient and step",
}

# what these keep in their state or groups, of which no checkpoint can be read without running code
KEEPS = {
    "adashift": "a queue of gradients",
    "conda": "a projector object",
    "scalableshampoo": "a preconditioner object",
    "scion": "a member of an enumeration",
    "scionlight": "a member of an enumeration",
}

NO_TEMPLATE_STEP = {
    "a2grad": "it has no learning rate that could be 0: its first step moves the weights",
    "adahessian": "it differentiates gradients, and that step's have no graph",
    "alig": "it needs a closure, and that step has none",
    "bsam": "it needs a closure, and that step has none",
    "emofact": "it keeps numbers of the whole run in the state under names, which that client refuses",
    "emolynx": "it keeps numbers of the whole run in the state under names, which that client refuses",
    "emonavi": "it keeps numbers of the whole run in the state under names, which that client refuses",
    "lorarite": "it keeps the state of two factors under the first",
    "madgrad": "it keeps numbers of the whole run in the state under names, which that client refuses",
    "ranger21": "it counts that step in an attribute",
    "sophiah": "it differentiates gradients, and that step's have no graph",
    "spam": "it keeps numbers of the whole run in the state under names, which that client refuses",
    "stablespam": "it counts that step in an attribute",
}

OTHERS = {
    "state_is_whole_at_the_first_step": {
        "asgd": "it divides by norms of gradients, and those of the check are 0",
        "dadaptsgd": "it leaves its step early where all gradients are 0",
        "gravity": "it divides by the largest gradient, and those of the check are 0",
    },
    "groups_have_values_of_their_own": {
        "apollodqn": "it takes the rate at construction, for all groups",
        "dadaptadagrad": "it refuses groups of different rates, or takes the largest",
        "dadaptadam": "it refuses groups of different rates, or takes the largest",
        "dadaptadan": "it refuses groups of different rates, or takes the largest",
        "dadaptlion": "it refuses groups of different rates, or takes the largest",
        "dadaptsgd": "it refuses groups of different rates, or takes the largest",
        "prodigy": "it refuses groups of different rates, or takes the largest",
    },
    "takes_a_group_later": {
        "lorarite": "it moves pairs of factors, and the group of the check has one",
        "radam": "the first five updates of each group change nothing",
        "schedulefreeradam": "the first five updates of each group change nothing",
    },
    "works_without_some_gradients": {
        "adashift": "its queue is longer than the check is patient",
        "sara": "it makes a mask of every parameter at construction",
        "spam": "it makes a mask of every parameter at construction",
    },
    "text_rebuilds_the_stack": {
        "grokfastadamw": "it divides the rate that it is given by three, and keeps the quotient",
        "scion": "its norm_kwargs is a dict, which has no text",
        "scionlight": "its norm_kwargs is a dict, which has no text",
    },
    "copies_and_pickles": {"adopt": "it keeps a lambda, which cannot be pickled"},
    "is_the_bare_class_bit_for_bit": {"bsam": "outside of a stack it needs gradients before step(closure) as well"},
}

NOT_RUN = dict.fromkeys(
    ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"),
    "its groups must say use_muon, which is not a hyperparameter: make it by hand and give it to metaopt.wrap",
)
if find_spec("einops") is None:
    NOT_RUN["demo"] = "it needs the package einops, which is not installed"


def _expected_failures(name: str) -> dict[str, str]:
    found = {check: reasons[name] for check, reasons in OTHERS.items() if name in reasons}
    if name in READS:
        found["waits_for_no_device"] = f"it reads {READS[name]} in Python at every update"
    if name in KEEPS:
        for check in ("state_dict_round_trip", "resumes_in_a_new_process"):
            found[check] = f"it keeps {KEEPS[name]} where a checkpoint holds tensors, numbers and text alone"
    if name in NO_TEMPLATE_STEP:
        found["template_step_leaves_the_run_alone"] = NO_TEMPLATE_STEP[name]
    return found


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {
        name: Example(
            **NEEDS.get(short, {}), expected_failures=_expected_failures(short), skip_reason=NOT_RUN.get(short, "")
        )
        for name in metaopt_optimizers()
        for short in [name.rpartition(".")[2]]
    }


# ---- the optimizers


@hookimpl
def metaopt_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    classes = {name.lower(): getattr(pytorch_optimizer, name) for name in dir(pytorch_optimizer)}
    supported = sorted(set(pytorch_optimizer.get_supported_optimizers()) & set(classes))
    return {f"pytorch_optimizer.{name}": classes[name] for name in supported if _is_base_of_its_own(classes[name])}


def _is_base_of_its_own(optimizer: type[torch.optim.Optimizer]) -> bool:
    """Tell whether a stack can build this class and metaopt does not have it already.

    That package also lists torch's own classes, and some that take a whole model or another optimizer.
    """
    first = next(iter(inspect.signature(optimizer).parameters))
    return first == "params" and not optimizer.__module__.startswith("torch.")
