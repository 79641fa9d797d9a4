# Written by `metaopt stubs`: what an editor completes and a type checker knows. Not to be changed by hand.
# With metaopt's own parts.
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from metaopt.construction.building import build as build
from metaopt.construction.building import wrap as wrap
from metaopt.construction.configured import Optimizer as Optimizer
from metaopt.construction.grouping import groups as groups
from metaopt.construction.lr_scaling import scale_lr as scale_lr
from metaopt.engine.multi_base import Partitioner as Partitioner
from metaopt.engine.multi_base import Sequencer as Sequencer
from metaopt.ensembling import ensemble as ensemble
from metaopt.ensembling import save_snapshots as save_snapshots
from metaopt.errors import CheckpointError as CheckpointError
from metaopt.errors import HintWarning as HintWarning
from metaopt.errors import HyperparameterError as HyperparameterError
from metaopt.errors import LogError as LogError
from metaopt.errors import MetaoptError as MetaoptError
from metaopt.errors import MetaoptWarning as MetaoptWarning
from metaopt.errors import MissingExtra as MissingExtra
from metaopt.errors import ParameterError as ParameterError
from metaopt.errors import PluginError as PluginError
from metaopt.errors import ProblemError as ProblemError
from metaopt.errors import ScheduleConflict as ScheduleConflict
from metaopt.errors import SpecError as SpecError
from metaopt.errors import StepError as StepError
from metaopt.errors import UnknownPart as UnknownPart
from metaopt.errors import warn as warn
from metaopt.explaining.report import explain as explain
from metaopt.group import Group as Group
from metaopt.group import Groups as Groups
from metaopt.hooks import Example as Example
from metaopt.hooks import hookimpl as hookimpl
from metaopt.hyperparameters import hyper as hyper
from metaopt.lab.own.making import problem as problem
from metaopt.logger import Histogram as Histogram
from metaopt.logger import Layout as Layout
from metaopt.logger import Logger as Logger
from metaopt.logger import Margin as Margin
from metaopt.logger import Table as Table
from metaopt.problem_class import Problem as Problem
from metaopt.registry import register as register
from metaopt.rules import elementwise as elementwise
from metaopt.schedule import Schedule as Schedule
from metaopt.slots import anchor as anchor
from metaopt.slots import counter as counter
from metaopt.slots import history as history
from metaopt.slots import moments as moments
from metaopt.slots import number as number
from metaopt.slots import previous as previous
from metaopt.slots import scalar as scalar
from metaopt.slots import start as start
from metaopt.slots import zeros as zeros
from metaopt.space import Space as Space
from metaopt.specs.pipeline import Part as _Part
from metaopt.stack import Stack as Stack
from metaopt.tensor_problem import TensorProblem as TensorProblem
from metaopt.tuner import Task as Task
from metaopt.tuner import Tried as Tried
from metaopt.tuner import Tuner as Tuner
from metaopt.wrapper import Wrapper as Wrapper

__version__: str

# a number, or what it is over time
_Rate = float | Tensor | Schedule | Callable[[int], float]

class _Adadelta(_Part):
    def __call__(self, lr: _Rate = 1.0, rho: _Rate = 0.9, eps: _Rate = 1e-06, weight_decay: _Rate = 0, foreach: bool | None = None, capturable: bool = False, maximize: bool = False, differentiable: bool = False) -> _Part:
        """Implements Adadelta algorithm.

        Args:
            lr: coefficient that scale delta before it is applied to the parameters
            rho: coefficient used for computing a running average of squared gradients
            eps: term added to the denominator to improve numerical stability
            weight_decay: weight decay (L2 penalty)
            foreach: whether foreach implementation of optimizer is used
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
            maximize: maximize the objective with respect to the params, instead of minimizing
            differentiable: whether autograd should occur through the optimizer step in training
        """

adadelta: _Adadelta

class _Adafactor(_Part):
    def __call__(self, lr: _Rate = 0.01, beta2_decay: _Rate = -0.8, eps: Sequence[Any] = ..., d: _Rate = 1.0, weight_decay: _Rate = 0.0, foreach: bool | None = None, maximize: bool = False) -> _Part:
        """Implements Adafactor algorithm.

        Args:
            lr: unlike other optimizers, Adafactor does not require a learning rate, and Noam Shazeer and Mitchell Stern do not use lr at all
            beta2_decay: the decay rate of beta2. beta2 standardly refers to the coefficient used for computing the running average of the gradient squared
            eps: epsilon1 is the term added to the denominator of the update calculation to improve numerical stability
            d: the clipping threshold, used to avoid larger-than-desired updates
            weight_decay: weight decay coefficient
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
        """

adafactor: _Adafactor

class _Adagrad(_Part):
    def __call__(self, lr: _Rate = 0.01, lr_decay: _Rate = 0, weight_decay: _Rate = 0, initial_accumulator_value: _Rate = 0, eps: _Rate = 1e-10, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False, fused: bool | None = None) -> _Part:
        """Implements Adagrad algorithm.

        Args:
            lr: learning rate
            lr_decay: learning rate decay
            weight_decay: weight decay (L2 penalty)
            initial_accumulator_value: initial value of the sum of squares of gradients
            eps: term added to the denominator to improve numerical stability
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            differentiable: whether autograd should occur through the optimizer step in training
            fused: whether the fused implementation (CPU and CUDA only) is used
        """

adagrad: _Adagrad

class _Adam(_Part):
    def __call__(self, lr: _Rate = 0.001, betas: Sequence[Any] = ..., eps: _Rate = 1e-08, weight_decay: _Rate = 0, amsgrad: bool = False, foreach: bool | None = None, maximize: bool = False, capturable: bool = False, differentiable: bool = False, fused: bool | None = None, decoupled_weight_decay: bool = False) -> _Part:
        """Implements Adam algorithm.

        Args:
            lr: learning rate
            betas: coefficients used for computing running averages of gradient and its square
            eps: term added to the denominator to improve numerical stability
            weight_decay: weight decay (L2 penalty)
            amsgrad: whether to use the AMSGrad variant of this algorithm from the paper `On the Convergence of Adam and Beyond`_
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
            differentiable: whether autograd should occur through the optimizer step in training
            fused: whether the fused implementation is used
            decoupled_weight_decay: if True, this optimizer is equivalent to AdamW and the algorithm will not accumulate weight decay in the momentum nor variance
        """

