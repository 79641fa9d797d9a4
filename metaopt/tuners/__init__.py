"""The built-in ways to search, one idea per file; the folder is the list."""
