"""Imports point one way, and every public name can be reached in any order."""

import ast
import random
import subprocess
import sys
from pathlib import Path

import pytest
from documents import in_forks

import metaopt
from metaopt.registry import BUILT_IN, registry

ROOT = Path(metaopt.__file__).parent
HEAVY = {"tensorboard", "typer", "rich", "matplotlib", "sklearn"}
# module -> what it may import from metaopt, the lowest first; a group of modules may import one another
BOTTOM: dict[str, set[str]] = {
    "errors": set(),
    "multi_tensor": set(),
    "flat_memory": {"multi_tensor"},
    "distributed": {"errors", "distributed", "multi_tensor", "flat_memory"},
    "hooks": set(),
    "docstrings": set(),
    "hyperparameters": {"errors"},
    "checkpoint_file": {"errors"},
    "deferred": {"errors", "hyperparameters"},
    "space": {"errors", "hyperparameters", "deferred"},
    "tuner": {"errors", "hyperparameters", "deferred", "space"},
    "schedule": {"errors", "hyperparameters", "deferred", "space"},
    "scheduled_values": {"errors", "schedule"},
    "group_entries": {"errors", "hyperparameters", "schedule", "space"},
    "logger": set(),
    "measurements": {"errors"},
    "metrics": {"errors", "logger", "measurements"},
    "module_buffers": set(),
    "slots": set(),
    "group": set(),
    "rules": {"errors", "group", "multi_tensor"},
    "joined_rules": {"rules"},
    "flat_padding": {"rules"},
    "flat_operations": {"flat_memory", "multi_tensor"},
    "flat_rules": {"flat_memory", "flat_operations", "flat_padding", "group", "multi_tensor", "rules"},
    "programs": {"joined_rules", "rules"},
    "wrapper": {"errors", "hyperparameters", "schedule", "slots", "group", "rules"},
    "problem_class": {"errors", "hyperparameters"},
    "tensor_problem": {"hyperparameters", "problem_class"},
    "registry": {"errors", "hooks"},
    "lr_reporter": set(),
    "misuse": {"errors", "schedule", "wrapper"},
    "torch_internals": set(),
}
# what a stack is made of works without pluggy and without any registered part
BELOW_ENGINE = {
    *("errors", "hyperparameters", "deferred", "space", "schedule", "slots", "group", "rules", "wrapper"),
    *("joined_rules", "programs", "flat_padding", "flat_operations", "flat_rules"),
    *("metrics", "logger", "measurements", "multi_tensor", "flat_memory"),
    *("group_entries", "misuse", "module_buffers", "distributed", "scheduled_values", "torch_internals"),
}
# the modules of the engine, the lowest first: each imports only from those above it here
ENGINE = (
    "chain",
    *("fused.probes", "fused.uniform", "fused.lists", "fused.postponed", "fused.recorded"),
    "multi_base",
    "structure",
    *("run.entries", "run.run", "run.groups"),
    *("update.change", "update.update"),
    *("param_state.scratch", "param_state.slot_values", "param_state.placeholders", "param_state.first_update"),
    "param_state.base_reset",
    *(
        "views.blocks",
        "views.params",
        "views.rows",
        "views.numbers",
        "views.group_view",
        "views.cutting",
        "views.groups_view",
    ),
    "averages",
    *("exchange.buckets", "exchange.initial_sync", "exchange.outer_steps"),
    *("checkpoint.report", "checkpoint.matching", "checkpoint.validation", "checkpoint.precedence", "checkpoint.reset"),
    "checkpoint.loading",
    *("step.points", "step.hooks", "step.evaluation", "step.base_step", "step.capture", "step.order"),
)
TOP = {"lab", "cli", "testing"}
PACKAGES = {"distributed", "specs", "construction", "explaining", "ejecting", "misuse"}
MODULES = {f.stem for f in ROOT.glob("*.py")} - {"__init__", "__main__"} | PACKAGES
BELOW_SPECS = {*BOTTOM, "engine", "refusals", "stack", "compiled_step"} - {"problem_class", "tensor_problem"}
ALLOWED: dict[str, set[str]] = {
    **BOTTOM,
    "compiled_step": BELOW_ENGINE | {"engine"},
    "refusals": BELOW_ENGINE | {"engine"},
    "stack": BELOW_ENGINE | {"engine", "refusals", "compiled_step", "lr_reporter"},
    "ensembling": BELOW_ENGINE | {"engine", "checkpoint_file", "stack"},
    "specs": BELOW_SPECS | {"specs"},
    "explaining": BELOW_SPECS | {"specs", "explaining"},
    # a run shows its own explanation in its log
    "construction": BELOW_SPECS | {"specs", "construction", "explaining"},
    "ejecting": BELOW_SPECS | {"specs", "construction", "ejecting", "metaopt"},
    "stubs": BELOW_SPECS | {"specs", "metaopt"},
}
ANYTHING = {*MODULES, "metaopt", "engine", *BUILT_IN}