adam: _Adam

class _Adamax(_Part):
    def __call__(self, lr: _Rate = 0.002, betas: Sequence[Any] = ..., eps: _Rate = 1e-08, weight_decay: _Rate = 0, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False, capturable: bool = False) -> _Part:
        """Implements Adamax algorithm (a variant of Adam based on infinity norm).

        Args:
            lr: learning rate
            betas: coefficients used for computing running averages of gradient and its square
            eps: term added to the denominator to improve numerical stability
            weight_decay: weight decay (L2 penalty)
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            differentiable: whether autograd should occur through the optimizer step in training
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
        """

adamax: _Adamax

class _Adamw(_Part):
    def __call__(self, lr: _Rate = 0.001, betas: Sequence[Any] = ..., eps: _Rate = 1e-08, weight_decay: _Rate = 0.01, amsgrad: bool = False, maximize: bool = False, foreach: bool | None = None, capturable: bool = False, differentiable: bool = False, fused: bool | None = None) -> _Part:
        """Implements AdamW algorithm, where weight decay does not accumulate in the momentum nor variance.

        Args:
            lr: learning rate
            betas: coefficients used for computing running averages of gradient and its square
            eps: term added to the denominator to improve numerical stability
            weight_decay: weight decay coefficient
            amsgrad: whether to use the AMSGrad variant of this algorithm from the paper `On the Convergence of Adam and Beyond`_
            maximize: maximize the objective with respect to the params, instead of minimizing
            foreach: whether foreach implementation of optimizer is used
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
            differentiable: whether autograd should occur through the optimizer step in training
            fused: whether the fused implementation is used
        """

adamw: _Adamw

class _Asgd(_Part):
    def __call__(self, lr: _Rate = 0.01, lambd: _Rate = 0.0001, alpha: _Rate = 0.75, t0: _Rate = 1000000.0, weight_decay: _Rate = 0, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False, capturable: bool = False) -> _Part:
        """Implements Averaged Stochastic Gradient Descent.

        Args:
            lr: learning rate
            lambd: decay term
            alpha: power for eta update
            t0: point at which to start averaging
            weight_decay: weight decay (L2 penalty)
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            differentiable: whether autograd should occur through the optimizer step in training
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
        """

asgd: _Asgd

class _Lbfgs(_Part):
    def __call__(self, lr: _Rate = 1, max_iter: int = 20, max_eval: int | None = None, tolerance_grad: _Rate = 1e-07, tolerance_change: _Rate = 1e-09, history_size: int = 100, line_search_fn: str | None = None) -> _Part:
        """Implements L-BFGS algorithm.

        Args:
            lr: learning rate
            max_iter: maximal number of iterations per optimization step
            max_eval: maximal number of function evaluations per optimization step
            tolerance_grad: termination tolerance on first order optimality
            tolerance_change: termination tolerance on function value/parameter changes
            history_size: update history size
            line_search_fn: either 'strong_wolfe' or None
        """

lbfgs: _Lbfgs

class _Muon(_Part):
    def __call__(self, lr: _Rate = 0.001, weight_decay: _Rate = 0.1, momentum: _Rate = 0.95, nesterov: bool = True, ns_coefficients: Sequence[Any] = ..., eps: _Rate = 1e-07, ns_steps: int = 5, adjust_lr_fn: str | None = None) -> _Part:
        """Implements Muon algorithm.

        Args:
            lr: learning rate
            weight_decay: weight decay (L2 penalty)
            momentum: momentum factor
            nesterov: enables Nesterov momentum
            ns_coefficients: coefficients \\(a,b,c\\) for the Newton–Schulz orthogonalization polynomial
            eps: term added to the denominator for numerical stability
            ns_steps: number of Newton–Schulz iteration steps
            adjust_lr_fn: function to adjust learning rate
        """

muon: _Muon

class _Nadam(_Part):
    def __call__(self, lr: _Rate = 0.002, betas: Sequence[Any] = ..., eps: _Rate = 1e-08, weight_decay: _Rate = 0, momentum_decay: _Rate = 0.004, decoupled_weight_decay: bool = False, foreach: bool | None = None, maximize: bool = False, capturable: bool = False, differentiable: bool = False) -> _Part:
        """Implements NAdam algorithm.

        Args:
            lr: learning rate
            betas: coefficients used for computing running averages of gradient and its square
            eps: term added to the denominator to improve numerical stability
            weight_decay: weight decay (L2 penalty)
            momentum_decay: momentum momentum_decay
            decoupled_weight_decay: whether to decouple the weight decay as in AdamW to obtain NAdamW. If True, the algorithm does not accumulate weight decay in the momentum nor variance
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
            differentiable: whether autograd should occur through the optimizer step in training
        """

nadam: _Nadam

class _Partition(_Part):
    def __call__(self, parts: Any) -> _Part:
        """Each parameter goes to the pipeline of the first pattern that matches it: partition({"pattern": pipeline, ...})."""

partition: _Partition

class _Radam(_Part):
    def __call__(self, lr: _Rate = 0.001, betas: Sequence[Any] = ..., eps: _Rate = 1e-08, weight_decay: _Rate = 0, decoupled_weight_decay: bool = False, foreach: bool | None = None, maximize: bool = False, capturable: bool = False, differentiable: bool = False) -> _Part:
        """Implements RAdam algorithm.

        Args:
            lr: learning rate
            betas: coefficients used for computing running averages of gradient and its square
            eps: term added to the denominator to improve numerical stability
            weight_decay: weight decay (L2 penalty)
            decoupled_weight_decay: whether to decouple the weight decay as in AdamW to obtain RAdamW. If True, the algorithm does not accumulate weight decay in the momentum nor variance
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
            differentiable: whether autograd should occur through the optimizer step in training
        """

