"""`python -m benchmarks`: what an update costs here, beside what people write by hand; or the project's targets."""

import argparse
import json
import os
import sys
from pathlib import Path

# the profiler reports its own start and stop, and every tensor that is older than it, on standard error
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from benchmarks import report
from benchmarks.plan import Found, plan_bench, run_bench
from benchmarks.targets import TARGETS, WHOLE
from metaopt.errors import MetaoptError
from metaopt.lab.shapes import SETS
from metaopt.lab.whole_file import check_writable, write_whole

DTYPES = ("float32", "float64", "float16", "bfloat16")


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options; exit with status 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("specs", nargs="*", metavar="SPEC", default=[WHOLE], help="the stacks to measure")
    parser.add_argument("--shapes", default="", metavar="SET,...", help=", ".join(SETS))
    parser.add_argument("--rounds", type=_positive, default=20, help="interleaved; fewer than 20 are a rough look")
    parser.add_argument("--baseline", help="what ratios are taken to: a contender's key or text; default torch-fused")
    parser.add_argument("--targets", action="store_true", help="check the project's own targets instead")
    parser.add_argument("--only", default="", metavar="TARGET,...", help=f"with --targets: {', '.join(TARGETS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=_positive, help="of torch; its own choice by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure, print and write; return the exit status: 1 if a target is missed, 2 for a mistake."""
    options = read_arguments(arguments)
    try:
        plan = plan_bench(
            specs=options.specs,
            shapes=_items(options.shapes),
            rounds=options.rounds,
            baseline=options.baseline,
            targets=options.targets,
            only=_items(options.only),
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
        )
        if options.json is not None:
            check_writable(options.json)  # before minutes are spent
        found = run_bench(plan, _progress if sys.stderr.isatty() else None)
        show(found)
        if options.json is not None:
            write_whole(options.json, json.dumps(found.document(), indent=1) + "\n")
    except MetaoptError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return int(any(verdict.met is False for verdict in found.verdicts))


def show(found: Found) -> None:
    """Print every table as Markdown."""
    print(found.heading())
    for heading, table in found.tables():
        print(f"\n{heading}\n\n{report.markdown(table)}")
    print()
    for remark in found.remarks():
        print(f"- {remark}")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _progress(what: str) -> None:
    print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
