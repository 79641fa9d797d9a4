"""One update from top to bottom: the closure, the gradients, the base, what acts behind it."""
