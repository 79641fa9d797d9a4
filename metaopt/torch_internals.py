"""Private behaviour of torch that the engine relies on: one function each, with the reason. Checked with torch 2.13."""

import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.autograd import profiler
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

Step = TypeVar("Step", bound=Callable[..., Any])
Hooks = OrderedDict[int, Callable[..., Any]]

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
CHECKPOINT_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# every optimizer has these attributes
HOOK_TABLES = (*STEP_HOOKS, *CHECKPOINT_HOOKS)


# ---- what torch wraps around a step


def with_step_hooks(step: Step) -> Step:
    """Return `step` with torch's own wrapper around it, used only if a hook, the profiler or the compiler would see it.

    Otherwise it would cost a quarter of an update of small tensors; the engine saves the one around the base's step.
    """
    as_torch_does = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled
            or torch.compiler.is_compiling()
        ):
            return as_torch_does(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    # torch looks for this mark before it puts its own wrapper around the class's step
    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def without_step_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a class's step without torch's wrappers that call hooks.

    Compiling anything in a process puts one more around the steps of some classes, with the same mark.
    """
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


def without_grad_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step without torch's decorator that turns gradients off: the stack has done that, once for all."""
    code, names = getattr(step, "__code__", None), getattr(step, "__globals__", {})
    decorated = code is not None and code.co_name == "_use_grad" and names.get("__name__") == "torch.optim.optimizer"
    return getattr(step, "__wrapped__", step) if decorated else step


def call_without_grad(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with gradients off, as inside torch.no_grad(), at a fifth of its cost."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        return function(*arguments)
    finally:
        torch._C._set_grad_enabled(before)


def keep_versions(tensors: tuple[torch.Tensor, ...]) -> Any:
    """Return a context in which writes to these tensors look like none to autograd."""
    return _unsafe_preserve_version_counter(tensors)


class Versions:
    """The version counters of tensors, by which autograd sees that a tensor it has saved was changed."""

    # more than a run changes a tensor
    APART = 1 << 30

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # inference tensors have none
        self._tensors = tuple(tensor for tensor in tensors if not tensor.is_inference())
        self._before = tuple(tensor._version for tensor in self._tensors)

    def set_apart(self) -> None:
        """Give the tensors versions that they have at no other time, whatever they hold then."""
        self._set(tuple(version + self.APART for version in self._before))

    def restore(self) -> None:
        """Give the tensors the versions of before: they hold the same again."""
        self._set(self._before)

    def _set(self, versions: tuple[int, ...]) -> None:
        torch._C._autograd._unsafe_set_version_counter(self._tensors, versions)


def is_capturing(kind: str) -> bool:
    """Return whether the work that is given to the current device of a type now is captured into a graph."""
    asked = getattr(getattr(torch, kind, None), "is_current_stream_capturing", None)
    if asked is None:
        return False
    try:
        return bool(asked())
    except RuntimeError:
        if getattr(torch, kind).is_available():
            raise
        return False  # fake tensors, of a device for which this torch was not built


# ---- hooks that base and stack share


def share_hooks(base: Optimizer, stack: Optimizer) -> None:
    """Give base and stack the same hooks, whichever a user registers them on: they run once, with the stack.

    Hooks that the base's class registered for itself keep getting the base, of which they know.
    """
    for name in HOOK_TABLES:
        hooks: Hooks = getattr(base, name)
        if name in STEP_HOOKS:
            # the stack calls the bare step, around which no hook runs
            hooks.update({key: partial(_with_base, hook, base) for key, hook in hooks.items() if _is_own(hook, base)})
        setattr(stack, name, hooks)


class _WatchedStep:
    """`base.step` of a base inside a stack: torch's schedulers take it for a bound method, and it holds no base."""

    def __init__(self, base: Optimizer, step: Callable[..., Any]) -> None:
        self.__func__ = step
        self._base = weakref.ref(base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self._base(), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # the marks that torch puts on a step
        return getattr(self.__dict__["__func__"], name)


def watch_step(base: Optimizer, seen: Callable[[], None]) -> None:
    """Call `seen` when somebody steps a base by itself; the engine calls the step of its class, past this."""
    given = vars(base).get("step")
    while isinstance(given, _WatchedStep):  # of a stack that was around this base before
        given = given.__dict__["__func__"].inner
    own = type(base).step if given is None else given

    @functools.wraps(own)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        seen()
        return own(self, *args, **kwargs) if given is None else own(*args, **kwargs)

    step.inner = given  # type: ignore[attr-defined]
    base.step = _WatchedStep(base, step)  # type: ignore[method-assign]


def user_hooks(hooks: Hooks, base: Optimizer) -> list[Callable[..., Any]]:
    """Return the hooks that the base's class did not register for itself."""
    return [hook for hook in hooks.values() if not _is_own(hook, base)]


@contextmanager
def only_class_hooks(base: Optimizer) -> Iterator[None]:
    """Let only the hooks of the base's class run for it: those of users run for the stack."""
    shared = {name: getattr(base, name) for name in CHECKPOINT_HOOKS}
    for name, hooks in shared.items():
        setattr(base, name, OrderedDict((key, hook) for key, hook in hooks.items() if _is_own(hook, base)))
    try:
        yield
    finally:
        vars(base).update(shared)


def _is_own(hook: Callable[..., Any], base: Optimizer) -> bool:
    if getattr(hook, "__self__", None) is base:
        return True
    declared = [value for cls in type(base).__mro__ for value in vars(cls).values()]
    return any(hook is value or hook is getattr(value, "__func__", None) for value in declared)


def _with_base(hook: Callable[..., Any], base: Optimizer, stack: Any, *rest: Any) -> Any:
    return hook(base, *rest)


# ---- properties of tensors


def properties_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Return a function that says whether as many other tensors have the properties of these; None without such.

    Class, dtype, device, layout, sizes, strides and `requires_grad`. From Python one of these takes as long as all of
    them in this call, by which `torch.compile` guards its graphs.
    """
    if not _has_guards():
        return None
    return _guards(tensors)


def _guards(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    guards: Any = torch._C._dynamo.guards
    check: Callable[..., bool] = guards.TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check
    return check


@functools.cache
def _has_guards() -> bool:
    """Return whether torch's guards tell apart what they have to, tried once: they are no public interface."""
    try:
        like = torch.empty(2, 3, device="cpu")
        others = [
            torch.empty(2, 3, device="cpu", dtype=torch.float64),
            torch.empty(2, 4, device="cpu"),
            torch.empty(3, 2, device="cpu").t(),
            torch.empty(2, 6, device="cpu")[:, ::2],
            torch.empty(2, 3, device="meta"),
            torch.empty(2, 3, device="cpu").to_sparse(),
            torch.nn.Parameter(torch.empty(2, 3, device="cpu"), requires_grad=False),
        ]
        check = _guards([like, like])
        return check(like, torch.empty(2, 3, device="cpu")) and not any(check(like, other) for other in others)
    except (AttributeError, TypeError, RuntimeError):
        return False


# ---- copies of optimizers

# a step that a torch scheduler replaced, and what GradScaler and the engine set for one step
_TEMPORARY = frozenset(["step", "_opt_called", "grad_scale", "found_inf", *HOOK_TABLES])


def optimizer_parts(base: Optimizer) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return class and attributes of an optimizer, for a copy or a pickle.

    Its own `__getstate__` keeps three attributes and loses the rest: L-BFGS could not step any more. Of the hooks only
    those remain that the class registered for itself and that are not bound to the object.
    """
    attributes = {key: value for key, value in base.__dict__.items() if key not in _TEMPORARY}
    for name in CHECKPOINT_HOOKS:
        hooks: Hooks = getattr(base, name)
        attributes[name] = OrderedDict(
            (key, hook)
            for key, hook in hooks.items()
            if _is_own(hook, base) and getattr(hook, "__self__", None) is None
        )
    return type(base), attributes


def restored_optimizer(cls: type[Optimizer], attributes: dict[str, Any]) -> Optimizer:
    """Return the optimizer that `optimizer_parts` described, without hooks of users, as torch's own copies."""
    base = cls.__new__(cls)
    base.__dict__.update({name: OrderedDict() for name in HOOK_TABLES})
    base.__dict__.update(attributes)
    base._patch_step_function()
    return base


# ---- distributed


def reshard_fsdp_modules(params: Iterable[torch.Tensor]) -> None:
    """Make FSDP2 gather the weights again for the next forward pass, if any of `params` is a DTensor.

    After an evaluation without a backward pass a root module keeps the weights that it gathered: those that were
    exchanged since would be neither evaluated nor trained.
    """
    tensor = sys.modules.get("torch.distributed.tensor")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # a parameter has no reference to its module; torch keeps the modules that it shards here
    states = sys.modules.get("torch.distributed._composable_state")
    if tensor is None or fsdp is None or states is None:
        return
    if any(isinstance(p, tensor.DTensor) for p in params):
        for module in list(states._module_state_mapping):
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def called_by_zero_redundancy_optimizer() -> bool:
    """Return whether ZeroRedundancyOptimizer is making a stack now, over the parameters that one rank updates.

    Nothing in such parameters shows it: they are whole tensors, fewer than the model has.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return False
    maker = module.ZeroRedundancyOptimizer._init_local_optimizer.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not maker:
        frame = frame.f_back
    return frame is not None
