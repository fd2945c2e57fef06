"""summary.json of certificates: certified accuracy by radius, beside what attacks left where both are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from robustknn import store
from robustknn.certification.base import ITSELF
from robustknn.checks import check_number
from robustknn.errors import IntegrityError
from robustknn.evaluation import metrics
from robustknn.evaluation.attacked import Attacked, attacks_on
from robustknn.evaluation.certificates import CertificateCell, CertificateDirectory
from robustknn.evaluation.summary import Strict, write_table

CERTIFICATES_SCHEMA = 1
_STEPS = 8
Rows = dict[str, NDArray[Any]]


class CertifiedPoint(Strict):
    """Certified accuracy at one radius."""

    radius: float
    certified_accuracy: float = Field(description="share of samples right and certified at this radius")
    certified_accuracy_interval: tuple[float, float] = Field(description="95 %, Wilson")
    upper_accuracy: float | None = Field(
        description="share of samples right and not known to break at this radius or below; null: none is known"
    )


class AttackedPoint(Strict):
    """What an attack left at one radius, and what is certified there."""

    attack: str
    eps: float
    robust_accuracy: float
    robust_accuracy_interval: tuple[float, float]
    certified_accuracy: float
    violations: int = Field(description="samples right and certified at this radius that the attack fooled: must be 0")


class CertificateSummary(Strict):
    """One classifier's certificates by one certifier."""

    certifier: str
    options: dict[str, Any]
    of: str = Field(description='whose decisions: "the classifier", or what stands in its place, e.g. a smoothed one')
    unit: str
    assumptions: list[str]
    n: int
    clean_accuracy: float = Field(description="share of samples whose certified decision is right, ties counted in")
    clean_accuracy_interval: tuple[float, float]
    uncertified: float = Field(description="share of samples for which nothing is certified, not even as they are")
    median_radius: float | None = Field(description="over the samples that are right; null for none, or when it is ∞")
    curve: list[CertifiedPoint]
    attacked: list[AttackedPoint] = Field(description="of attacks on what is certified, in the same unit")
    seconds: float

    @property
    def bounded(self) -> bool:
        """Whether an upper bound is known that says more than the certified accuracy."""
        return any(p.upper_accuracy not in (None, p.certified_accuracy) for p in self.curve)


class CertifiedClassifier(Strict):
    """One classifier."""

    name: str
    certificates: list[CertificateSummary]


class CertificatesSummary(Strict):
    """All figures of a run of certificates."""

    schema_version: int = CERTIFICATES_SCHEMA
    kind: str = "certificates"
    run: str = Field(description="the key of the run these figures are of, as every batch carries it")
    radii: list[float] | None = Field(description="those asked for; null: chosen for each certificate")
    seed: int
    samples: int
    other_units: list[str] = Field(description="units of attacks given that no certificate here is measured in")
    others: list[str] = Field(description="what is certified here in the place of a classifier that was attacked")
    classifiers: list[CertifiedClassifier]
    environment: dict[str, Any]


def finish_certificates(
    run: CertificateDirectory | str | Path, radii: Sequence[float] | None = None
) -> CertificatesSummary:
    """Write `summary.json` and `rows.parquet` of a run of certificates.

    Args:
        radii: where certified accuracy is stated; None takes those of the summary that is there, else round numbers.

    Raises:
        InputError: a radius below 0 or not finite.
        IntegrityError: a batch is altered, or some sample has no row yet.
    """
    run = CertificateDirectory.of(run)
    if radii is None and (run.path / "summary.json").is_file():
        held = read_certificates(run)
        radii = held.radii if held.run == run.key else None
    wanted = (
        None if radii is None else sorted({check_number(r, "a radius", "of at least 0", _is_radius) for r in radii})
    )
    summary = _summarize(run, wanted)
    store.write_sealed(run.path / "summary.json", summary.model_dump(mode="json"))
    write_table(run, run.certificates)
    return summary


def _is_radius(value: float) -> bool:
    return 0 <= value < math.inf


