"""Runs whose outcome is known, for the tests of what is made of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, registry
from robustknn.evaluation import Cell, Options, RunDirectory, evaluate, finish
from robustknn.evaluation.rundir import CLEAN

EPS = 0.25


PUBLISHED = {"published_attack": {"name": "pgd-transfer"}}


def make_run(
    path: Path,
    fooled: Mapping[str, Sequence[int]],
    *,
    n: int = 10,
    wrong: Sequence[int] = (9,),
    transfer: Sequence[str] = (),
    tensors: Mapping[str, dict[str, Tensor]] | None = None,
    credibility: float | None = None,
    tied: Sequence[int] = (),
    classifier: str = "victim",
    columns: Mapping[str, dict[str, Any]] | None = None,
    **plan: Any,
) -> RunDirectory:
    """A run of one classifier in which `fooled` says, for each attack, which samples it fools.

    Sample i is of class i mod 3; who is wrong or fooled is taken for the next class. `tied` under attack are taken for
    it too, but by the tie rule alone, which is no win of the attack.
    """
    label = np.arange(n) % 3
    clean = ~np.isin(np.arange(n), wrong)
    cells = [Cell(classifier, CLEAN), *(Cell(classifier, a, EPS) for a in fooled)]
    voters = plan.pop("voters", [])
    environment = {"command": plan.pop("command", "evaluate"), "device": "cpu", "versions": {}}
    run = RunDirectory(path)
    run.open(
        {"data": "d" * 64},
        {
            "cells": [c.to_config() for c in cells],
            "classifier_names": [classifier],
            "attack_names": list(fooled),
            "classifiers": {classifier: {"type": "KNN", "model": "Net", "n_classes": 3, "voters": voters} | PUBLISHED},
            "attacks": {a: {"name": "pgd", "steps": 7, "transfer": a in transfer, "role": ""} for a in fooled},
            "threat": {"norm": "linf", "eps": EPS, "bounds": [0.0, 1.0], "l1_fraction": 0.01},
            "eps": [EPS],
            "samples": n,
            "scored": {classifier: n},
            "seed": 5,
            "examples": n,
            "controls": 0,
            "class_names": None,
            "describe": {},
        }
        | plan,
        environment,
    )
    for cell in cells:
        lost = np.isin(np.arange(n), [*wrong, *fooled.get(cell.attack, ())])
        row: dict[str, Any] = {"sample_id": np.arange(n) + 100, "label": label, "correct": ~lost}
        even = np.isin(np.arange(n), tied if cell.attack != CLEAN else ())
        row |= {"prediction": np.where(lost | even, (label + 1) % 3, label)}
        row |= {"margin": np.where(even, 0.0, np.where(lost, -0.5, 0.5))}
        if credibility is not None:
            row["credibility"] = np.where(lost, credibility, 1.0)
        if cell.attack != CLEAN:
            row |= {"clean_correct": clean, "success": lost, "robust": clean & ~lost}
            row |= {"l2": np.full(n, 0.75), "linf": np.full(n, 0.25), "zero_gradient": np.zeros(n, dtype=bool)}
            row |= {"gradient_passes": np.full(n, 7), "forward_passes": np.full(n, 2)}
        row |= (columns or {}).get(cell.attack, {})
        run.write(cell, torch.arange(n), row, (tensors or {}).get(cell.attack, {}), 1.25)
    finish(run)
    return run


def shown_run(path: Path, images: bool = True, **plan: Any) -> RunDirectory:
    """Four 8 × 8 images, two of them fooled, over 6 references of one layer, k = 3."""
    x = torch.linspace(0.3, 0.6, 4)[:, None, None, None].expand(4, 1, 8, 8).contiguous()
    moved = x.clone()
    moved[:, :, 0] += EPS
    moved[3] = x[3]
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, -1], [2, 1, 0]])
    labels = torch.tensor([[0, 0, 1], [1, 1, 2], [2, 0, 0], [0, 0, 0]])
    base = {"position": torch.arange(4), "ids 0": ids, "labels 0": labels, "distances 0": ids.float() + 0.5}
    attacked = base | {"x": moved, "labels 0": labels.roll(1, dims=1)}
    run = make_run(
        path,
        {"a": [1, 2]},
        n=4,
        wrong=[],
        tensors={CLEAN: base | {"x": x}, "a": attacked},
        voters=[
            {
                "layer": "fc",
                "n_neighbors": 3,
                "metric": "l2",
                "references": 6,
                "dim": 2,
                "index": "E",
                "exact": True,
                "bank": 0,
            }
        ],
        **plan,
    )
    if images:
        kept = torch.arange(6)[:, None, None, None].expand(6, 1, 8, 8) / 5
        gallery = {"ids 0": torch.arange(6), "labels 0": torch.zeros(6, dtype=torch.int64), "images 0": kept}
        run.write_gallery(gallery)
    return run


def network(shape: tuple[int, ...], n_classes: int) -> nn.Module:
    torch.manual_seed(0)
    d = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(d, 16), nn.ReLU(), nn.Linear(16, n_classes)).eval()


def real_run(out: Path, shape: tuple[int, ...], n_classes: int = 3, **given: Any) -> RunDirectory:
    g = torch.Generator().manual_seed(1)
    n = 2 * n_classes + 6
    x, y = torch.rand(n, *shape, generator=g), torch.arange(n) % n_classes
    features = FeatureExtractor(network(shape, n_classes), ["1", "3"])
    references = ReferenceSet.build(features, (x, y), keep_images=given.pop("keep_images", True))
    classifiers: dict[str, Any] = {"knn": KNN(references, 3, layer="1")}
    if given.pop("dknn", False):
        classifiers["dknn"] = DkNN(references, 3).calibrate(
            torch.rand(9, *shape, generator=g), torch.arange(9) % n_classes
        )
    names = given.pop("attacks", ["ask"])
    attacks = {name: registry.attacks.create(name, steps=2) for name in names}
    options = Options(batch_size=32, controls=4, examples=given.pop("examples", 4))
    given = {"threat": ThreatModel("linf", 0.2)} | given
    samples = (torch.rand(6, *shape, generator=g), torch.arange(6) % n_classes)
    run = evaluate(classifiers, samples, attacks=attacks, out=out, options=options, **given)
    finish(run)
    return run


HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<svg onload=alert(1)>",
    "&lt;b&gt;",
    "&#60;script&#62;",
    "{{ 7*7 }}",
    "{% raw %}",
    "</style><style>*{display:none}",
    "<!-- ",
    "--><plaintext>",
    "]]>",
    "</title></head><body>",
    "javascript:alert(1)",
    '<a href="//evil">x</a>',
    "\u202egnp.exe",
    "\u2066a\u2069\u200fb",
    "a" + "\u0301" * 40,
    "x" * 10_000,
    "<b>" * 3_000,
    "$\\alpha$ $x^2",
    "two\nlines\tand a tab",
    "\x1b[31mred",
    "null\x00byte",
    "日本語クラス",
    "עברית",
    "👩\u200d🔬",
    "%s %(x)s {0} {x!r}",
    "<table><tr><td>",
    '<iframe srcdoc="<b>">',
    '<meta http-equiv="refresh" content=0>',
    "<base href=x>",
    "'\"`<>&\\",
    "../../etc",
]


HOSTILE_CLASSIFIER = "</title><script>'\"&</script>\u202e"


def can_be_a_folder(name: str) -> bool:
    return "\x00" not in name and ".." not in name and len(name.encode()) < 200


def hostile_run(path: Path) -> RunDirectory:
    """One run in which everything that has a name has hostile ones."""
    n = len(HOSTILE)
    x = torch.zeros(1, 5)
    tensors = {"position": torch.tensor([0]), "x": x}
    for place in range(n):  # voter i shows one reference, of class i
        tensors |= {f"ids {place}": torch.tensor([[0]]), f"distances {place}": torch.ones(1, 1)}
        tensors[f"labels {place}"] = torch.tensor([[place]])
    voters = [
        {"layer": h, "n_neighbors": 1, "metric": h, "references": 1, "dim": 5, "index": h, "exact": True, "bank": 0}
        for h in HOSTILE
    ]
    attacks = [h for h in HOSTILE if can_be_a_folder(h)]
    return make_run(
        path,
        {a: [0] for a in attacks},
        n=1,
        wrong=[],
        tensors={CLEAN: tensors} | dict.fromkeys(attacks, tensors),
        voters=voters,
        class_names=HOSTILE,
        describe={h: h for h in HOSTILE} | {"data": HOSTILE[0]},
        command=" ".join(HOSTILE),
        attacks={a: {"name": a, "transfer": False, "role": "", "nested": {a: a}} for a in attacks},
        classifier=HOSTILE_CLASSIFIER,
    )
