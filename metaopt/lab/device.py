"""The device that a user names, checked before anything is trained on it."""

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
