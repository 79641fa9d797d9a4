"""A small network learns XOR, once with each of five optimizers."""

import metaopt

STACKS = {
    "SGD": "sgd(lr=0.3)",
    "momentum": "sgd(lr=0.1, momentum=0.9)",
    "RMSprop": "rmsprop(lr=3e-3)",
    "Adam": "adam(lr=1e-2)",
    "AdamW": "adamw(lr=1e-2, weight_decay=1e-2)",
}

for name, spec in STACKS.items():
    problem = metaopt.xor()
    model = problem.model(0, "cpu")  # the same initial weights for each
    opt = metaopt.build(metaopt.groups(model, no_decay="1d"), spec)
    for _, batch in zip(range(600), problem.batches(0, "cpu"), strict=False):
        opt.zero_grad()
        problem.loss(model, batch).backward()
        opt.step()
    result = problem.evaluate(model, "test")
    print(f"{name:10} {spec:36} " + "  ".join(f"{metric} {value:.4f}" for metric, value in result.items()))
