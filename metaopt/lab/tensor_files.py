"""Tensors in the format of torch.distributed.checkpoint, and nothing but tensors: no file can name code to run."""

import pickle
import warnings
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import metadata as formats
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import load

from metaopt.errors import CheckpointError

METADATA = ".metadata"

# what the index of a checkpoint may consist of
_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name): getattr(formats, name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    )
}


class _Index(pickle.Unpickler):
    """Reads an index; a class that is not of an index is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            return _StorageInfo
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was written; nothing is read from there
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.layout):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an index")


class _Reader(FileSystemReader):
    """torch's reader, but for how it reads the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> formats.Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            return _index(file)


def _index(file: BinaryIO) -> formats.Metadata:
    found = _Index(file).load()
    if not isinstance(found, formats.Metadata):
        raise pickle.UnpicklingError("the index is not one of torch.distributed.checkpoint")
    return found


def sizes_of(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor of a checkpoint. Raises CheckpointError."""
    try:
        with (folder / METADATA).open("rb") as file:
            entries = _index(file).state_dict_metadata
        return {key: (entry.size, entry.properties.dtype) for key, entry in entries.items()}  # type: ignore[union-attr]
    except Exception as error:  # what a damaged or crafted file makes the reader raise is not foreseeable
        raise _unreadable(folder, error) from None


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read a checkpoint into tensors of the right shapes; a DTensor gets its own shard. Raises CheckpointError."""
    expect_single_processes()
    try:
        load(tensors, storage_reader=_Reader(folder), no_dist=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        raise _unreadable(folder, error) from None


def expect_single_processes() -> None:
    """Silence torch's warning that a process reads or writes by itself: it is meant to."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
    return CheckpointError(f"{folder} cannot be read as a checkpoint: it is damaged, or of something else ({reason})")
