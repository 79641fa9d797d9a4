"""The built-in search spaces, one family per file; the folder is the list."""
