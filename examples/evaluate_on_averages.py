"""Averages: one run, evaluated on the weights that are trained, on Lookahead's slow ones and on an average."""

import metaopt

problem = metaopt.xor()
model = problem.model(seed=0)
opt = metaopt.build(model, "adam(lr=0.03) | lookahead(k=10) | ema(0.98)")

losses = {"fast": [], "lookahead": [], "ema": []}
for step, batch in zip(range(600), problem.batches(seed=0), strict=False):
    opt.zero_grad()
    problem.loss(model, batch).backward()
    opt.step()
    if step >= 300 and step % 10 == 4:  # between two pulls
        losses["fast"].append(problem.evaluate(model)["loss"])
        for label in ("lookahead", "ema"):
            with opt.averaged(label):  # the weights that are trained come back at the end of the block
                losses[label].append(problem.evaluate(model)["loss"])

for name, values in losses.items():
    print(f"{name:10} validation loss {sum(values) / len(values):.4f}, the mean of {len(values)} evaluations")
