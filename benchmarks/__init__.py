"""What this project measures of itself: its updates beside what people write by hand, its targets, its last version.

Run from the checkout: `python -m benchmarks`, `python -m benchmarks --targets`, `python -m benchmarks.against OLD`.
"""
