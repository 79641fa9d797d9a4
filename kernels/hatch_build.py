"""Builds the C++ library for the wheel, if there is a compiler; the package is complete without it."""

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"]
ON_X86 = {"base": [], "avx2": ["-mavx2", "-mfma"], "avx512": AVX512}


def compiler() -> str | None:
    """Return the C++ compiler that `CXX` names, or else the first one on the path."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def build(folder: Path) -> list[Path]:
    """Build the variants that this machine's processors may need; return those that could be built."""
    cxx = compiler()
    variants = ON_X86 if platform.machine() in ("x86_64", "AMD64") else {"base": []}
    built = []
    # without OpenMP the library works with one thread
    for threads in (["-fopenmp"], []):
        running = {}
        for name, flags in variants.items() if cxx else ():
            file = folder / f"kernels_{name}.so"
            file.unlink(missing_ok=True)
            command = [cxx, *FLAGS, *threads, *flags, str(folder / "kernels.cpp"), "-o", str(file)]
            running[file] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        built = [file for file, process in running.items() if process.wait() == 0]
        if built:
            break
    return built


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library to a wheel, which is then one for this platform and for every Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library, and name the wheel by its platform if there is one."""
        if self.target_name == "wheel" and build(Path(self.root) / "metaopt_kernels"):
            build_data["artifacts"].append("metaopt_kernels/*.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
