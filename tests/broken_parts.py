"""A plugin whose parts are all wrong, each in one way that authors write; `CAUGHT` names the check that catches it.

Two sound ones stand among them. Loaded with `--plugin broken_parts`.
"""

import math
import random

import torch

from metaopt import (
    Example,
    HyperparameterError,
    Logger,
    Problem,
    Schedule,
    Wrapper,
    anchor,
    hookimpl,
    hyper,
    start,
    zeros,
)

OPTIMIZERS, WRAPPERS, SCHEDULES, LOGGERS, PROBLEMS, EXAMPLES = {}, {}, {}, {}, {}, {}
CAUGHT: dict[str, tuple[str, str]] = {}  # name -> (check, what its message says)


def broken(offers: dict, name: str, check: str, says: str, **example):
    """Offer a class under a name and note the check that has to catch it."""

    def offer(cls):
        offers[name] = cls
        CAUGHT[name] = (check, says)
        if example:
            EXAMPLES[name] = Example(**example)
        return cls

    return offer


# ---- references, on plain tensors


def pull(x, gradients, update, *, k, alpha):
    slow = x
    for t, gradient in enumerate(gradients, 1):
        x = update(x, gradient(x))
        if t % k == 0:
            slow = x = slow + alpha * (x - slow)
        yield x


def sign_descent(x, gradients, *, lr):
    for gradient in gradients:
        x = x - lr * gradient(x).sign()
        yield x


# ---- sound


class Pull(Wrapper, every="k"):
    """slow <- slow + alpha (fast - slow); fast <- slow."""

    k: int = hyper(2, ge=1, doc="updates between pulls")
    alpha: float = hyper(0.5, gt=0.0, doc="how far the slow weights move")
    slow = anchor()

    def after_update(self, group):
        torch._foreach_lerp_(group.slow, group.params, group.alpha)
        group.set_params(group.slow)


