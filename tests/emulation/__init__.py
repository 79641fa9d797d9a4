"""The device `emulated`: no hardware, but as on a GPU nothing of it mixes with main memory, and reading it is a wait.

It belongs in a process of its own: for torch it is then the accelerator of the machine. Nothing is said of a GPU by it,
only of what the host asks of a device, and in which order.
"""

import contextlib
import os
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
# in the order of the source
MODES = ("raises", "captures", "ignores the factor", "lacks fused kernels")


def compiler() -> str | None:
    """Return a C++ compiler, or None."""
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)


def built(folder: Path) -> Path:
    """Compile the device, which takes some 20 seconds; return the library."""
    torch_folder, library = Path(torch.__file__).parent, folder / "libemulated.so"
    includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    libraries = torch_folder / "lib"
    subprocess.run(
        [
            *(str(compiler()), "-O0", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(library)),
            *(f"-I{include}" for include in includes),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return library


def load(library: Path) -> None:
    """Make the device torch's accelerator, in this process and for good."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend("emulated")
    module = types.ModuleType("torch.emulated")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=0: torch.get_rng_state(),
        set_rng_state=lambda state, device=0: torch.set_rng_state(state),
        synchronize=lambda device=None: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        device=lambda device: contextlib.nullcontext(),
        set_device=lambda device: None,
        is_current_stream_capturing=lambda: torch.ops.emulated.mode(MODES.index("captures")),
    )
    torch._register_device_module("emulated", module)
    torch.utils.generate_methods_for_privateuse1_backend()


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    """Put the device into one of its modes."""
    torch.ops.emulated.set_mode(MODES.index(name), True)
    try:
        yield
    finally:
        torch.ops.emulated.set_mode(MODES.index(name), False)
