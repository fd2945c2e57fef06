"""`python -m benchmarks [NAME…] [--quick] [--strict] [--results DIR]`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import HEADER, Result, row, write

HOMES = {
    "pgd_ce": "benchmarks.pgd_ce",
    "ask_cosine": "benchmarks.ask_cosine",
    "ask_l2": "benchmarks.ask_l2",
    "objectives": "benchmarks.objectives",
    "training": "benchmarks.training",
    "refresh": "benchmarks.refresh",
    "search": "benchmarks.search",
    "long_features": "benchmarks.long_features",
    "guides": "benchmarks.guides",
    "smoothing": "benchmarks.smoothing",
    "import": "benchmarks.import_time",
    "memory": "benchmarks.memory",
    "certificates": "benchmarks.certificates",
}
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks, print their table, write a JSON file each; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Costs beside bare torch, as ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(HOMES)}; all when left out")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; no bound holds")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a bound is missed")
    parser.add_argument(
        "--results", type=Path, help="where to write NAME.json; a quick run writes only when told where"
    )
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in HOMES:
            parser.error(f"there is no benchmark {name!r}; choose from {', '.join(HOMES)}.")
    folder = args.results or (None if args.quick else RESULTS)
    print("\n".join(HEADER), flush=True)
    met = True
    for name in args.names or HOMES:
        result: Result = importlib.import_module(HOMES[name]).run(args.quick)
        for figure in result.figures:
            print(row(name, figure), flush=True)
        met = met and result.met
        if folder is not None:
            write(folder / f"{name}.json", name, result, args.quick)
    return 1 if args.strict and not met else 0


if __name__ == "__main__":
    sys.exit(main())
