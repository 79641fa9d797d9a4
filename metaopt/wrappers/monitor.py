"""Monitor: what a person wants to see of a run, measured where a point is logged."""

import weakref
from collections.abc import Callable, MutableMapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from metaopt import Group, Groups, HyperparameterError, Wrapper, counter, hookimpl, hyper, scalar, zeros

# how many of the largest and of the smallest tensors are shown where no pattern chooses
MOST = 5
# a histogram has a bin for each power of two between these, for either sign, and one around zero
LOWEST, HIGHEST = -40, 24
EDGES = (
    *(-(2.0**e) for e in range(HIGHEST, LOWEST - 1, -1)),
    *(2.0**e for e in range(LOWEST, HIGHEST + 1)),
)
# sums of gradients by which ranks find out whether a gradient is the mean of theirs
SUMS = 64
# entries of bases that hold an average of squared gradients
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")


class Monitor(Wrapper):
    """Measures logged updates and changes nothing; w are the weights, g is the gradient, d the change of w.

    |x| is the 2-norm, of the whole model and of each tensor; g is what the base was given; d is all that was added
    to w. update_ratio |d| / |w|, about 1e-3 where a run is healthy. effective_lr |d| / |g|. alignment cos(d, -g), 1
    being straight downhill, and last_alignment cos(g, g of the update before), which keeps a copy of g.
    sign_agreement: the share of elements with d g < 0. moments: the norms of the base's moments, and
    second_below_eps: the share of elements whose second moment v has sqrt(v) < eps. noise_scale: (b - a) / (1 -
    1/n) over (n a - b) / (n - 1), in batches of one `step()`, where n steps are accumulated, b is the mean of their
    |g|^2 and a the |g|^2 of their mean; each of the two is averaged over points (arXiv:1812.06162).

    replica_noise: the same over the n ranks of DDP at every so many updates, b being the mean over ranks of the
    |g|^2 of a rank's own gradient, as a backward pass leaves it before DDP averages, and a that of the mean, in
    batches of one rank. A factor that a GradScaler or a clip has put on g is taken out. It is nan where g is not
    the mean of the ranks' own gradients, as with `across="replicas"`; backward passes that are added up by hand
    need DDP's `no_sync`. It costs an all-reduce of a few numbers.

    sharpness: the largest eigenvalue of the Hessian by power iteration on differences of gradients, at every so
    many updates with `step(closure)`; it costs `iterations` + 1 evaluations of the loss and its gradient each time.
    histograms: of w, g and d, by powers of two, if finite.
    """

    known_as = (
        "gradient norm per layer",
        "update-to-weight ratio",
        "watch",
        "layer statistics",
        "gradient noise scale",
    )
    observes = True
    supports_sparse_grads = True
    measures = {
        "update_ratio": "the norm of the change of the weights over the norm of the weights",
        "grad_norm": "the norm of the gradient that the base was given",
        "param_norm": "the norm of the weights",
        "effective_lr": "the norm of the change over the norm of the gradient",
        "alignment": "the cosine between the change and the direction downhill",
        "last_alignment": "the cosine between this gradient and the last",
        "sign_agreement": "the share of elements that moved against their gradient",
        "moments": "the norms of the base's moments",
        "second_below_eps": "the share of elements whose second moment has a root below eps",
        "noise_scale": "the gradient noise scale, in batches of one step",
        "replica_noise": "the gradient noise scale over the ranks of DDP, in batches of one rank",
        "sharpness": "the largest eigenvalue of the Hessian",
        "weights": "the weights, as a histogram",
        "gradients": "the gradients, as a histogram",
        "changes": "the change of the weights, as a histogram",
    }

    tensors: str | tuple[str, ...] | None = hyper(
        None,
        doc="patterns of names, such as 'blocks.*': these tensors are shown; without, the 5 largest and the 5 smallest",
        per_group=False,
    )
    update_ratio: bool = hyper(True, doc="measure |d| / |w|", per_group=False)
    grad_norm: bool = hyper(True, doc="measure |g|", per_group=False)
    param_norm: bool = hyper(True, doc="measure |w|", per_group=False)
    effective_lr: bool = hyper(False, doc="measure |d| / |g|", per_group=False)
    alignment: bool = hyper(False, doc="measure cos(d, -g) and cos(g, last g)", per_group=False, defines_state=True)
    sign_agreement: bool = hyper(False, doc="measure the share of elements with d g < 0", per_group=False)
    moments: bool = hyper(False, doc="measure the norms of the base's moments", per_group=False)
    noise_scale: bool = hyper(
        False, doc="measure the gradient noise scale; needs accumulate in the stack", per_group=False
    )
    replica_noise: int = hyper(
        0,
        ge=0,
        doc="updates between two measurements of the noise scale over the ranks of DDP, by all ranks; 0: none",
        per_group=False,
    )
    sharpness: int = hyper(
        0, ge=0, doc="updates between two measurements of the Hessian's largest eigenvalue; 0: none", per_group=False
    )
    iterations: int = hyper(4, ge=1, doc="power iterations of `sharpness`", per_group=False)
    histograms: bool = hyper(False, doc="histograms of weights, gradients and changes", per_group=False)
    last = zeros()
    squares = scalar(0.0, per="run", doc="the sum of |g|^2 over the steps of this update")
    steps = scalar(0.0, per="run", doc="how many steps that are")
    gathered = scalar(0.0, per="run", doc="the |g|^2 of their mean")
    windows = counter("how many means of several steps were measured for the noise scale")
    noise = scalar(0.0, per="run", doc="the average of the estimated trace of the gradient's covariance")
    signal = scalar(0.0, per="run", doc="the average of the estimated |g|^2")
    rank_noise = scalar(0.0, per="run", doc="`noise`, over ranks")
    rank_signal = scalar(0.0, per="run", doc="`signal`, over ranks")

    def active_slots(self) -> dict[str, Any]:
        return self.slots if self.alignment else {}

    def looks_with(self, hook: str) -> bool:
        looks = {"observe_gradients": self.noise_scale or self.replica_noise > 0, "observe_loss": self.sharpness > 0}
        return looks.get(hook, True)

    def looks_ahead(self) -> bool:
        return self.alignment

    def validate_names(self, names: Sequence[str]) -> None:
        if self.tensors is not None and not any(self._is_chosen(name) for name in names):
            shown = ", ".join(names[:3])
            raise HyperparameterError(
                f"{self.label}: tensors={self.tensors!r} must match the name of a parameter, such as {shown}; "
                f"parameters have names if the stack is built over a model or named parameters"
            )

    def _is_chosen(self, name: str) -> bool:
        patterns = (self.tensors,) if isinstance(self.tensors, str) else self.tensors
        return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)

    # ---- the update

    def observe(self, groups: Groups) -> None:
        views = list(groups)
        if groups.is_logged:
            self._measure(groups, views)
        if self.alignment:
            for view in views:
                for kept, gradient in zip(view.last, view.grads, strict=True):
                    if kept.shape == gradient.shape:
                        kept.copy_(gradient)

    def _measure(self, groups: Groups, views: list[Group]) -> None:
        needs_change = self.update_ratio or self.effective_lr or self.alignment
        weights = _joined(views, lambda v: v.norms(v.params)) if self.param_norm or self.update_ratio else None
        changes = _joined(views, lambda v: v.norms(v.update)) if needs_change else None
        gradients = None
        if self.grad_norm or self.effective_lr or self.alignment:
            gradients = _joined(views, lambda v: v.norms(v.grads))
        if self.param_norm and weights is not None:
            self._show(groups, views, "param_norm", weights, _whole(weights))
        if self.grad_norm and gradients is not None:
            self._show(groups, views, "grad_norm", gradients, _whole(gradients))
        if self.update_ratio and changes is not None and weights is not None:
            self._show(
                groups, views, "update_ratio", _ratio(changes, weights), _ratio(_whole(changes), _whole(weights))
            )
        if changes is not None and gradients is not None and self.effective_lr:
            ratio = _ratio(_whole(changes), _whole(gradients))
            self._show(groups, views, "effective_lr", _ratio(changes, gradients), ratio)
        if changes is not None and gradients is not None and self.alignment:
            self._measure_alignment(groups, views, changes, gradients)
        if self.sign_agreement:
            self._measure_shares(groups, views, "sign_agreement", lambda v: _map_alike(_agrees, v.update, v.grads))
        if self.moments:
            self._measure_moments(groups, views)
        if self.noise_scale and groups.windows:
            self._measure_noise(groups)
        if self.histograms:
            self._measure_histograms(groups, views)

    def _show(self, groups: Groups, views: list[Group], name: str, values: torch.Tensor, whole: torch.Tensor) -> None:
        """Log the number of the whole model, and those of the chosen tensors."""
        groups.measure(name, whole)
        names = [n for view in views for n in view.param_names]
        if self.tensors is None:
            groups.measure_tensors(name, names, values, MOST)
            return
        chosen = [i for i, n in enumerate(names) if self._is_chosen(n)]
        if chosen:
            shown = torch.stack([values[i] for i in chosen])
            groups.measure_tensors(name, [names[i] for i in chosen], shown)

    def _measure_alignment(
        self, groups: Groups, views: list[Group], changes: torch.Tensor, gradients: torch.Tensor
    ) -> None:
        downhill = -_joined(views, lambda v: v.dots(*_alike(v.update, v.grads)))
        whole = _ratio(downhill.sum(), _whole(changes) * _whole(gradients))
        self._show(groups, views, "alignment", _ratio(downhill, changes * gradients), whole)
        lasts = _joined(views, lambda v: v.norms(v.last))
        products = _joined(views, lambda v: v.dots(*_alike(v.last, v.grads)))
        whole = _ratio(products.sum(), _whole(lasts) * _whole(gradients))
        self._show(groups, views, "last_alignment", _ratio(products, lasts * gradients), whole)

    def _measure_shares(
        self, groups: Groups, views: list[Group], name: str, marks: Callable[[Group], list[torch.Tensor]]
    ) -> None:
        """Log the share of elements that are marked by a 1."""
        shares = _joined(views, lambda v: v.means(marks(v)))
        sizes = torch.tensor([float(size) for v in views for size in v.numels], device=shares.device)
        self._show(groups, views, name, shares, (shares * sizes).sum() / sizes.sum())

    def _measure_moments(self, groups: Groups, views: list[Group]) -> None:
        keys = {key for view in views for key in view.base_moments}
        for key in sorted(keys):
            having = [view for view in views if key in view.base_moments]
            norms = _joined(having, partial(_moment_norms, key))
            self._show(groups, having, f"moments/{key}", norms, _whole(norms))
        second = next((key for key in SECOND_MOMENTS if key in keys), None)
        having = [v for v in views if second in v.base_moments and v.base_setting("eps") is not None]
        if second is not None and having:
            self._measure_shares(
                groups,
                having,
                "second_below_eps",
                lambda v: [(m.real.sqrt() < v.base_setting("eps")).float() for m in v.base_moments[second]],
            )

    def _measure_histograms(self, groups: Groups, views: list[Group]) -> None:
        kinds: dict[str, Callable[[Group], list[torch.Tensor]]] = {
            "weights": lambda v: v.params,
            "changes": lambda v: v.update,
            "gradients": lambda v: v.grads,
        }
        for kind, tensors in kinds.items():
            counts: torch.Tensor | None = None
            for view in views:
                counted = view.sum_over_shards([_counted(tensor) for tensor in tensors(view)])
                for name, found in zip(view.param_names, counted, strict=True):
                    if self.tensors is not None and self._is_chosen(name):
                        groups.measure_histogram(f"{kind}/{name}", EDGES, found)
                    counts = found if counts is None else counts + found.to(counts.device)
            if counts is not None:
                groups.measure_histogram(kind, EDGES, counts)

    # ---- the noise scale

    def observe_gradients(self, groups: Groups, *, gathered: bool) -> None:
        if self.replica_noise and not gathered and groups.num_replicas > 1:
            self._look_at_ranks(groups)
        if not self.noise_scale or not groups.is_logged:
            return
        square = groups.norm().square().to(groups.squares)
        if gathered:
            groups.gathered.copy_(square)
            groups.set_counter("windows", groups.windows + 1)
        else:
            groups.squares.add_(square)
            groups.steps.add_(1.0)

    def _measure_noise(self, groups: Groups) -> None:
        mean = groups.squares / groups.steps.clamp_min(1.0)
        counts = groups.steps >= 2.0
        _follow(groups.noise, groups.signal, groups.steps.clamp_min(2.0), mean, groups.gathered, counts)
        groups.measure("noise_scale", groups.noise / groups.signal)
        groups.squares.zero_()
        groups.steps.zero_()
        groups.gathered.zero_()

    def _look_at_ranks(self, groups: Groups) -> None:
        views = list(groups)
        parameters = [p for view in views for p in view.params]
        update = groups.updates + 1
        watch = _WATCHES.setdefault(self, _Watch())
        # decided by what all ranks have in common, whoever of them writes a log
        if watch.is_due and update % self.replica_noise == 0:
            self._measure_ranks(groups, views, watch.taken(parameters))
        # the next step is of the next update, or of this one if steps are accumulated
        watch.look(parameters, any((update + ahead) % self.replica_noise == 0 for ahead in (0, 1)))

    def _measure_ranks(self, groups: Groups, views: list[Group], own: torch.Tensor) -> None:
        (mean,) = groups.mean_over_replicas([own])
        sums = mean[1:]
        shared = _gathered(_joined(views, lambda v: [_sum(g) for g in v.grads])).to(sums)
        # what a GradScaler or a clip by the norm has multiplied the gradients by since
        factor = torch.dot(sums, shared) / torch.dot(sums, sums)
        is_mean = torch.linalg.vector_norm(shared - factor * sums) <= 0.02 * torch.linalg.vector_norm(shared)
        n = torch.full_like(factor, groups.num_replicas)
        whole = groups.norm().square().to(factor)
        _follow(groups.rank_noise, groups.rank_signal, n, mean[0] * factor.square(), whole, is_mean)
        groups.measure("replica_noise", torch.where(is_mean, groups.rank_noise / groups.rank_signal, torch.nan))

    # ---- the sharpness

    def observe_loss(self, closure: Callable[[], Any], groups: Groups) -> None:
        views = list(groups)
        if not views or (views[0].updates + 1) % self.sharpness:
            return
        weights = [[p.clone() for p in view.params] for view in views]
        gradients = [[g.clone() for g in view.grads] for view in views]
        devices = [p.device for view in views for p in view.params if p.device.type == "cuda"]

        def gradient_at(move: list[list[torch.Tensor]] | None) -> list[list[torch.Tensor]]:
            for view, kept, moves in zip(views, weights, move or weights, strict=True):
                torch._foreach_copy_(view.params, kept)
                if move is not None:
                    torch._foreach_add_(view.params, moves)
                view.clear_grads()
            # all evaluations draw the same numbers, for instance for dropout, and the run draws none
            with groups.buffers_kept(), torch.random.fork_rng(devices=list(dict.fromkeys(devices))):
                closure()
            return [[g.clone() for g in view.grads] for view in views]

        try:
            groups.measure("sharpness", _largest_eigenvalue(views, gradient_at, self.iterations))
        finally:
            for view, kept, own in zip(views, weights, gradients, strict=True):
                torch._foreach_copy_(view.params, kept)
                torch._foreach_copy_(view.grads, own)