def _summarize(run: CertificateDirectory, radii: list[float] | None) -> CertificatesSummary:
    plan, attacks = run.header["plan"], attacks_on(run)
    by_classifier = {
        name: [_certificate(run, cell, radii, attacks) for cell in run.certificates if cell.classifier == name]
        for name in plan["classifier_names"]
    }
    units = {c.unit for found in by_classifier.values() for c in found}
    others = {c.of for found in by_classifier.values() for c in found if attacks and c.of != ITSELF}
    return CertificatesSummary(
        run=run.key,
        radii=radii,
        seed=plan["seed"],
        samples=plan["samples"],
        other_units=sorted({a.unit for a in attacks} - units),
        others=sorted(others),
        classifiers=[CertifiedClassifier(name=name, certificates=found) for name, found in by_classifier.items()],
        environment=run.environment,
    )


def whole_rows(run: CertificateDirectory, cell: CertificateCell) -> Rows:
    """The rows of a cell; IntegrityError when some sample has none."""
    rows, wanted = run.rows(cell), len(run.positions(cell.classifier))
    found = len(rows.get("position", ()))
    if found != wanted:
        raise IntegrityError(
            f"{cell.folder!r} has rows for {found} of {wanted} samples; run the same command again to finish it."
        )
    return rows


def _certificate(
    run: CertificateDirectory, cell: CertificateCell, radii: list[float] | None, attacks: list[Attacked]
) -> CertificateSummary:
    rows, about = whole_rows(run, cell), run.about(cell)
    right = rows["decision"] == rows["label"]
    n, radius = len(right), rows["radius"]
    middle = float(np.median(radius[right])) if bool(right.any()) else math.inf
    plan = run.header["plan"]
    options = {k: v for k, v in plan["certifiers"][cell.certifier].items() if k != "name"}
    of = plan["certified"][cell.certifier]
    alike = [a for a in attacks if (a.classifier, a.unit, ITSELF) == (cell.classifier, about["unit"], of)]
    return CertificateSummary(
        certifier=cell.certifier,
        options=options,
        of=of,
        unit=about["unit"],
        assumptions=about["assumptions"],
        n=n,
        clean_accuracy=metrics.share(right),
        clean_accuracy_interval=metrics.wilson(int(right.sum()), n),
        uncertified=metrics.share(radius < 0),
        median_radius=middle if math.isfinite(middle) else None,
        curve=[_point(rows, r) for r in (round_radii(radius[right]) if radii is None else radii)],
        attacked=[_attacked(rows, a) for a in alike],
        seconds=run.seconds(cell),
    )


def _point(rows: Rows, radius: float) -> CertifiedPoint:
    right = rows["decision"] == rows["label"]
    held = right & (rows["radius"] >= radius)
    return CertifiedPoint(
        radius=radius,
        certified_accuracy=metrics.share(held),
        certified_accuracy_interval=metrics.wilson(int(held.sum()), len(held)),
        upper_accuracy=metrics.share(right & (rows["upper"] > radius)) if "upper" in rows else None,
    )


def _attacked(rows: Rows, attack: Attacked) -> AttackedPoint:
    held = (rows["decision"] == rows["label"]) & (rows["radius"] >= attack.eps)
    return AttackedPoint(
        attack=attack.attack,
        eps=attack.eps,
        robust_accuracy=metrics.share(attack.robust),
        robust_accuracy_interval=metrics.wilson(int(attack.robust.sum()), len(attack.robust)),
        certified_accuracy=metrics.share(held),
        violations=int((held & ~attack.robust).sum()),
    )


def round_radii(radii: NDArray[np.float64]) -> list[float]:
    """Round numbers from 0 up to the largest finite radius; 1, 2, 5, 10, … and itself where all are whole."""
    finite = radii[np.isfinite(radii) & (radii > 0)]
    if not len(finite):
        return [0.0]
    most = float(finite.max())
    if bool((finite == np.round(finite)).all()):
        powers = range(math.floor(math.log10(most)) + 1)
        return [0.0, *(float(m * 10**p) for p in powers for m in (1, 2, 5) if m * 10**p < most), most]
    rough = most / _STEPS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [float(f"{i * step:.10g}") for i in range(int(most / step) + 1)]


def read_certificates(run: CertificateDirectory) -> CertificatesSummary:
    """The summary that `finish_certificates` wrote; IntegrityError when it is missing or altered."""
    content = store.read_sealed(run.path / "summary.json")
    try:
        return CertificatesSummary.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(
            f"{str(run.path / 'summary.json')!r} is no summary of certificates of schema {CERTIFICATES_SCHEMA}; "
            "write it again with robustknn report."
        ) from error