radam: _Radam

class _Rmsprop(_Part):
    def __call__(self, lr: _Rate = 0.01, alpha: _Rate = 0.99, eps: _Rate = 1e-08, weight_decay: _Rate = 0, momentum: _Rate = 0, centered: bool = False, capturable: bool = False, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False) -> _Part:
        """Implements RMSprop algorithm.

        Args:
            lr: learning rate
            alpha: smoothing constant
            eps: term added to the denominator to improve numerical stability
            weight_decay: weight decay (L2 penalty)
            momentum: momentum factor
            centered: 
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            differentiable: whether autograd should occur through the optimizer step in training
        """

rmsprop: _Rmsprop

class _Rprop(_Part):
    def __call__(self, lr: _Rate = 0.01, etas: Sequence[Any] = ..., step_sizes: Sequence[Any] = ..., capturable: bool = False, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False) -> _Part:
        """Implements the resilient backpropagation algorithm.

        Args:
            lr: learning rate
            etas: pair of (etaminus, etaplus), that are multiplicative increase and decrease factors
            step_sizes: a pair of minimal and maximal allowed step sizes
            capturable: whether this instance is safe to capture in a graph, whether for CUDA graphs or for torch.compile support
            foreach: whether foreach implementation of optimizer is used
            maximize: maximize the objective with respect to the params, instead of minimizing
            differentiable: whether autograd should occur through the optimizer step in training
        """

rprop: _Rprop

class _Sgd(_Part):
    def __call__(self, lr: _Rate = 0.001, momentum: _Rate = 0, dampening: _Rate = 0, weight_decay: _Rate = 0, nesterov: bool = False, maximize: bool = False, foreach: bool | None = None, differentiable: bool = False, fused: bool | None = None) -> _Part:
        """Implements stochastic gradient descent (optionally with momentum).

        Args:
            lr: learning rate
            momentum: momentum factor
            dampening: dampening for momentum
            weight_decay: weight decay (L2 penalty)
            nesterov: enables Nesterov momentum
            maximize: maximize the objective with respect to the params, instead of minimizing
            foreach: whether foreach implementation of optimizer is used
            differentiable: whether autograd should occur through the optimizer step in training
            fused: whether the fused implementation is used
        """

sgd: _Sgd

class _SparseAdam(_Part):
    def __call__(self, lr: _Rate = 0.001, betas: Sequence[Any] = ..., eps: _Rate = 1e-08, maximize: bool = False) -> _Part:
        """SparseAdam implements a masked version of the Adam algorithm suitable for sparse gradients.

        Args:
            lr: learning rate
            betas: coefficients used for computing running averages of gradient and its square
            eps: term added to the denominator to improve numerical stability
            maximize: maximize the objective with respect to the params, instead of minimizing
        """

sparse_adam: _SparseAdam

class _Switch(_Part):
    def __call__(self, *args: Any, **kwargs: Any) -> _Part:
        """switch(a, n, b, m, ..., z): a is the base for n updates, b for m more, ..., z to the end. arXiv:1712.07628"""

switch: _Switch

class _Accumulate(_Part):
    def __call__(self, steps: int, *, label: str | None = None) -> _Part:
        """sum <- sum + w g at every `step()`; at every `steps`-th, g <- sum / (sum of all w) makes the update, sum <- 0.

        Args:
            steps: how many calls of step() make one update
        """

accumulate: _Accumulate

class _AdaptiveGradClip(_Part):
    def __call__(self, clipping: _Rate = 0.01, eps: _Rate = 0.001, *, label: str | None = None) -> _Part:
        """g_i <- g_i min(1, clipping max(|w_i|, eps) / |g_i|) for each row i; a vector is one row. arXiv:2102.06171

        Args:
            clipping: the largest |g| / |w| of a row
            eps: the smallest size that weights count as; zeros could not move otherwise
        """

adaptive_grad_clip: _AdaptiveGradClip

class _Cautious(_Part):
    def __call__(self, *, label: str | None = None) -> _Part:
        """u <- u m / max(mean(m), 0.001), m = 1 where u g < 0 and otherwise 0, for each tensor's update u. arXiv:2411.16085"""

cautious: _Cautious

class _CautiousDecay(_Part):
    def __call__(self, weight_decay: _Rate = 0.025, *, label: str | None = None) -> _Part:
        """u <- u - lr weight_decay w m, m = 1 where u w <= 0 and otherwise 0, with the base's lr. arXiv:2510.12402

        Args:
            weight_decay: the share of the weights that an update at rate 1 takes away
        """

cautious_decay: _CautiousDecay

class _Centralize(_Part):
    def __call__(self, *, label: str | None = None) -> _Part:
        """g_i <- g_i - mean(g_i) for each row i of tensors with two dimensions or more. arXiv:2004.01461"""

centralize: _Centralize

class _ClipGradNorm(_Part):
    def __call__(self, max_norm: _Rate, norm_type: _Rate = 2.0, *, label: str | None = None) -> _Part:
        """g <- g min(1, max_norm / (|g| + 1e-6)), with |g| over all parameters together. arXiv:1211.5063

        Args:
            max_norm: the largest norm that passes unchanged
            norm_type: the p of the norm; inf is allowed
        """

clip_grad_norm: _ClipGradNorm

class _ClipGradValue(_Part):
    def __call__(self, clip_value: _Rate, *, label: str | None = None) -> _Part:
        """g <- min(max(g, -clip_value), clip_value), componentwise.

        Args:
            clip_value: the largest magnitude of a component
        """

clip_grad_value: _ClipGradValue

