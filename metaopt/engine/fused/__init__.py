"""torch's fused updates, called directly, without the base's `step()`."""
