"""Certificates on disk: what `robustknn certify` leaves, how it goes on, what stands beside attacks, how it refuses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from command import refuse, results, succeed
from small import random_classifier
from torch import Tensor

from robustknn import InputError, IntegrityError, Options, ResumeError, evaluate, registry
from robustknn.certification import Certified, Certifier, PoisoningInsert, PoisoningModify, Smoothing
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.evaluation import (
    CertificateDirectory,
    RunDirectory,
    attach,
    certify,
    finish_certificates,
    holds_certificates,
)
from robustknn.evaluation.certificates import CertificateCell
from robustknn.evaluation.certified import round_radii
from robustknn.evaluation.metrics import wilson
from robustknn.progress import Progress
from robustknn.reports import write_certificates
from robustknn.threat import ThreatModel

POISON = ("--certifier", "poisoning-modify", "--certifier", "poisoning-insert")


@registry.certifiers.register("stated")
@dataclass(frozen=True)
class Stated(Certifier):
    """A radius that somebody states, right or wrong."""

    name: ClassVar[str] = "stated"
    unit: ClassVar[str] = "L-infinity of the input"
    radius: float = 0.0
    upper: float | None = None
    stops_after: int = 10**6
    endless: bool = False
    calls: ClassVar[list[int]] = []

    def check(self, classifier: Classifier) -> None:
        if not isinstance(classifier, VoterClassifier):
            raise InputError("'stated' needs voters.")

    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        if len(self.calls) >= self.stops_after:
            raise KeyboardInterrupt
        self.calls.append(len(x))
        radius = torch.full((len(x),), self.radius, dtype=torch.float64)
        upper = None if self.upper is None else torch.full((len(x),), self.upper, dtype=torch.float64)
        if self.endless:
            radius = upper = torch.full_like(radius, math.inf)
        return Certified(classifier.labels(x), radius, self.unit, ("Somebody said so.",), upper)


@registry.certifiers.register("stated-in-l2")
@dataclass(frozen=True)
class StatedInL2(Stated):
    """The same, measured otherwise."""

    name: ClassVar[str] = "stated-in-l2"
    unit: ClassVar[str] = "L2 of the input"


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    Stated.calls.clear()


# ------------------------------------------------------------------------------------------------- in the library


def victim() -> tuple[Any, Tensor, Tensor]:
    dknn, x, _ = random_classifier(k=7)
    sides = dknn.predict(x).clone()
    sides[:3] = (sides[:3] + 1) % 4  # three that are wrong
    return dknn, x, sides


def test_rows_and_summary_say_what_the_certifier_says(tmp_path: Path) -> None:
    dknn, x, y = victim()
    ways = {"modify": PoisoningModify(), "insert": PoisoningInsert()}
    run = certify({"dknn": dknn}, (x, y), certifiers=ways, out=tmp_path / "run", batch_size=5)
    summary = finish_certificates(run, [0, 1, 2])
    (classifier,) = summary.classifiers
    for (name, way), found in zip(ways.items(), classifier.certificates, strict=True):
        certified = way(dknn, x)
        rows = run.rows(CertificateCell("dknn", name))
        assert rows["radius"].tolist() == certified.radius.tolist()
        assert rows["decision"].tolist() == certified.labels.tolist()
        assert rows["label"].tolist() == y.tolist()
        assert (found.unit, tuple(found.assumptions)) == (certified.unit, certified.assumptions)
        assert found.clean_accuracy == 9 / 12
        right = certified.labels == y
        for point, radius in zip(found.curve, (0, 1, 2), strict=True):
            held = int((right & (certified.radius >= radius)).sum())
            assert point.certified_accuracy == held / 12
            assert point.certified_accuracy_interval == wilson(held, 12)
        assert found.uncertified == float((certified.radius < 0).double().mean())
        assert found.attacked == []
    assert not classifier.certificates[0].bounded  # several layers: no upper bound is known
    assert (tmp_path / "run" / "rows.parquet").stat().st_size > 100
    assert holds_certificates(tmp_path / "run")


def test_a_stopped_run_ends_with_the_same_rows(tmp_path: Path) -> None:
    dknn, x, y = victim()
    whole = certify(dknn, (x, y), certifiers={"s": Stated(0.5)}, out=tmp_path / "whole", batch_size=12)
    Stated.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        certify(dknn, (x, y), certifiers={"s": Stated(0.5, stops_after=2)}, out=tmp_path / "again", batch_size=4)
    stopped = CertificateDirectory(tmp_path / "again")
    with pytest.raises(IntegrityError, match="rows for 8 of 12 samples; run the same command again"):
        finish_certificates(stopped)
    with pytest.raises(ResumeError, match="another config"):
        certify(dknn, (x, y), certifiers={"s": Stated(0.7, stops_after=2)}, out=tmp_path / "again")
    Stated.calls.clear()
    going_on = {"s": Stated(0.5, stops_after=2)}
    run = certify(dknn, (x, y), certifiers=going_on, out=tmp_path / "again", batch_size=3)
    assert Stated.calls == [3, 1]
    for name, column in whole.rows(CertificateCell("knn", "s")).items():
        assert column.tolist() == run.rows(CertificateCell("knn", "s"))[name].tolist()


def test_radii_without_end_and_upper_bounds(tmp_path: Path) -> None:
    dknn, x, y = victim()
    ways = {"far": Stated(endless=True), "near": Stated(0.25, 0.5)}
    run = certify({"dknn": dknn}, (x, y), certifiers=ways, out=tmp_path)
    summary = finish_certificates(run, [0, 0.25, 0.3, 0.5])
    far, near = summary.classifiers[0].certificates
    assert [p.certified_accuracy for p in far.curve] == [0.75] * 4
    assert far.median_radius is None
    assert [p.certified_accuracy for p in near.curve] == [0.75, 0.75, 0, 0]
    assert [p.upper_accuracy for p in near.curve] == [0.75, 0.75, 0.75, 0]
    assert near.bounded
    page = write_certificates(run).read_text(encoding="utf-8")
    assert "at most, %" in page
    assert "broken above this line" in (tmp_path / "figures" / "certified-1-dknn-1.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("radii", "expected"),
    [
        ([-1, 0, 0], [0]),
        ([1, 3], [0, 1, 2, 3]),
        ([7], [0, 1, 2, 5, 7]),
        ([100, 4], [0, 1, 2, 5, 10, 20, 50, 100]),
        ([0.37, 0.1], [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
        ([0.1, math.inf], [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
    ],
)
def test_round_radii(radii: list[float], expected: list[float]) -> None:
    assert round_radii(np.array(radii, dtype=np.float64)) == expected


def attacked_run(dknn: Any, x: Tensor, y: Tensor, out: Path, norm: str = "linf", **options: Any) -> RunDirectory:
    return evaluate(
        {"dknn": dknn},
        (x, y),
        attacks=["ask"],
        threat=ThreatModel(norm, 0.3),
        eps=[0.05],
        out=out,
        options=Options(controls=0, examples=0, **options),
    )


def test_beside_attacks_a_wrong_certificate_is_found_out(tmp_path: Path) -> None:
    dknn, x, y = victim()
    attacked = attacked_run(dknn, x, y, tmp_path / "attacked")
    robust = {c.eps: attacked.rows(c)["robust"] for c in attacked.cells if c.attack == "ask"}
    assert not robust[0.3].all()
    ways = {"true": Stated(0.0), "false": Stated(0.3), "poison": PoisoningModify()}
    run = certify({"dknn": dknn}, (x, y), certifiers=ways, out=tmp_path / "run")
    attach(run, attacked)
    summary = finish_certificates(run)
    true, false, poison = summary.classifiers[0].certificates
    assert poison.attacked == []  # another unit
    for points, violated in ((true.attacked, False), (false.attacked, True)):
        assert {p.eps for p in points} == {0.05, 0.3}
        for p in points:
            assert p.robust_accuracy == robust[p.eps].mean()
            held = (dknn.predict(x) == y).numpy() & violated
            assert p.certified_accuracy == held.mean()
            assert p.violations == int((held & ~robust[p.eps].astype(bool)).sum())
    assert sum(p.violations for p in false.attacked) > 0
    page = write_certificates(run).read_text(encoding="utf-8")
    assert "fooled inside the radius" in page
    drawn = (tmp_path / "run" / "figures" / "certified-1-dknn-1.svg").read_text(encoding="utf-8")
    assert "attacked: ask" in drawn
    assert "attacked" not in (tmp_path / "run" / "figures" / "certified-1-dknn-2.svg").read_text(encoding="utf-8")


def test_attacks_in_another_unit_stand_apart(tmp_path: Path) -> None:
    dknn, x, y = victim()
    attacked = attacked_run(dknn, x, y, tmp_path / "attacked")
    run = certify({"dknn": dknn}, (x, y), certifiers="poisoning-insert", out=tmp_path / "run")
    attach(run, attacked)
    assert finish_certificates(run).other_units == ["L-infinity of the input"]
    page = write_certificates(run).read_text(encoding="utf-8")
    assert "they are not drawn beside each other" in page


def test_a_smoothed_decision_is_not_compared_with_attacks_on_another(tmp_path: Path) -> None:
    dknn, x, y = victim()
    attacked = attacked_run(dknn, x, y, tmp_path / "attacked", "l2")
    certifiers = {"smoothing": Smoothing(sigma=0.25, n0=4, n=20), "own": StatedInL2(1.0)}
    run = certify({"dknn": dknn}, (x, y), certifiers=certifiers, out=tmp_path / "run")
    attach(run, attacked)
    summary = finish_certificates(run)
    smoothed, own = summary.classifiers[0].certificates
    assert (smoothed.of, smoothed.unit, smoothed.attacked) == ("the smoothed classifier", own.unit, [])
    assert own.of == "the classifier"
    assert own.attacked
    assert summary.others == ["the smoothed classifier"]
    assert "not the classifier that was attacked" in write_certificates(run).read_text(encoding="utf-8")


def test_attacks_on_something_else_are_refused(tmp_path: Path) -> None:
    dknn, x, y = victim()
    run = certify({"dknn": dknn}, (x, y), certifiers="poisoning-insert", out=tmp_path / "run")
    with pytest.raises(InputError, match="is of other samples"):
        attach(run, attacked_run(dknn, x[:6], y[:6], tmp_path / "few"))
    other, _, _ = random_classifier(k=5)
    with pytest.raises(InputError, match="attacks none of the classifiers certified here"):
        attach(run, attacked_run(other, x, y, tmp_path / "other"))
    with pytest.raises(InputError, match="holds no run"):
        attach(run, tmp_path / "nothing")
    assert not (tmp_path / "run" / "attacked.json").exists()


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    dknn, x, y = victim()
    out = tmp_path / "run"
    for changes, why in (
        ({"certifiers": "no-such"}, "unknown certifier 'no-such'"),
        ({"certifiers": []}, "nothing to certify by"),
        ({"certifiers": [3]}, "certifiers must be a name, a list of names"),
        ({"certifiers": [Stated(), Stated(1.0)]}, "two certifiers are named 'stated'"),
        ({"certifiers": {"a": 3}}, "must be a Certifier"),
        ({"certifiers": {"a/b": Stated()}}, "cannot be used"),
        ({"certifiers": {"a": Stated(), "A": Stated()}}, "differ in case alone"),
        ({"batch_size": 0}, "batch_size"),
        ({"exclude": {"dknn": range(12)}}, "every sample is excluded"),
        ({"exclude": {"knn": [1]}}, "unknown classifier in exclude"),
    ):
        with pytest.raises(InputError, match=why):
            certify({"dknn": dknn}, (x, y), **{"certifiers": "stated", "out": out, **changes})
    assert not out.exists()
    run = certify({"dknn": dknn}, (x, y), certifiers="stated", out=out, exclude={"dknn": [0, 11]})
    assert run.rows(CertificateCell("dknn", "stated"))["position"].tolist() == list(range(1, 11))
    for radius in (-1, math.nan, math.inf, "1"):
        with pytest.raises(InputError, match="a radius must be a number"):
            finish_certificates(run, [radius])  # type: ignore[list-item]


def test_altered_files_are_refused(tmp_path: Path) -> None:
    dknn, x, y = victim()
    run = certify({"dknn": dknn}, (x, y), certifiers="stated", out=tmp_path / "run")
    finish_certificates(run)
    file = next((run.path / "cells").rglob("*.json"))
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.replace("0.0", "9.0", 1), encoding="utf-8")
    with pytest.raises(IntegrityError):
        finish_certificates(tmp_path / "run")
    file.write_text(whole, encoding="utf-8")
    with pytest.raises(IntegrityError, match="holds no run of schema"):
        _ = RunDirectory(run.path).header
    attacked = attacked_run(dknn, x, y, tmp_path / "attacked")
    with pytest.raises(IntegrityError, match="holds no run of schema"):
        _ = CertificateDirectory(attacked.path).header


# ------------------------------------------------------------------------------------------------ on the command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certify") / "model"
    succeed("train", "--epochs", 2, "--lr", 2e-3, "--batch-size", 64, "--out", folder)
    return folder


def flags(checkpoint: Path, *more: Any) -> list[Any]:
    return ["--checkpoint", checkpoint, "-n", 20, "--references-per-class", 20, "-k", 7, *more]


def test_the_command_certifies_shows_and_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    shared = flags(checkpoint, "-c", "knn", "-c", "dknn", *POISON, "--batch-size", 8, "--out", tmp_path / "run")
    said = succeed("certify", *shared)
    assert "fixed and trusted" in said
    assert "references modified" in said
    before = results(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_bytes()
    assert b"fixed and trusted" in page
    assert b"<script" not in page
    again = succeed("certify", *shared, "--radius", 3, "-r", 1)
    assert results(tmp_path / "run") == before
    assert again.splitlines()[-2].startswith("page: ")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["radii"] == [1, 3]
    page = (tmp_path / "run" / "report.html").read_bytes()
    succeed("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_bytes() == page
    (tmp_path / "run" / "summary.json").unlink()
    succeed("report", tmp_path / "run")


def test_the_command_draws_attacks_beside(checkpoint: Path, tmp_path: Path) -> None:
    attacks = ["-a", "pgd-transfer", "--attack-option", "steps=3", "-e", 0.2]
    options = ["--certifier", "stated", "--certifier-option", "radius=1"]
    said = succeed("certify", *flags(checkpoint, *options, *attacks, "--out", tmp_path / "run"))
    assert "pgd-transfer" in said
    assert "fooled inside their radius" in said
    named = tmp_path / "run" / "attacked"
    said = succeed("certify", *flags(checkpoint, *POISON, "--attacked", named, "--out", tmp_path / "other"))
    assert "L-infinity of the input" in said
    assert "pgd-transfer" not in said


def test_the_command_refuses(checkpoint: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert "poisoning-insert | poisoning-modify" in refuse("certify", *flags(checkpoint, *out))
    assert "did you mean" in refuse("certify", *flags(checkpoint, *out, "--certifier", "poison-modify"))
    wrong = (*POISON, "--certifier-option", "batchsize=3")
    assert "batch_size" in refuse("certify", *flags(checkpoint, *out, *wrong))
    both = (*POISON, "-a", "ask", "--attacked", tmp_path)
    assert "give one of the two" in refuse("certify", *flags(checkpoint, *out, *both))
    assert not (tmp_path / "run").exists()


def test_certifiers_are_listed() -> None:
    said = succeed("list", "certifiers")
    assert re.search(r"poisoning-insert +The most references that may be inserted", said)
    assert "poisoning-modify" in said