class _ClipUpdateNorm(_Part):
    def __call__(self, max_norm: _Rate = 1.0, *, label: str | None = None) -> _Part:
        """u <- u min(1, max_norm / |u|), |u| being the distance that the update moves all weights together.

        Args:
            max_norm: the largest distance
        """

clip_update_norm: _ClipUpdateNorm

class _ClipUpdateRms(_Part):
    def __call__(self, max_rms: _Rate = 1.0, *, label: str | None = None) -> _Part:
        """u <- u / max(1, RMS(u / lr) / max_rms) for each tensor, RMS(x) = sqrt(mean(x^2)). arXiv:1804.04235

        Args:
            max_rms: the largest RMS of an update at rate 1
        """

clip_update_rms: _ClipUpdateRms

class _Decay(_Part):
    def __call__(self, weight_decay: _Rate, *, label: str | None = None) -> _Part:
        """w <- (1 - lr weight_decay) w right before the base's update, with the base's rate: AdamW's. arXiv:1711.05101

        Args:
            weight_decay: the share of the weights that an update at rate 1 takes away
        """

decay: _Decay

class _Ema(_Part):
    def __call__(self, decay: _Rate = 0.999, warmup: bool = False, average_dtype: Literal[None, 'float32'] = None, start: int = 0, every: int = 1, device: Literal[None, 'cpu'] = None, *, label: str | None = None) -> _Part:
        """average <- d average + (1 - d) w after every update; `opt.averaged()` shows it. doi:10.1137/0330046

        Args:
            decay: how much of the average is kept each time it is updated
            warmup: begin with a shorter memory
            average_dtype: the dtype of the average; None: the parameter's own, in 16 bits too coarse for a decay near 1
            start: the update after which averaging begins
            every: updates between updates of the average
            device: where the average is kept: 'cpu' is main memory; None: beside the parameter
        """

ema: _Ema

class _EmaNesterov(_Part):
    def __call__(self, beta: _Rate = 0.5, gamma: _Rate = 0.99, *, label: str | None = None) -> _Part:
        """x' = x + beta m + u; m' = gamma m + (1 - gamma) (x' - x), u being the base's step at x + beta m. arXiv:2605.25395

        Args:
            beta: how far along m gradients are taken
            gamma: how much of m an update keeps
        """

ema_nesterov: _EmaNesterov

class _Flatten(_Part):
    def __call__(self, *, label: str | None = None) -> _Part:
        """W of shape (n, a, b, ...) is the matrix (n, a b ...) to the base, as Muon's author treats convolutions."""

flatten: _Flatten

class _Gpa(_Part):
    def __call__(self, mu_x: _Rate = 0.9967, mu_y: _Rate = 0.7, *, label: str | None = None) -> _Part:
        """z <- z + u; x <- mu_x x + (1 - mu_x) z; y <- mu_y x + (1 - mu_y) z, u being the base's step. arXiv:2512.17131

        Args:
            mu_x: how much of x an update keeps
            mu_y: the share of x in y, the rest is z
        """

gpa: _Gpa

class _GradientNoise(_Part):
    def __call__(self, eta: _Rate = 0.01, gamma: _Rate = 0.55, seed: int = 0, *, label: str | None = None) -> _Part:
        """g <- g + N(0, eta / (1 + t)^gamma), t being the number of updates made so far. arXiv:1511.06807

        Args:
            eta: the variance of the first noise; the paper tries 0.01, 0.3 and 1
            gamma: how fast the variance falls
            seed: the seed of the noise
        """

gradient_noise: _GradientNoise

class _Grokfast(_Part):
    def __call__(self, alpha: _Rate = 0.98, lamb: _Rate = 2.0, *, label: str | None = None) -> _Part:
        """average <- alpha average + (1 - alpha) g; g <- g + lamb average. arXiv:2405.20233

        Args:
            alpha: how much of the average a step keeps
            lamb: how much of the average is added
        """

grokfast: _Grokfast

class _Hyperball(_Part):
    def __call__(self, *, label: str | None = None) -> _Part:
        """w <- R N(w + lr R N(u)), N(x) = x / |x|, R = |w|, for each tensor with two dimensions or more. arXiv:2606.16899"""

hyperball: _Hyperball

class _L2(_Part):
    def __call__(self, weight_decay: _Rate, *, label: str | None = None) -> _Part:
        """g <- g + weight_decay w: the penalty goes through the base like the loss, so an adaptive base rescales it.

        Args:
            weight_decay: the strength of the penalty weight_decay |w|^2 / 2
        """

l2: _L2

class _Lawa(_Part):
    def __call__(self, k: int, n: int, *, label: str | None = None) -> _Part:
        """average = (w_s + w_(s-k) + ... + w_(s-(n-1)k)) / n, s being the last update that k divides. arXiv:2209.14981

        Args:
            k: updates between samples
            n: how many samples are averaged
        """

lawa: _Lawa

class _Lookahead(_Part):
    def __call__(self, k: int = 5, alpha: _Rate = 0.5, pullback_momentum: Literal['none', 'reset', 'pullback'] = 'none', slow_dtype: Literal[None, 'float32'] = None, device: Literal[None, 'cpu'] = None, across: Literal[None, 'replicas'] = None, compress: Literal[None, 'bfloat16'] = None, fragments: int = 1, delay: int = 0, blend: _Rate = 0.5, *, label: str | None = None) -> _Part:
        """slow <- slow + alpha (fast - slow); fast <- slow, every k updates. arXiv:1907.08610

        Args:
            k: updates between pulls
            alpha: how far the slow weights move toward the fast ones
            pullback_momentum: what a pull does to the base's moments
            slow_dtype: the dtype of the slow weights; None: the parameter's own
            device: where the slow weights are kept: 'cpu' is main memory; None: beside the parameter
            across: over what the way that the weights went is averaged before the step; None: it is this process's own
            compress: the dtype in which replicas send that way; None: at least float32
            fragments: parts of the parameters that have their steps in turn, spread over the k updates
            delay: updates made while the mean is on its way
            blend: after a delayed step, the share of a replica's own weights in its new ones
        """

