"""Loading a checkpoint, whole or not at all: what is matched, validated, taken and reported; and resets after it."""