class Descent(torch.optim.Optimizer):
    """p <- p - lr sign(grad): what the broken ones below are made of."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, self.state[p], group)

    def begin(self, group):
        pass

    def move(self, p, state, group):
        p.add_(p.grad.sign(), alpha=-group["lr"])


WRAPPERS["sound_pull"], OPTIMIZERS["sound_descent"] = Pull, Descent
EXAMPLES["sound_pull"] = Example(reference=pull)
EXAMPLES["sound_descent"] = Example(reference=sign_descent)


# ---- optimizers


@broken(OPTIMIZERS, "late_slow", "state_is_whole_at_the_first_step", "slow of parameter 0 is in the state after step 2")
class TakesSlowCopyAtTheFirstSync(Descent):
    def begin(self, group):
        group["count"] = group.get("count", 0) + 1

    def move(self, p, state, group):
        super().move(p, state, group)
        if group["count"] % 2 == 0:
            slow = state.setdefault("slow", p.clone())
            p.copy_(slow.lerp_(p, 0.5))


@broken(OPTIMIZERS, "counts_outside", "resumes_in_a_new_process", "CountsOutsideTheGroups.count")
class CountsOutsideTheGroups(Descent):
    count = 0

    def begin(self, group):
        self.count += 1

    def move(self, p, state, group):
        p.add_(p.grad.sign(), alpha=-group["lr"] / self.count)


@broken(OPTIMIZERS, "aliased_momentum", "state_tensors_share_no_memory", "are the same memory")
class CachesMomentumWithoutACopy(Descent):
    def move(self, p, state, group):
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.mul_(0.9).add_(p.grad)
        state["cached"] = momentum
        p.add_(state["cached"], alpha=-group["lr"])


@broken(OPTIMIZERS, "aliased_gradient", "state_tensors_share_no_memory", "the gradient of parameter 0")
class KeepsTheGradientItself(Descent):
    def move(self, p, state, group):
        p.add_(state.get("previous", p.grad), alpha=-group["lr"])
        state["previous"] = p.grad


@broken(OPTIMIZERS, "keeps_lists", "survives_replaced_tensors", "replaced the state's tensors")
class KeepsListsOfStateTensors(Descent):
    def begin(self, group):
        if not hasattr(self, "buffers"):
            self.buffers = {}

    def move(self, p, state, group):
        if p not in self.buffers:
            self.buffers[p] = state.setdefault("momentum", torch.zeros_like(p))
        self.buffers[p].mul_(0.9).add_(p.grad)
        p.add_(self.buffers[p], alpha=-group["lr"])


@broken(OPTIMIZERS, "reads_the_norm", "waits_for_no_device", "norm = p.grad.norm().item()")
class ReadsTheNormAtEveryUpdate(Descent):
    def move(self, p, state, group):
        norm = p.grad.norm().item()
        p.add_(p.grad, alpha=-group["lr"] / max(norm, 1e-3))


@broken(OPTIMIZERS, "decides_on_values", "waits_for_no_device", "if (p.grad > 0).any():")
class DecidesOnValues(Descent):
    def move(self, p, state, group):
        if (p.grad > 0).any():
            p.add_(p.grad.clamp(min=0), alpha=-group["lr"])
        else:
            super().move(p, state, group)


@broken(
    OPTIMIZERS, "one_rate_for_all", "groups_have_values_of_their_own", "lr=0.005 in the second group changes nothing"
)
class IgnoresTheGroupsRate(Descent):
    def move(self, p, state, group):
        p.add_(p.grad.sign(), alpha=-self.defaults["lr"])


@broken(OPTIMIZERS, "first_group_s_rate", "groups_have_values_of_their_own", "lr=0.005 in the second group")
class TakesTheFirstGroupsRate(Descent):
    def move(self, p, state, group):
        p.add_(p.grad.sign(), alpha=-self.param_groups[0]["lr"])


@broken(OPTIMIZERS, "shared_count", "stacks_do_not_disturb_each_other", "two stacks train in turns")
class CountsInTheClass(Descent):
    counts = {"updates": 0}

    def begin(self, group):
        self.counts["updates"] += 1

    def move(self, p, state, group):
        p.add_(p.grad.sign(), alpha=-group["lr"] / (1 + self.counts["updates"] % 3))


@broken(OPTIMIZERS, "new_memory", "keeps_parameters_in_place", "replaced the memory of parameter 0")
class ReplacesTheMemory(Descent):
    def move(self, p, state, group):
        p.data = p.data - group["lr"] * p.grad.sign()


@broken(OPTIMIZERS, "touches_frozen", "works_without_some_gradients", "changed a parameter that never had a gradient")
class DecaysWithoutAGradient(Descent):
    def begin(self, group):
        for p in group["params"]:
            p.mul_(1 - group["lr"])


@broken(OPTIMIZERS, "begins_all_at_once", "works_without_some_gradients", "when gradients come to some parameters")
class MakesStateAtItsFirstStepAlone(Descent):
    def begin(self, group):
        if not self.state:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["momentum"] = torch.zeros_like(p)

    def move(self, p, state, group):
        p.add_(state["momentum"].mul_(0.9).add_(p.grad), alpha=-group["lr"])


@broken(
    OPTIMIZERS,
    "listed_at_construction",
    "takes_a_group_later",
    "does not update the parameters of a group that was added",
)
class ListsParametersAtConstruction(Descent):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.listed = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.listed:
            if p.grad is not None:
                p.add_(p.grad.sign(), alpha=-self.param_groups[0]["lr"])


@broken(OPTIMIZERS, "holds_a_lambda", "copies_and_pickles", "pickle raised")
class HoldsALambda(Descent):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.rule = lambda gradient: gradient.sign()

    def move(self, p, state, group):
        p.add_(self.rule(p.grad), alpha=-group["lr"])


class Remembered:
    """Something that a checkpoint would need a class for."""


@broken(OPTIMIZERS, "holds_an_object", "state_dict_round_trip", "GLOBAL broken_parts.Remembered")
class KeepsAnObjectInTheState(Descent):
    def move(self, p, state, group):
        state.setdefault("remembered", Remembered())
        super().move(p, state, group)


@broken(OPTIMIZERS, "own_dice", "stacks_do_not_disturb_each_other", "two stacks train in turns")
class ThrowsDiceOfItsOwn(Descent):
    def move(self, p, state, group):
        p.add_(p.grad.sign(), alpha=-group["lr"] * random.random())


@broken(
    OPTIMIZERS,
    "divides_by_zero",
    "state_is_whole_at_the_first_step",
    "zero gradients and a rate of 0 raised ZeroDivisionError",
)
class DividesByTheNorm(Descent):
    def move(self, p, state, group):
        p.add_(p.grad, alpha=-group["lr"] * (1 / p.grad.norm().item()))


@broken(OPTIMIZERS, "rescales_its_rate", "text_rebuilds_the_stack", "builds a stack that calls itself")
class ChangesItsRateAtConstruction(Descent):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr * 0.5)


@broken(OPTIMIZERS, "patched_groups", "is_the_bare_class_bit_for_bit", "and ActsOnceItIsWrapped itself")
class ActsOnceItIsWrapped(Descent):
    def begin(self, group):
        if "metaopt.updates" in group:
            group["lr"] *= 0.9


@broken(OPTIMIZERS, "loops_over_state", "works_inside_wrappers", "the outer lookahead keeps was changed")
class LoopsOverAllState(Descent):
    def move(self, p, state, group):
        state.setdefault("momentum", torch.zeros_like(p))
        for buffer in state.values():
            buffer.mul_(0.9).add_(p.grad)
        p.add_(state["momentum"], alpha=-group["lr"])


@broken(OPTIMIZERS, "stands_still", "changes_parameters", "left parameter 0 of shape (4, 3) as it was")
class StandsStill(Descent):
    def move(self, p, state, group):
        p + p.grad.sign() * -group["lr"]


@broken(
    OPTIMIZERS, "wrong_rule", "agrees_with_its_reference", "its reference part after step 1", reference=sign_descent
)
class DoesNotFollowItsReference(Descent):
    def move(self, p, state, group):
        p.add_(p.grad.tanh(), alpha=-group["lr"])


@broken(OPTIMIZERS, "no_scalars", "takes_every_shape", "(3,)")
class MixesUpItsShapes(Descent):
    def begin(self, group):
        rows = [len(p) for p in group["params"] if p.grad is not None and p.dim()]
        self.scale = 1.0 if len({*rows}) < 3 else math.inf

    def move(self, p, state, group):
        p.add_(p.grad.sign(), alpha=-group["lr"] * self.scale)


# ---- wrappers


@broken(WRAPPERS, "late_zeros", "agrees_with_its_reference", "its reference part after step 2", reference=pull)
class CopiesAtTheFirstSync(Pull, every="k"):
    slow = zeros()

    def after_update(self, group):
        if group.updates == group.k:
            torch._foreach_copy_(group.slow, group.params)
        super().after_update(group)


@broken(WRAPPERS, "slow_in_self", "object_is_configuration", "changes self.kept")
class KeepsTheSlowWeightsInItself(Wrapper, every="k"):
    """slow <- slow + alpha (fast - slow); fast <- slow."""

    k: int = hyper(2, ge=1, doc="updates between pulls")

    def after_update(self, group):
        kept = self.__dict__.setdefault("kept", [p.clone() for p in group.params])
        torch._foreach_lerp_(kept, group.params, 0.5)
        group.set_params(kept)


@broken(WRAPPERS, "counts_in_self", "resumes_in_a_new_process", "counts_in_self.count")
class CountsInItself(Wrapper):
    """g <- g / t."""

    count = 0

    def on_gradients(self, groups):
        self.count += 1
        for group in groups:
            torch._foreach_div_(group.grads, float(self.count))


@broken(WRAPPERS, "early_state", "declares_what_it_keeps", "keeps seen")
class WritesStateBeforeTheBase(Wrapper):
    """g <- g + 0.1 seen; seen <- g."""

    def on_gradients(self, groups):
        for group in groups:
            for p, gradient in zip(group.parameters, group.grads, strict=True):
                seen = group._update.run.state[p].setdefault("seen", torch.zeros_like(p))
                gradient.add_(seen, alpha=0.1)
                seen.copy_(gradient)


@broken(WRAPPERS, "lists_of_state", "rewinds_in_place", "taken back to step 3")
class KeepsListsOfState(Pull, every="k"):
    def after_update(self, group):
        lists = self.__dict__.setdefault("lists", {})
        slow = lists.setdefault(group.params[0].data_ptr(), group.slow)
        torch._foreach_lerp_(slow, group.params, group.alpha)
        group.set_params(slow)


@broken(WRAPPERS, "aliased_slow", "object_is_configuration", "changes self.moments")
class KeepsTheMomentsThemselves(Wrapper, every="k"):
    """m <- (m + c) / 2; c <- m."""

    k: int = hyper(2, ge=1, doc="updates between pulls")

    def after_update(self, group):
        for key, current in group.base_moments.items():
            cached = self.__dict__.setdefault("moments", {}).get(key, current)
            torch._foreach_lerp_(current, cached, 0.5)
            self.moments[key] = current


@broken(WRAPPERS, "reads_the_distance", "waits_for_no_device", "float(")
class ReadsTheDistance(Pull, every="k"):
    def after_update(self, group):
        group.measure("distance", float((group.slow[0] - group.params[0]).norm()))
        super().after_update(group)


@broken(WRAPPERS, "no_bounds", "holds_its_bounds", "k=0")
class DeclaresNoBounds(Wrapper):
    """w <- w / 2 every k updates."""

    k: int = hyper(2, doc="updates between halvings")

    def after_update(self, group):
        if group.updates % group.k == 0:
            group.set_params([p / 2 for p in group.params])


@broken(WRAPPERS, "unchecked_bounds", "holds_its_bounds", "takes k=0, though it declares >= 1")
class DoesNotCheckItsBounds(Pull, every="k"):
    def __init__(self, k=2, alpha=0.5, *, label=None):
        self.__dict__.update(k=k, alpha=alpha, label=label or "unchecked_bounds", arguments={"k": k, "alpha": alpha})


@broken(WRAPPERS, "pulls_frozen", "leaves_frozen_parameters_alone", "moved a frozen parameter")
class PullsFrozenParameters(Pull, every="k"):
    acts_on_frozen = True


@broken(WRAPPERS, "nameless_error", "holds_its_bounds", "does not name k")
class RefusesWithoutAName(Pull, every="k"):
    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except HyperparameterError:
            raise HyperparameterError("bad value") from None


@broken(
    WRAPPERS, "one_alpha_for_all", "groups_have_values_of_their_own", "one_alpha_for_all.alpha=0.25 in the second group"
)
class IgnoresTheGroupsAlpha(Pull, every="k"):
    def after_update(self, group):
        torch._foreach_lerp_(group.slow, group.params, self.alpha)
        group.set_params(group.slow)


@broken(WRAPPERS, "never_due", "acts_in_a_hook", "acts every 10 updates, and a check makes 6")
class NeverDue(Wrapper, every="k"):
    """Would raise if it were ever called."""

    k: int = hyper(10, ge=1, doc="updates between two calls")

    def after_update(self, group):
        raise RuntimeError("called")


@broken(WRAPPERS, "misspelt_hook", "acts_in_a_hook", "Did you mean on_gradients or observe_gradients?")
class MisspellsItsHook(Wrapper):
    """g <- 0.5 g."""

    def on_gradient(self, groups):
        groups.scale(0.5)


@broken(WRAPPERS, "misses_a_state", "changes_parameters", "raised AttributeError at broken_parts.py:")
class ReadsWhatItDoesNotDeclare(Wrapper):
    """w <- slow."""

    def after_update(self, group):
        group.set_params(group.slow)


@broken(WRAPPERS, "fails_in_every_group", "groups_have_values_of_their_own", "raised RuntimeError")
class FailsAtTheThirdStep(Wrapper):
    """g <- alpha g, twice."""

    alpha: float = hyper(0.5, gt=0.0, doc="how much is left of a gradient")

    def on_gradients(self, groups):
        for group in groups:
            if group.updates > 1:
                raise RuntimeError("no more")
            torch._foreach_mul_(group.grads, group.alpha)


@broken(OPTIMIZERS, "keeps_a_graph", "is_the_bare_class_bit_for_bit", "@torch.no_grad()")
class StepsUnderAutograd(Descent):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


@broken(WRAPPERS, "class_attribute", "object_is_configuration", "SharesAList.history")
class SharesAList(Wrapper):
    """g <- g / (number of gradients so far)."""

    history = []

    def on_gradients(self, groups):
        self.history.append(1)
        for group in groups:
            torch._foreach_div_(group.grads, float(len(self.history)))


@broken(WRAPPERS, "silent_mover", "tells_when_it_moves_the_weights", "without saying so")
class MovesWithoutSayingSo(Pull, every="k"):
    def after_update(self, group):
        torch._foreach_lerp_(group.slow, group.params, group.alpha)
        torch._foreach_copy_(group.params, group.slow)


@broken(WRAPPERS, "undoes_by_subtracting", "leaves_the_weights_to_the_base", "the weights change")
class UndoesBySubtracting(Wrapper):
    """g <- gradient at w + g / 3."""

    def around(self, closure, groups):
        loss = closure()
        pieces = [(group, [g / 3 for g in group.grads]) for group in groups]
        for group, steps in pieces:
            torch._foreach_add_(group.params, steps)
        closure()
        for group, steps in pieces:
            torch._foreach_sub_(group.params, steps)
        return loss


@broken(WRAPPERS, "forgets_the_loss", "evaluates_a_closure", "not the loss of its first evaluation")
class ForgetsTheLoss(Wrapper):
    """Evaluates the loss and returns nothing."""

    def around(self, closure, groups):
        closure()


@broken(WRAPPERS, "mixed_dtypes", "takes_every_dtype", "over torch.float64 parameters: step 1 of")
class MixesDtypes(Wrapper):
    """average <- (average + w) / 2, in float32 whatever the weights are."""

    average = start(dtype="float32")

    def after_update(self, group):
        torch._foreach_lerp_(group.average, group.params, 0.5)


@broken(WRAPPERS, "copied_average", "averages_swap_in_and_out", "averaged() shows the plain weights")
class ShowsACopy(Wrapper):
    """average <- (average + w) / 2."""

    average = start()

    def after_update(self, group):
        torch._foreach_lerp_(group.average, group.params, 0.5)

    def averaged(self, group):
        return [p.clone() for p in group.params]


@broken(WRAPPERS, "undocumented", "says_what_it_does", "hyperparameters without a doc: alpha")
class SaysNothing(Wrapper):
    """Pulls."""

    alpha: float = hyper(0.5, gt=0.0)

    def after_update(self, group):
        group.set_params([p * group.alpha for p in group.params])


@broken(WRAPPERS, "breaks_again", "works_or_refuses_where_the_loss_is_evaluated_again", "IndexError")
class CountsEvaluationsAsUpdates(Wrapper):
    """g <- g / 2; one list of halves, used up by the update."""

    def on_gradients(self, groups):
        halves = self.__dict__.setdefault("halves", [0.5])
        half = halves.pop()
        for group in groups:
            torch._foreach_mul_(group.grads, half)

    def after_update(self, group):
        self.__dict__["halves"] = [0.5]


# ---- schedules


@broken(SCHEDULES, "remembers", "is_pure", "a new curve gives")
class Remembers(Schedule):
    """v(t) = 0.9 v(t - 1)."""

    start: float = hyper(0.1, ge=0.0, doc="the first value")

    def curve(self, run, span):
        held = {"value": self.start}

        def value(t):
            held["value"] *= 0.9
            return held["value"]

        return value


@broken(SCHEDULES, "goes_on_falling", "honours_its_length", "its length is 60 updates, but at t = 61")
class GoesOnFalling(Schedule):
    """v(t) = start (1 - t / steps)."""

    start: float = hyper(0.1, doc="the first value")
    steps: int | float | None = hyper(None, doc="its length")

    def curve(self, run, span):
        steps = self.resolve_steps(self.steps, run, span)
        return lambda t: self.start * (1 - t / steps)


@broken(SCHEDULES, "infinite_at_first", "gives_finite_floats", "t = 0 raised ZeroDivisionError")
class InfiniteAtFirst(Schedule):
    """v(t) = start t^-0.5."""

    start: float = hyper(0.1, doc="the first value")

    def curve(self, run, span):
        return lambda t: self.start * t**-0.5


@broken(SCHEDULES, "gives_tensors", "gives_finite_floats", "the value at t = 0 is tensor(0.1")
class GivesTensors(Schedule):
    """v(t) = value."""

    value: float = hyper(0.1, doc="the value")

    def curve(self, run, span):
        return lambda t: torch.tensor(self.value)


@broken(SCHEDULES, "needs_the_run", "honours_its_length", "raised TypeError")
class NeedsTheRun(Schedule):
    """v(t) = start / run."""

    start: float = hyper(0.1, doc="the first value")

    def curve(self, run, span):
        height = self.start / run
        return lambda t: height


@broken(
    SCHEDULES, "private_setting", "text_rebuilds_the_schedule", "gives another schedule", spec="private_setting(0.5)"
)
class HasAPrivateSetting(Schedule):
    """v(t) = height."""

    def __init__(self, height=0.1):
        super().__init__()
        self.height = height

    @property
    def hyperparameters(self):
        return {}

    def __eq__(self, other):
        return isinstance(other, HasAPrivateSetting) and other.height == self.height

    __hash__ = None

    def curve(self, run, span):
        return lambda t: self.height


@broken(
    SCHEDULES,
    "wrong_curve",
    "follows_its_reference",
    "its reference",
    reference=lambda t, run, *, start: start / (t + 1),
)
class IsNotItsFormula(Schedule):
    """v(t) = start / (t + 1)."""

    start: float = hyper(0.1, doc="the first value")

    def curve(self, run, span):
        return lambda t: self.start / (t + 2)


# ---- loggers and problems


@broken(LOGGERS, "finite_alone", "takes_every_point", "raised ValueError")
class TakesFiniteNumbersAlone(Logger):
    """Writes nothing."""

    def open(self, *, step, tags, spec, hparams):
        pass

    def scalars(self, step, values):
        if not all(map(math.isfinite, values.values())):
            raise ValueError("cannot write this")


class Sound(Problem):
    """|x|^2 from a point that the seed chooses."""

    targets = {"loss": 0.1}

    def model(self, seed, device="cpu"):
        model = torch.nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 3, generator=torch.Generator().manual_seed(seed)))
        return model

    def batches(self, seed, device="cpu", start=0):
        while True:
            yield torch.randn(3, generator=torch.Generator().manual_seed(1000 * seed + start))
            start += 1

    def loss(self, model, batch):
        return (model.weight - batch).square().sum()

    def evaluate(self, model, split="validation"):
        return {"loss": float(model.weight.detach().square().sum())}

    def data_hash(self):
        return "none"


@broken(PROBLEMS, "global_weights", "starts_from_its_seed", "draws from torch's global generator")
class DrawsGlobally(Sound):
    """The same, from torch's own generator."""

    def model(self, seed, device="cpu"):
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 1, bias=False)


@broken(PROBLEMS, "first_batch_again", "feeds_by_number", "does not begin with batch 3")
class IgnoresTheStart(Sound):
    """The same, always from its first batch."""

    def batches(self, seed, device="cpu", start=0):
        return super().batches(seed, device, 0)


@broken(PROBLEMS, "misses_its_target", "evaluates_without_a_trace", "accuracy is missing")
class MissesItsTarget(Sound):
    """The same, with a target that it does not measure."""

    targets = {"accuracy": 0.9}


@hookimpl
def metaopt_optimizers():
    return OPTIMIZERS


@hookimpl
def metaopt_wrappers():
    return WRAPPERS


@hookimpl
def metaopt_schedules():
    return SCHEDULES


@hookimpl
def metaopt_loggers():
    return LOGGERS


@hookimpl
def metaopt_problems():
    return PROBLEMS


@hookimpl
def metaopt_examples():
    return EXAMPLES