lookahead: _Lookahead

class _Magma(_Part):
    def __call__(self, keep: _Rate = 0.5, tau: _Rate = 2.0, smoothing: _Rate = 0.9, beta: _Rate = 0.9, seed: int = 0, *, label: str | None = None) -> _Part:
        """s <- 0.9 s + 0.1 sigmoid(cos(m, g) / tau); u <- s u with probability `keep`, otherwise 0. arXiv:2602.15322

        Args:
            keep: the probability that a tensor moves
            tau: the temperature of the agreement
            smoothing: how much of s an update keeps
            beta: how much of m an update keeps
            seed: the seed of the masks
        """

magma: _Magma

class _Mars(_Part):
    def __call__(self, gamma: _Rate = 0.025, beta1: _Rate = 0.95, *, label: str | None = None) -> _Part:
        """c = g + gamma beta1 / (1 - beta1) (g - g_before); g <- c / max(1, |c|) for each tensor. arXiv:2411.10438

        Args:
            gamma: how much of the change of the gradient is added
            beta1: the memory of the base's momentum
        """

mars: _Mars

class _Mechanic(_Part):
    def __call__(self, s_init: _Rate = 1e-06, num_betas: int = 6, eps: _Rate = 1e-08, weight_decay: _Rate = 0.01, *, label: str | None = None) -> _Part:
        """x <- x_0 + s (D + u), D = (x_before - x_0) / s_before the way so far, u the base's update. arXiv:2306.00144

        Args:
            s_init: the first scale of the updates
            num_betas: how many memories bet on the scale
            eps: keeps quotients finite
            weight_decay: how strongly h counts the weights' own size, unlike the base's decay
        """

mechanic: _Mechanic

class _Monitor(_Part):
    def __call__(self, tensors: str | Sequence[Any] | None = None, update_ratio: bool = True, grad_norm: bool = True, param_norm: bool = True, effective_lr: bool = False, alignment: bool = False, sign_agreement: bool = False, moments: bool = False, noise_scale: bool = False, replica_noise: int = 0, sharpness: int = 0, iterations: int = 4, histograms: bool = False, *, label: str | None = None) -> _Part:
        """Measures logged updates and changes nothing; w are the weights, g is the gradient, d the change of w.

        Args:
            tensors: patterns of names, such as 'blocks.*': these tensors are shown; without, the 5 largest and the 5 smallest
            update_ratio: measure |d| / |w|
            grad_norm: measure |g|
            param_norm: measure |w|
            effective_lr: measure |d| / |g|
            alignment: measure cos(d, -g) and cos(g, last g)
            sign_agreement: measure the share of elements with d g < 0
            moments: measure the norms of the base's moments
            noise_scale: measure the gradient noise scale; needs accumulate in the stack
            replica_noise: updates between two measurements of the noise scale over the ranks of DDP, by all ranks; 0: none
            sharpness: updates between two measurements of the Hessian's largest eigenvalue; 0: none
            iterations: power iterations of `sharpness`
            histograms: histograms of weights, gradients and changes
        """

monitor: _Monitor

class _Orthograd(_Part):
    def __call__(self, *, label: str | None = None) -> _Part:
        """a = g - (w g / (w w + 1e-30)) w; g <- a |g| / (|a| + 1e-30) for each tensor, so that w g = 0. arXiv:2501.04697"""

orthograd: _Orthograd

class _Outer(_Part):
    def __call__(self, k: int = 28, lr: _Rate = 0.7, momentum: _Rate = 0.6, nesterov: bool = True, slow_dtype: Literal[None, 'float32'] = None, device: Literal[None, 'cpu'] = None, across: Literal[None, 'replicas'] = None, compress: Literal[None, 'bfloat16'] = None, fragments: int = 1, delay: int = 0, blend: _Rate = 0.5, *, label: str | None = None) -> _Part:
        """s = slow - fast; b <- momentum b + s; slow <- slow - lr (momentum b + s); fast <- slow, every k updates.

        Args:
            k: updates between outer steps
            lr: the outer rate; above 1 is allowed
            momentum: the outer momentum
            nesterov: step along momentum b + s rather than along b
            slow_dtype: the dtype of the slow weights and the outer momentum; None: the parameter's own
            device: where slow weights and outer momentum are kept: 'cpu' is main memory; None: beside the parameter
            across: over what the way that the weights went is averaged before the step; None: it is this process's own
            compress: the dtype in which replicas send that way; None: at least float32
            fragments: parts of the parameters that have their steps in turn, spread over the k updates
            delay: updates made while the mean is on its way
            blend: after a delayed step, the share of a replica's own weights in its new ones
        """

outer: _Outer

class _Plateau(_Part):
    def __call__(self, metric: str, factor: _Rate = 0.1, patience: int = 10, mode: Literal['min', 'max'] = 'min', threshold: _Rate = 0.0001, threshold_mode: Literal['rel', 'abs'] = 'rel', cooldown: int = 0, min_lr: _Rate = 0.0, eps: _Rate = 1e-08, *, label: str | None = None) -> _Part:
        """lr <- max(factor lr, min_lr) if the metric has not improved more than `patience` times in a row.

        Args:
            metric: the name under which the metric is recorded, such as 'val_loss'
            factor: what the rate is multiplied with
            patience: how many values in a row may bring no improvement
            mode: whether a lower or a higher value is better
            threshold: by how much a value must be better
            threshold_mode: whether the threshold is a share of the best value
            cooldown: how many values after a fall are not counted
            min_lr: the rate below which it does not fall
            eps: a fall of the rate that is not larger is left out
        """

plateau: _Plateau

class _RadialBrake(_Part):
    def __call__(self, outward: _Rate = 0.5, inward: _Rate = 1.0, *, label: str | None = None) -> _Part:
        """u <- x - w, x = w + t + s c w scaled to the length |w + s c w|, for each tensor's u = t + c w.

        Args:
            outward: the share of a growth that stays
            inward: the share of a shrinkage that stays
        """

