"""Updates of many tensors in one pass over memory, by a small C++ library that torch's numbers are compared with once.

The library is built when the package is installed, where there is a compiler. Without it `load()` returns None.
"""

import array
import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

__version__ = "0.1.0"

# of the interface between this file and kernels.cpp
INTERFACE = 5
OFF = "METAOPT_KERNELS"
SINGLE = ["move", "add", "sub", "mul", "div", "lt", "le", "gt", "select", "sqrt", "abs", "neg", "hypot", "max", "lerp"]
OTHERS = ["addcmul", "adam", "sgd", "dot", "dots", "mean", "pass"]
SEVERAL = ["mul_add", "mul_addcmul", "addcmul_add", "mul_lt", "mul_le", "mul_gt", "decay_add", "turn_decay_add"]
OPS = [*SINGLE, *OTHERS, *SEVERAL]
CODES = {name: code for code, name in enumerate(OPS)}
# where an operand is: working memory, a list of tensors, a number of the program, a number of each tensor, and what one
# pass leaves to the next
REGISTER, TENSOR, NUMBER, OF_TENSOR, SCRATCH = (kind << 20 for kind in range(5))
MOST_NUMBERS = 64
# numbers of an instruction
LENGTH = 8
# how a product and a sum round: twice, or once with the first product fused, or with the last
TWICE, FIRST, LAST = range(3)
# what torch calls the instructions that it uses, and the library that uses the same; bytes that round as a whole: under
# AVX-512 compilers take half a vector at the end of a tensor
VARIANTS = {"AVX512": ("avx512", 32), "AVX2": ("avx2", 32), "DEFAULT": ("base", 32)}

Tensors = Sequence[torch.Tensor]
Instruction = tuple[int, ...]  # the operation, where the result goes, and up to six operands
Begins = Callable[[int, int, int], None]  # objects, their number, and where to write at which address each begins
Way = tuple[int, int]  # how whole vectors round, and how the rest of a tensor does


class _Job(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("length", "tensors", "threads")),
        *((name, ctypes.c_void_p) for name in ("address", "size", "number", "count", "base", "divisor")),
        *((name, ctypes.c_int64) for name in ("vector", "rounding", "rest_rounding", "lerp_rounding")),
        ("product_rounding", ctypes.c_int64),
    ]


