"""certify(): classifiers × certifiers, one row a sample, in whole batches that survive a kill.

A certificates' directory is a run directory whose cells are (classifier, certifier):

    run.json, environment.json           as of a run; kind "certificates"
    cells/CLASSIFIER/CERTIFIER/          rows of finished batches: decision, radius, upper
    attacked.json                        sealed: what attacks left of the same samples, where an evaluation was given
    summary.json, rows.parquet, report.html, figures/
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustknn import registry, store
from robustknn.certification import Certified, Certifier
from robustknn.checks import Bounds, check_inputs, check_labels, check_positive_int, check_whole
from robustknn.classifiers import Classifier
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.errors import InputError, IntegrityError
from robustknn.evaluation.given import (
    class_labels,
    classifiers_by_name,
    describe_classifier,
    excluded_positions,
    fingerprints,
    identity_of,
    parts_by_name,
    refuse_stale,
    samples_of,
)
from robustknn.evaluation.rundir import RunDirectory, check_name, environment
from robustknn.progress import Progress, Silent


@dataclass(frozen=True)
class CertificateCell:
    """The certificates of one classifier by one certifier."""

    classifier: str
    certifier: str

    @property
    def folder(self) -> str:
        """Its folder under `cells/`."""
        return f"{self.classifier}/{self.certifier}"

    def to_config(self) -> dict[str, Any]:
        """As JSON."""
        return {"classifier": self.classifier, "certifier": self.certifier}


class CertificateDirectory(RunDirectory):
    """Reading and writing the certificates of one run."""

    kind: ClassVar[str] = "certificates"

    @property
    def certificates(self) -> list[CertificateCell]:
        """What is certified, in order."""
        return [CertificateCell(**c) for c in self.header["plan"]["cells"]]

    def rows(self, cell: Any) -> dict[str, NDArray[Any]]:
        """All rows of a cell as columns, in order of position; an `upper` or `radius` without end is ∞."""
        columns = super().rows(cell)
        return {k: np.nan_to_num(v, nan=np.inf) if k in ("radius", "upper") else v for k, v in columns.items()}

    def about(self, cell: CertificateCell) -> dict[str, Any]:
        """`unit` and `assumptions` of a cell's certificates.

        Raises:
            IntegrityError: batches that say different things, or none.
        """
        said = [content.get("about") for _, content in self.batches(cell)]
        if not said or not isinstance(said[0], dict) or any(other != said[0] for other in said):
            raise IntegrityError(f"the certificates in {cell.folder!r} of {str(self.path)!r} do not say one thing.")
        return said[0]

    def positions(self, classifier: str) -> Tensor:
        """The samples a classifier is scored on, (n,) positions."""
        left_out = self.header["plan"]["excluded"].get(classifier, [])
        return torch.tensor([p for p in range(self.header["plan"]["samples"]) if p not in set(left_out)])


def holds_certificates(path: str | Path) -> bool:
    """Whether a folder holds certificates, not attacks."""
    file = Path(path) / "run.json"
    return file.is_file() and store.read_sealed(file).get("kind") == CertificateDirectory.kind


def certify(
    classifiers: Classifier | Mapping[str, Classifier],
    data: Split | tuple[Any, Any],
    *,
    certifiers: str | Sequence[str | Certifier] | Mapping[str, Certifier],
    out: str | Path,
    bounds: Bounds | None = (0.0, 1.0),
    seed: int = 0,
    batch_size: int = 100,
    exclude: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    describe: Mapping[str, Any] | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> CertificateDirectory:
    """Certify decisions and write one row for every sample.

    A run that was stopped at any moment goes on when it is called again with the same arguments, and ends with the same
    files. `robustknn.evaluation.finish_certificates` then writes the summary.

    Args:
        classifiers: one, or several by name.
        data: the samples: a split or (x, y), with labels as in `classifier.score`.
        certifiers: names (`robustknn list certifiers`), certifiers, or certifiers by name.
        out: the folder, new or to be continued.
        bounds: the least and greatest value of an input, None for any.
        seed: of all randomness.
        batch_size: samples worked on at once, and rows in a file; it changes memory and time, not results.
        exclude: for a classifier, positions of samples not to score it on (those it was calibrated with).
        class_names, describe, command: for the record.
        progress: where to report.

    Raises:
        InputError: bad data or names, or a certificate that does not hold for a classifier, before anything is written.
        ResumeError: the folder holds a run made with something else, named in the sentence.
    """
    check_whole(seed, "seed")
    check_positive_int(batch_size, "batch_size")
    named = classifiers_by_name(classifiers)
    ways = parts_by_name(certifiers, Certifier, registry.certifiers)
    if not ways:
        raise InputError("there is nothing to certify by; name a certifier, robustknn list certifiers shows them.")
    classes = class_labels(named)
    samples = samples_of(data, classes)
    excluded = excluded_positions(exclude or {}, named, len(samples))
    _check(named, ways, samples, excluded)
    if class_names is None and classes is not None:
        class_names = classes.tolist()
    banks = list(dict.fromkeys(held for c in named.values() for held in c.reference_sets))
    plan = {
        "cells": [CertificateCell(c, w).to_config() for c in named for w in ways],
        "classifier_names": list(named),
        "certifier_names": list(ways),
        "classifiers": {name: describe_classifier(c, banks) for name, c in named.items()},
        "certifiers": {name: to_config(w, registry.certifiers) for name, w in ways.items()},
        "certified": {name: w.of for name, w in ways.items()},
        "samples": len(samples),
        "excluded": {name: sorted(places.tolist()) for name, places in excluded.items()},
        "seed": seed,
        "class_names": [str(n) for n in class_names] if class_names else None,
        "describe": dict(describe or {}),
        "fingerprints": fingerprints(named),
    }
    run = CertificateDirectory(out)
    extractor = next(iter(named.values())).extractor
    device = "cpu" if extractor is None else str(extractor.device)
    run.open(identity_of(named, samples, bounds, plan), plan, environment(command, device))
    _work(run, named, ways, samples, bounds, batch_size, progress or Silent())
    return run


def _check(
    named: Mapping[str, Classifier], ways: Mapping[str, Certifier], samples: Split, excluded: Mapping[str, Tensor]
) -> None:
    """Refuse at the entrance what would fail later."""
    for names in (named, ways):
        if len({name.lower() for name in names}) < len(names):
            raise InputError(f"the names {', '.join(names)} differ in case alone; folders may not, rename one.")
    for name, classifier in named.items():
        check_name(name, "classifier")
        for bank in classifier.reference_sets:
            refuse_stale(bank)
        check_labels(samples.labels, None, classifier.n_classes, f"the labels (classifier {name!r})")
        if len(samples) <= len(excluded.get(name, ())):
            raise InputError(f"every sample is excluded for classifier {name!r}; pass more samples.")
        for way in ways.values():
            way.check(classifier)


def _work(
    run: CertificateDirectory,
    named: Mapping[str, Classifier],
    ways: Mapping[str, Certifier],
    samples: Split,
    bounds: Bounds | None,
    batch_size: int,
    progress: Progress,
) -> None:
    """Do what has no row yet, batch by batch."""
    todo = []
    for cell in run.certificates:
        wanted, done = run.positions(cell.classifier), set(run.done(cell))
        left = wanted[[int(p) not in done for p in wanted]]
        todo += [(cell, rows) for rows in left.split(batch_size)] if len(left) else []
    progress.start("certifying", sum(len(rows) for _, rows in todo))
    try:
        for cell, rows in todo:
            began = time.perf_counter()
            x = check_inputs(samples.batch(rows), bounds, "the data")
            found = ways[cell.certifier](named[cell.classifier], x, samples.ids[rows], int(run.header["plan"]["seed"]))
            columns = {"sample_id": samples.ids[rows], "label": samples.labels[rows], **_columns(found)}
            about = {"unit": found.unit, "assumptions": list(found.assumptions)}
            run.write(cell, rows, columns, {}, time.perf_counter() - began, about)
            progress.advance(len(rows))
    finally:
        progress.stop()


def _columns(found: Certified) -> dict[str, Any]:
    columns = {"decision": found.labels.cpu(), "radius": found.radius.cpu().double()}
    return columns if found.upper is None else {**columns, "upper": found.upper.cpu().double()}
