"""Who is measured: stacks, and the equal of a stack as people write it by hand."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch

from benchmarks.baselines import ByExpert, ByPackage, ByTorch, Recipe, Update, find_recipe
from metaopt.construction.building import build
from metaopt.errors import HyperparameterError, MetaoptError, SpecError
from metaopt.lab.shapes import NamedParameters
from metaopt.lab.timing import cycle_of
from metaopt.specs.pipeline import Pipeline, as_pipeline

# PyPI's names of packages that wrap an optimizer with a Lookahead of their own, and where it is found in them
PACKAGES = {"pytorch-optimizer": "pytorch_optimizer", "timm": "timm.optim"}


@dataclass(frozen=True)
class Contender:
    """One row: `make` gives the update over new parameters; `equal` is the stack, as text, that computes the same."""

    key: str
    what: str
    equal: str
    make: Callable[[NamedParameters], Update]


class ByStack(Update):
    """A stack of metaopt's; wrappers that own the evaluation get a loss that costs nothing."""

    def __init__(self, spec: str, parameters: NamedParameters, **settings: Any) -> None:
        self.stack = build(parameters, spec, **settings)
        if self.stack.needs_closure:
            raise SpecError(f"{spec}: its base evaluates the loss itself, so its update alone cannot be measured")
        loss = torch.zeros((), device=parameters[0][1].device)
        around = any("around" in wrapper.implemented_hooks() for wrapper in self.stack.wrappers)
        self._step = partial(self.stack.step, lambda: loss) if around else self.stack.step

    def step(self) -> None:
        self._step()

    def kept_tensors(self) -> Iterable[torch.Tensor]:
        for entries in self.stack.state.values():
            yield from (value for value in entries.values() if isinstance(value, torch.Tensor))

    def close(self) -> None:
        self.stack.close()

    def cycle(self) -> int:
        """Return after how many steps everything that is due every so often has been due equally often."""
        return cycle_of(self.stack)


def stack_contender(spec: str, key: str = "", **settings: Any) -> Contender:
    """Return the contender of a spec. Raises MetaoptError where it cannot be read or written as text."""
    return Contender(key or "stack", spec, str(as_pipeline(spec)), lambda named: ByStack(spec, named, **settings))


def find_baselines(
    spec: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[list[Contender], list[str]]:
    """Return what people write by hand instead of a stack, and a line for everything that cannot be measured here."""
    pipeline = as_pipeline(spec)
    recipe = find_recipe(pipeline)
    if recipe is None:
        return [], [f"{pipeline}: no equal by hand is known; its rows stand alone"]
    without = str(Pipeline(tuple(part for part in pipeline if part.name != "lookahead")))
    clip = "" if recipe.max_norm is None else f"clip_grad_norm_({recipe.max_norm:g}), "
    found = [Contender("torch", clip + _call(recipe), without, lambda parameters: ByTorch(recipe, parameters))]
    notes = []
    for flag in ("foreach", "fused"):
        if not _runs(recipe, device, dtype, flag):
            notes.append(f"{recipe.base.__name__}({flag}=True): torch does not offer it for {dtype} on {device}")
            continue
        make = partial(_by_torch, recipe, flag)
        found.append(Contender(f"torch-{flag}", clip + _call(recipe, f"{flag}=True"), without, make))
    if _runs(recipe, device, dtype, "fused"):
        found += _by_experts(recipe, str(pipeline), without)
    if recipe.k is not None:
        for package, module in PACKAGES.items():
            lookahead, note = _lookahead_of(package, module)
            if lookahead is None:
                notes.append(note)
                continue
            if package == "timm" and recipe.k == 1:
                notes.append("timm copies its slow weights at its first pull: at k=1 it computes something else")
                continue
            what = f"{clip}{_call(recipe)}, {_pull(recipe)} of {package}"
            make = partial(_by_package, recipe, lookahead)
            found.append(Contender(package, what, str(pipeline), make))
    return found, notes


def make_contenders(
    specs: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[list[Contender], list[str]]:
    """Return the contenders of several specs, each once; keys of the second spec and later ones carry its number."""
    found: list[Contender] = []
    notes: list[str] = []
    for number, spec in enumerate(specs, start=1):
        baselines, said = find_baselines(spec, device, dtype)
        notes += [line for line in said if line not in notes]
        for contender in [stack_contender(spec), *baselines]:
            if any(contender.what == other.what for other in found):
                continue
            found.append(contender if number == 1 else changed(contender, key=f"{contender.key}-{number}"))
    return found, notes


def _by_torch(recipe: Recipe, flag: str, parameters: NamedParameters) -> Update:
    return ByTorch(recipe, parameters, **{flag: True})


def _by_package(recipe: Recipe, lookahead: Callable[..., Any], parameters: NamedParameters) -> Update:
    return ByPackage(recipe, parameters, lookahead)


def _by_experts(recipe: Recipe, whole: str, without: str) -> list[Contender]:
    call = _call(recipe, "fused=True")
    clip = "" if recipe.max_norm is None else "get_total_norm, grad_scale, "
    found = []
    if clip:
        made = partial(ByExpert, recipe, pull=False)
        found.append(Contender("expert", clip + call, without, made))
    if recipe.k is not None:
        made = partial(ByExpert, recipe, pull=True)
        found.append(Contender("expert-lookahead", f"{clip}{call}, multi-tensor {_pull(recipe)}", whole, made))
    return found


def _call(recipe: Recipe, *more: str) -> str:
    given = [f"{name}={value!r}" for name, value in recipe.given.items()]
    return f"{recipe.base.__name__}({', '.join([*given, *more])})"


def _pull(recipe: Recipe) -> str:
    alpha = "" if recipe.alpha == 0.5 else f", alpha={recipe.alpha:g}"
    return f"Lookahead(k={recipe.k}{alpha})"


def _runs(recipe: Recipe, device: torch.device | str, dtype: torch.dtype, flag: str) -> bool:
    """Tell whether torch offers this way to run the optimizer for these tensors."""
    probe = [("probe", torch.nn.Parameter(torch.zeros(1, device=device, dtype=dtype)))]
    try:
        optimizer = recipe.optimizer(probe, **{flag: True})
        probe[0][1].grad = torch.zeros_like(probe[0][1])
        optimizer.step()
    except (RuntimeError, TypeError):
        return False
    except ValueError as error:
        raise HyperparameterError(f"{recipe.base.__name__}: {error}") from error
    return True


def _lookahead_of(package: str, module: str) -> tuple[Callable[..., Any] | None, str]:
    """Return a package's Lookahead, or None and a line that says why not."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.partition(".")[0] == module.partition(".")[0]:
            return None, f"{package} is not installed: its Lookahead is left out"
        return None, f"{package} is installed without {missing}: its Lookahead is left out"
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        return None, f"{package} cannot be imported here ({reason}): its Lookahead is left out"
    return found.Lookahead, ""


def chosen_baseline(contenders: Sequence[Contender], wanted: str | None) -> str:
    """Return the key of the baseline: the one asked for by key or text, else fused torch, else the first."""
    keys = [contender.key for contender in contenders]
    if wanted is None:
        return next((key for key in ("torch-fused", "torch") if key in keys), keys[0])
    for contender in contenders:
        if wanted in (contender.key, contender.what):
            return contender.key
    try:
        text = str(as_pipeline(wanted))
    except MetaoptError:
        text = wanted
    for contender in contenders:
        if contender.key.startswith("stack") and text == contender.equal:
            return contender.key
    raise SpecError(f"--baseline {wanted}: no contender is called so; there is: {', '.join(keys)}")
