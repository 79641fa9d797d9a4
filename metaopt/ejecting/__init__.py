"""A stack as one file without metaopt."""
