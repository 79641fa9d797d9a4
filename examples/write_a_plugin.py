"""Write a wrapper and an optimizer, register both, use them in a spec: one file, no packaging."""

import torch

import metaopt
from metaopt import Wrapper, anchor, hyper


class Pull(Wrapper, every="k"):
    """slow <- slow + alpha (fast - slow); fast <- slow. arXiv:1907.08610"""

    k: int = hyper(5, ge=1, doc="updates between pulls")
    alpha: float = hyper(0.5, gt=0.0, doc="how far the slow weights move toward the fast ones")
    slow = anchor()  # state[p]["pull.slow"]

    def after_update(self, group):
        torch._foreach_lerp_(group.slow, group.params, group.alpha)
        group.set_params(group.slow)


class SignDescent(torch.optim.Optimizer):
    """p <- p - lr sign(grad). Any torch optimizer can be registered, unchanged."""

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


metaopt.register(optimizers={"sign_descent": SignDescent}, wrappers={"pull": Pull})

x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
opt = metaopt.build([x], "sign_descent(lr=0.1) | pull(k=4)")
for _ in range(100):
    opt.zero_grad()
    x.square().sum().backward()
    opt.step()
print(f"{opt.spec} ends at {[round(value, 3) for value in x.tolist()]}")
