"""summary.json: the figures of a run, in a stable schema. Units: distances as the inputs, shares in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robustknn import store
from robustknn.errors import IntegrityError
from robustknn.evaluation import metrics
from robustknn.evaluation.approximation import recall_column
from robustknn.evaluation.diagnostics import Warned, warnings_of
from robustknn.evaluation.plan import PUBLISHED, WORST_CASE, attacks_on, is_blind, searches_of
from robustknn.evaluation.rundir import CLEAN, Cell, Place, RunDirectory

SUMMARY_SCHEMA = 5
Rows = dict[str, NDArray[Any]]


class Strict(BaseModel):
    """A part of a summary: it has the fields it names and no others, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CurvePoint(Strict):
    """Accuracy under one attack at one radius."""

    eps: float
    n: int
    robust_accuracy: float
    robust_accuracy_interval: tuple[float, float]


class Rejection(Strict):
    """What a threshold on credibility would reject."""

    share: float = Field(description="of the calibration samples, rejected by this threshold")
    threshold: float = Field(description="inputs of less credibility are rejected")
    clean_rejected: float = Field(description="share of the clean samples that it rejects")
    detected: float | None = Field(description="share of the fooled samples whose example it rejects")
    robust_accuracy: float = Field(
        description="share of samples accepted and right without attack, and not fooled by an example that is accepted"
    )


class Engine(Strict):
    """The index of one voter."""

    layer: str
    n_neighbors: int
    index: str = Field(description="the engine's name")
    settings: dict[str, Any] = Field(description="what it was set to, as far as it says so")
    recall: float = Field(description="share of the exact n_neighbors nearest references that it found, in the mean")


class Approximation(Strict):
    """A classifier whose index is not exact, beside its exact twin: same references, rule and k, searched exactly."""

    n: int = Field(description="clean samples on which the two were compared")
    recall: float = Field(description="recall@k, the mean over voters")
    vote_agreement: float = Field(description="share of these samples on which both decide alike")
    vote_agreement_interval: tuple[float, float] = Field(description="95 %, Wilson")
    engines: list[Engine]


class ExactSearch(Strict):
    """What came of the examples that were made on the exact twin."""

    robust_accuracy: float = Field(description="share of samples that the classifier has right and keeps right on them")
    robust_accuracy_interval: tuple[float, float]
    twin_robust_accuracy: float = Field(description="the same of the exact twin")
    twin_robust_accuracy_interval: tuple[float, float]


class Part(Strict):
    """One of the attacks of which an attack consists."""

    name: str
    fooled: float | None = Field(
        description="share of all samples that were right and that this part fooled first; null: it cannot work on "
        "this classifier and did not run"
    )


class AttackSummary(Strict):
    """One attack at the radius of the tables."""

    name: str
    transfer: bool = Field(description="it looks at the network alone, not at the neighbors")
    role: str = Field(description='"published", "worst-case", or "" for neither column')
    eps: float
    n: int
    robust_accuracy: float = Field(description="share of all samples that are right and stay right (AA)")
    robust_accuracy_interval: tuple[float, float] = Field(description="95 %, Wilson")
    error_rate: float = Field(description="1 - robust_accuracy")
    attack_success_rate: float = Field(description="share of the initially correct samples that the attack fools")
    harmonic_mean: float = Field(description="of clean_accuracy and robust_accuracy (HM)")
    mean_l2: float = Field(description="mean L2 distance over all samples")
    mean_linf: float = Field(description="mean L-infinity distance over all samples")
    mean_l2_success: float | None = Field(description="over the initially correct samples that were fooled")
    mean_linf_success: float | None
    mean_credibility: float | None = Field(description="DkNN credibility of the attacked samples")
    mean_credibility_success: float | None
    gradient_passes: float = Field(description="backward passes a sample, in the mean")
    forward_passes: float = Field(description="looks at the classifier a sample, in the mean")
    zero_gradient: float = Field(description="share of samples whose first gradient was zero")
    tied: float = Field(description="share of samples counted as robust that the tie rule decides wrongly under attack")
    success_8bit: float | None = Field(description="share of the successful examples that succeed as 8-bit images too")
    parts: list[Part] = Field(description="the attacks of which it consists, in the order in which they ran")
    rejection: list[Rejection] = Field(description="DkNN: thresholds on credibility, from the calibration samples")
    searches: str = Field(
        description='where an attack on a classifier with an approximate index searches: "exact" (on the exact twin), '
        '"deployed" (the network or the decision alone, or the approximate index), "exact, then deployed"; else ""'
    )
    exact_search: ExactSearch | None = Field(description="null where nothing was attacked through an exact twin")
    fresh_accuracy: float | None = Field(
        description="of a randomized classifier: share right, and not fooled by the example, in draws that no attack "
        "has seen, the mean over samples and `fresh_draws`; else null"
    )
    seconds: float
    curve: list[CurvePoint] = Field(description="every radius evaluated, in order")


