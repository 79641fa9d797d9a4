"""From a pipeline and parameters to a stack: groups, bases, wrappers, the order of a run."""
