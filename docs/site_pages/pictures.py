"""What a part does on a small problem, as a picture."""

from typing import Any

from metaopt.registry import Entry, registry
from metaopt.specs.parsing import parse_schedule
from metaopt.testing import cases
from site_pages import plot, runs

BASE = "sgd(lr=0.3, momentum=0.9)"
# settings under which a part shows what it is for; the others are drawn with those that they are checked with
SPECS = {
    "accumulate": f"accumulate(4) | {BASE}",
    "clip_grad_norm": f"clip_grad_norm(1.0) | {BASE}",
    "clip_grad_value": f"clip_grad_value(0.1) | {BASE}",
    "zclip": f"zclip | {BASE}",
    "lookahead": f"{BASE} | lookahead(k=5)",
    "outer": f"{BASE} | outer(k=5, lr=0.7, momentum=0.5)",
    "ema": f"{BASE} | ema(0.95)",
    "lawa": f"{BASE} | lawa(k=5, n=10)",
    "tail_average": f"{BASE} | tail_average(start=50)",
    "sgd": "sgd(lr=0.3, momentum=0.9)",
    "adam": "adam(lr=0.03)",
    "adamw": "adamw(lr=0.03)",
    "adamax": "adamax(lr=0.03)",
    "nadam": "nadam(lr=0.03)",
    "radam": "radam(lr=0.03)",
    "rmsprop": "rmsprop(lr=0.01)",
    "adagrad": "adagrad(lr=0.3)",
    "adadelta": "adadelta(lr=5.0)",
    "adafactor": "adafactor(lr=0.05)",
    "asgd": "asgd(lr=1.0)",
    "muon": "muon(lr=0.05)",
    "sparse_adam": "sparse_adam(lr=0.05)",
    "rprop": "rprop(lr=0.01)",
    "lbfgs": "lbfgs(lr=0.1, max_iter=3)",
    "partition": "partition({'*weight & matrix': muon(lr=0.05), '*': adamw(lr=0.03)})",
    "magma": "adamw(lr=0.03) | magma",
    "mechanic": "adamw(lr=1.0) | mechanic(s_init=0.001)",
    "schedule_free": "adamw(lr=0.05, betas=(0.0, 0.999)) | schedule_free(0.9)",
    "trust_ratio": "adamw(lr=0.03) | trust_ratio",
    "hyperball": "adamw(lr=0.02) | hyperball",
    "update_floor": "adamw(lr=0.003) | update_floor(0.3)",
    "cautious": "adamw(lr=0.03) | cautious",
    "cautious_decay": "adamw(lr=0.03, weight_decay=0.0) | cautious_decay(0.1)",
    "mars": "mars | adamw(lr=0.03)",
    "decay": "decay(0.1) | adamw(lr=0.03, weight_decay=0.0)",
}
SPIKED = {"clip_grad_norm", "clip_grad_value", "zclip", "adaptive_grad_clip", "clip_update_norm", "clip_update_rms"}
SCHEDULES = {
    "constant": "constant(0.1)",
    "cosine": "cosine(0.1)",
    "cosine_restarts": "cosine_restarts(0.1, first=100, mult=2)",
    "cyclic": "cyclic(0.01, 0.1, up=100)",
    "exponential": "exponential(0.1, 0.995)",
    "inverse_sqrt": "inverse_sqrt(0.1, 100)",
    "linear": "linear(0.1, 0.0)",
    "noam": "noam(512, 100)",
    "one_cycle": "one_cycle(0.1)",
    "polynomial": "polynomial(0.1, power=2.0)",
    "sequence": "sequence(linear(0.0, 0.1), 0.1, 0.1, 0.4, cosine(0.1))",
    "step_decay": "step_decay(0.1, 300)",
    "warmup": "warmup(cosine(0.1), 0.1)",
    "wsd": "wsd(0.1, warmup=0.1, decay=0.3)",
}


def spec_of(entry: Entry) -> str:
    """Return the stack that a page shows the part in."""
    if entry.name in SPECS:
        return SPECS[entry.name]
    stack = str(cases(entry.name)[0].subjects[0].text)
    return stack if entry.kind == "optimizer" else stack.replace("sgd(lr=0.1, momentum=0.9)", BASE)


def base_of(entry: Entry) -> str:
    """Return the same stack without the part."""
    parts = [text for text in spec_of(entry).split(" | ") if text.partition("(")[0] != entry.name]
    return " | ".join(parts)


def problem_for(entry: Entry) -> runs.Regression:
    """Return the regression that suits the part."""
    example = registry.examples(entry.name)[0]
    return runs.Regression(
        sparse=example.gradients == "sparse", bias=example.parameters != "matrices", spikes=entry.name in SPIKED
    )


def training(entry: Entry, run: runs.Run) -> str:
    """Return the error over the updates: with the part, without it, and on its average."""
    problem = problem_for(entry)
    lines = {f"with {entry.name}" if entry.kind == "wrapper" else entry.name: run.losses}
    if entry.kind == "wrapper":
        lines = {"without": runs.train(problem, base_of(entry)).losses, **lines}
    elif entry.name != "sgd" and not problem.sparse:
        lines = {"sgd": runs.train(problem, "sgd(lr=0.3)").losses, **lines}
    lines |= {f"average of {label}": points for label, points in run.averages.items()}
    return plot.chart(lines, x="updates", y="error", log=True)


def caption(entry: Entry) -> str:
    """Return what the picture shows."""
    problem = problem_for(entry)
    what = "an embedding learns a table" if problem.sparse else "a linear layer learns a linear map"
    spikes = f", and every {runs.SPIKES}th batch has targets that are far off" if problem.spikes else ""
    return (
        f"The mean squared error of `{spec_of(entry)}` while {what} from batches of eight noisy examples{spikes}; a "
        f"run of {runs.UPDATES} updates, made when this page was built. It shows what the part does, not which part "
        "is better: no rate was tuned."
    )


def schedule_text(entry: Entry) -> str:
    """Return the schedule that a page shows."""
    return SCHEDULES.get(entry.name) or str(cases(entry.name)[0].subjects[0].text)


def schedule(entry: Entry, updates: int = 1000) -> str:
    """Return the curve of a schedule."""
    text = schedule_text(entry)
    curve = parse_schedule(text).curve(updates, updates)
    return plot.chart({text: [(t, curve(t)) for t in range(0, updates + 1, 5)]}, x="updates", y="value")


def problem(entry: Entry, updates: int = 24) -> list[str]:
    """Return the validation loss of two stacks on a problem, and what was drawn."""
    import metaopt

    specs = ("sgd(lr=0.001, momentum=0.9)", "adamw(lr=0.01)")
    lines: dict[str, Any] = {}
    for spec in specs:
        made = entry.target()
        model = made.model(0)
        stack = metaopt.build(list(model.named_parameters()), spec)
        lines[spec] = points = [(0.0, made.evaluate(model)["loss"])]
        for number, batch in zip(range(1, updates + 1), made.batches(0), strict=False):
            stack.zero_grad()
            made.loss(model, batch).backward()
            stack.step()
            if number % 4 == 0:
                points.append((float(number), made.evaluate(model)["loss"]))
    picture = plot.chart(lines, x="updates", y="validation loss", log=True)
    return [picture, f"The first {updates} updates with two stacks, made when this page was built; no rate was tuned."]
