"""Samples beside their nearest references, without attack and under it: what the report shows of the neighbors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from robustknn.evaluation import RunDirectory, Summary
from robustknn.evaluation.rundir import Cell
from robustknn.evaluation.summary import AttackSummary, ClassifierSummary
from robustknn.reports.examples import FOOLED, STOOD, TIED, WRONG, Book, Near, Voters, Way
from robustknn.reports.pictures import LARGE, SMALL, Picture
from robustknn.reports.way import WayChart
from robustknn.reports.words import distance

_ORDER = (FOOLED, STOOD, TIED, WRONG)
_OPEN = 2  # the first samples of a gallery are unfolded


class Budget:
    """How many bytes of something a page may still hold, and how much was left out."""

    def __init__(self, total: int) -> None:
        self.total, self.left, self.refused = total, total, 0

    def take(self, size: int) -> bool:
        """Whether `size` bytes are to be had; once refused, nothing more is given."""
        if self.refused or size > self.left:
            self.refused += 1
            return False
        self.left -= size
        return True


@dataclass(frozen=True)
class Reference:
    """One near reference; `role` and `change` as in `examples.Near`."""

    id: int
    label: str
    distance: str
    role: str
    change: str
    picture: Picture | None


@dataclass(frozen=True)
class Row:
    """The nearest references of one voter, without attack and under it.

    Attributes:
        votes: (class, votes without attack, votes attacked), the most first.
        entered: how many of the `k` that vote do so under attack alone; None where the run did not keep it.
    """

    layer: str
    note: str
    clean: list[Reference]
    attacked: list[Reference]
    votes: list[tuple[str, int, int]]
    k: int
    entered: int | None


@dataclass(frozen=True)
class Shown:
    """One sample.

    Attributes:
        number: its place in the data set.
        outcome: "fooled", "stood", "tied" (a tie counts for the defender) or "wrong" (without any attack).
        label, before, after: the true class, and the decisions without attack and under it.
        change: the perturbation, None where there is none; `amplified` times as strong as in the pictures, ±`scale`
            from end to end.
        moved: the L2 and L-infinity distances, as text.
        way: the lead of the true class from the sample to its example; None where the run did not keep it.
    """

    number: int
    outcome: str
    label: str
    before: str
    after: str
    clean: Picture | None
    attacked: Picture | None
    change: Picture | None
    amplified: str
    scale: str
    moved: tuple[str, str]
    rows: list[Row]
    way: WayChart | None


Drawn = Callable[[Shown, str, bool, str], str]
"""A sample, the attack's name, whether it is unfolded and a key of its own in the page → HTML."""


@dataclass
class Gallery:
    """What is shown of one classifier.

    Attributes:
        kept: how many examples the run holds of it; `wanted` of them were to be shown, and `samples` are, as HTML.
        pictures: whether the references have pictures.
        kind: what the inputs are (see `pictures.kind_of`), `reduced` whether they are larger than they are drawn.
    """

    classifier: str
    attack: str
    kept: int
    wanted: int
    pictures: bool
    kind: str
    reduced: bool
    span: tuple[str, str]
    samples: list[str]


def strongest(classifier: ClassifierSummary) -> AttackSummary | None:
    """The attack that leaves the least accuracy, None where none was run; of several the first that sees neighbors."""
    return min(classifier.attacks, key=lambda a: (a.robust_accuracy, a.transfer), default=None)


def galleries(run: RunDirectory, summary: Summary, samples: int, budget: Budget, drawn: Drawn) -> list[Gallery]:
    """The galleries of all classifiers under their strongest attack, at most `samples` samples each.

    The budget is of their HTML, pictures and all that is written around them. It is spent one sample of every
    classifier at a time, so that none takes it all.
    """
    references = run.gallery()
    books = [
        Book(run, Cell(c.name, best.name, best.eps), references)
        for c in summary.classifiers
        if (best := strongest(c)) is not None
    ]
    made = [_gallery(book, samples) for book in books]
    for turn in zip_longest(*(_views(book, samples) for book in books)):
        if budget.refused:
            break
        for number, (gallery, view) in enumerate(zip(made, turn, strict=True), 1):
            if view is None:
                continue
            place = len(gallery.samples) + 1
            html = drawn(view, gallery.attack, place <= _OPEN, f"way-{number}-{place}")
            if budget.take(len(html.encode())):
                gallery.samples.append(html)
    return made


