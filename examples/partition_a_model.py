"""Partition: Muon for the matrices inside the blocks of a transformer, AdamW for everything else, in one stack."""

import metaopt

ADAMW = "adamw(lr=1e-2, weight_decay=0.0)"

problem = metaopt.charlm(width=32, layers=1)
for spec in (ADAMW, f"partition({{'blocks.* & matrix': muon(lr=0.02, weight_decay=0.0), '*': {ADAMW}}})"):
    model = problem.model(seed=0)
    opt = metaopt.build(model, spec)
    for _, batch in zip(range(60), problem.batches(seed=0), strict=False):
        opt.zero_grad()
        problem.loss(model, batch).backward()
        opt.step()
    print(f"{opt.spec}: test loss {problem.evaluate(model, 'test')['loss']:.3f}")

for group in opt.param_groups:  # of the partition: a group for each part, with the hyperparameters of its own base
    print(f"{group['name']!r}: {len(group['params'])} tensors at lr {group['lr']}, {group['param_names'][0]} the first")
