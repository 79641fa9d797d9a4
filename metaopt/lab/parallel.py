"""How ranks train one model: alone, DistributedDataParallel (`ddp`), sharded (`fsdp`), or as replicas (`local`).

A rank gets its part of each batch of the problem. With ddp and fsdp the loss that the optimizer sees is that of the
whole batch, the same on all ranks, and so is the wish of any rank to stop. Replicas know their own part alone.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from metaopt.errors import ProblemError
from metaopt.lab.batches import dealt
from metaopt.lab.dealing import Dealing
from metaopt.lab.ranks import Ranks
from metaopt.problem_class import Problem
from metaopt.stack import Stack

# on an accelerator a wish to stop is read so many steps later: reading it at once would wait for the device
LATER = 8


class Parallel(ABC):
    """Evaluates the loss and its gradient on this rank's part of a batch, and shares both with the others."""

    # whether each rank has weights and state of its own
    has_replicas = False

    def __init__(self, problem: Problem, model: nn.Module, ranks: Ranks, dealing: Dealing | None = None) -> None:
        self.problem, self.model, self.ranks = problem, model, ranks
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self._wishes: deque[tuple[torch.Tensor, torch.Event | None]] = deque()

    def expect(self, opt: Stack) -> None:
        """Take the stack that makes the steps. Raises ProblemError for one that cannot train in this way."""
        self._opt = opt

    @abstractmethod
    def backward(self, batch: Any) -> torch.Tensor:
        """Return the mean loss over all ranks' parts of a batch; the gradients are in place, averaged as well."""

    def evaluate(self, split: str) -> dict[str, float]:
        """Return the problem's evaluation; every rank makes it."""
        return self.problem.evaluate(self.model, split)

    def has_to_stop(self) -> bool:
        """Return whether any rank wants to stop: the same answer on all ranks after the same step."""
        return self.wants_to_stop()

    def _part(self, batch: Any) -> Any:
        return dealt(batch, self.ranks.rank, self.ranks.size, type(self.problem).__name__.lower())

    def _row(self, loss: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what is averaged over ranks beside the gradients: the loss, and whether this rank wants to stop."""
        loss = loss.detach().to(dtype).reshape(1)
        return torch.cat([loss, loss.new_full((1,), float(self.wants_to_stop()))])

    def _shared(self, row: torch.Tensor) -> torch.Tensor:
        """Return the loss of an averaged row; its wish is read by `has_to_stop`."""
        if row.device.type == "cpu":
            self._wishes.append((row[1], None))
        else:
            copied = row[1].to("cpu", non_blocking=True)
            self._wishes.append((copied, torch.accelerator.current_stream().record_event()))
        return row[0]


class Alone(Parallel):
    """One process: the whole batch."""

    def backward(self, batch: Any) -> torch.Tensor:
        loss = self.problem.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss


class _Agreed(Parallel):
    """Ranks that share the row of `_row` with each gradient."""

    def has_to_stop(self) -> bool:
        later = LATER if self.ranks.device != "cpu" else 0
        asked = False
        while len(self._wishes) > later:
            wish, copied = self._wishes.popleft()
            if copied is not None:
                copied.synchronize()
            asked = asked or float(wish) > 0.0
        return asked


class DataParallel(_Agreed):
    """torch's DistributedDataParallel around the loss: whatever the problem does with its model is inside `forward`.

    The loss travels with the gradients, as that of one more parameter, so that no collective is added.
    """

    def __init__(self, problem: Problem, model: nn.Module, ranks: Ranks, dealing: Dealing | None = None) -> None:
        super().__init__(problem, model, ranks)
        assert dealing is not None
        self._dtype = torch.promote_types(dealing.dtype, torch.float32)
        inner = _Loss(self, model, torch.zeros(2, dtype=self._dtype, device=ranks.device))
        self._loss = nn.parallel.DistributedDataParallel(inner, find_unused_parameters=dealing.has_unused)
        self._tally = inner.tally
        # torch sorts its buckets anew after a first gradient, and sums of more than two ranks depend on them: a run
        # that goes on from a checkpoint is to have them as the run that was not interrupted
        dealing.leave_no_trace(lambda: self.backward(dealing.batch))
        self._wishes.clear()

    def backward(self, batch: Any) -> torch.Tensor:
        self._loss(self._part(batch)).backward()
        row, self._tally.grad = self._tally.grad, None
        assert row is not None
        return self._shared(row)


class _Loss(nn.Module):
    """The loss as a module, with one parameter more whose gradient is the row of `Parallel._row`."""

    def __init__(self, owner: DataParallel, model: nn.Module, tally: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.tally = nn.Parameter(tally)
        self._owner = (owner,)  # not a module of this one

    def forward(self, batch: Any) -> torch.Tensor:
        (owner,) = self._owner
        loss = owner.problem.loss(self.model, batch)
        counted: torch.Tensor = _Counted.apply(  # type: ignore[no-untyped-call]
            loss, self.tally, owner._row(loss, owner._dtype)
        )
        return counted


class _Counted(torch.autograd.Function):
    """The loss as it is; backward gives `tally` the row as its gradient."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, tally: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        (row,) = ctx.saved_tensors
        return gradients[0], row, None


class Sharded(_Agreed):
    """FSDP2: `fully_shard` over the blocks of each nn.ModuleList, and over the rest of the model together."""

    def __init__(self, problem: Problem, model: nn.Module, ranks: Ranks, dealing: Dealing | None = None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(problem, model, ranks)
        mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.size,))
        for module in reversed([*model.modules()]):  # the inner ones first
            for block in module if isinstance(module, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        self._root: Any = fully_shard(_Call(model), mesh=mesh)

    def backward(self, batch: Any) -> torch.Tensor:
        loss = self._root(self.problem.loss, self._part(batch))
        loss.backward()
        row = self._row(loss, torch.promote_types(loss.dtype, torch.float32))
        distributed.all_reduce(row)
        return self._shared(row / self.ranks.size)

    def evaluate(self, split: str) -> dict[str, float]:
        found: dict[str, float] = self._root(self.problem.evaluate, split)
        self._root.reshard()  # forward leaves the outer weights gathered for a backward pass that does not come
        return found


class LocalUpdates(Parallel):
    """Replicas: no gradient is sent, and the parts with `across="replicas"` average the ways that the weights went."""

    has_replicas = True

    def expect(self, opt: Stack) -> None:
        if not opt.takes_means:
            raise ProblemError(
                f"--parallel local needs a part that averages over replicas, and {opt.spec} has none: write "
                f"\"adamw(lr=3e-3) | outer(k=30, across='replicas')\", or use --parallel ddp"
            )
        super().expect(opt)

    def backward(self, batch: Any) -> torch.Tensor:
        loss = self.problem.loss(self.model, self._part(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def has_to_stop(self) -> bool:
        if not self._opt.met_replicas:
            return False
        # together with the outer step: between two of them nothing is sent
        wish = torch.tensor([float(self.wants_to_stop())])
        distributed.all_reduce(wish, group=self.ranks.group)
        return bool(wish > 0.0)


class _Call(nn.Module):
    """Calls a function of the model inside `forward`, where the shards are gathered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


WAYS: dict[str, type[Parallel]] = {"ddp": DataParallel, "fsdp": Sharded, "local": LocalUpdates}
