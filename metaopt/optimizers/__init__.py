"""The built-in optimizers, one family per file; the folder is the list."""
