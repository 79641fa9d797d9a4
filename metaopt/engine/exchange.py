"""What replicas exchange: the ways that their weights went since the last outer step, averaged over a process group.

All replicas call `step()` equally often, whether or not one of them skips an update. So it is the count of steps that
says when an exchange is due, and every replica takes part with what it has.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from metaopt.distributed.replicas import BUCKET, Sum
from metaopt.distributed.shards import holders_of_other_shards, local
from metaopt.engine.chain import Chain, ParamGroup
from metaopt.engine.param_state.first_update import add_state_of
from metaopt.engine.param_state.placeholders import remove_placeholders
from metaopt.engine.param_state.slot_values import slot_dtype
from metaopt.engine.run.entries import STEPS, TEMPLATE
from metaopt.engine.run.run import Run
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update import Params, Update
from metaopt.engine.views.blocks import Rows, row_ranges
from metaopt.engine.views.group_view import GroupView, views_of
from metaopt.engine.views.params import is_trained
from metaopt.errors import HyperparameterError, StepError
from metaopt.wrapper import Wrapper

# elements of a tensor that are looked at together
DIGESTED = 1 << 22


@dataclass
class Part:
    """A parameter, or rows of it, in a bucket."""

    group: ParamGroup
    parameter: torch.Tensor
    rows: Rows

    @property
    def shape(self) -> torch.Size:
        whole = local(self.parameter)
        return whole.shape if self.rows is None else whole[self.rows[0] : self.rows[1]].shape


@dataclass
class Bucket:
    """Parts whose ways are added up in one collective."""

    parts: list[Part]
    sum: Sum | None = None
    # a checkpoint that was taken on the way holds the means
    is_saved: bool = False

    def means(self) -> list[torch.Tensor]:
        """Return the mean way of each part; waits for the collective."""
        assert self.sum is not None
        sizes = [part.shape.numel() for part in self.parts]
        pieces = torch.split(self.sum.mean(), sizes)
        return [piece.view(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]


def exchange_of(run: Run) -> "Exchange | None":
    """Return the exchange of a run, or None if none of its wrappers takes means."""
    return Exchange(run) if run.structure.exchanges else None


class Exchange:
    """When the wrappers of a run that take means are due, and what is on its way to or from other replicas."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.joined = False
        # whether an exchange was due at the last step: the same answer on all replicas
        self.met = False
        # of the step in progress: how many updates all replicas have had the time for, or None between two of these
        self._round: int | None = None
        # by wrapper and fragment, while a delay lasts
        self._under_way: dict[tuple[str, str, int], list[Bucket]] = {}

    # ---- when

    def count_step(self) -> None:
        """Count a call of `step()`; with a wrapper that gathers several steps into one update, so many are a round."""
        run = self.run
        self.met = False
        each = self._steps_per_round()
        if run.replicas.size == 1:
            self._round = run.updates
            for group in run.param_groups:
                group[STEPS] = run.updates * each
            return
        before = int(run.param_groups[0].get(STEPS, 0))
        # a flush ends a round that has begun
        steps = -(-before // each) * each if run.flushing else before + 1
        for group in run.param_groups:
            group[STEPS] = steps
        self._round = steps // each if steps > before and steps % each == 0 else None

    def take_part(self, update: Update) -> None:
        """Make the exchanges that are due at a step that makes no update here; alone there are none."""
        if self.run.replicas.size == 1:
            return
        update.pending_state = {}  # no update begins these parameters
        self.count_step()
        for placed in self.run.structure.exchanges:
            self.act(update, placed)

    def act(self, update: Update, placed: PlacedWrapper) -> None:
        """Make what is due of one wrapper: send ways, and step along the means that have come."""
        if self._round is None:
            return
        wrapper = placed.wrapper
        fragments, delay = (int(vars(wrapper)[name]) for name in ("fragments", "delay"))
        k = self._k(placed)
        for number in range(fragments):
            since = self._round - k * (number + 1) // fragments
            due = since >= 0 and since % k == 0
            self.met = self.met or due
            if due and not delay:
                for bucket in self._sent_in_turn(update, placed, number):
                    self._step(update, placed, bucket.parts, bucket.means())
            elif due:
                self._under_way[self._place(placed, number)] = list(self._sent(update, placed, number))
            elif since >= delay and (since - delay) % k == 0:
                self._receive(update, placed, number)

    def _steps_per_round(self) -> int:
        group, each = self.run.param_groups[0], 1
        for wrapper in self.run.structure.wrappers:
            if wrapper.spans_steps:
                each *= int(group[f"{wrapper.label}.{wrapper.spans_steps}"])
        return each

    def _k(self, placed: PlacedWrapper) -> int:
        key = f"{placed.wrapper.label}.{placed.wrapper.acts_every}"
        values = {int(group[key]) for group in self.run.groups_of(placed)}
        if len(values) > 1:
            raise HyperparameterError(
                f"{key} differs between groups ({', '.join(map(str, sorted(values)))}), but with across='replicas' all "
                f"groups have their steps together: give every group the same value"
            )
        return values.pop()

    @staticmethod
    def _place(placed: PlacedWrapper, number: int) -> tuple[str, str, int]:
        return "" if placed.chain is None else placed.chain.name, placed.wrapper.label, number

    # ---- what

    def _members(self, placed: PlacedWrapper) -> list[tuple[ParamGroup, Params]]:
        """Return the parameters that are exchanged, with their state: the same on all replicas.

        A parameter that has no gradient here may have had one elsewhere.
        """
        run = self.run
        if any(group[TEMPLATE] for group in run.param_groups):
            remove_placeholders(run, keep_early=True)
        found = []
        for group in self.run.groups_of(placed):
            members = [p for p in group["params"] if is_trained(p)]
            if run.replicas.size == 1:
                members = [p for p in members if p in run.state]
            add_state_of(run, run.structure.chain_of(group), placed.wrapper, members)
            found.append((group, members))
        return found

    def _buckets(self, placed: PlacedWrapper, number: int) -> list[Bucket]:
        """Return the parts of one fragment in buckets, which depend only on groups and shapes."""
        wrapper, slot = placed.wrapper, placed.wrapper.slots[str(placed.wrapper.anchor_across)]
        members = [(group, p) for group, params in self._members(placed) for p in params]
        buckets: list[Bucket] = []
        filling: dict[Any, tuple[Bucket, int]] = {}
        for group, p in _fragment(members, number, int(vars(wrapper)["fragments"])):
            dtype = _wide(slot_dtype(slot, vars(wrapper), p))
            whole = self.run.structure.chain_of(group).slots_of(wrapper).keeps_moments
            most = BUCKET // dtype.itemsize
            for rows, size in [(None, local(p).numel())] if whole else row_ranges(local(p), most):
                kind = dtype, p.device
                bucket, filled = filling.get(kind, (None, 0))
                if bucket is None or filled + size > most:
                    bucket, filled = Bucket([]), 0
                    buckets.append(bucket)
                bucket.parts.append(Part(group, p, rows))
                filling[kind] = bucket, filled + size
        return buckets

    def _sent(self, update: Update, placed: PlacedWrapper, number: int) -> Iterator[Bucket]:
        """Begin the collectives of a fragment, and yield its buckets."""
        for bucket in self._buckets(placed, number):
            flat = _flat(update, placed.wrapper, bucket.parts)
            bucket.sum = self.run.replicas.begin_sum(flat)
            yield bucket

    def _sent_in_turn(self, update: Update, placed: PlacedWrapper, number: int) -> Iterator[Bucket]:
        """Yield the buckets of a fragment, each when the next one is on its way already: two are in memory at most."""
        before: Bucket | None = None
        for bucket in self._sent(update, placed, number):
            if before is not None:
                yield before
            before = bucket
        if before is not None:
            yield before

    # ---- what comes back

    def _receive(self, update: Update, placed: PlacedWrapper, number: int) -> None:
        sent = self._under_way.pop(self._place(placed, number), None)
        # after a load they are in the state
        for bucket in self._buckets(placed, number) if sent is None else sent:
            pending = self._pending(placed, bucket.parts)
            means = bucket.means() if sent is not None else [kept.clone() for kept in pending]
            for kept in pending if sent is None or bucket.is_saved else ():
                kept.zero_()
            self._step(update, placed, bucket.parts, means)

    def _pending(self, placed: PlacedWrapper, parts: list[Part]) -> list[torch.Tensor]:
        key = f"{placed.wrapper.label}.pending"
        kept = [(local(self.run.state[part.parameter][key]), part.rows) for part in parts]
        return [tensor if rows is None else tensor[rows[0] : rows[1]] for tensor, rows in kept]

    def _step(self, update: Update, placed: PlacedWrapper, parts: list[Part], means: list[torch.Tensor]) -> None:
        """Let the wrapper make its outer step along means that have come."""
        wrapper = placed.wrapper
        for view, positions in _views(update, wrapper, parts):
            if vars(wrapper)["delay"]:
                view.kept_share = float(view.blend)
            anchors = getattr(view, str(wrapper.anchor_across))
            view.means_of_ways = [means[i].to(a) for i, a in zip(positions, anchors, strict=True)]
            wrapper.after_update(view)
            view.write_back()

    def settle(self) -> None:
        """Wait for the means that are on their way, and put them into the state: a checkpoint is taken."""
        for placed in self.run.structure.exchanges if self._under_way else ():
            for number in range(int(vars(placed.wrapper)["fragments"])):
                for bucket in self._under_way.get(self._place(placed, number), ()):
                    bucket.is_saved = True
                    for kept, mean in zip(self._pending(placed, bucket.parts), bucket.means(), strict=True):
                        kept.copy_(mean)

    def forget(self) -> None:
        """Drop what is on its way: a checkpoint was loaded, which brings its own."""
        for buckets in self._under_way.values():
            for bucket in buckets:
                bucket.means()
        self._under_way.clear()

    # ---- the first step

    @torch.no_grad()
    def join(self) -> bool:
        """Agree with the other replicas, once, on model, settings and weights; return whether weights changed here."""
        if self.joined:
            return False
        run, replicas = self.run, self.run.replicas
        self._refuse_other_shards()
        if replicas.size == 1:
            self.joined = True
            return False
        steps, device = int(run.param_groups[0].get(STEPS, 0)), run.param_groups[0]["params"][0].device
        own = [self._model(), self._settings(), steps, run.updates, self._weights()]
        told = replicas.gather(own, device)
        for place, what in enumerate(("parameters (names, shapes, dtypes or groups)", "settings of the exchange")):
            other = [rank for rank, numbers in enumerate(told) if numbers[place] != told[0][place]]
            if other:
                raise StepError(
                    f"replicas 0 and {other[0]} have different {what}: build the same stack over the same model on all"
                )
        most = max(numbers[2] for numbers in told)
        ahead = [rank for rank, numbers in enumerate(told) if numbers[2] == most]
        source = told[ahead[0]]
        differs = [rank for rank in ahead if told[rank][4] != source[4]]
        if most and differs:
            raise StepError(
                f"replicas {ahead[0]} and {differs[0]} have made {most} steps and keep different outer weights: load "
                f"checkpoints of one run, from one moment, on all replicas"
            )
        joins = [rank for rank in range(len(told)) if rank not in ahead]
        self.joined = True
        if joins:
            self._take_outer_weights(ahead[0], most, source[3], is_new=replicas.rank in joins)
            return replicas.rank in joins
        if not differs:
            return False
        replicas.broadcast([local(p.detach()) for group in run.param_groups for p in group["params"]], ahead[0])
        return replicas.rank in differs

    def _take_outer_weights(self, source: int, steps: int, updates: int, *, is_new: bool) -> None:
        """Send the outer weights of one replica, and what goes with them, to those that have made fewer steps."""
        run = self.run
        covered: dict[torch.Tensor, torch.Tensor] = {}
        if is_new:
            for group in run.param_groups:
                group[TEMPLATE] = ""
                for p in group["params"]:
                    run.state.pop(p, None)
            run.invalidate()
        sent: list[torch.Tensor] = []
        for placed in self.run.structure.exchanges:
            for group, members in self._members(placed):
                for p in members:
                    keys = run.structure.chain_of(group).slots_of(placed.wrapper).state_keys
                    sent += [local(run.state[p][key]) for key in keys]
                    # the innermost wrapper has made the last outer step
                    covered.setdefault(p, local(run.state[p][f"{placed.wrapper.label}.{placed.wrapper.anchor_across}"]))
        every = [p for group in run.param_groups for p in group["params"]]
        sent += [local(p.detach()) for p in every if p not in covered]
        on_device = [tensor.to(every[0].device) for tensor in sent] if every else []
        run.replicas.broadcast(on_device, source)
        if not is_new:
            return
        for kept, came in zip(sent, on_device, strict=True):
            if kept is not came:
                kept.copy_(came)
        for p, anchor in covered.items():
            local(p.detach()).copy_(anchor)
        for group in run.param_groups:
            group[STEPS] = steps
        run.count_from(updates)

    def _refuse_other_shards(self) -> None:
        replicas = set(self.run.replicas.ranks()) if self.run.replicas.size > 1 else set()
        for group in self.run.param_groups if replicas else ():
            for p in group["params"]:
                if replicas & holders_of_other_shards(p):
                    raise StepError(
                        f"parameters are sharded over ranks that the replicas {sorted(replicas)} include: a mean over "
                        f"these would mix different shards. Give build(..., replicas=mesh['NAME']), the dimension of a "
                        f"device mesh along which whole copies of the model are"
                    )

    def _model(self) -> int:
        names = self.run.names()
        return _number(
            (names[p], tuple(local(p).shape), str(p.dtype), p.requires_grad)
            for group in self.run.param_groups
            for p in group["params"]
        )

    def _settings(self) -> int:
        run, found = self.run, []
        for placed in run.structure.exchanges:
            wrapper = placed.wrapper
            for group in self.run.groups_of(placed):
                scheduled = run.schedules_of(group)
                keys = [f"{wrapper.label}.{name}" for name in wrapper.hyperparameters]
                found.append([(key, group[key]) for key in keys if key not in scheduled])
        return _number((self._steps_per_round(), *found))

    def _weights(self) -> int:
        """Return a number for the outer weights, or before the first step for the weights."""
        run = self.run
        keys: dict[Chain, list[str]] = {}
        for placed in run.structure.exchanges if run.param_groups[0].get(STEPS, 0) else ():
            for chain in run.structure.chains_of(placed):
                keys.setdefault(chain, []).append(f"{placed.wrapper.label}.{placed.wrapper.anchor_across}")
        found: list[torch.Tensor] = []
        for group in run.param_groups:
            for p in group["params"]:
                wanted = keys.get(run.structure.chain_of(group), ())
                held = run.state.get(p, {})
                found += [local(held[key]) for key in wanted if key in held]
                found += [] if any(key in held for key in wanted) or keys else [local(p.detach())]
        return _number(_digest(tensor) for tensor in found)


def _flat(update: Update, wrapper: Wrapper, parts: list[Part]) -> torch.Tensor:
    """Return the ways of all parts in one tensor, in the dtype in which they are sent."""
    sizes = [part.shape.numel() for part in parts]
    flat: torch.Tensor | None = None
    pieces: tuple[torch.Tensor, ...] = ()
    for view, positions in _views(update, wrapper, parts):
        anchors = getattr(view, str(wrapper.anchor_across))
        for i, weights, anchor in zip(positions, view.params, anchors, strict=True):
            wide = _wide(anchor.dtype)
            if flat is None:
                compressed = vars(wrapper)["compress"] is not None and not wide.is_complex
                flat = torch.empty(sum(sizes), dtype=torch.bfloat16 if compressed else wide, device=weights.device)
                pieces = torch.split(flat, sizes)
            pieces[i].view(anchor.shape).copy_(weights.to(wide) - anchor)
    assert flat is not None
    return flat


def _views(update: Update, wrapper: Wrapper, parts: list[Part]) -> Iterator[tuple[GroupView, list[int]]]:
    """Yield views of the parts of each group, with the positions of their tensors among the parts."""
    groups: dict[int, tuple[ParamGroup, list[int]]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(id(part.group), (part.group, []))[1].append(i)
    for group, positions in groups.values():
        chosen = [parts[i] for i in positions]
        params = [part.parameter for part in chosen]
        if any(part.rows is not None for part in chosen):
            yield GroupView(update, group, wrapper, params, [part.rows for part in chosen], positions), positions
            continue
        at = {id(p): i for p, i in zip(params, positions, strict=True)}
        for view in views_of(update, group, wrapper, params):
            yield view, [at[id(p)] for p in view.parameters]


def _fragment(members: list[tuple[ParamGroup, torch.Tensor]], number: int, fragments: int) -> Iterable[Any]:
    """Yield the members of one of several contiguous fragments of about the same size."""
    sizes = [local(p).numel() for _, p in members]
    total, before = sum(sizes), 0
    for member, size in zip(members, sizes, strict=True):
        # a parameter belongs to the fragment in which its middle is
        if min(fragments - 1, (2 * before + size) * fragments // max(1, 2 * total)) == number:
            yield member
        before += size


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _number(values: Iterable[Any]) -> int:
    """Return a number of 63 bits for some values: for the same ones the same number, in every process."""
    return int.from_bytes(hashlib.blake2b(repr(list(values)).encode(), digest_size=8).digest(), "little") >> 1


def _digest(tensor: torch.Tensor) -> int:
    """Return a number for the bits of a tensor; reads it from its device."""
    if not tensor.numel():
        return 0
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = numbers.contiguous().view(kinds[numbers.element_size()]).reshape(-1)
    # in pieces: 64 bits for each of many elements would be more than the weights
    places = torch.arange(1, min(bits.numel(), DIGESTED) + 1, device=bits.device)
    sums = [(piece * places[: piece.numel()]).sum() for piece in torch.split(bits, DIGESTED)]
    return _number(torch.stack(sums).tolist())
