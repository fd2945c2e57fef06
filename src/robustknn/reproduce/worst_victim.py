"""The worst case of a classifier as it decides: one part, whatever the classifier and the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustknn import rng
from robustknn.attacks import Attack
from robustknn.classifiers import Classifier
from robustknn.datasets import Split
from robustknn.evaluation import Options, evaluate, finish
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import alone
from robustknn.reproduce.experiment import Part
from robustknn.threat import ThreatModel

_WORST = "worst-case"
_ATTACKED = "classifier"
"""What a classifier is called where its worst case is kept, which tables with other names for it share."""


def worst_part(
    bench: Bench,
    name: str,
    classifier: Callable[[], Classifier],
    split: Callable[[], Split],
    threat: ThreatModel,
    attack: Attack,
    n: int,
    folder: Path,
    seconds: float,
) -> Part:
    """The part that measures a worst case on a counted random choice of n samples.

    Args:
        folder: of this work alone.
        seconds: of one image on two cores.
    """

    def run(_: Path) -> dict[str, Any]:
        samples = split()
        places = rng.permutation(len(samples), bench.seed, "worst case")[:n].sort().values
        with alone(folder):
            done = evaluate(
                {_ATTACKED: classifier()},
                samples.subset(places),
                attacks={_WORST: attack},
                threat=threat,
                out=folder,
                options=Options(bench.seed, batch_size=50, examples=0, controls=0),
                progress=bench.progress,
            )
            finish(done)
            (cell,) = [cell for cell in done.cells if cell.attack == _WORST]
            robust = torch.from_numpy(done.rows(cell)["robust"])
        return {"n": len(robust), "right": int(robust.sum()), "flags": flags_of(robust)}

    whole = (folder / "summary.json").exists()
    return Part(f"worst case, {name}", 0.0 if whole else n * seconds, run)


def flags_of(right: Tensor) -> str:
    """Truths (n,) as a text of ones and zeros."""
    return "".join("1" if flag else "0" for flag in right.to(torch.bool).tolist())


def truths(flags: str) -> Tensor:
    """What `flags_of` made a text of, (n,) bool."""
    return torch.tensor([flag == "1" for flag in flags], dtype=torch.bool)