class Program:
    """Instructions on elements, one after the other."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.length = len(code)
        padded = ([*each, *[0] * LENGTH][:LENGTH] for each in code)
        self.code = array.array("i", itertools.chain.from_iterable(padded))


class Places:
    """Where the tensors of a list begin; their memory may be another one at every look."""

    def __init__(self, tensors: Tensors, begins: Begins | None) -> None:
        self._tensors = list(tensors)
        self._objects = array.array("Q", list(map(id, self._tensors)))
        self._begins = begins

    def look(self) -> "array.array[int]":
        """Return where each begins now."""
        if self._begins is None:
            return array.array("Q", list(map(torch.Tensor.data_ptr, self._tensors)))
        found = array.array("Q", bytes(8 * len(self._objects)))
        self._begins(self._objects.buffer_info()[0], len(found), found.buffer_info()[0])
        return found


def _begins_of(path: Path) -> Begins | None:
    """Return the library's loop over torch's own function, which costs a tenth of a call from Python for each tensor.

    Generated code of `torch.compile` is given the address of that function. None if torch has none, or another one.
    """
    address = getattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", None)
    if not isinstance(address, int):
        return None
    # unlike `CDLL` it keeps Python's lock, without which nobody may touch the objects
    function = ctypes.PyDLL(str(path)).metaopt_begins
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    begins = partial(function, address)
    samples = [torch.empty(3, device="cpu"), torch.nn.Parameter(torch.empty(5, device="cpu")[2:])]
    if type(samples[0]) is not torch.Tensor:  # in a mode of fake tensors, which have no memory
        return None
    return begins if [*Places(samples, begins).look()] == [*Places(samples, None).look()] else None


class Kernels:
    """The library, and how torch rounds on this machine."""

    def __init__(self, library: ctypes.CDLL, vector: int, variant: str, begins: Begins | None = None) -> None:
        self.vector = vector
        self._begins = begins
        self.variant = variant
        self._run = {torch.float32: library.metaopt_run_float, torch.float64: library.metaopt_run_double}
        for function in self._run.values():
            function.argtypes, function.restype = [ctypes.POINTER(_Job)], None
        # by dtype and operation: how torch rounds; None: in no way that the library knows
        self._roundings: dict[tuple[torch.dtype, str], Way | None] = {}

    def knows(self, dtype: torch.dtype, *names: str) -> bool:
        """Return whether the library has torch's bits for these of "adam", "sgd", "lerp", "addcmul" and "sqrt"."""
        return dtype in self._run and all(self._rounding(dtype, name) is not None for name in names)

    def places(self, tensors: Tensors) -> Places:
        """Return what finds out where these tensors begin, any number of times; it holds them."""
        return Places(tensors, self._begins)

    def run(
        self,
        dtype: torch.dtype,
        program: Program,
        address: "array.array[int]",
        size: "array.array[int]",
        numbers: Sequence[float] = (),
        *,
        base: str = "",
        settings: Sequence[float] = (),
        count: "array.array[int] | None" = None,
        divisor: torch.Tensor | None = None,
        roundings: Way | None = None,
    ) -> None:
        """Run a program over tensors of `dtype`: the addresses list by list, and the size of each tensor."""
        number = array.array("d", [*numbers, *[0.0] * (MOST_NUMBERS - len(numbers))])
        own = array.array("d", [*settings, *[0.0] * (8 - len(settings))])
        roundings = roundings or (self._rounding(dtype, base) if base else None) or (TWICE, TWICE)
        job = _Job(
            code=program.code.buffer_info()[0],
            length=program.length,
            tensors=len(size),
            threads=torch.get_num_threads(),
            address=address.buffer_info()[0],
            size=size.buffer_info()[0],
            number=number.buffer_info()[0],
            count=None if count is None else count.buffer_info()[0],
            base=own.buffer_info()[0],
            divisor=None if divisor is None else divisor.data_ptr(),
            vector=self.vector,
            rounding=roundings[0],
            rest_rounding=roundings[1],
            lerp_rounding=(self._known(dtype, "lerp") or roundings)[0],
            product_rounding=(self._known(dtype, "addcmul") or roundings)[0],
        )
        self._run[dtype](ctypes.byref(job))

    # ---- how torch rounds

    def _known(self, dtype: torch.dtype, name: str) -> Way | None:
        return self._roundings.get((dtype, name))

    def _rounding(self, dtype: torch.dtype, name: str) -> Way | None:
        key = dtype, name
        if key not in self._roundings:
            apart = name in ("adam", "sgd")
            ways: list[Way] = [(a, b) for a in (LAST, FIRST, TWICE) for b in (LAST, FIRST, TWICE) if apart or a == b]
            self._roundings[key] = next(
                (way for way in ways if all(self._is_equal(dtype, name, way, c) for c in range(4))), None
            )
        return self._roundings[key]

    def _is_equal(self, dtype: torch.dtype, name: str, way: Way, case: int) -> bool:
        """Return whether the library, rounding in this way, and torch compute the same numbers."""
        # a square root may be another one in one of two hundred cases only
        sizes = (7, 64, 71, 77, *([4096] if name == "sqrt" else []))
        lists = [[_samples(n, dtype, 10 * i + case) for n in sizes] for i in range(4)]
        lists[3] = [t.abs() for t in lists[3]]
        own = [[t.clone() for t in tensors] for tensors in lists]
        counts = [torch.tensor(3.0) for _ in sizes]
        own_counts = [c.clone() for c in counts]
        instruction, numbers, settings = _expected(name, case, lists, counts)
        self.run(
            dtype,
            Program([instruction]),
            addresses(*own),
            array.array("q", sizes),
            numbers,
            settings=settings,
            count=addresses(own_counts) if name == "adam" else None,
            roundings=way,
        )
        return all(map(torch.equal, itertools.chain(*own), itertools.chain(*lists)))


