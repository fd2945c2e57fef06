"""Run an evaluation, kill it with SIGKILL at random moments, let it go on, and compare what it leaves.

A program of its own (`python tests/kill_driver.py FOLDER KILLS SEED`): it prepares everything once in a process
without threads and forks a child for every attempt, so that a kill can fall anywhere in the work. Prints one JSON
object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from small import digits, digits_references

from robustknn import DkNN, ThreatModel
from robustknn.attacks import PGD
from robustknn.errors import RobustKNNError
from robustknn.evaluation import Options, RunDirectory, evaluate, finish
from robustknn.recipes import pgd_transfer

torch.set_num_threads(1)


def left_behind(folder: Path) -> dict[str, str]:
    """sha256 of every result file: all but clock times and the summary that holds some."""
    import hashlib

    skipped = {"environment.json", "summary.json"}
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".time" and p.name not in skipped]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def figures(folder: Path) -> Any:
    """The summary without its seconds."""
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("sha256")
    summary.pop("environment")
    for classifier in summary["classifiers"]:
        for attack in classifier["attacks"]:
            attack.pop("seconds")
    return summary


class Victim:
    """Everything a run needs, made once."""

    def __init__(self) -> None:
        source, model = digits(epochs=3)
        assert source.calibration is not None
        self.samples = source.test.first(30)
        self.classifier = DkNN(digits_references(source, model), 15).calibrate(source.calibration)

    def run(self, out: Path) -> None:
        attacks = {"ask": PGD(steps=4, check_every=2), "transfer": pgd_transfer(steps=2)}
        options = Options(batch_size=5, examples=8, controls=10)
        threat = ThreatModel("linf", 0.1)
        finish(
            evaluate({"dknn": self.classifier}, self.samples, attacks=attacks, threat=threat, out=out, options=options)
        )


def attempt(victim: Victim, out: Path, after: float | None) -> int:
    """Run in a child, killed after so many seconds (None: left alone); the number of the signal it died of, or 0."""
    child = os.fork()
    if child == 0:
        try:
            victim.run(out)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return 0


def readable(out: Path) -> bool:
    """Whether what a killed run left can be read: whole batches or nothing."""
    if not (out / "run.json").exists():
        return True
    try:
        run = RunDirectory(out)
        for cell in run.cells:
            run.rows(cell)
            run.tensors(cell)
    except RobustKNNError:
        return False
    return True


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    victim, chance = Victim(), random.Random(seed)
    reference = folder / "reference"
    began = time.perf_counter()
    attempt(victim, reference, None)
    duration = time.perf_counter() - began
    expected, wanted = left_behind(reference), figures(reference)
    killed = completed = unreadable = different = 0
    while killed < kills:
        out = folder / f"run-{completed}"
        while True:
            # Half of the kills fall anywhere in the run, half early, where files appear most densely.
            after = chance.uniform(0, duration if chance.random() < 0.5 else duration / 4)
            died = attempt(victim, out, after if killed < kills else None)
            killed += died == signal.SIGKILL
            unreadable += not readable(out)
            if died == 0:
                break
        completed += 1
        different += left_behind(out) != expected or figures(out) != wanted
        shutil.rmtree(out)
    return {
        "kills": killed,
        "runs": completed,
        "unreadable": unreadable,
        "different": different,
        "files": len(expected),
        "seconds": round(duration, 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