radial_brake: _RadialBrake

class _Sam(_Part):
    def __call__(self, rho: _Rate = 0.05, adaptive: bool = False, *, label: str | None = None) -> _Part:
        """g <- gradient at w + rho g / |g|; adaptive: at w + rho w^2 g / | |w| g |. arXiv:2010.01412, arXiv:2102.11600

        Args:
            rho: how far from the weights the gradient is taken
            adaptive: measure that distance relative to each weight's size (ASAM), with a rho about ten times as large
        """

sam: _Sam

class _ScheduleFree(_Part):
    def __call__(self, momentum: _Rate = 0.9, r: _Rate = 0.0, weight_lr_power: _Rate = 2.0, weight_decay_at_y: _Rate = 0.0, *, label: str | None = None) -> _Part:
        """z <- z + u; x <- (1 - c) x + c z; y <- momentum x + (1 - momentum) z. arXiv:2405.15682

        Args:
            momentum: the share of x in y, the rest is z
            r: the power of the update's number in its weight
            weight_lr_power: the power of the largest rate so far in an update's weight
            weight_decay_at_y: z <- z - lr weight_decay_at_y y, for a base without decay
        """

schedule_free: _ScheduleFree

class _SkipNonfinite(_Part):
    def __call__(self, patience: int, *, label: str | None = None) -> _Part:
        """The update is skipped where a gradient is NaN or infinite; `patience` of them in a row are an error.

        Args:
            patience: how many such updates in a row are too many
        """

skip_nonfinite: _SkipNonfinite

class _SkipSpikes(_Part):
    def __call__(self, sigma: _Rate = 6.0, window: int = 128, *, label: str | None = None) -> _Part:
        """The update is skipped if |g| > bound = mean + sigma deviation, |g| over all parameters: a spike.

        Args:
            sigma: how many deviations above the mean a spike begins
            window: how many norms are remembered
        """

skip_spikes: _SkipSpikes

class _TailAverage(_Part):
    def __call__(self, start: int = 0, every: int = 1, *, label: str | None = None) -> _Part:
        """average <- average + (w - average) / n at the n-th sample: SWA's equal weights. arXiv:1803.05407

        Args:
            start: the update after which samples are taken
            every: updates between samples
        """

tail_average: _TailAverage

class _TrustRatio(_Part):
    def __call__(self, trust_coefficient: _Rate = 1.0, eps: _Rate = 0.0, min_norm: _Rate = 0.0, max_ratio: _Rate = ..., *, label: str | None = None) -> _Part:
        """u <- u min(trust_coefficient |w| / (|u| / lr + eps), max_ratio) for each tensor. arXiv:1904.00962

        Args:
            trust_coefficient: the ratio at equal norms
            eps: added to the size of the update
            min_norm: what both norms count as at least
            max_ratio: the largest ratio; 1 only shrinks
        """

trust_ratio: _TrustRatio

class _UpdateFloor(_Part):
    def __call__(self, floor: _Rate = 0.35, rows: bool = False, *, label: str | None = None) -> _Part:
        """u <- u max(1, floor lr |w| / |u|) for each tensor: an update at rate 1 moves the weights by `floor` |w| or more.

        Args:
            floor: the smallest |u| / |w| of an update at rate 1
            rows: hold it for each index of the first dimension; a vector is one row
        """

update_floor: _UpdateFloor

class _Zclip(_Part):
    def __call__(self, alpha: _Rate = 0.97, z_thresh: _Rate = 2.5, warmup: int = 25, mode: Literal['reciprocal', 'mean', 'max'] = 'reciprocal', *, label: str | None = None) -> _Part:
        """g <- g bound / |g| if z = (|g| - mean) / deviation > z_thresh, |g| over all parameters. arXiv:2504.02507

        Args:
            alpha: how much of mean and variance a step keeps
            z_thresh: from how many deviations on a norm is a spike
            warmup: how many norms mean and variance begin with
            mode: what a spike is clipped to; reciprocal: the larger it is, the nearer to the mean
        """

zclip: _Zclip

class _Constant(_Part):
    def __call__(self, value: _Rate) -> Schedule:
        """v(t) = value.

        Args:
            value: the value
        """

constant: _Constant

class _Cosine(_Part):
    def __call__(self, start: _Rate, end: _Rate = 0.0, steps: int | _Rate | None = None) -> Schedule:
        """v(t) = end + (start - end) (1 + cos(pi min(t / steps, 1))) / 2: half a cosine, no restart. arXiv:1608.03983

        Args:
            start: the value at the first update
            end: the value after `steps` updates
            steps: updates, a fraction of the run, or None: to its end
        """

cosine: _Cosine

class _CosineRestarts(_Part):
    def __call__(self, start: _Rate, first: int, mult: int = 1, end: _Rate = 0.0) -> Schedule:
        """v = end + (start - end) (1 + cos(pi c / T)) / 2, c updates into a cycle of T = first mult^i. arXiv:1608.03983

        Args:
            start: the value at every restart
            first: updates in the first cycle
            mult: how much longer each cycle is than the one before
            end: the value that each cycle approaches
        """

cosine_restarts: _CosineRestarts

class _Cyclic(_Part):
    def __call__(self, low: _Rate, high: _Rate, up: int = 2000, down: int | None = None, mode: Literal['triangular', 'triangular2', 'exp_range'] = 'triangular', gamma: _Rate = 1.0) -> Schedule:
        """v(t) = low + (high - low) max(0, 1 - |2 x - 1|) s, x the part of the cycle done. arXiv:1506.01186

        Args:
            low: the value at both ends of a cycle
            high: the value in the middle of a cycle
            up: updates from low to high
            down: updates from high to low; None: as many
            mode: how the height changes
            gamma: the factor of every update in exp_range
        """

cyclic: _Cyclic