def addresses(*lists: Tensors) -> "array.array[int]":
    """Return where the tensors begin, list by list."""
    return array.array("Q", [tensor.data_ptr() for tensors in lists for tensor in tensors])


def _samples(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=dtype, generator=generator)


def _expected(
    name: str, case: int, lists: list[list[torch.Tensor]], counts: list[torch.Tensor]
) -> tuple[Instruction, Sequence[float], Sequence[float]]:
    """Let torch update the lists; return the instruction that does the same, with its numbers."""
    p, g, m, v = lists
    place = [TENSOR | i for i in range(4)]
    if name == "lerp":
        weight = (0.3, 0.5, 0.001, 1.0)[case]
        torch._foreach_lerp_(m, p, weight)
        return (CODES["lerp"], place[2], place[2], place[0], NUMBER), [weight], []
    if name == "addcmul":
        torch._foreach_addcmul_(m, p, g)
        return (CODES["addcmul"], place[2], place[2], place[0], place[1]), [], []
    if name == "sqrt":
        m[:] = torch._foreach_sqrt(v)
        return (CODES["sqrt"], place[2], place[3]), [], []
    decoupled, maximize = case % 2, case // 2
    if name == "adam":
        kernel: Callable[..., Any] = torch._fused_adamw_ if decoupled else torch._fused_adam_
        beta1 = 0.3 if case == 3 else 0.9
        torch._foreach_add_(counts, 1)
        kernel(
            p, g, m, v, [], counts, amsgrad=False, lr=0.0013, beta1=beta1, beta2=0.997, weight_decay=0.11, eps=1e-8,
            maximize=bool(maximize), grad_scale=None, found_inf=None,
        )  # fmt: skip
        settings = adam_settings(0.0013, (beta1, 0.997), 1e-8, 0.11, bool(maximize), bool(decoupled))
        return (CODES["adam"], place[0], *place[:3]), [], settings
    torch._fused_sgd_(
        p, g, m, weight_decay=0.11, momentum=0.9, lr=0.0013, dampening=0.0 if decoupled else 0.3,
        nesterov=bool(decoupled), maximize=bool(maximize), is_first_step=False, grad_scale=None, found_inf=None,
    )  # fmt: skip
    settings = sgd_settings(0.0013, 0.9, 0.0 if decoupled else 0.3, bool(decoupled), 0.11, bool(maximize))
    return (CODES["sgd"], place[0], *place[:3]), [], settings


def adam_settings(
    lr: float, betas: Sequence[float], eps: float, weight_decay: float, maximize: bool, decoupled: bool
) -> tuple[float, ...]:
    """Return the numbers of Adam in the order of kernels.cpp."""
    return lr, *betas, eps, weight_decay, float(maximize), float(decoupled)


def sgd_settings(
    lr: float, momentum: float, dampening: float, nesterov: bool, weight_decay: float, maximize: bool
) -> tuple[float, ...]:
    """Return the numbers of SGD in the order of kernels.cpp."""
    return lr, momentum, dampening, float(nesterov), weight_decay, float(maximize)


@cache
def load() -> Kernels | None:
    """Return the library for the instructions that torch uses here; None if there is none, or `METAOPT_KERNELS=0`."""
    if os.environ.get(OFF) == "0":
        return None
    variant, vector = VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ("base", 16))
    path = Path(__file__).with_name(f"kernels_{variant}.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # not built, or built for another machine
        return None
    return Kernels(library, vector, variant, _begins_of(path)) if library.metaopt_version() == INTERFACE else None
