"""A module's buffers, such as the statistics of batch norm, kept aside and given back exactly."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

_Kept = tuple[torch.nn.Module, str, torch.Tensor | None, torch.Tensor | None]


class KeptBuffers:
    """The buffers of modules as they are now, and what they hold; `restore` gives both back."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self._kept: list[_Kept] = []
        self._seen: set[torch.nn.Module] = set()
        for module in modules:
            self.add(module)

    def add(self, module: torch.nn.Module) -> None:
        """Keep the buffers of a module and of all in it, unless they are kept already."""
        if module in self._seen:
            return
        for owner in module.modules():
            if owner not in self._seen:
                self._seen.add(owner)
                for name, buffer in owner._buffers.items():
                    self._kept.append((owner, name, buffer, _copy(buffer)))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the modules their buffers back, with the contents of then; autograd sees no change of them."""
        for owner, name, buffer, content in self._kept:
            if buffer is not None and content is not None:
                with torch.autograd.grad_mode._unsafe_preserve_version_counter(buffer):
                    buffer.copy_(content)
            if owner._buffers.get(name) is not buffer:
                owner._buffers[name] = buffer


@contextmanager
def buffers_kept(model: torch.nn.Module | None) -> Iterator[None]:
    """Give a model its buffers back at the end, as they are now; without a model, every module that is called inside.

    Which modules these are is found as they are called: by whatever name, in whatever wrapper.
    """
    if model is not None:
        kept, handle = KeptBuffers(model), None
    else:
        kept = KeptBuffers()
        handle = register_module_forward_pre_hook(lambda module, _: kept.add(module))
    try:
        with warnings.catch_warnings():
            # a compiled module calls the hook once more, which does no harm
            warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        if handle is not None:
            handle.remove()
        kept.restore()


def _copy(buffer: torch.Tensor | None) -> torch.Tensor | None:
    return None if buffer is None or torch.nn.parameter.is_lazy(buffer) else buffer.detach().clone()
