"""The machine in words: what a table of times must say to mean anything."""

import os
import platform
from pathlib import Path

import torch


def machine(device: torch.device | str) -> dict[str, str | int]:
    """Return processor, device, threads and versions."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    return {
        "device": name,
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def machine_line(found: dict[str, str | int]) -> str:
    """Return the machine as one line."""
    return (
        f"{found['device']}, {found['cores']} cores of {found['processor']} ({found['vector_instructions']}), "
        f"{found['threads']} threads, torch {found['torch']}, Python {found['python']}, {found['system']}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system than Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
