"""How fast this memory is: the faster of copying a large buffer and of changing one in place."""

import torch

from benchmarks.clock import sample

# far beyond any cache
BYTES = 256 * 1024 * 1024


class Probe:
    """Two buffers; `measure()` tells the bytes per second, read and written, that the device moves just now."""

    def __init__(self, device: torch.device | str = "cpu", size: int = BYTES) -> None:
        self.device = torch.device(device)
        self._from = torch.ones(size // 4, device=self.device)
        self._to = torch.zeros_like(self._from)
        self.size = self._from.numel() * 4

    def measure(self) -> float:
        """Return bytes per second, of the better of the two."""
        # in place as an update does: that spares a CPU the fetch of lines that it only fills
        copied = sample(self.device, _nothing, lambda: self._to.copy_(self._from), 1)
        negated = sample(self.device, _nothing, self._to.neg_, 1)
        return 2 * self.size / min(copied.device, negated.device)


def _nothing() -> None:
    pass
