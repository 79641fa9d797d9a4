"""Files that torch.save wrote, read as data alone, with what is wrong with them in one sentence."""

import pickle
from pathlib import Path
from typing import Any

import torch

from metaopt.errors import CheckpointError


def read_saved(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Return what a file holds: tensors and plain values; nothing in it is executed. Raises CheckpointError."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: torch.save did not write it, or it holds more than tensors and "
            f"plain values"
        ) from None
    except Exception as error:  # what a damaged or foreign file makes the reader raise is not foreseeable
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: torch.save did not write it, or it is damaged ({reason})"
        ) from None
