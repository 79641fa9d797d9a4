"""The library computes torch's numbers bit for bit, for every size and number of threads."""

import os
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

metaopt_kernels = pytest.importorskip("metaopt_kernels", reason="metaopt-kernels is not installed")
from metaopt_kernels import (  # noqa: E402
    CODES,
    NUMBER,
    OF_TENSOR,
    SCRATCH,
    TENSOR,
    Kernels,
    Places,
    Program,
    adam_settings,
    addresses,
    load,
    sgd_settings,
)

if load() is None:
    pytest.skip("the library of metaopt-kernels was not built, or is turned off", allow_module_level=True)

KERNELS = load()
SIZES = [*range(71), 1000, 4097, 40_000, 70_001]
DTYPES = [torch.float32, torch.float64]
P, G, M, V = (TENSOR | i for i in range(4))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels() -> Kernels:
    assert KERNELS is not None
    return KERNELS


def run(kernels: Kernels, threads: int, *args: Any, **keywords: Any) -> None:
    """Run the library with some threads; torch opens a parallel region for each small tensor, and gets one."""
    torch.set_num_threads(threads)
    kernels.run(*args, **keywords)
    torch.set_num_threads(1)


def lists(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randn(n, dtype=dtype, generator=generator) for n in SIZES] for _ in range(4)]
    return [*made[:3], [t.abs() for t in made[3]]]


def copies(tensors: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[t.clone() for t in each] for each in tensors]


