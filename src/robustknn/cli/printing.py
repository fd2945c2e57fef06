"""What the commands print: tables for people; files are for programs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from robustknn.evaluation import CertificateDirectory, RunDirectory, Summary, finish, finish_certificates
from robustknn.evaluation.approximation import EXACTLY, engine
from robustknn.evaluation.certified import CertificateSummary
from robustknn.evaluation.plan import FRESH
from robustknn.registry import Registry
from robustknn.training import EpochRecord, TrainResult

if TYPE_CHECKING:
    from robustknn.reports.floors import Floor, Judged


def print_run(run: RunDirectory) -> Summary:
    """Write summary, table, page and figures of a whole run, and print the table."""
    from robustknn.reports import write_report

    summary = finish(run)
    page = write_report(run)
    console = Console()
    console.print(_columns(summary))
    console.print(_table(summary))
    for table in (*_approximations(summary), *_randomized(summary)):
        console.print(table)
    for warned in summary.warnings:
        console.print(f"[bold]warning[/bold] {warned.classifier}, {warned.attack}: {warned.message}", highlight=False)
    print(f"page: {page}")
    print(f"summary: {run.path / 'summary.json'}")
    return summary


def print_floors(summary: Summary, floors: Sequence[Floor], junit: Path | None) -> list[Judged]:
    """Judge floors, write them as JUnit XML where that is wanted, and print a line for each."""
    from robustknn.reports import write_junit
    from robustknn.reports.floors import judge

    judged = judge(summary, floors)
    if junit is not None:
        print(f"junit: {write_junit(summary, judged, junit)}")
    for j in judged:
        print(f"floor {j.outcome}: {j.classifier}, {j.floor}: {j.sentence}")
    return judged


def print_certificates(run: CertificateDirectory, radii: Sequence[float] | None = None) -> None:
    """Write summary, table, page and figures of certificates, and print the tables with what they assume."""
    from robustknn.reports import write_certificates

    summary = finish_certificates(run, radii)
    page = write_certificates(run)
    console = Console()
    for c in summary.classifiers:
        for found in c.certificates:
            console.print(_certified(c.name, found))
            for assumed in found.assumptions:
                console.print(f"  {assumed}", highlight=False, soft_wrap=True, markup=False)
            broken = sum(a.violations for a in found.attacked)
            if broken:
                console.print(
                    f"[bold]wrong[/bold] {broken} certified samples were fooled inside their radius: an assumption "
                    "does not hold, or there is a defect; do not use these certificates.",
                    highlight=False,
                )
    for unit in summary.other_units:
        console.print(
            f"Attacks are measured in {unit}, which no certificate here is; they are not compared.", soft_wrap=True
        )
    for other in summary.others:
        console.print(f"What is certified is {other}, not the one attacked; they are not compared.", soft_wrap=True)
    print(f"page: {page}")
    print(f"summary: {run.path / 'summary.json'}")


def _certified(classifier: str, found: CertificateSummary) -> Table:
    bounded = found.bounded
    columns = [
        found.unit,
        "certified",
        "95 %",
        *(["at most"] if bounded else []),
        *(["attacked"] if found.attacked else []),
    ]
    table = Table(title=f"{classifier}, {found.certifier}: {found.n} samples, right {_share(found.clean_accuracy)}")
    for name in columns:
        table.add_column(name, justify="right")
    for point in found.curve:
        cells = [f"{point.radius:g}", _share(point.certified_accuracy), _interval(point.certified_accuracy_interval)]
        if bounded:
            cells.append("" if point.upper_accuracy is None else _share(point.upper_accuracy))
        table.add_row(*cells, *([""] if found.attacked else []))
    for a in found.attacked:
        cells = [f"{a.eps:g}", _share(a.certified_accuracy), "", *([""] if bounded else [])]
        table.add_row(*cells, f"{_share(a.robust_accuracy)} {a.attack}")
    return table


def _columns(summary: Summary) -> Table:
    """What was published beside what is left."""
    table = Table(title="accuracy: what papers report, and what is left")
    for name in ("classifier", "clean", "published protocol", "worst case"):
        table.add_column(name, justify="left" if name == "classifier" else "right", no_wrap=True)
    for c in summary.classifiers:
        published = "not run" if c.published_accuracy is None else _share(c.published_accuracy)
        worst = _share(c.worst_case_accuracy) if c.searched else "not run"
        table.add_row(c.name, _share(c.clean_accuracy), published, worst)
    return table


def _table(summary: Summary) -> Table:
    threat = summary.threat
    table = Table(title=f"{summary.samples} samples, {threat['norm']} eps {threat['eps']:.6g}, seed {summary.seed}")
    for name in ("classifier", "attack", "accuracy", "95 %", "fooled", "seconds"):
        table.add_column(name, justify="left" if name in ("classifier", "attack") else "right", no_wrap=True)
    for c in summary.classifiers:
        table.add_row(c.name, "none", _share(c.clean_accuracy), _interval(c.clean_accuracy_interval), "", "")
        for a in c.attacks:
            table.add_row(
                c.name,
                a.name + (" (blind)" if a.transfer else ""),
                _share(a.robust_accuracy),
                _interval(a.robust_accuracy_interval),
                _share(a.attack_success_rate),
                f"{a.seconds:.1f}",
            )
        worst = _share(c.worst_case_accuracy)
        table.add_row(c.name, "worst of these", worst, _interval(c.worst_case_accuracy_interval), "", "")
        table.add_section()
    return table


def _approximations(summary: Summary) -> list[Table]:
    """What approximate indexes find, and what attacks that search exactly leave; nothing where all are exact."""
    found = Table(title="approximate indexes, beside exact search over the same references")
    for name in ("classifier", "layer", "index", "recall@k", "decides alike", "95 %", "samples"):
        found.add_column(name, justify="left" if name in ("classifier", "layer", "index") else "right")
    left = Table(title="accuracy under examples made with exact search", caption=EXACTLY)
    for name in ("classifier", "attack", "as deployed", "95 %", "exact twin", "95 %"):
        left.add_column(name, justify="left" if name in ("classifier", "attack") else "right", no_wrap=True)
    for c in summary.classifiers:
        if c.approximation is None:
            continue
        made, whole = c.approximation, [_share(c.approximation.vote_agreement)]
        whole += [_interval(made.vote_agreement_interval), str(made.n)]
        for place, e in enumerate(made.engines):
            found.add_row(c.name, e.layer, engine(e), _share(e.recall), *(whole if not place else ()))
        for a in c.attacks:
            if (s := a.exact_search) is not None:
                shown = [_share(s.robust_accuracy), _interval(s.robust_accuracy_interval)]
                shown += [_share(s.twin_robust_accuracy), _interval(s.twin_robust_accuracy_interval)]
                left.add_row(c.name, a.name, *shown)
    return [table for table in (found, left) if table.row_count]


def _randomized(summary: Summary) -> list[Table]:
    """What examples do to randomized classifiers in draws that no attack has seen; nothing where none is random."""
    table = Table(title=f"randomized classifiers: accuracy over {summary.fresh_draws} fresh draws", caption=FRESH)
    for name in ("classifier", "attack", "the draw attacked", "fresh draws"):
        table.add_column(name, justify="left" if name in ("classifier", "attack") else "right", no_wrap=True)
    for c in summary.classifiers:
        if c.fresh_accuracy is not None:
            table.add_row(c.name, "none", _share(c.clean_accuracy), _share(c.fresh_accuracy))
        for a in c.attacks:
            if a.fresh_accuracy is not None:
                table.add_row(c.name, a.name, _share(a.robust_accuracy), _share(a.fresh_accuracy))
    return [table] if table.row_count else []


def print_epoch(record: EpochRecord, epochs: int) -> None:
    """One line for a finished epoch beside the progress bar; without one, in a long run, of short epochs one in ten."""
    seldom = record.epoch % max(1, epochs // 10) and record.epoch != epochs
    short = record.seconds < 10 and (seldom or record.seconds * epochs < 10)
    if short and not sys.stderr.isatty():
        return
    losses = ", ".join(f"{name} {value:.4f}" for name, value in record.parts.items())
    shown = f"epoch {record.epoch} of {epochs}: loss {losses}"
    if record.validation_accuracy is not None:
        shown += f"; validation {_share(record.validation_accuracy)}"
    if record.robust_accuracy is not None:
        shown += f", under attack {_share(record.robust_accuracy)}"
    Console(stderr=True, highlight=False).print(f"{shown} ({record.seconds:.1f} s)", soft_wrap=True)


def print_training(result: TrainResult, test_accuracy: float, n: int) -> None:
    """Print what training gave."""
    held = result.history[result.epoch - 1]
    validated = "" if held.validation_accuracy is None else f", validation accuracy {held.validation_accuracy:.4f}"
    robust = "" if held.robust_accuracy is None else f" ({held.robust_accuracy:.4f} under attack)"
    print(f"epoch {result.epoch} of {len(result.history)}: loss {held.loss:.4f}{validated}{robust}")
    print(f"test accuracy {test_accuracy:.4f} on {n} samples")
    print(f"checkpoint: {result.checkpoint}")


def print_registry(kinds: Mapping[str, Registry[Any]]) -> None:
    """Print the registered names of each kind, a line each."""
    for kind, registry in kinds.items():
        entries = list(registry)
        print(f"{kind}:")
        width = max((len(e.name) for e in entries), default=0)
        for entry in entries:
            print(f"  {entry.name.ljust(width)}  {entry.summary}")


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"