class ClassifierSummary(Strict):
    """One classifier."""

    name: str
    n: int
    clean_accuracy: float = Field(description="share of correct decisions without attack (SA)")
    clean_accuracy_interval: tuple[float, float]
    mean_credibility: float | None
    fresh_accuracy: float | None = Field(
        description="of a randomized classifier: share right in those draws without attack, the mean over samples and "
        "draws; else null"
    )
    worst_case_accuracy: float = Field(description="share of samples right and robust under every attack listed")
    worst_case_accuracy_interval: tuple[float, float]
    published_accuracy: float | None = Field(
        description="robust accuracy under the protocol of the classifier's own paper; null: it was not run"
    )
    published_attack: dict[str, Any] = Field(description="that protocol: an attack's name and options")
    searched: bool = Field(description="a worst-case attack was among the attacks; else worst_case_accuracy is loose")
    approximation: Approximation | None = Field(description="null for a classifier that searches exactly")
    attacks: list[AttackSummary]


class Summary(Strict):
    """All figures of a run."""

    schema_version: int = SUMMARY_SCHEMA
    run: str = Field(description="the key of the run these figures are of, as every batch carries it")
    threat: dict[str, Any]
    seed: int
    samples: int
    fresh_draws: int = Field(description="in how many fresh draws a randomized classifier decided once more")
    classifiers: list[ClassifierSummary]
    warnings: list[Warned]
    environment: dict[str, Any]


def summarize(run: RunDirectory) -> Summary:
    """The figures of a run whose cells are whole.

    Raises:
        IntegrityError: a batch is altered, or some sample has no row yet.
    """
    rows = {cell: _whole(run, cell) for cell in run.cells}
    plan = run.header["plan"]
    return Summary(
        run=run.key,
        threat=plan["threat"],
        seed=plan["seed"],
        samples=plan["samples"],
        fresh_draws=plan.get("fresh_draws", 0),
        classifiers=[_classifier(run, name, rows) for name in plan["classifier_names"]],
        warnings=warnings_of(plan, rows),
        environment=run.environment,
    )


def _whole(run: RunDirectory, cell: Cell) -> Rows:
    rows = run.rows(cell)
    wanted = run.header["plan"]["scored"][cell.classifier]
    if cell.control:
        wanted = min(wanted, run.header["plan"]["controls"])
    found = len(rows.get("position", ()))
    if found != wanted:
        raise IntegrityError(
            f"{cell.folder!r} has rows for {found} of {wanted} samples; run the same evaluation again to finish it."
        )
    return rows