def imported(file: Path) -> set[str]:
    """Return the modules of metaopt that a file imports, also for typing; `metaopt` stands for the public names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "metaopt":
            modules = {a.name for a in node.names if (ROOT / f"{a.name}.py").exists() or (ROOT / a.name).is_dir()}
            found |= {f"metaopt.{name}" for name in modules}
            found |= {"metaopt"} if len(modules) < len(node.names) else set()
        elif isinstance(node, ast.ImportFrom) and is_folder_of_engine(node.module or ""):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] == "metaopt"}


def is_folder_of_engine(module: str) -> bool:
    return module.startswith("metaopt.engine") and (ROOT.parent / module.replace(".", "/")).is_dir()


def first(names: set[str]) -> set[str]:
    return {name.split(".")[1] if "." in name else "metaopt" for name in names}


PARTS = sorted(f for folder in BUILT_IN for f in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("file", PARTS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_part_imports_only_what_a_third_party_may(file: Path) -> None:
    assert imported(file) <= {"metaopt"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    files = (ROOT / module).rglob("*.py") if module in PACKAGES else [ROOT / f"{module}.py"]
    for file in files:
        assert first(imported(file)) <= ALLOWED[module], file


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_imports_one_way_and_knows_no_stack_and_no_part(module: str) -> None:
    found = imported(ROOT / "engine" / f"{module.replace('.', '/')}.py")
    lower = {f"metaopt.engine.{name}" for name in ENGINE[: ENGINE.index(module)]}
    assert {name for name in found if name.startswith("metaopt.engine")} <= lower
    assert first(found) <= BELOW_ENGINE | {"engine"}


def test_the_engine_is_a_dozen_modules() -> None:
    files = [f.relative_to(ROOT / "engine").with_suffix("") for f in (ROOT / "engine").rglob("*.py")]
    assert {".".join(f.parts) for f in files if f.name != "__init__"} == set(ENGINE)
    # a folder is one of them
    assert len({module.partition(".")[0] for module in ENGINE}) <= 12


def test_the_table_names_all_modules() -> None:
    assert set(ALLOWED) == MODULES


@pytest.mark.parametrize(
    "file",
    sorted(f for name in ("lab", "testing") for f in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")] if f.exists()),
    ids=lambda f: str(f.relative_to(ROOT)),
)
def test_the_laboratory_and_the_kit_know_no_command(file: Path) -> None:
    assert first(imported(file)) <= ANYTHING | {"lab", "testing"}


@pytest.mark.parametrize("file", sorted((ROOT / "cli").glob("*.py")), ids=lambda f: f.stem)
def test_a_command_knows_no_other_command(file: Path) -> None:
    found = imported(file)
    assert first(found) <= ANYTHING | TOP
    assert not {name for name in found if name.startswith("metaopt.cli.")}


@pytest.mark.parametrize(
    "statement", ["import metaopt", "import metaopt; metaopt.build; metaopt.explain; metaopt.adamw"]
)
def test_importing_metaopt_loads_nothing_heavy(statement: str) -> None:
    # a name is looked up with every built-in part present, except those that a logger or problem needs when it is made
    program = f"import sys; {statement}; print(*{{n.split('.')[0] for n in sys.modules}} & {HEAVY!r})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_no_module_bears_a_public_or_a_registered_name() -> None:
    modules = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert modules & (set(metaopt._HOMES) | set(registry.names())) == set()


def test_no_registered_name_is_a_public_one() -> None:
    assert set(metaopt._HOMES) & set(registry.names()) == set()


@pytest.mark.slow
def test_every_name_is_reached_whatever_was_imported_before(tmp_path: Path) -> None:
    files = [f for f in ROOT.rglob("*.py") if f.stem not in ("__init__", "__main__") and "lab" not in f.parts]
    modules = [".".join(("metaopt", *f.relative_to(ROOT).with_suffix("").parts)) for f in sorted(files)]
    programs = []
    for seed in (0, 1):
        random.Random(seed).shuffle(modules)
        programs.append(f"""
import importlib, types
for name in {modules!r}:
    importlib.import_module(name)
import metaopt
from metaopt.registry import registry
names = [*metaopt._HOMES, *(n for n in registry.names() if "." not in n)]
print(*[n for n in names if isinstance(getattr(metaopt, n), types.ModuleType) or n not in dir(metaopt)])
""")
    for status, printed, errors in in_forks(programs, tmp_path):
        assert status == 0, errors
        assert printed.split() == []
