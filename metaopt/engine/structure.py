"""What follows from the parts of a stack and never changes: its chains, and which wrapper acts in which phase."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from metaopt.engine.chain import PART, Chain, ParamGroup
from metaopt.engine.multi_base import MultiBase
from metaopt.schedule import Schedule
from metaopt.wrapper import Wrapper


@dataclass(frozen=True)
class PlacedWrapper:
    """A wrapper and the chain that it acts on; None: it acts around all chains."""

    wrapper: Wrapper
    chain: Chain | None


class Structure:
    """The chains of a stack, its own wrappers and schedules, and the wrappers of each phase in the order of acting."""

    def __init__(
        self,
        base: torch.optim.Optimizer,
        wrappers: Sequence[Wrapper],
        schedules: Mapping[str, Schedule],
        total_steps: int | None,
        fused_by_default: bool,
    ) -> None:
        self.wrappers = tuple(wrappers)
        self.schedules = dict(schedules)
        self.total_steps = total_steps
        self.fused_by_default = fused_by_default
        single = Chain(base, outer=self.wrappers, fused_by_default=fused_by_default)
        self.chains: tuple[Chain, ...] = base.chains if isinstance(base, MultiBase) else (single,)
        self.multi_base = base if isinstance(base, MultiBase) else None
        self._by_name = {chain.name: chain for chain in self.chains if chain.name}
        outer = [PlacedWrapper(wrapper, None) for wrapper in self.wrappers]
        inner = [PlacedWrapper(wrapper, chain) for chain in self.chains for wrapper in chain.wrappers]
        self.around = tuple(w for w in self.wrappers if "around" in w.implemented_hooks())
        self.on_gradients = _with_hook("on_gradients", (*outer, *inner))
        self.before_update = _with_hook("before_update", (*outer, *inner))
        self.on_record = _with_hook("on_record", (*outer, *inner))
        looking = [p for p in (*outer, *inner) if p.wrapper.observes]
        self.observers = tuple(looking)
        self.gradient_observers = _looking_with("observe_gradients", looking)
        self.loss_observers = _looking_with("observe_loss", looking)
        behind = {"on_update", "after_updates", "after_update"}
        self.acts_behind = tuple(p for p in (*inner, *outer) if p.wrapper.implemented_hooks() & behind)
        self.exchanges = tuple(p for p in self.acts_behind if p.wrapper.takes_means)
        self.needs_closure = any(chain.needs_closure for chain in self.chains)
        self.keeps_early_state = any(chain.early_keys for chain in self.chains)
        self.needs_weights_before = any(chain.needs_weights_before for chain in self.chains)
        self.has_leading_on_update = any(chain.leading_on_update for chain in self.chains)

    def chain_of(self, group: ParamGroup) -> Chain:
        """Return the chain that a group belongs to."""
        return self._by_name[group[PART]] if self._by_name else self.chains[0]

    def shared_schedules_of(self, group: ParamGroup) -> dict[str, Schedule]:
        """Return the schedules, by key, that drive the entries for which a group has none of its own."""
        return {**self.chain_of(group).schedules, **self.schedules} if self._by_name else self.schedules

    def chains_of(self, placed: PlacedWrapper) -> tuple[Chain, ...]:
        """Return the chains that a wrapper acts on."""
        return self.chains if placed.chain is None else (placed.chain,)

    def labels(self) -> list[str]:
        """Return the labels of all wrappers."""
        return list(dict.fromkeys(label for chain in self.chains for label in chain.labelled))

    def averages(self) -> list[str]:
        """Return the labels of the wrappers that `averaged()` can show."""
        wrappers = [w for chain in self.chains for w in chain.ordered if "averaged" in w.implemented_hooks()]
        return list(dict.fromkeys(wrapper.label for wrapper in wrappers))

    def default_average(self) -> str | None:
        """Return the average that is written last, outermost: it has seen what the others have done.

        None if the bases of a partition have different ones.
        """
        own = [[w.label for w in chain.ordered if "averaged" in w.implemented_hooks()] for chain in self.chains]
        last = {labels[-1] for labels in own if labels}
        return last.pop() if len(last) == 1 else None


def _with_hook(name: str, placed: Sequence[PlacedWrapper]) -> tuple[PlacedWrapper, ...]:
    return tuple(p for p in placed if name in p.wrapper.implemented_hooks())


def _looking_with(hook: str, placed: Sequence[PlacedWrapper]) -> tuple[PlacedWrapper, ...]:
    return tuple(p for p in placed if hook in p.wrapper.implemented_hooks() and p.wrapper.looks_with(hook))