def _classifier(run: RunDirectory, name: str, every: dict[Cell, Rows]) -> ClassifierSummary:
    clean = every[Cell(name, CLEAN)]
    plan = run.header["plan"]
    main = float(plan["threat"]["eps"])
    attacks, robust = [], [clean["correct"].astype(bool)]
    for attack in attacks_on(plan, name):
        cells = sorted((c for c in every if _reports(c, name, attack)), key=lambda c: c.eps)
        rows = every[Cell(name, attack, main)]
        robust.append(rows["robust"].astype(bool))
        curve = [_point(c.eps, every[c]["robust"].astype(bool)) for c in cells]
        attacks.append(_attack(run, Cell(name, attack, main), rows, clean, curve))
    worst = metrics.worst_case(robust)
    n = len(worst)
    return ClassifierSummary(
        name=name,
        n=n,
        clean_accuracy=metrics.share(clean["correct"]),
        clean_accuracy_interval=metrics.wilson(int(clean["correct"].sum()), n),
        mean_credibility=_mean(clean, "credibility"),
        fresh_accuracy=_mean(clean, "fresh"),
        worst_case_accuracy=metrics.share(worst),
        worst_case_accuracy_interval=metrics.wilson(int(worst.sum()), n),
        published_accuracy=next((a.robust_accuracy for a in attacks if a.role == PUBLISHED), None),
        published_attack=plan["classifiers"][name].get("published_attack", {}),
        searched=any(a.role == WORST_CASE for a in attacks),
        approximation=_approximation(plan["classifiers"][name]["voters"], clean),
        attacks=attacks,
    )


def _approximation(voters: list[dict[str, Any]], clean: Rows) -> Approximation | None:
    if "agrees" not in clean:
        return None
    measured = np.isfinite(clean["agrees"])
    n, agree = int(measured.sum()), clean["agrees"][measured] == 1
    engines = [
        Engine(
            layer=v["layer"],
            n_neighbors=v["n_neighbors"],
            index=v["engine"],
            settings=v["settings"],
            recall=float(np.mean(clean[recall_column(place)][measured])),
        )
        for place, v in enumerate(voters)
    ]
    return Approximation(
        n=n,
        recall=float(np.mean([e.recall for e in engines])),
        vote_agreement=metrics.share(agree),
        vote_agreement_interval=metrics.wilson(int(agree.sum()), n),
        engines=engines,
    )


def _reports(cell: Cell, classifier: str, attack: str) -> bool:
    return (cell.classifier, cell.attack, cell.control) == (classifier, attack, "")


def _attack(run: RunDirectory, cell: Cell, rows: Rows, clean: Rows, curve: list[CurvePoint]) -> AttackSummary:
    plan = run.header["plan"]
    robust = rows["robust"].astype(bool)
    correct = rows["clean_correct"].astype(bool)
    fooled = metrics.fooled(rows)
    point = _point(cell.eps, robust)
    return AttackSummary(
        name=cell.attack,
        transfer=is_blind(plan, cell.classifier, cell.attack),
        role=plan["attacks"][cell.attack].get("role", ""),  # runs of before had none
        eps=cell.eps,
        n=point.n,
        robust_accuracy=point.robust_accuracy,
        robust_accuracy_interval=point.robust_accuracy_interval,
        error_rate=1 - point.robust_accuracy,
        attack_success_rate=metrics.share(fooled[correct]),
        harmonic_mean=metrics.harmonic_mean(metrics.share(clean["correct"]), point.robust_accuracy),
        mean_l2=float(np.mean(rows["l2"])),
        mean_linf=float(np.mean(rows["linf"])),
        mean_l2_success=metrics.mean_of(rows["l2"], fooled),
        mean_linf_success=metrics.mean_of(rows["linf"], fooled),
        mean_credibility=_mean(rows, "credibility"),
        mean_credibility_success=_mean(rows, "credibility", fooled),
        gradient_passes=float(np.mean(rows["gradient_passes"])),
        forward_passes=float(np.mean(rows["forward_passes"])),
        zero_gradient=metrics.share(rows["zero_gradient"]),
        tied=metrics.share(metrics.tied(rows)),
        success_8bit=_mean(rows, "success_8bit", rows["success"].astype(bool)),
        parts=_parts(rows, plan, cell),
        rejection=[_rejection(t, rows, clean) for t in plan["classifiers"][cell.classifier].get("rejection", [])],
        searches=searches_of(plan, cell.classifier).get(cell.attack, ""),
        exact_search=_exact_search(rows),
        fresh_accuracy=_mean(rows, "fresh"),
        seconds=run.seconds(cell),
        curve=curve,
    )


