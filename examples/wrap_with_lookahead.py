"""Wrap an optimizer you already have with Lookahead: one line of the program changes."""

import torch

import metaopt

torch.manual_seed(0)
inputs = torch.randn(256, 8)
targets = inputs @ torch.randn(8, 1) + 0.1 * torch.randn(256, 1)
model = torch.nn.Linear(8, 1)

opt = torch.optim.AdamW(model.parameters(), lr=0.05)
opt = metaopt.wrap(opt, "lookahead(k=5, alpha=0.5)")  # the one line

for _ in range(200):
    opt.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    opt.step()

with opt.averaged():  # the slow weights
    slow_loss = torch.nn.functional.mse_loss(model(inputs), targets).item()
print(f"{type(opt).__name__} is a torch.optim.Optimizer: {isinstance(opt, torch.optim.Optimizer)}")
print(f"after {opt.updates} updates: loss {loss.item():.4f} with the fast weights, {slow_loss:.4f} with the slow ones")