def assert_equal(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for i, (own, theirs) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(own, theirs, strict=True):
            assert torch.equal(a, b), (i, a.numel())


@pytest.mark.parametrize("scale", [None, 3.7])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("beta1", "decay"), [(0.9, 0.1), (0.3, 0.1), (0.9, 0.0)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_is_torch_s(
    kernels: Kernels,
    threads: int,
    dtype: torch.dtype,
    beta1: float,
    decay: float,
    decoupled: bool,
    maximize: bool,
    scale: float | None,
) -> None:
    expected = lists(dtype)
    found = copies(expected)
    counts, own_counts = ([torch.tensor(float(i % 3)) for i in range(len(SIZES))] for _ in range(2))
    divisor = None if scale is None else torch.tensor(scale)
    assert kernels.knows(dtype, "adam")
    settings = adam_settings(0.0013, (beta1, 0.997), 1e-8, decay, maximize, decoupled)
    for _ in range(2):
        torch._foreach_add_(counts, 1)
        gradients = [g.clone() for g in expected[1]]  # torch writes the divided ones
        (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
            expected[0], gradients, expected[2], expected[3], [], counts, amsgrad=False, lr=0.0013, beta1=beta1,
            beta2=0.997, weight_decay=decay, eps=1e-8, maximize=maximize, grad_scale=divisor, found_inf=None,
        )  # fmt: skip
        run(
            kernels,
            threads,
            dtype,
            Program([(CODES["adam"], P, P, G, M)]),
            addresses(*found),
            array("q", SIZES),
            base="adam",
            settings=settings,
            count=addresses(own_counts),
            divisor=divisor,
        )
    assert_equal(found, expected)
    assert counts == own_counts


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), [(0, 0, 0), (0.9, 0, 0), (0.9, 0.3, 0), (0.9, 0, 1)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_is_torch_s(
    kernels: Kernels,
    threads: int,
    dtype: torch.dtype,
    decay: float,
    momentum: float,
    dampening: float,
    nesterov: int,
    maximize: bool,
) -> None:
    expected = lists(dtype)[:3]
    found = copies(expected)
    settings = sgd_settings(0.013, momentum, dampening, bool(nesterov), decay, maximize)
    assert kernels.knows(dtype, "sgd")
    for _ in range(2):
        torch._fused_sgd_(
            expected[0], expected[1], expected[2] if momentum else [], weight_decay=decay, momentum=momentum, lr=0.013,
            dampening=dampening, nesterov=bool(nesterov), maximize=maximize, is_first_step=False, grad_scale=None,
            found_inf=None,
        )  # fmt: skip
        program = Program([(CODES["sgd"], P, P, G, M if momentum else 0)])
        run(kernels, threads, dtype, program, addresses(*found), array("q", SIZES), base="sgd", settings=settings)
    assert_equal(found, expected)


@pytest.mark.parametrize("weight", [0.001, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_operations_are_torch_s(kernels: Kernels, threads: int, dtype: torch.dtype, weight: float) -> None:
    expected = lists(dtype)
    found = copies(expected)
    assert kernels.knows(dtype, "lerp", "addcmul")
    torch._foreach_lerp_(expected[2], expected[0], weight)
    torch._foreach_copy_(expected[0], expected[2])
    torch._foreach_addcmul_(expected[3], expected[0], expected[1])
    code = [
        (CODES["lerp"], M, M, P, NUMBER),
        (CODES["move"], P, M, 0, 0),
        (CODES["addcmul"], V, V, P, G),
    ]
    run(kernels, threads, dtype, Program(code), addresses(*found), array("q", SIZES), [weight])
    assert_equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_end_a_pass_and_give_each_tensor_its_number(kernels: Kernels, threads: int, dtype: torch.dtype) -> None:
    """P <- P + (P G) (P.G / (P.P + G.G + 1) - mean(M)), and V is left alone."""
    expected = lists(dtype)
    found = copies(expected)
    pp, pg, gg, mean, total, factor = (OF_TENSOR | i for i in range(6))
    code = [
        (CODES["mul"], SCRATCH, P, G),
        (CODES["dots"], pp, P, G),
        (CODES["mean"], mean, M),
        (CODES["add"], total, pp, gg),
        (CODES["add"], total, total, NUMBER),
        (CODES["div"], factor, pg, total),
        (CODES["sub"], factor, factor, mean),
        (CODES["pass"],),
        (CODES["mul_add"], P, SCRATCH, factor, P),
    ]
    run(kernels, threads, dtype, Program(code), addresses(*found), array("q", SIZES), [1.0])
    again = copies(expected)
    run(kernels, 3 - threads, dtype, Program(code), addresses(*again), array("q", SIZES), [1.0])
    assert_equal(found, again)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for p, g, m, own in zip(*expected[:3], found[0], strict=True):
        p, g, m = (t.double() for t in (p, g, m))
        by = torch.dot(p, g) / (torch.dot(p, p) + torch.dot(g, g) + 1) - (m.mean() if len(m) else 0)
        torch.testing.assert_close(own.double(), p + p * g * by, rtol=tolerance, atol=tolerance)
    assert_equal(found[1:], expected[1:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("divisor", [None, torch.tensor(1.7)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_the_base_adds_up_on_its_way_have_the_bits_of_sums_behind_it(
    kernels: Kernels, dtype: torch.dtype, decoupled: bool, maximize: bool, divisor: torch.Tensor | None, threads: int
) -> None:
    pp, pu, uu, total = (OF_TENSOR | i for i in range(4))
    base, sums, between = (CODES["adam"], SCRATCH, P, G, M, 1), (CODES["dots"], pp, P, SCRATCH), (CODES["move"], 0, P)
    behind = [
        *((CODES["add"], total, pp, pu), (CODES["add"], total, total, uu), (CODES["pass"],)),
        (CODES["mul_add"], P, SCRATCH, total, P),
    ]
    found = []
    for code in ([base, sums, *behind], [base, between, sums, *behind]):
        own = lists(dtype)
        sizes = array("q", SIZES)
        run(
            kernels,
            threads,
            dtype,
            Program(code),
            addresses(*own),
            sizes,
            base="adam",
            settings=adam_settings(0.1, (0.9, 0.99), 1e-8, 0.1, maximize, decoupled),
            count=addresses(counts := [torch.tensor(1.0) for _ in sizes]),
            divisor=divisor,
        )
        assert all(count == 2 for count in counts)
        found.append(own)
    assert_equal(*found)


def test_several_operations_in_one_have_the_bits_of_single_ones(kernels: Kernels) -> None:
    for dtype in DTYPES:
        assert kernels.knows(dtype, "addcmul")
        pairs: list[tuple[list[Any], list[Any]]] = [
            ([("mul", M, P, NUMBER), ("add", M, G, M)], [("mul_add", M, P, NUMBER, G)]),
            ([("mul", M, P, NUMBER), ("addcmul", M, M, G, NUMBER + 1)], [("mul_addcmul", M, P, NUMBER, G, NUMBER + 1)]),
            ([("addcmul", M, P, G, V), ("add", M, P, M)], [("addcmul_add", M, P, G, V, P)]),
            *(
                (
                    [("mul", M, P, G), (name, M, M, NUMBER), ("mul", M, M, NUMBER + 1)],
                    [(f"mul_{name}", M, P, G, NUMBER, NUMBER + 1)],
                )
                for name in ("lt", "le", "gt")
            ),
            (
                [
                    *(("mul", V, P, G), ("le", V, V, NUMBER), ("mul", V, V, NUMBER + 1)),
                    *(("addcmul", V, P, V, G), ("add", V, G, V)),
                ],
                [("decay_add", V, P, G, NUMBER, NUMBER + 1)],
            ),
            (
                [
                    *(("mul", M, P, NUMBER), ("addcmul", M, M, G, NUMBER + 1)),
                    *(("mul", V, M, G), ("le", V, V, NUMBER), ("mul", V, V, NUMBER + 1)),
                    *(("addcmul", V, M, V, G), ("add", V, G, V), ("move", M, G)),
                ],
                [("turn_decay_add", V, P, G, NUMBER, NUMBER + 1, NUMBER, NUMBER + 1), ("move", M, G)],
            ),
            # over the weights themselves, as programs do
            (
                [("decay_add", V, P, G, NUMBER, NUMBER + 1), ("move", G, V)],
                [("decay_add", G, P, G, NUMBER, NUMBER + 1), ("move", V, G)],
            ),
            (
                [("turn_decay_add", V, P, G, NUMBER, NUMBER + 1, NUMBER, NUMBER + 1), ("move", G, V)],
                [("turn_decay_add", G, P, G, NUMBER, NUMBER + 1, NUMBER, NUMBER + 1), ("move", V, G)],
            ),
        ]
        for single, several in pairs:
            one, other = lists(dtype), lists(dtype)
            for tensors, code in ((one, single), (other, several)):
                program = Program([(CODES[name], *places) for name, *places in code])
                run(kernels, 1, dtype, program, addresses(*tensors), array("q", SIZES), [0.3, -0.7])
            assert_equal(other, one)


def test_a_square_root_that_torch_rounds_in_its_own_way_is_torch_s_own(kernels: Kernels) -> None:
    numbers = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 100
    exact = numbers.double().sqrt().float()
    assert kernels.knows(torch.float32, "sqrt") == torch.equal(numbers.sqrt(), exact)


def test_a_kind_of_update_that_differs_in_one_bit_is_torch_s_own(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_roundings", {})
    monkeypatch.setattr(kernels, "vector", 16)  # the rest of a tensor then begins at another element
    known = kernels.knows(torch.float32, "adam")
    assert known == (torch.backends.cpu.get_cpu_capability() == "DEFAULT")


def test_two_threads_of_torch_compute_the_same(kernels: Kernels) -> None:
    sizes = [31, 70_001]
    expected = [[torch.full((n,), 0.1 * i) for n in sizes] for i in range(1, 5)]
    found = copies(expected)
    counts, own_counts = ([torch.tensor(1.0) for _ in sizes] for _ in range(2))
    torch.set_num_threads(2)
    torch._foreach_add_(counts, 1)
    torch._fused_adamw_(
        *expected, [], counts, amsgrad=False, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, maximize=False,
        grad_scale=None, found_inf=None,
    )  # fmt: skip
    torch._foreach_lerp_(expected[1], expected[0], 0.3)
    kernels.run(
        torch.float32,
        Program([(CODES["adam"], P, P, G, M), (CODES["lerp"], G, G, P, NUMBER)]),
        addresses(*found),
        array("q", sizes),
        [0.3],
        base="adam",
        settings=adam_settings(0.1, (0.9, 0.99), 1e-8, 0.1, False, True),
        count=addresses(own_counts),
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_places_are_those_of_torch_whoever_gave_a_tensor_other_memory(kernels: Kernels, dtype: torch.dtype) -> None:
    assert kernels._begins is not None  # of this torch
    whole = torch.zeros(90, dtype=dtype)
    tensors = [whole[3:7], torch.nn.Parameter(torch.ones(5, dtype=dtype)), whole[:0], whole[::2]]
    places = kernels.places(tensors)
    for _ in range(3):
        assert places.look() == addresses(tensors)
        tensors[1].data = torch.ones(5000, dtype=dtype)
        tensors[0].data = whole[8:]
    assert Places(tensors, None).look() == places.look()


def test_the_package_installs_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    source = Path(__file__).parents[1]
    if not (source / "hatch_build.py").exists():
        pytest.skip("the tests are not beside the source")
    for file in source.rglob("*"):
        if file.is_file() and file.suffix in (".py", ".cpp", ".toml", ".md", "") and "tests" not in file.parts:
            copy = tmp_path / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    code = "import hatchling.build as b; print(b.build_wheel('.'))"
    built = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert built.stdout.split()[-1].endswith("-py3-none-any.whl")
    assert not list(tmp_path.rglob("*.so"))