def _exact_search(rows: Rows) -> ExactSearch | None:
    if "twin_robust" not in rows:
        return None
    own, twin = (_point(0, rows[name].astype(bool)) for name in ("exact_robust", "twin_robust"))
    return ExactSearch(
        robust_accuracy=own.robust_accuracy,
        robust_accuracy_interval=own.robust_accuracy_interval,
        twin_robust_accuracy=twin.robust_accuracy,
        twin_robust_accuracy_interval=twin.robust_accuracy_interval,
    )


def _parts(rows: Rows, plan: dict[str, Any], cell: Cell) -> list[Part]:
    names = plan["attacks"][cell.attack].get("parts", [])
    left_out = plan["classifiers"][cell.classifier].get("left_out", {}).get(cell.attack, [])
    fooled = metrics.fooled(rows)
    return [
        Part(name=n, fooled=None if n in left_out else metrics.share(fooled & (rows["winner"] == place)))
        for place, n in enumerate(names)
    ]


def _rejection(threshold: dict[str, float], rows: Rows, clean: Rows) -> Rejection:
    least = threshold["threshold"]
    fooled = metrics.fooled(rows)
    accepted, passed = clean["credibility"] >= least, rows["credibility"] >= least
    stands = rows["clean_correct"].astype(bool) & accepted & ~(fooled & passed)
    return Rejection(
        share=threshold["share"],
        threshold=least,
        clean_rejected=metrics.share(~accepted),
        detected=metrics.share(~passed[fooled]) if bool(fooled.any()) else None,
        robust_accuracy=metrics.share(stands),
    )


def _point(eps: float, robust: metrics.Bools) -> CurvePoint:
    n = len(robust)
    return CurvePoint(
        eps=eps,
        n=n,
        robust_accuracy=metrics.share(robust),
        robust_accuracy_interval=metrics.wilson(int(robust.sum()), n),
    )


def _mean(rows: Rows, column: str, where: metrics.Bools | None = None) -> float | None:
    return metrics.mean_of(rows[column], where) if column in rows else None


def finish(run: RunDirectory | str | Path) -> Summary:
    """Write `summary.json` and `rows.parquet` from the finished batches of a run, or of the run in a folder."""
    run = RunDirectory.of(run)
    summary = summarize(run)
    store.write_sealed(run.path / "summary.json", summary.model_dump(mode="json"))
    write_table(run, run.cells)
    return summary


def write_table(run: RunDirectory, cells: Sequence[Place]) -> None:
    """All rows of all cells in one Parquet table; a column that a cell lacks is null there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for cell in cells:
        columns = run.rows(cell)
        n = len(columns["position"])
        named = {k: pa.array([v] * n) for k, v in cell.to_config().items()}
        tables.append(pa.table({**named, **{k: pa.array(v) for k, v in columns.items()}}))
    table = pa.concat_tables(tables, promote_options="default")
    with store.atomic_path(run.path / "rows.parquet") as partial:
        pq.write_table(table, partial)


def read_summary(run: RunDirectory | str | Path) -> Summary:
    """The summary that `finish` wrote of a run, or of the run in a folder; IntegrityError: it is missing or altered."""
    run = RunDirectory.of(run)
    content = store.read_sealed(run.path / "summary.json")
    try:
        return Summary.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(
            f"{str(run.path / 'summary.json')!r} is no summary of schema {SUMMARY_SCHEMA}; "
            "write it again with robustknn report."
        ) from error
