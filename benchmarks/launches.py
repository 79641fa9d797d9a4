"""`python -m benchmarks.launches`: how many kernels an update launches on an accelerator, counted without one.

The parameters are fake tensors on "cuda", so nothing is computed and every operator of an update is seen; torch's own
rules say how many kernels each of them launches (`launch_rules`). It is a count, not a measurement.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt
from benchmarks.launch_rules import CHUNKS, launches_of
from metaopt.flat_memory import forget_layouts
from metaopt.registry import registry

Shapes = Sequence[tuple[int, ...]]
# makes the optimizer over parameters, and returns what makes one update
Maker = Callable[[list[torch.nn.Parameter]], Callable[[], Any]]

UPDATES = 2
# an update of `clip_grad_norm_` and fused AdamW may be exceeded by so many launches
ALLOWED = 4


def gpt2(layers: int = 12, width: int = 768, words: int = 50257, context: int = 1024) -> Shapes:
    """Return the shapes of GPT-2's 148 tensors."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(words, width), (context, width), *(block * layers), (width,), (width,)]


SHAPES: dict[int, Shapes] = {
    10: [(128, 64), (128,), (128, 128), (128,), (128, 128), (128,), (128, 128), (128,), (10, 128), (10,)],
    148: gpt2(),
    1000: [(64, 16)] * 1000,
}

# settings under which a part acts at every update, or at every second one, so that few updates show all that it does
SETTINGS = {
    "accumulate": "accumulate(2) | adamw",
    "clip_grad_norm": "clip_grad_norm(1.0) | adamw",
    "clip_grad_value": "clip_grad_value(1.0) | adamw",
    "decay": "decay(0.1) | adamw",
    "l2": "l2(0.1) | adamw",
    "lawa": "adamw | lawa(k=1, n=2)",
    "lookahead": "adamw | lookahead(k=2)",
    "outer": "adamw | outer(k=2)",
    "plateau": "adamw | plateau('val_loss')",
    "skip_nonfinite": "skip_nonfinite(3) | adamw",
    "skip_spikes": "skip_spikes(window=2) | adamw",
    "zclip": "zclip(warmup=2) | adamw",
}
# other settings of parts, and such as matter for parameters of 16 bits
MORE = (
    "adamw | lookahead(k=2, pullback_momentum='pullback')",
    "adamw | lookahead(k=2, pullback_momentum='reset')",
    "sam(adaptive=True) | adamw",
    "adamw | ema(warmup=True)",
    "adamw | update_floor(rows=True)",
    "clip_grad_norm(1.0) | adamw | lookahead(k=2)",
)
MORE_OF_16_BITS = (
    "adamw | ema(average_dtype='float32')",
    "adamw | lookahead(k=2, slow_dtype='float32')",
    "adamw | outer(k=2, slow_dtype='float32')",
)


class Count(NamedTuple):
    """What one update takes: the most kernels of several updates by CUDA version, and how often the host waits."""

    launches: dict[int, int]
    waits: int
    operators: Counter[str]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernels that operators launch. What the host reads is answered: of each list the first is true."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = dict.fromkeys(CHUNKS, 0)
        self.operators: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            self.waits += args[0].device.type != "cpu"
            return 1.0 if args[0].dtype.is_floating_point else True
        # nobody looks at what they compute, and there are many tensors in them
        kwargs = {key: None if key == "generator" else value for key, value in (kwargs or {}).items()}
        idle = name.startswith(("aten::_foreach_", "aten::_fused_")) and name.endswith("_")
        made = None if idle else func(*args, **kwargs)
        found = launches_of(func, args, made)
        for cuda, number in found.items():
            self.launches[cuda] += number
        if found:
            self.operators[str(func)] += found[max(CHUNKS)]
        return made


