"""Updates without the base's `step()`: torch's fused kernels, called directly, or the optional library."""
