"""The state of a parameter: first update, placeholders, what a wrapper resets, and what a scratch base would make."""
