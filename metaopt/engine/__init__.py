"""The engine: what a stack does between `step()` and the weights. See docs/architecture.md."""
