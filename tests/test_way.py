"""What a run keeps of the samples that are shown: all their voters, and the decision on the way to their examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, ThreatModel
from robustknn.attacks import PGD
from robustknn.evaluation import Cell, Options, RunDirectory, evaluate
from robustknn.evaluation.rundir import CLEAN
from robustknn.recipes import pgd_transfer
from robustknn.reports.examples import Book, Way

K, D, CLASSES, KEPT = 11, 6, 3, 5


@pytest.fixture(scope="module")
def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    labels = torch.arange(90) % CLASSES
    centers = torch.rand(CLASSES, D, generator=g)
    references = (0.5 * centers[labels] + 0.5 * torch.rand(90, D, generator=g)).clamp(0, 1)
    y = torch.arange(12) % CLASSES
    x = (0.5 * centers[y] + 0.5 * torch.rand(12, D, generator=g)).clamp(0, 1)
    return references, labels, x, y


def made(scene: tuple[torch.Tensor, ...], out: Path, batch_size: int = 4) -> RunDirectory:
    references, labels, x, y = scene
    features = FeatureExtractor(nn.Sequential(nn.Identity()), ["0"])
    knn = KNN(ReferenceSet.build(features, (references, labels)), K)
    options = Options(batch_size=batch_size, examples=KEPT, controls=0)
    return evaluate(
        {"knn": knn}, (x, y), attacks={"pgd": PGD(steps=8)}, threat=ThreatModel("linf", 0.3), out=out, options=options
    )


def truth(scene: tuple[torch.Tensor, ...], point: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Ids of the k nearest references and the votes of every class, in float64."""
    references, labels = scene[0].double().numpy(), scene[1].numpy()
    far = np.sqrt(((references - point) ** 2).sum(1))
    ids = np.lexsort((np.arange(len(far)), far))[:K]
    return ids.tolist(), np.bincount(labels[ids], minlength=CLASSES)


def test_every_voter_is_kept(scene: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    run = made(scene, tmp_path / "r")
    for cell in (Cell("knn", CLEAN), Cell("knn", "pgd", 0.3)):
        kept = run.tensors(cell)
        for place in range(KEPT):
            ids, _ = truth(scene, kept["x"][place].double().numpy())
            assert kept["voters 0"][place].tolist() == ids
            assert kept["votes 0"][place].tolist() == scene[1][ids].tolist()
            assert kept["ids 0"][place].tolist() == ids[:8]


def test_the_way_is_the_hard_decision_on_the_straight_line(scene: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    run = made(scene, tmp_path / "r")
    clean, kept = run.tensors(Cell("knn", CLEAN)), run.tensors(Cell("knn", "pgd", 0.3))
    rows = run.rows(Cell("knn", "pgd", 0.3))
    changed = 0
    for place in range(KEPT):
        a, b, y = (t[place].double().numpy() for t in (clean["x"], kept["x"], scene[3]))
        for step in range(11):
            _, votes = truth(scene, a + step / 10 * (b - a))
            others = np.delete(votes, int(y)).max()
            assert float(kept["path lead"][place][step]) == pytest.approx((votes[int(y)] - others) / K, abs=1e-9)
            assert int(kept["path decision"][place][step]) == int(votes.argmax())
        assert float(kept["path lead"][place][-1]) == rows["margin"][place]
        assert int(kept["path decision"][place][-1]) == rows["prediction"][place]
        changed += int(kept["path decision"][place].unique().numel() > 1)
    assert changed > 0


def test_neither_batches_nor_a_resume_change_what_is_kept(scene: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    whole = made(scene, tmp_path / "a", batch_size=12)
    for size in (1, 5):
        other = made(scene, tmp_path / f"b{size}", batch_size=size)
        sorted((other.path / "cells").rglob("pgd*/*.json"))[0].unlink()
        other = made(scene, tmp_path / f"b{size}", batch_size=size)
        for cell in whole.cells:
            first, second = whole.tensors(cell), other.tensors(cell)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_which_references_entered_and_left(scene: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    run = made(scene, tmp_path / "r")
    book = Book(run, Cell("knn", "pgd", 0.3), run.gallery())
    for place in range(KEPT):
        before, votes_before = truth(scene, book.before["x"][place].double().numpy())
        after, votes_after = truth(scene, book.after["x"][place].double().numpy())
        [voters] = book.voters_of(place)
        assert [r.id for r in voters.clean if r.change == "left"] == [i for i in before[:8] if i not in after]
        assert [r.id for r in voters.attacked if r.change == "new"] == [i for i in after[:8] if i not in before]
        assert voters.entered == len(set(after) - set(before))
        assert {of: (a, b) for of, a, b in voters.votes} == {
            of: (votes_before[of], votes_after[of]) for of in range(CLASSES) if votes_before[of] or votes_after[of]
        }


def test_a_run_of_before_shows_what_it_kept(scene: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    run = made(scene, tmp_path / "r")
    book = Book(run, Cell("knn", "pgd", 0.3), run.gallery())
    for held in (book.before, book.after):
        for name in [n for n in held if n.split()[0] in ("voters", "votes", "path")]:
            del held[name]
    [voters] = book.voters_of(0)
    assert len(voters.clean) == len(voters.attacked) == 8
    assert (voters.votes, voters.entered, book.way(0)) == ((), None, None)
    assert all(not r.change for r in [*voters.clean, *voters.attacked])


@pytest.mark.parametrize(
    ("leads", "lost"),
    [((1, 0.5, 0), None), ((1, -0.5, 0.2), None), ((1, 0.5, -0.1), 2), ((-1, -0.5, -1), 0), ((1, -1, 0, -1), 3)],
)
def test_from_where_on_the_way_is_lost(leads: tuple[float, ...], lost: int | None) -> None:
    assert Way(leads, (0,) * len(leads)).lost == lost


def test_classifiers_of_several_layers_and_blind_attacks_have_a_way_too(
    scene: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    references, labels, x, y = scene
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()
    built = ReferenceSet.build(FeatureExtractor(model, ["0", "1"]), (references, labels))
    dknn = DkNN(built, 5).calibrate(references[:30], labels[:30])
    attacks = {"pgd": PGD(steps=3), "blind": pgd_transfer(steps=3)}
    run = evaluate(
        {"dknn": dknn},
        (x, y),
        attacks=attacks,
        threat=ThreatModel("l2", 0.4),
        out=tmp_path / "r",
        options=Options(examples=KEPT, controls=0),
    )
    for name in attacks:
        kept, before = run.tensors(Cell("dknn", name, 0.4)), run.rows(Cell("dknn", CLEAN))
        assert kept["path lead"].shape == (KEPT, 11)
        assert kept["path lead"][:, 0].tolist() == before["margin"][:KEPT].tolist()
        assert kept["voters 1"].shape == (KEPT, 5)
