"""What wrappers see of a run: groups as aligned lists of local tensors."""
