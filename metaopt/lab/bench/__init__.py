"""Measuring what an update costs: time, bytes and memory, side by side with what people write by hand."""
