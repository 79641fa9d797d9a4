"""A stack in the training script of the optimization track of modded-nanogpt: one file, without metaopt.

A result of the track is its own script, train_gpt_simple.py, with another optimizer and other hyperparameters, and the
logs of its runs. So the script is the user's own copy of it; two of its sections are rewritten, and nothing else.
"""

import ast
import re
from typing import Any

from metaopt.ejecting.writing import defined_names, eject_for_any_length, small_stack
from metaopt.errors import SpecError

SCRIPT = "train_gpt_simple.py"
WHERE = "records/track_3_optimization in github.com/KellerJordan/modded-nanogpt"
OPTIMIZER, HYPERPARAMETERS = "Optimizer", "Init & Optim Hyperparams"
# within the section of hyperparameters: what is in front of it makes the initial weights, and stays
CREATED = "# create the optimizer(s)"
MADE = """# create the optimizer, whose schedules are as long as the run
optimizers = [make_optimizer(list(model.named_parameters()), train_steps)]
assert set(p for opt in optimizers for group in opt.param_groups for p in group["params"]) == set(model.parameters())

def set_hparams(step):
    pass  # the optimizer sets its own
"""


def training_script(spec: Any, script: str, steps: int | None = None) -> str:
    """Return the track's script with a stack as its optimizer; `steps` replaces its number of steps.

    Raises SpecError for what `metaopt eject` cannot do, and for a script that does not have the track's sections.
    """
    written = eject_for_any_length(spec, "export --form speedrun")
    docstring, _, code = written.partition('"""\n\nfrom __future__ import annotations\n')
    comment = "".join(f"# {line}".rstrip() + "\n" for line in (docstring + _note(spec)).strip('"\n').splitlines())
    _check_names(code, _replaced(script, OPTIMIZER, lambda old, indent: ""))
    changed = _replaced(script, OPTIMIZER, lambda old, indent: f"{comment}{code.rstrip()}\n")
    return _replaced(changed, HYPERPARAMETERS, lambda old, indent: _hyperparameters(old, indent, steps))


def _note(spec: Any) -> str:
    kept = " and ".join(small_stack(spec).averages)
    return f"\nThe script evaluates the weights that are trained, not the average of {kept}." if kept else ""


def _replaced(script: str, title: str, change: Any) -> str:
    """Return a script with the content of one section changed: what is between its heading and the next one."""
    heading = r"^(?P<indent> *)#{{8,}}\n *# +{} +#\n *#{{8,}}\n"
    found = re.search(heading.format(re.escape(title)), script, re.M)
    after = re.search(heading.format("[^#\n]+?"), script[found.end() :], re.M) if found else None
    if found is None or after is None:
        raise SpecError(f"the script must be {SCRIPT} of {WHERE}, got one without a section {title!r}")
    old = script[found.end() : found.end() + after.start()]
    return f"{script[: found.end()]}\n{change(old, found['indent'])}\n\n{script[found.end() + after.start() :]}"


def _hyperparameters(old: str, indent: str, steps: int | None) -> str:
    """Return the section with its initial weights, the number of steps and the new optimizer."""
    kept, created, _ = old.partition(f"{indent}{CREATED}\n")
    kept, counted = re.subn(r"(?m)^( *train_steps = )(\d+)", lambda m: f"{m[1]}{steps or m[2]}", kept)
    if not created or counted != 1:
        missing = "train_steps = ..." if created else CREATED
        raise SpecError(f"the script must be {SCRIPT} of {WHERE}, got one without {missing!r} in {HYPERPARAMETERS!r}")
    lines = [f"{indent}{line}".rstrip() + "\n" for line in MADE.splitlines()]
    return kept.lstrip("\n") + "".join(lines)


def _check_names(code: str, others: str) -> None:
    """Refuse a script that uses a name of the written code for something else; `others` are its other sections."""
    try:
        theirs = {name for node in ast.parse(others).body for name in defined_names(node)}
    except SyntaxError as error:
        raise SpecError(f"the script must be {SCRIPT} of {WHERE}, got what is not Python: {error}") from None
    both = sorted(theirs & {name for node in ast.parse(code).body for name in defined_names(node)})
    if both:
        raise SpecError(f"the script has {', '.join(both)} already, as the optimizer does: rename it in the script")
