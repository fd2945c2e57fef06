"""How large a report is and how fast it opens from a disk: `python -m benchmarks.report_page [--n 1000] [--out FILE]`.

It needs Chromium and playwright (`pip install '.[dev]'`). Wall time, since a browser is several processes.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import chromium
from benchmarks.record import HEADER, Figure, Result, row, write
from robustknn import KNN, DkNN, FeatureExtractor, Options, ReferenceSet, ThreatModel, evaluate, finish, write_report

MEGABYTES, SECONDS = 5.0, 2.0
EXAMPLES = 300
ATTACKS = ("fgsm-transfer", "pgd-transfer", "ask")
WHAT = (
    "The report of a kNN and a DkNN of two layers on random 32×32 color images, which no format makes smaller, under "
    "three attacks at two radii, with as many samples beside their neighbors as the page takes: its size, and the wall "
    "time from asking headless Chromium for the file to the end of the load event, scripts run; each time in a new "
    "profile. The page is written once."
)


def report(folder: Path, n: int) -> Path:
    """The page of n samples, of a network with random weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)
    ).eval()
    images, labels = torch.rand(10 * n, 3, 32, 32), torch.arange(10 * n) % 10
    references = ReferenceSet.build(FeatureExtractor(net, ["1", "3"]), (images, labels))
    classifiers = {"knn": KNN(references, 15, layer="3"), "dknn": DkNN(references, 15)}
    samples = (torch.rand(n, 3, 32, 32), torch.arange(n) % 10)
    run = evaluate(
        classifiers,
        samples,
        attacks=ATTACKS,
        threat=ThreatModel("linf", 8 / 255),
        eps=4 / 255,
        out=folder,
        options=Options(examples=EXAMPLES),
    )
    finish(run)
    return write_report(run, samples=EXAMPLES)


def opening(page: Path, repeats: int) -> list[float]:
    """Seconds from asking for the page until it is loaded, once for each new profile of one browser."""
    program = chromium.program()
    if program is None:
        raise SystemExit(f"{chromium.MISSING}.")
    found = []
    with chromium.launched(program) as browser:
        for _ in range(repeats):
            context = browser.new_context(viewport={"width": 1200, "height": 900})
            tab = context.new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="load")
            found.append(time.perf_counter() - start)
            context.close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write a JSON file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_page", description=WHAT)
    parser.add_argument("--n", type=int, default=1000, help="samples; ten times as many references")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where to write the JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        page = report(Path(folder) / "run", args.n)
        size, times = page.stat().st_size / 1e6, opening(page, args.repeats)
    figures = [
        Figure("size, MB", size, bound=MEGABYTES),
        Figure("opened, seconds", max(times), statistics.median(times), SECONDS, pairs=times),
    ]
    print("\n".join((*HEADER, *(row("report_page", figure) for figure in figures))))
    if args.out is not None:
        settings = {"samples": args.n, "references": 10 * args.n, "attacks": ATTACKS, "examples": EXAMPLES}
        command = "python -m benchmarks.report_page " + shlex.join(argv if argv is not None else sys.argv[1:])
        write(args.out, "report_page", Result(WHAT, args.repeats, figures, settings), False, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
