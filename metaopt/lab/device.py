"""The device that a user names, checked before anything is trained on it, and its own random numbers."""

from typing import Any

import torch

from metaopt.errors import ProblemError


def usable_device(name: str) -> str:
    """Return `name` if tensors can be made there. Raises ProblemError."""
    try:
        torch.zeros(1, device=name).item()  # the meta device makes tensors, but none that hold numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        present = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        reason = str(error).splitlines()[0][:80]
        raise ProblemError(f"--device {name}: cannot be used here ({reason}); present: {present}") from None
    return name


def random_state(device: str | torch.device) -> torch.Tensor | None:
    """Return the state of an accelerator's own generator; None for the processor, and where there is none."""
    device = torch.device(device)
    module: Any = None if device.type == "cpu" else getattr(torch, device.type, None)
    if not hasattr(module, "get_rng_state"):
        return None
    # Apple's has one device, and takes none
    state: torch.Tensor = module.get_rng_state(*([] if device.type == "mps" else [device]))
    return state


def set_random_state(device: str | torch.device, state: torch.Tensor | None) -> None:
    """Set an accelerator's own generator to what `random_state` returned."""
    device = torch.device(device)
    if state is not None:
        getattr(torch, device.type).set_rng_state(state, *([] if device.type == "mps" else [device]))
