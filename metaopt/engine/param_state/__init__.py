"""The state of a parameter: its first update, placeholders for what is not made yet, and what a wrapper resets."""
