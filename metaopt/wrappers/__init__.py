"""The built-in wrappers, one per file; the folder is the list."""