def _gallery(book: Book, samples: int) -> Gallery:
    kind, reduced, span = "other", False, ("", "")
    if book.kept:
        kind, shape = book.pen.kind, book.after["x"].shape[1:]
        reduced = kind == "image" and max(shape) > SMALL
        span = (f"{book.pen.low:.4g}", f"{book.pen.high:.4g}")
    pictures = any(f"images {v['bank']}" in book.references for v in book.voters)
    wanted = min(samples, book.kept)
    return Gallery(book.cell.classifier, book.cell.attack, book.kept, wanted, pictures, kind, reduced, span, [])


def _views(book: Book, samples: int) -> Iterator[Shown]:
    for place in _chosen(book, samples):
        yield _view(book, place)


def _chosen(book: Book, samples: int) -> list[int]:
    """Places of the samples to show: the fooled ones first, but some of those that stood where there are any."""
    outcomes = [str(book.outcomes[row]) for row in book.places]
    fooled = [p for p, o in enumerate(outcomes) if o == FOOLED]
    others = sorted((p for p, o in enumerate(outcomes) if o != FOOLED), key=lambda p: _ORDER.index(outcomes[p]))
    room = max(samples - len(fooled), min(len(others), samples // 3))
    return (fooled[: samples - room] + others)[:samples]


def _view(book: Book, place: int) -> Shown:
    row, rows, pen = int(book.places[place]), book.rows, book.pen
    delta, scale, way = book.delta(place), book.scale(place), book.way(place)
    return Shown(
        number=int(rows["sample_id"][row]),
        outcome=str(book.outcomes[row]),
        label=book.class_name(rows["label"][row]),
        before=book.class_name(book.clean_rows["prediction"][row]),
        after=book.class_name(rows["prediction"][row]),
        clean=pen.draw(book.before["x"][place], LARGE),
        attacked=pen.draw(book.after["x"][place], LARGE),
        change=pen.change(delta, scale) if bool(delta.any()) else None,
        amplified=amplified(pen.high - pen.low, scale),
        scale=distance(scale),
        moved=(distance(float(rows["l2"][row])), distance(float(rows["linf"][row]))),
        rows=[_row(book, voters) for voters in book.voters_of(place)],
        way=None if way is None else _way(book, way),
    )


def amplified(span: float, scale: float) -> str:
    """How many times a change is stronger in its picture than in that of the sample."""
    return f"{span / (2 * scale):.3g}" if scale > 0 else "1"


def _way(book: Book, way: Way) -> WayChart:
    return WayChart(way.leads, way.lost, [book.class_name(of) for of in way.decisions])


def _row(book: Book, voters: Voters) -> Row:
    return Row(
        voters.layer,
        note_of(voters),
        [_reference(book, voters, near) for near in voters.clean],
        [_reference(book, voters, near) for near in voters.attacked],
        [(book.class_name(of), before, after) for of, before, after in voters.votes],
        voters.k,
        voters.entered,
    )


def note_of(voters: Voters) -> str:
    """Which of its references are shown."""
    note = f"{voters.shown} nearest" if voters.shown >= voters.k else f"{voters.shown} nearest of the {voters.k}"
    return f"{note} that vote" + (f", {voters.made}" if voters.made else "")


def _reference(book: Book, voters: Voters, near: Near) -> Reference:
    picture = book.picture(voters.bank, near.id)
    return Reference(near.id, book.class_name(near.label), distance(near.distance), near.role, near.change, picture)
