"""The built-in schedules, one family per file; the folder is the list."""
