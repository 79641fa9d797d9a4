"""Outer steps over replicas: when a wrapper that takes means is due, and what is on its way to or from others.

All replicas call `step()` equally often, whether or not one of them skips an update. So it is the count of steps that
says when an exchange is due, and every replica takes part with what it has. A step that
raises before the base, in it or in `on_update` right behind it is not counted, and one that raises later, in a wrapper
in front of the exchange, is counted without it: a replica that goes on after one is no longer in step with the rest.
"""

from collections.abc import Iterator

import torch

from metaopt.distributed.shards import local
from metaopt.engine.exchange.buckets import (
    Bucket,
    Chunk,
    buckets_of_fragment,
    displacements_in_one_tensor,
    views_of_chunks,
)
from metaopt.engine.exchange.initial_sync import compared, steps_per_round, take_weights
from metaopt.engine.run.entries import STEP_CALLS
from metaopt.engine.run.run import Run
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update.update import Update
from metaopt.errors import HyperparameterError


def exchange_of(run: Run) -> "Exchange | None":
    """Return the exchange of a run, or None if none of its wrappers takes means."""
    return Exchange(run) if run.structure.exchanges else None


class Exchange:
    """When the wrappers of a run that take means are due, and what is on its way to or from other replicas."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.joined = False
        # whether an exchange was due at the last step: the same answer on all replicas
        self.was_due = False
        # the number of the round that the step in progress ends, or None if it ends none
        self._round: int | None = None
        # by wrapper and fragment, while a delay lasts
        self._under_way: dict[tuple[str, str, int], list[Bucket]] = {}
        # by wrapper and fragment: what was sent went with a reset, so that nothing comes back
        self._dropped: set[tuple[str, str, int]] = set()

    def join(self) -> bool:
        """Agree with the other replicas, once, on model, settings and weights; return whether weights changed here."""
        if self.joined:
            return False
        found = compared(self.run)
        self.joined = True
        return found is not None and take_weights(self.run, found)

    # ---- when

    def count_call(self) -> None:
        """Count a call of `step()`; with a wrapper that gathers several steps into one update, so many are a round."""
        run = self.run
        self.was_due = False
        each = steps_per_round(self.run)
        if run.replicas.size == 1:
            self._round = run.updates
            for group in run.param_groups:
                group[STEP_CALLS] = run.updates * each
            return
        before = int(run.param_groups[0].get(STEP_CALLS, 0))
        # a flush ends a round that has begun
        steps = -(-before // each) * each if run.flushing else before + 1
        for group in run.param_groups:
            group[STEP_CALLS] = steps
        self._round = steps // each if steps > before and steps % each == 0 else None

    def act_in_skipped_step(self, update: Update) -> None:
        """Make the exchanges that are due at a step that makes no update here; alone there are none."""
        self.was_due = False
        if self.run.replicas.size == 1:
            return
        update.pending_state = {}  # no update begins these parameters
        self.count_call()
        for placed in self.run.structure.exchanges:
            self.act(update, placed)

    def act(self, update: Update, placed: PlacedWrapper) -> None:
        """Make what is due of one wrapper: send displacements, and step along the means that have come."""
        if self._round is None:
            return
        wrapper = placed.wrapper
        fragments, delay = (int(vars(wrapper)[name]) for name in ("fragments", "delay"))
        k = self._k(placed)
        for number in range(fragments):
            since = self._round - k * (number + 1) // fragments
            due = since >= 0 and since % k == 0
            self.was_due = self.was_due or due
            if due and not delay:
                for bucket in self._sent_in_turn(update, placed, number):
                    self._outer_step(update, placed, bucket.chunks, bucket.means())
            elif due:
                place = self._place(placed, number)
                self._under_way[place] = list(self._sent(update, placed, number))
                self._dropped.discard(place)
            elif since >= delay and (since - delay) % k == 0:
                self._receive(update, placed, number)

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

    # ---- what is sent

    def _sent(self, update: Update, placed: PlacedWrapper, number: int) -> Iterator[Bucket]:
        """Begin the collectives of a fragment, and yield its buckets."""
        for bucket in buckets_of_fragment(self.run, placed, number):
            flat = displacements_in_one_tensor(update, placed.wrapper, bucket.chunks)
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
        if self._place(placed, number) in self._dropped:
            return
        sent = self._under_way.pop(self._place(placed, number), None)
        # after a load they are in the state
        for bucket in buckets_of_fragment(self.run, placed, number) if sent is None else sent:
            pending = self._pending(placed, bucket.chunks)
            means = bucket.means() if sent is not None else [kept.clone() for kept in pending]
            for kept in pending if sent is None or bucket.is_saved else ():
                kept.zero_()
            self._outer_step(update, placed, bucket.chunks, means)

    def _pending(self, placed: PlacedWrapper, chunks: list[Chunk]) -> list[torch.Tensor]:
        key = f"{placed.wrapper.label}.pending"
        kept = [(local(self.run.state[chunk.parameter][key]), chunk.rows) for chunk in chunks]
        return [tensor if rows is None else tensor[rows[0] : rows[1]] for tensor, rows in kept]

    def _outer_step(
        self, update: Update, placed: PlacedWrapper, chunks: list[Chunk], means: list[torch.Tensor]
    ) -> None:
        """Let the wrapper make its outer step along means that have come."""
        wrapper = placed.wrapper
        for view, positions in views_of_chunks(update, wrapper, chunks):
            if vars(wrapper)["delay"]:
                view.kept_share = float(view.blend)
            anchors = getattr(view, str(wrapper.anchor_across))
            view.mean_displacements = [means[i].to(a) for i, a in zip(positions, anchors, strict=True)]
            wrapper.after_update(view)
            view.write_back()

    def settle(self) -> None:
        """Wait for the means that are on their way, and put them into the state: a checkpoint is taken."""
        for placed in self.run.structure.exchanges if self._under_way else ():
            for number in range(int(vars(placed.wrapper)["fragments"])):
                for bucket in self._under_way.get(self._place(placed, number), ()):
                    bucket.is_saved = True
                    for kept, mean in zip(self._pending(placed, bucket.chunks), bucket.means(), strict=True):
                        kept.copy_(mean)

    def forget(self) -> None:
        """Drop what is on its way: a checkpoint was loaded, which brings its own."""
        self._dropped.clear()
        for buckets in self._under_way.values():
            for bucket in buckets:
                bucket.means()
        self._under_way.clear()

    def drop(self) -> None:
        """Drop what is on its way, and what a checkpoint has brought of it: a reset begins the anchors anew."""
        self.forget()
        for placed in self.run.structure.exchanges:
            self._dropped |= {self._place(placed, number) for number in range(int(vars(placed.wrapper)["fragments"]))}