@contextmanager
def fake_device() -> Iterator[None]:
    """Let tensors on "cuda" be made without a card, and let torch and metaopt treat them as ordinary ones."""

    def address(tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata) + int(tensor.storage_offset()) * tensor.element_size()

    def read(tensor: torch.Tensor) -> Any:
        return torch.ops.aten._local_scalar_dense.default(tensor)

    def listed(tensor: torch.Tensor) -> list[Any]:
        first, *others = [read(each) for each in tensor.unbind()]
        return [first, *(False for _ in others)]

    def item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
        # torch asks for a card when it is given an index, and not when it is asked for a part
        if isinstance(index, slice):
            begin, end, _ = index.indices(tensor.shape[0])
            return tensor.narrow(0, begin, end - begin)
        return tensor.select(0, index) if isinstance(index, int) else torch.Tensor.__getitem__(tensor, index)

    def copy(tensor: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        torch._foreach_copy_([tensor], [source])
        return tensor

    own: dict[str, Any] = {"data_ptr": address, "tolist": listed, "__getitem__": item, "copy_": copy}
    own["__invert__"] = lambda tensor: torch.bitwise_not(tensor)
    own |= dict.fromkeys(("item", "__float__", "__bool__", "__int__"), read)
    before = {name: vars(FakeTensor).get(name) for name in own}
    for name, method in own.items():
        setattr(FakeTensor, name, method)
    ordinary = (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types)
    for types in ordinary:
        types.append(FakeTensor)
    registry.entries()  # imports, which want torch as it is
    mode, generator = FakeTensorMode(), torch.Generator
    torch.Generator = lambda device="cpu": generator()  # type: ignore[assignment, misc]
    fork = torch.random.fork_rng
    torch.random.fork_rng = lambda devices=(): nullcontext()  # type: ignore[assignment, misc]
    forget_layouts()
    try:
        with mode:
            yield
    finally:
        forget_layouts()
        torch.Generator, torch.random.fork_rng = generator, fork  # type: ignore[misc]
        for types in ordinary:
            types.remove(FakeTensor)
        for name, method in before.items():
            if method is None:
                delattr(FakeTensor, name)
            else:
                setattr(FakeTensor, name, method)


def count(make: Maker, shapes: Shapes, dtype: torch.dtype = torch.float32, warm: int = 2) -> Count:
    """Count the launches of an update, after the first ones, in which state is made."""
    with fake_device():
        parameters = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda")) for shape in shapes]
        gradients = [torch.empty_like(p) for p in parameters]
        step = make(parameters)
        watches = []
        for number in range(warm + UPDATES):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            watch = Watch()
            with watch:
                step()
            if number >= warm:
                watches.append(watch)
    most = max(watches, key=lambda each: each.launches[max(CHUNKS)])
    launches = {cuda: max(each.launches[cuda] for each in watches) for cuda in CHUNKS}
    return Count(launches, max(each.waits for each in watches), most.operators)


def by_hand(parameters: list[torch.nn.Parameter]) -> Callable[[], Any]:
    """Return the update that all others are compared with: `clip_grad_norm_` and fused AdamW."""
    base = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        base.step()

    return step


def by_stack(spec: str) -> Maker:
    """Return what makes the update of a stack; parts that own the evaluation of the loss get a closure."""

    def make(parameters: list[torch.nn.Parameter]) -> Callable[[], Any]:
        opt = metaopt.build([(f"layer.{i}.weight", p) for i, p in enumerate(parameters)], spec)
        loss = torch.zeros((), device="cuda")
        gradients = [torch.empty_like(p) for p in parameters]

        def closure() -> torch.Tensor:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            return loss

        owns = "sam" in spec
        return lambda: opt.step(closure) if owns else opt.step()

    return make


def spec_of(name: str) -> str:
    """Return a stack with one wrapper, by its name."""
    if name in SETTINGS:
        return SETTINGS[name]
    wrapper = registry.find(name, "wrapper").target
    return f"{name} | adamw" if wrapper.runs_before_base() else f"adamw | {name}"


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("specs", nargs="*", metavar="SPEC", help="stacks; every wrapper beside adamw by default")
    parser.add_argument("--tensors", type=int, action="append", choices=[*SHAPES], help="how many; all by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--operators", action="store_true", help="also what launches them")
    return parser.parse_args(arguments)


def default_specs(dtype: torch.dtype) -> list[str]:
    """Return a stack for every wrapper, and for settings that matter."""
    names = [entry.name for entry in registry.entries("wrapper")]
    return ["adamw", *map(spec_of, names), *MORE, *(MORE_OF_16_BITS if dtype.itemsize == 2 else ())]


def main(arguments: list[str]) -> int:
    """Print a table in Markdown; return the exit status."""
    given = read_arguments(arguments)
    dtype, numbers = getattr(torch, given.dtype), given.tensors or [*SHAPES]
    print(f"| update, {given.dtype} | {' | '.join(f'{number} tensors' for number in numbers)} | waits |")
    print("| --- " * (len(numbers) + 2) + "|")
    rows: list[tuple[str, Maker]] = [("`clip_grad_norm_`, AdamW(fused)", by_hand)]
    rows += [(f"`{spec}`", by_stack(spec)) for spec in given.specs or default_specs(dtype)]
    for label, make in rows:
        counts = [count(make, SHAPES[number], dtype) for number in numbers]
        cells = [f"{each.launches[13]} ({each.launches[12]})" for each in counts]
        print(f"| {label} | {' | '.join(cells)} | {counts[0].waits} |", flush=True)
        if given.operators:
            for operator, launched in counts[-1].operators.most_common():
                print(f"    {launched:6} {operator}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
