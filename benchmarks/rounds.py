"""One contender at work: its update, its own parameters, and what its rounds measured."""

from dataclasses import dataclass, field

from benchmarks.baselines import Update
from benchmarks.clock import Sample, sample
from metaopt.lab.shapes import NamedParameters, TensorSet
from metaopt.lab.timing import count_updates


@dataclass
class Runner:
    """`cycle` is how many updates pass until everything that happens every k updates has happened equally often."""

    key: str
    update: Update
    tensors: TensorSet
    parameters: NamedParameters
    cycle: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def updates_per_sample(self) -> int:
        """How many updates one sample has."""
        return count_updates(self.tensors, self.cycle)

    def seconds(self) -> list[float]:
        """Return the seconds of one update, round by round."""
        return [s.device for s in self.samples]

    def warm_up(self) -> None:
        """Make the state, in updates that do not count."""
        self._sample(self.cycle)

    def measure(self) -> Sample:
        """Return one sample."""
        return self._sample(self.updates_per_sample)

    def _sample(self, updates: int) -> Sample:
        device = self.tensors.weights[0].device
        return sample(device, lambda: self.tensors.restore(self.parameters), self.update.step, updates)