def _largest_eigenvalue(
    views: list[Group], gradient_at: Callable[[list[list[torch.Tensor]] | None], list[list[torch.Tensor]]], count: int
) -> torch.Tensor:
    """Return v H v after so many steps v <- H v / |H v|, with H v = (g(w + h v) - g(w)) / h."""
    here = gradient_at(None)
    size = _whole(_joined(views, lambda v: v.norms(v.params)))
    step = 1e-3 * (1.0 + size)
    direction = [view.random_like(view.params) for view in views]
    eigenvalue = torch.zeros((), device=size.device)
    for _ in range(count):
        length = _norm_of(views, direction)
        scale = step / length
        there = gradient_at([[d * scale.to(d) for d in own] for own in direction])
        product = [[(a - b) / step.to(a) for a, b in zip(x, y, strict=True)] for x, y in zip(there, here, strict=True)]
        eigenvalue = _dot_of(views, direction, product) / length
        direction = product
    return eigenvalue


# ---- gradients of one rank


class _Watch:
    """The hooks of a monitor on parameters, and whether they look at the next backward pass."""

    def __init__(self) -> None:
        self.is_due = False
        self._own: MutableMapping[torch.Tensor, _OwnGradient] = WeakIdKeyDictionary()

    def look(self, parameters: Sequence[torch.Tensor], is_due: bool) -> None:
        """Look at the next backward pass, or let it be."""
        self.is_due = is_due
        for p in parameters if is_due else ():
            if p not in self._own and p.is_leaf and p.requires_grad:
                self._own[p] = _OwnGradient(weakref.ref(self))
                p.register_post_accumulate_grad_hook(self._own[p])  # type: ignore[no-untyped-call]
        for own in self._own.values():
            own.square = own.sum = None

    def taken(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of all squares of this rank's gradient, then `SUMS` sums of its elements."""
        zero = torch.zeros((), device=parameters[0].device)
        found = [self._own.get(p) for p in parameters]
        squares = [zero if own is None or own.square is None else own.square.to(zero) for own in found]
        sums = [zero if own is None or own.sum is None else own.sum.to(zero) for own in found]
        return torch.cat([torch.stack(squares).sum().reshape(1), _gathered(torch.stack(sums))])


class _OwnGradient:
    """A hook of one parameter: it runs when a backward pass has left its gradient, before DDP averages that."""

    def __init__(self, watch: "weakref.ref[_Watch]") -> None:
        self._watch = watch
        self.square: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None

    def __call__(self, p: torch.Tensor) -> None:
        watch = self._watch()
        if watch is None or not watch.is_due or p.grad is None:
            return
        gradient = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
        self.square = torch.linalg.vector_norm(gradient, dtype=_wide(gradient)).float().square()
        self.sum = _sum(gradient)


# by monitor: a wrapper itself has nothing that changes
_WATCHES: MutableMapping[Monitor, _Watch] = weakref.WeakKeyDictionary()


def _gathered(sums: torch.Tensor) -> torch.Tensor:
    """Return as many sums whatever the number of tensors is, which need not be the same on all ranks."""
    where = torch.arange(len(sums), device=sums.device) % SUMS
    return torch.zeros(SUMS, device=sums.device).index_add_(0, where, sums)


def _wide(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dtype=_wide(values)).real.float()


# ---- numbers


def _follow(
    noise: torch.Tensor,
    signal: torch.Tensor,
    n: torch.Tensor,
    mean: torch.Tensor,
    gathered: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Bring the averages of noise and signal up to date: n gradients have a mean square, their mean has `gathered`."""
    noises = (mean - gathered) / (1.0 - 1.0 / n)
    signals = (n * gathered - mean) / (n - 1.0)
    # both averages begin at zero, and their ratio has no bias from that
    noise.add_(torch.where(counts, 0.1 * (noises - noise), 0.0))
    signal.add_(torch.where(counts, 0.1 * (signals - signal), 0.0))


def _moment_norms(key: str, view: Group) -> list[torch.Tensor]:
    return view.norms(view.base_moments[key])


def _joined(views: Sequence[Group], numbers: Callable[[Group], list[torch.Tensor]]) -> torch.Tensor:
    """Return one number for each tensor of all views, on the device of the first."""
    parts = [torch.stack(numbers(view)) for view in views]
    return torch.cat([part.to(parts[0].device, torch.promote_types(part.dtype, torch.float32)) for part in parts])


def _whole(norms: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = torch.linalg.vector_norm(norms)
    return whole


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a / b, and 0 where both are 0."""
    return torch.where((a == 0) & (b == 0), 0.0, a / b)


def _norm_of(views: list[Group], tensors: list[list[torch.Tensor]]) -> torch.Tensor:
    parts = [torch.stack(view.norms(own)) for view, own in zip(views, tensors, strict=True)]
    return _whole(torch.cat([part.to(parts[0].device) for part in parts]))


def _dot_of(views: list[Group], a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> torch.Tensor:
    parts = [torch.stack(view.dots(x, y)).sum() for view, x, y in zip(views, a, b, strict=True)]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _alike(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return both lists; where shapes differ, as those of a sparse gradient's values do, the second one is zero."""
    return a, [y if y.shape == x.shape else torch.zeros_like(x) for x, y in zip(a, b, strict=True)]


def _map_alike(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: list[torch.Tensor], b: list[torch.Tensor]
) -> list[torch.Tensor]:
    return [function(x, y) for x, y in zip(*_alike(a, b), strict=True)]


def _agrees(change: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return 1 where the change is against the gradient, 0 elsewhere."""
    signs = (
        torch.view_as_real(change * gradient.conj())[..., 0] if change.is_complex() else change.sign() * gradient.sign()
    )
    return (signs < 0).float()


def _counted(values: torch.Tensor) -> torch.Tensor:
    """Return how many values lie in each bin of `EDGES`, without waiting for the device."""
    values = (torch.view_as_real(values) if values.is_complex() else values).detach().reshape(-1).float()
    exponents = values.abs().log2().floor().clamp(LOWEST - 1, HIGHEST - 1).nan_to_num(LOWEST - 1) - (LOWEST - 1)
    middle = HIGHEST - LOWEST
    bins = (middle + values.sign() * exponents).nan_to_num(middle).to(torch.int64)
    counts = torch.zeros(len(EDGES) - 1, device=values.device)
    return counts.scatter_add_(0, bins, torch.isfinite(values).float())


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"monitor": Monitor}
