"""The built-in problems, one family per file; the folder is the list."""
