"""Is AdamW better with Lookahead, an outer optimizer or an average around it, on a small transformer?

An hour on two cores: ten studies for each contender, each a tuning of its own over five learning rates.
`--short` trains for seconds and can show nothing; it proves that the script runs.
"""

import sys

from metaopt.cli import main

ADAMW = "adamw(weight_decay=0.1)"
CONTENDERS = (
    ADAMW,
    f"{ADAMW} | lookahead(k=5)",
    f"{ADAMW} | outer(k=28, lr=0.7, momentum=0.6)",
    f"{ADAMW} | ema(0.99, warmup=True)",
)
# 140 updates are whole cycles of 5 and of 28: slow weights are not caught between two pulls
FULL = "--steps 140 --studies 10 --trials 5 --lr-min 1e-3 --lr-max 0.1"
SHORT = "--steps 2 --studies 2 --trials 1 --lr-min 1e-2 --lr-max 1e-2"

arguments = ["compare", "--problem", "charlm", "--out", "runs/compare_charlm"]
arguments += (SHORT if "--short" in sys.argv else FULL).split()
for spec in CONTENDERS:
    arguments += ["-o", spec]

if __name__ == "__main__":  # the workers import this file
    main(arguments)
