"""A clip before the stack's own: gradients that somebody has clipped between `backward()` and `step()`."""

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from metaopt.errors import warn

# updates that are looked at: a clip acts in the first ones, or hardly ever
UPDATES = 10
# elements of one gradient that are compared
ELEMENTS = 64


class SecondClip:
    """One parameter's gradient as `backward()` left it; `check` warns once if it was clipped since."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], clips: Sequence[str]) -> None:
        trained = [p for g in groups for p in g["params"] if p.requires_grad and p.is_leaf and p.is_floating_point()]
        self._clips = clips
        self._left = UPDATES if trained else 0
        self._version = 0
        self._sample: torch.Tensor | None = None
        if trained:
            p = max(trained, key=torch.numel)
            self._parameter = weakref.ref(p)
            self._hook = p.register_post_accumulate_grad_hook(_hook_of(weakref.ref(self)))

    def remember(self, gradient: torch.Tensor | None) -> None:
        """Keep some elements of a gradient, right after it was accumulated."""
        self._sample = None
        if gradient is not None and type(gradient) is torch.Tensor and not gradient.is_sparse:
            self._sample = _some(gradient).clone()
            self._version = gradient._version

    def check(self, groups: Sequence[Mapping[str, Any]]) -> "SecondClip | None":
        """Compare, right before the stack uses the gradients; return None after the last time.

        Waits for the device only if somebody has written to the gradient since `backward()`, in the first updates.
        """
        p = self._parameter() if self._left else None
        gradient, sample, self._sample = None if p is None else p.grad, self._sample, None
        self._left -= 1
        if gradient is not None and sample is not None and gradient._version != self._version:
            found = _value(sample, _some(gradient)) or _norm(sample, _some(gradient), groups)
            if found:
                warn(
                    f"the gradients were clipped to {found} before step(), and {' and '.join(self._clips)} in the "
                    f"stack clips them again. Leave one of the two out: the other is gradient_clip_val in Lightning, "
                    f"max_grad_norm in the Hugging Face Trainer (1.0 if it is not set, 0 turns it off), "
                    f"accelerator.clip_grad_norm_(), or a clip in the training loop",
                )
                self._left = 0
        if self._left > 0:
            return self
        if p is not None:
            self._hook.remove()
        return None


def _hook_of(watch: "weakref.ref[SecondClip]") -> Any:
    def remember(p: torch.Tensor) -> None:
        alive = watch()
        if alive is not None:
            alive.remember(p.grad)

    return remember


def _some(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.detach().reshape(-1)[:ELEMENTS]


def _norm(before: torch.Tensor, after: torch.Tensor, groups: Sequence[Mapping[str, Any]]) -> str:
    """Return in words the norm that gradients were scaled down to: a number that somebody has chosen, such as 1.0."""
    wide_before, wide_after = before.double(), after.double()
    kept = wide_before != 0
    ratios = (wide_after[kept] / wide_before[kept]).tolist()
    exact = torch.finfo(before.dtype).eps < 1e-6
    most = max(ratios, default=1.0)
    if not 0.0 < most < 1.0 - 1e-4 or most - min(ratios) > (1e-5 if exact else 2e-2) * most:
        return ""
    if math.frexp(most)[0] == 0.5:  # a power of two: a GradScaler has unscaled
        return ""
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if any(type(g) is not torch.Tensor or g.is_sparse for g in gradients):
        return ""
    norm = float(torch.nn.utils.get_total_norm(gradients))
    chosen = float(f"{norm:.2g}")
    # clip_grad_norm_ divides by the norm before plus 1e-6
    return f"a norm of {chosen:g}" if abs(norm - chosen) <= (2e-5 if exact else 1e-2) * norm + 2e-6 * most else ""


def _value(before: torch.Tensor, after: torch.Tensor) -> str:
    """Return in words the value that elements of gradients were cut to."""
    cut = after != before
    sizes = set(after[cut].abs().tolist())
    if len(sizes) != 1 or len(after) < 2:
        return ""
    most = sizes.pop()
    below = bool((after.abs() <= most).all()) and bool((before[cut].abs() > most).all())
    chosen = float(f"{most:.3g}")
    # several elements, and others that were left alone: a scaled gradient of equal elements is no such thing
    return f"values of {chosen:g}" if below and not bool(cut.all()) and abs(most - chosen) <= 1e-3 * most else ""