class _Exponential(_Part):
    def __call__(self, start: _Rate, gamma: _Rate) -> Schedule:
        """v(t) = start gamma^t.

        Args:
            start: the value at the first update
            gamma: the factor of every update
        """

exponential: _Exponential

class _InverseSqrt(_Part):
    def __call__(self, peak: _Rate, warmup: int | _Rate, start: _Rate = 0.0) -> Schedule:
        """v(t) = start + (peak - start) t / warmup for t < warmup, then peak sqrt(warmup / t). arXiv:1706.03762

        Args:
            peak: the value at the end of the warm-up
            warmup: updates, or a fraction of the run
            start: the value at the first update
        """

inverse_sqrt: _InverseSqrt

class _Linear(_Part):
    def __call__(self, start: _Rate, end: _Rate, steps: int | _Rate | None = None) -> Schedule:
        """v(t) = start + (end - start) min(t / steps, 1).

        Args:
            start: the value at the first update
            end: the value after `steps` updates
            steps: updates, a fraction of the run, or None: to its end
        """

linear: _Linear

class _MultiStep(_Part):
    def __call__(self, start: _Rate, milestones: Sequence[Any], gamma: _Rate = 0.1) -> Schedule:
        """v(t) = start gamma^n, n being the number of milestones up to t.

        Args:
            start: the value at the first update
            milestones: the updates, or fractions of the run, at which the value decays
            gamma: the factor of every decay
        """

multi_step: _MultiStep

class _Noam(_Part):
    def __call__(self, d_model: int = 512, warmup: int = 4000, factor: _Rate = 1.0) -> Schedule:
        """v(t) = factor d_model^-0.5 min(s^-0.5, s warmup^-1.5), s = t + 1 the number of the update. arXiv:1706.03762

        Args:
            d_model: the width of the model
            warmup: updates until the peak
            factor: multiplies every value
        """

noam: _Noam

class _OneCycle(_Part):
    def __call__(self, peak: _Rate, pct_start: _Rate = 0.3, div_factor: _Rate = 25.0, final_div_factor: _Rate = 10000.0, anneal: Literal['cos', 'linear'] = 'cos', steps: int | _Rate | None = None) -> Schedule:
        """v rises from peak / div_factor to peak, then falls to that / final_div_factor, by half cosines. arXiv:1708.07120

        Args:
            peak: the largest value
            pct_start: the part of the run that rises
            div_factor: peak / first value
            final_div_factor: first value / last value
            anneal: the form of both parts
            steps: updates, a fraction of the run, or None: to its end
        """

one_cycle: _OneCycle

class _Polynomial(_Part):
    def __call__(self, start: _Rate, end: _Rate = 0.0, power: _Rate = 1.0, steps: int | _Rate | None = None) -> Schedule:
        """v(t) = end + (start - end) (1 - min(t / steps, 1))^power.

        Args:
            start: the value at the first update
            end: the value after `steps` updates
            power: the exponent; 1 is linear
            steps: updates, a fraction of the run, or None: to its end
        """

polynomial: _Polynomial

class _Scale(_Part):
    def __call__(self, schedule: Any, factor: _Rate) -> Schedule:
        """v(t) = factor s(t): a schedule as a whole, made larger or smaller.

        Args:
            schedule: the schedule, or a number
            factor: multiplies every value
        """

scale: _Scale

class _Sequence(_Part):
    def __call__(self, *args: Any, **kwargs: Any) -> Schedule:
        """sequence(a, n, b, m, ..., z): a for n updates, b for m, ..., z to the end; each counts its own t from 0."""

sequence: _Sequence

class _StepDecay(_Part):
    def __call__(self, start: _Rate, step_size: int, gamma: _Rate = 0.1) -> Schedule:
        """v(t) = start gamma^floor(t / step_size).

        Args:
            start: the value at the first update
            step_size: updates between two decays
            gamma: the factor of every decay
        """

step_decay: _StepDecay

class _Warmup(_Part):
    def __call__(self, schedule: Any, steps: int | _Rate, start: _Rate = 0.0) -> Schedule:
        """v(t) = start + (s(0) - start) t / w for t < w, then s(t - w). arXiv:1706.02677

        Args:
            schedule: the schedule after the warm-up, or a number that then stays
            steps: updates, or a fraction of the run
            start: the value at the first update
        """

warmup: _Warmup

class _Wsd(_Part):
    def __call__(self, peak: _Rate, warmup: int | _Rate = 0.05, decay: int | _Rate = 0.2, end: _Rate = 0.0, start: _Rate = 0.0, steps: int | _Rate | None = None) -> Schedule:
        """v rises linearly from start to peak in `warmup`, stays, and falls linearly to end in the last `decay` of steps.

        Args:
            peak: the value between warm-up and decay
            warmup: updates, or a fraction of the run
            decay: updates, or a fraction of the run
            end: the last value
            start: the value at the first update
            steps: updates, a fraction of the run, or None: to its end
        """

wsd: _Wsd

class _Choice(_Part):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """choice(a, b, ...): one of these, each as likely as any other: numbers, text, None, tuples or schedules."""

choice: _Choice

class _Integers(_Part):
    def __call__(self, low: int, high: int) -> Any:
        """The whole numbers low, low + 1, ..., high, each as likely as any other.

        Args:
            low: the least value
            high: the greatest value, included
        """

integers: _Integers

class _Log(_Part):
    def __call__(self, low: _Rate, high: _Rate) -> Any:
        """x(u) = low (high / low)^u: each factor is as likely as any other, as suits a learning rate.

        Args:
            low: the least value
            high: the greatest value
        """

log: _Log

class _Uniform(_Part):
    def __call__(self, low: _Rate, high: _Rate) -> Any:
        """x(u) = low + (high - low) u: each value is as likely as any other.

        Args:
            low: the least value
            high: the greatest value
        """

uniform: _Uniform

