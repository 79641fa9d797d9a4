"""Write checkpoints while the training goes on: sharded over the ranks, each published whole or not at all."""

import copy
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from metaopt.errors import CheckpointError
from metaopt.lab.checkpoint import MANIFEST, POINTER, REPLICAS, REST, found, name_of, newest, prefix, separated, sha256
from metaopt.lab.holding import scratch_of
from metaopt.lab.ranks import Ranks, lost_contact

KEPT = 3


class Saver:
    """Writes the checkpoints of one run, at most one at a time; every rank has one.

    The processes agree on a group of their own: on the one of the gradients their collectives would mix with those.
    """

    def __init__(self, folder: Path, ranks: Ranks, kept: int = KEPT, has_replicas: bool = False) -> None:
        self.folder, self.ranks, self.kept, self.has_replicas = folder, ranks, kept, has_replicas
        self._group: Any = distributed.new_group(backend="gloo") if ranks.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._step = 0

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Copy a content and begin to write it, after the one before is written. Raises CheckpointError for that."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        from metaopt.lab.tensor_files import expect_single_processes

        self.settle()
        expect_single_processes()
        self._step = step
        rank, size = self.ranks.rank, self.ranks.size
        tensors, rest = separated(content)
        own = {key: tensor.detach() for key, tensor in tensors.items()}
        if self.has_replicas:
            own = {prefix(rank) + key: tensor for key, tensor in own.items()}
        else:
            # what all ranks have, each writes a part of; of shards each has its own
            shared = sorted(key for key, tensor in tensors.items() if not _is_sharded(tensor))
            for position, key in enumerate(shared):
                if position % size != rank:
                    del own[key]
        rest, random = copy.deepcopy({key: value for key, value in rest.items() if key != "random"}), rest["random"]
        scratch = scratch_of(self.folder / name_of(step))
        try:
            scratch.mkdir(exist_ok=True)  # not its parents: a folder that has disappeared is not made anew
            writer = FileSystemWriter(scratch)
            written = async_save(own, storage_writer=writer, process_group=self._group, no_dist=size == 1)
        except OSError as error:
            raise self._failed(error) from None
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._publish, written, scratch, rest, random)

    def check(self) -> None:
        """Raise CheckpointError if a checkpoint could not be written, without waiting for one."""
        if self._pending is not None and self._pending.done():
            self.settle()

    def settle(self) -> None:
        """Wait until the last checkpoint is published. Raises CheckpointError."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            if lost_contact(error):
                raise
            if self.ranks.rank == 0:
                with suppress(OSError):  # half a checkpoint on a full disk is in everybody's way
                    shutil.rmtree(scratch_of(self.folder / name_of(self._step)))
            raise self._failed(error) from error

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False)

    def _publish(self, written: Future[Any], scratch: Path, rest: dict[str, Any], random: Any) -> None:
        written.result()
        rank = self.ranks.rank
        sums = {path.name: sha256(path) for path in scratch.glob(f"__{rank}_*")}
        # with replicas, the plain values are each one's own as well
        values = {key: rest[key] for key in ("model", "stack")} if self.has_replicas else None
        each = self.ranks.gathered((sums, random, values), self._group)
        if self.has_replicas:
            rest = {**rest, REPLICAS: [own for _, _, own in each]}
        failed: OSError | None = None
        if rank == 0:
            try:
                self._finish(scratch, {**rest, "random": [state for _, state, _ in each]}, dict(_all(each)))
            except OSError as error:
                failed = error
        # nobody goes on before it is published, and all end if it was not
        if (of_first := self.ranks.gathered(failed, self._group)[0]) is not None:
            raise of_first

    def _finish(self, scratch: Path, rest: dict[str, Any], sums: dict[str, str]) -> None:
        """Write what is not in the tensors' files, put the checkpoint in its place, and let the pointer name it."""
        with (scratch / REST).open("wb") as file:
            torch.save(rest, file)
        for name in (REST, ".metadata"):
            sums[name] = sha256(scratch / name)
        (scratch / MANIFEST).write_text(json.dumps({"format": 1, "files": sums}, indent=1))
        for name in (REST, MANIFEST):
            _sync(scratch / name)
        _sync(scratch)
        path = self.folder / name_of(self._step)
        if path.exists():  # from a process that was killed before it moved the pointer
            shutil.rmtree(path)
        scratch.replace(path)
        pointer = scratch_of(self.folder / POINTER)
        pointer.write_text(f"{path.name}\n")
        _sync(pointer)
        pointer.replace(self.folder / POINTER)
        _sync(self.folder)
        for old in found(self.folder)[self.kept :]:
            if old.is_dir():
                (old / MANIFEST).unlink(missing_ok=True)  # one that is removed in part is none
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)

    def _failed(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._step} cannot be written to {self.folder}: {_reason(error)}. {newest(self.folder)}"
        )


def _all(each: list[Any]) -> Any:
    return (item for sums, _, _ in each for item in sums.items())


def _is_sharded(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _reason(error: BaseException) -> str:
    """Return why a write failed: torch wraps what the system said."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        error = next(iter(failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)  # a rename is on the disk when its directory is
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
