"""Suites: problems that are compared on together."""

from collections.abc import Sequence

from metaopt import hookimpl

# they need no download, and differ in kind: what is learned, from how much, by which layers
SMALL = (
    "xor",
    "digits",
    "digits_batch_norm",
    "digits_vit",
    "digits_autoencoder",
    "charlm(layers=1)",
    "recall",
    "modular_addition",
    "factorisation",
    "heat",
)


@hookimpl
def metaopt_suites() -> dict[str, Sequence[str]]:
    return {"small": SMALL}