class _Gp(_Part):
    def __call__(self, spread: _Rate = 0.33) -> Tuner:
        """Evenly spread settings, then those from which a Gaussian process expects the largest improvement.

        Args:
            spread: the share of the trials that are spread evenly, before the others
        """

gp: _Gp

class _Halving(_Part):
    def __call__(self, keep: int = 3, rungs: int = 3) -> Tuner:
        """Train all settings for a part of the run, the better ones for longer, the best to its end. arXiv:1502.07943

        Args:
            keep: one of so many settings goes on
            rungs: how often a choice is made, the last one included
        """

halving: _Halving

class _Sobol(_Part):
    def __call__(self, near: _Rate = 0.4) -> Tuner:
        """A scrambled Sobol sequence over the whole space, then boxes around the best setting that become smaller.

        Args:
            near: the share of the trials that are made near the best so far
        """

sobol: _Sobol

class _Csv(_Part):
    def __call__(self, path: Any) -> Logger:
        """Writes a row for each point and a column for each tag, `step` being the first: `pandas.read_csv("run.csv")`."""

csv: _Csv

class _Jsonl(_Part):
    def __call__(self, path: Any) -> Logger:
        """Writes one JSON object per line: first the run (spec, hyperparameters, tags), then `{"step": t, tag: value}`."""

jsonl: _Jsonl

class _Tensorboard(_Part):
    def __call__(self, log: Any) -> Logger:
        """Writes TensorBoard event files: scalars, the spec as text and one HParams record, all in the run's directory."""

tensorboard: _Tensorboard

class _Charlm(_Part):
    def __call__(self, batch_size: int = 16, context: int = 64, width: int = 64, layers: int = 2) -> Problem:
        """The next character of CPython's own help texts (pydoc_data.topics), split by topic: 80% to train, 10%, 10%.

        Args:
            batch_size: windows in a batch
            context: characters in a window
            width: width of the transformer; a multiple of 4
            layers: number of blocks
        """

charlm: _Charlm

class _Digits(_Part):
    def __call__(self, batch_size: int = 64) -> Problem:
        """1797 real handwritten digits of 8x8 pixels (scikit-learn's): 1000 to train, 397 to validate, 400 to test.

        Args:
            batch_size: images in a batch
        """

digits: _Digits

class _DigitsAutoencoder(_Part):
    def __call__(self, batch_size: int = 64) -> Problem:
        """The digits through a bottleneck of 8 numbers: a deep tanh autoencoder, squared error times 64.

        Args:
            batch_size: images in a batch
        """

digits_autoencoder: _DigitsAutoencoder

class _DigitsBatchNorm(_Part):
    def __call__(self, batch_size: int = 64) -> Problem:
        """The digits with four convolutions, BatchNorm behind each, and a residual connection. arXiv:1502.03167

        Args:
            batch_size: images in a batch
        """

digits_batch_norm: _DigitsBatchNorm

class _DigitsVit(_Part):
    def __call__(self, batch_size: int = 64, width: int = 32) -> Problem:
        """The digits with a vision transformer: 16 patches of 2x2 pixels, two pre-norm blocks. arXiv:2010.11929

        Args:
            batch_size: images in a batch
            width: width of the transformer; a multiple of 4
        """

digits_vit: _DigitsVit

class _Factorisation(_Part):
    def __call__(self, batch_size: int = 128, rank: int = 6, sparse: bool = False) -> Problem:
        """A noisy 200 x 150 matrix of rank 4 from a fifth of its entries, by squared error. doi:10.1109/MC.2009.263

        Args:
            batch_size: entries in a batch
            rank: length of the vectors
            sparse: sparse gradients, for bases that take them: sgd, sparse_adam
        """

factorisation: _Factorisation

class _Heat(_Part):
    def __call__(self, batch_size: int = 64, width: int = 24) -> Problem:
        """u_t = u_xx / 10 on the unit square from u = sin(pi x), u = 0 at the ends: a physics-informed network.

        Args:
            batch_size: points inside, and as many at the border, in a batch
            width: width of the network
        """

heat: _Heat

class _ModularAddition(_Part):
    def __call__(self, batch_size: int = 64, prime: int = 59, width: int = 32) -> Problem:
        """a + b modulo a prime from 80% of all pairs; 10% to validate and 10% to test. arXiv:2201.02177

        Args:
            batch_size: rows in a batch
            prime: the modulus
            width: width of the embedding
        """

modular_addition: _ModularAddition

class _NoisyQuadratic(_Part):
    def __call__(self, dimensions: int = 100, sigma: _Rate = 1.0) -> Problem:
        """sum_i a_i (x_i - c_i)^2 / 2 with a_i = 1 / i and c ~ N(0, sigma^2 a^-1) anew for every batch. arXiv:1907.08610

        Args:
            dimensions: number of eigenvalues, 1 / i each
            sigma: size of the gradient noise
        """

noisy_quadratic: _NoisyQuadratic

class _Recall(_Part):
    def __call__(self, batch_size: int = 64, delay: int = 16, width: int = 32) -> Problem:
        """The first symbol of a sequence, named after noise: a GRU learns what to keep. doi:10.1162/neco.1997.9.8.1735

        Args:
            batch_size: sequences in a batch
            delay: symbols of noise
            width: width of the network
        """

recall: _Recall

class _Rosenbrock(_Part):
    def __call__(self) -> Problem:
        """(1 - x)^2 + 100 (y - x^2)^2 from (-0.5, 0.5), in float64; 0 at (1, 1). doi:10.1093/comjnl/3.3.175"""

rosenbrock: _Rosenbrock

class _Xor(_Part):
    def __call__(self, batch_size: int = 32) -> Problem:
        """The sign of x y: 1000 points of the square, a 2-16-16-1 tanh network, batches of 32.

        Args:
            batch_size: points in a batch
        """

xor: _Xor

# the parts of plugins: `metaopt stubs` writes a stub that knows them
def __getattr__(name: str) -> Any: ...
