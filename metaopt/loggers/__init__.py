"""Where measurements go: one logger per file; the folder is the list."""
