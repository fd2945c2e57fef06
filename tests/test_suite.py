"""Attacks made of attacks: who goes on, who is recorded, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small import digits, random_classifier
from torch import Tensor, nn

from robustknn import FGSM, KNN, PGD, InputError, Options, ThreatModel, evaluate, finish, write_report
from robustknn.attacks import Attack, Close, EachTarget, Job, Members
from robustknn.attacks.targets import ranked_classes
from robustknn.classifiers import Classifier, Network, decide
from robustknn.recipes import WorstCase, WorstCaseASKDef
from robustknn.registry import attacks


class Threshold(Classifier):
    """Class 1 where the first coordinate exceeds .5, class 2 where the second does besides, else class 0."""

    n_classes = 3

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        one, two = (x[:, 0] > 0.5).double(), (x[:, 1] > 0.5).double()
        return torch.stack([1 - one, one * (1 - two), one * two], 1)

    def fingerprint(self) -> str:
        return "threshold"


@dataclass(frozen=True)
class Move(Attack):
    """Adds eps to one coordinate, and notes which samples it was given."""

    coordinate: int = 0
    only_even: bool = False

    def run(self, job: Job) -> None:
        rows = torch.arange(len(job.x))
        x = job.x.clone()
        even = job.ids % 2 == 0 if self.only_even else torch.ones_like(job.ids, dtype=torch.bool)
        x[even, self.coordinate] += float(job.threat.eps)
        job.gradient_passes += 1
        job.offer(job.threat.project(x, job.x), rows, job.look(x, rows)[0])


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.4, 0.0]] * 20 + [[0.9, 0.0]] * 2 + [[0.1, 0.1]] * 2), torch.tensor([0] * 24)


def test_only_survivors_go_on_and_the_winner_is_recorded(points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    suite = Members((("even", Move(only_even=True)), ("all", Move()), ("last", Move(coordinate=1))))
    result = suite(Threshold(), x, y, ThreatModel("linf", 0.2))
    fooled_by = [0, 1] * 10 + [-1, -1] + [-1, -1]
    assert result.winner.tolist() == fooled_by
    assert result.success.tolist() == [True] * 22 + [False] * 2
    # wrong without attack: no pass is spent on them; the others go as far as they stand
    assert result.gradient_passes.tolist() == [1, 2] * 10 + [0, 0] + [3, 3]
    assert suite.parts == ("even", "all", "last")
    assert torch.equal(decide(Threshold().scores(result.x_adv)) != y, result.success)


class Slope(Classifier):
    """Class 1 by as much as the first coordinate exceeds .5: the lead of class 0 is 1 − 2 x₀."""

    n_classes = 2

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        return torch.stack([1 - x[:, 0], x[:, 0]], 1).double()

    def fingerprint(self) -> str:
        return "slope"


@dataclass(frozen=True)
class Half(Move):
    """Adds half of eps."""

    def run(self, job: Job) -> None:
        x = job.x + float(job.threat.eps) / 2
        job.gradient_passes += 1
        job.offer(x, torch.arange(len(x)), job.look(x, torch.arange(len(x)))[0])


@pytest.mark.parametrize(("within", "runs"), [(0.2, [2, 1, 1]), (0.1, [1, 1, 1]), (0.7, [2, 2, 1]), (1.0, [2, 2, 2])])
def test_what_is_for_close_samples_runs_on_these_alone(within: float, runs: list[int]) -> None:
    """After half of eps .2, leads of .24, .6 and .9 are .04, .4 and .7: shares of .17, .67 and .78."""
    x, y = torch.tensor([[0.38], [0.2], [0.05]]), torch.zeros(3, dtype=torch.int64)
    suite = Members((("half", Half()), ("whole", Close(Move(), within))))
    found = suite(Slope(), x, y, ThreatModel("linf", 0.2))
    assert found.gradient_passes.tolist() == runs
    assert found.success.tolist() == [runs[0] == 2, False, False]
    assert found.winner.tolist() == [1 if runs[0] == 2 else -1, -1, -1]


@pytest.mark.parametrize(("k", "close"), [(1, []), (3, [1]), (5, [1]), (15, [1])])
def test_a_lead_of_one_vote_is_close_if_it_was_more(k: int, close: list[int]) -> None:
    """The least lead of an odd number of votes is one; all of them are no lead to come from."""
    classifier, _, _ = random_classifier(k=k, layers=("1",), n=80)
    lead = torch.tensor([3.0, 1.0, k]).double() / k
    wanted = Close(PGD()).wants(classifier, lead, torch.tensor([1.0, 1.0, 1.0]).double())
    assert wanted.nonzero()[:, 0].tolist() == close
    assert Close(PGD()).wants(classifier, lead[:2], lead[:2]).tolist() == [False, False]


def test_outside_a_suite_it_is_the_attack() -> None:
    x, y, threat = torch.tensor([[0.38], [0.2]]), torch.zeros(2, dtype=torch.int64), ThreatModel("linf", 0.2)
    found = Close(Move(), 0.0)(Slope(), x, y, threat)
    assert torch.equal(found.x_adv, Move()(Slope(), x, y, threat).x_adv)
    assert not Close(Move()).transfer
    assert Close(attacks.create("pgd-transfer")).transfer
    with pytest.raises(InputError, match="use a black-box attack"):
        Close(PGD())(Slope(), x, y, threat)
    with pytest.raises(InputError, match="attack must be an Attack"):
        Close("pgd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="within"):
        Close(Move(), 1.5)


def test_a_part_that_cannot_work_is_left_out(points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    suite = Members((("ask", PGD()), ("move", Move())))
    assert suite.usable(Threshold(), x[:1]) == ["move"]
    assert set(suite(Threshold(), x, y, ThreatModel("linf", 0.2)).winner.tolist()) == {1, -1}
    with pytest.raises(InputError, match="black-box"):
        Members((("ask", PGD()),))(Threshold(), x, y, ThreatModel("linf", 0.2))


@pytest.mark.parametrize(
    "pairs", [(), (("a", 1),), (("a", Move()), ("a", Move())), ((1, Move()),)], ids=["none", "no attack", "twice", "no"]
)
def test_members_must_be_named_attacks(pairs: tuple[tuple[str, Attack], ...]) -> None:
    with pytest.raises(InputError):
        Members(pairs)


@dataclass(frozen=True)
class Note(Attack):
    """Notes what it is to aim at."""

    def run(self, job: Job) -> None:
        aims.append(None if job.aim is None else job.aim.clone())
        wanted.append(job.target)


aims: list[Tensor | None] = []
wanted: list[Tensor | None] = []


@pytest.fixture
def noted() -> Iterator[None]:
    aims.clear()
    wanted.clear()
    yield
    aims.clear()
    wanted.clear()


@pytest.mark.usefixtures("noted")
def test_each_target_aims_at_one_wrong_class_after_another_nearest_first() -> None:
    classifier, x, _ = random_classifier(k=3, layers=("3",))
    truth = torch.arange(len(x)) % 4
    EachTarget(Note(), targets=9)(classifier, x, truth, ThreatModel("l2", 0.1))
    reached = torch.stack([a for a in aims if a is not None])
    assert reached.shape[0] == 3  # the wrong classes there are
    assert wanted == [None, None, None]  # any wrong class counts
    references, layer = classifier.references_, "3"
    features = classifier.references_.features
    assert features is not None
    z = features(x)[layer].detach()
    distances = torch.cdist(z, references.rows(layer, torch.arange(len(references))))
    near = torch.stack([distances[:, references.labels == c].sort(1).values[:, :2].mean(1) for c in range(4)], 1)
    standing = (decide(classifier.scores(x)) == truth).nonzero()[:, 0]
    for place, i in enumerate(standing.tolist()):
        expected = [c for c in near[i].argsort().tolist() if c != int(truth[i])]
        assert reached[:, place].tolist() == expected
    aims.clear()
    EachTarget(Note())(classifier, x, truth, ThreatModel("l2", 0.1), targets=(truth + 1) % 4)
    assert len(aims) == 1  # a targeted attack has one aim


def test_ranked_classes_leave_out_the_true_one_and_break_ties_by_number() -> None:
    distances = torch.tensor([[1.0, 0.5, 0.5, 0.1], [float("inf"), 2.0, float("inf"), 0.0]])
    assert ranked_classes(distances, torch.tensor([3, 0])).tolist() == [[1, 2, 0], [3, 1, 2]]


def test_a_suite_is_never_weaker_than_its_parts_and_does_not_depend_on_batches() -> None:
    classifier, x, y = random_classifier(k=5)
    threat = ThreatModel("l2", 0.12)
    parts = (("one", PGD(steps=3)), ("two", EachTarget(PGD(steps=5))), ("three", PGD(steps=8, start="random")))
    whole = Members(parts)(classifier, x, y, threat)
    for name, attack in parts:
        alone = attack(classifier, x, y, threat)
        if name != "three":  # random starts are drawn anew for each part
            assert bool((whole.success | ~alone.success).all())
    for size in (1, 7):
        other = Members(parts)(classifier, x, y, threat, batch_size=size)
        for name in ("x_adv", "success", "winner", "margin", "gradient_passes", "forward_passes"):
            assert torch.equal(getattr(whole, name), getattr(other, name)), name


def test_the_worst_case_comes_in_three_strengths_that_contain_each_other() -> None:
    fast, standard, thorough = (
        attacks.create(n).parts for n in ("worst-case-fast", "worst-case", "worst-case-thorough")
    )
    assert set(fast) < set(standard) < set(thorough)
    with pytest.raises(InputError, match="strength"):
        WorstCase("strong")


def test_an_approximate_index_loses_no_part_of_the_worst_case(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, x, _ = random_classifier(k=3)
    for voter in classifier.voters:
        monkeypatch.setattr(voter.index, "exact", False)
    suite = WorstCase()
    # Of RAILS, of Transformed and of what is smoothed.
    others = ("evolved", "evolved-restarts", "knn-stage", "knn-stage-restarts")
    others += ("through-transform", "through-noise", "through-noise-ask", "through-noise-restarts")
    assert suite.usable(classifier, x[:1]) == [p for p in suite.parts if p not in others]


def test_the_summary_tells_which_parts_did_not_run(tmp_path: Path) -> None:
    x = torch.tensor([[0.4, 0.0]] * 20 + [[0.1, 0.1]] * 4)
    suite = Members((("ask", PGD()), ("move", Move())))
    run = evaluate(
        Threshold(), (x, torch.zeros(24, dtype=torch.int64)), attacks={"both": suite}, threat=ThreatModel("linf", 0.2),
        out=tmp_path / "r", options=Options(controls=0),
    )  # fmt: skip
    (attack,) = finish(run).classifiers[0].attacks
    assert [(p.name, p.fooled) for p in attack.parts] == [("ask", None), ("move", pytest.approx(20 / 24))]
    assert "did not run" in write_report(run).read_text()


def test_no_gradient_is_said_where_no_part_had_one(points: tuple[Tensor, Tensor]) -> None:
    classifier, x, y = random_classifier(k=5)
    flat = Members((("move", Flat()), ("ask", PGD(steps=3))))
    threat = ThreatModel("l2", 1e-6)
    standing = classifier.labels(x) == y
    assert not bool(flat(classifier, x, y, threat).zero_gradient.any())
    only = Members((("move", Flat()),))(classifier, x, y, threat)
    assert torch.equal(only.zero_gradient, standing)


def test_the_worst_case_of_a_network_does_not_feel_the_size_of_its_scores() -> None:
    """Cross-entropy does: with scores a thousand times as large most of its gradients are zero."""
    source, model = digits(epochs=4)
    x, y = source.test.batch(torch.arange(60)), source.test.labels[:60]
    left = []
    for scale in (1.0, 1000.0):
        last = nn.Linear(10, 10, bias=False)
        last.weight.data = scale * torch.eye(10)
        found = WorstCase("fast")(Network(nn.Sequential(model, last), 10), x, y, ThreatModel("linf", 0.1))
        left.append(float(found.robust.double().mean()))
    assert left[0] < 0.9
    assert abs(left[0] - left[1]) <= 0.05


@dataclass(frozen=True)
class Flat(Attack):
    """Finds no gradient."""

    def run(self, job: Job) -> None:
        job.gradient_passes += 1
        job.zero_gradient[:] = True


@pytest.mark.parametrize("attacks", ["ab", None, 5, (), (PGD(), PGD()), ((1, PGD()),), {"a": "pgd"}])
def test_members_that_are_no_pairs_are_refused(attacks: Any) -> None:
    with pytest.raises(InputError, match=r"\(name, attack\) pairs"):
        Members(attacks)


def test_members_may_be_a_mapping() -> None:
    assert Members({"a": PGD(), "b": FGSM()}) == Members((("a", PGD()), ("b", FGSM())))


def test_the_worst_case_of_ask_def_looks_at_every_setting_of_its_loss() -> None:
    """Layers one by one and together, both metrics, temperatures, numbers of references; layers that nobody has."""
    classifier, x, _ = random_classifier()
    knn = KNN(classifier.references_, 5, layer="3")
    y, threat = knn.labels(x), ThreatModel("linf", 0.05)
    suite = WorstCaseASKDef(["1", "3"], "fast")
    ways = [each.objective for name, each in suite.members().items() if isinstance(each, PGD)]
    assert suite.role == "worst-case"
    assert {way.layers for way in ways} == {None, ("1",), ("3",), ("1", "3")}
    assert {way.metric for way in ways} == {None, "l2", "cosine"}
    assert {way.temperature for way in ways} >= {0.01, 0.2}
    assert {way.n_neighbors for way in ways} == {None, 1, 50}
    left = int(suite(knn, x, y, threat).robust.sum())
    assert 0 < left <= int(WorstCase("fast")(knn, x, y, threat).robust.sum())
    for name, each in suite.members().items():
        assert int(each(knn, x, y, threat).robust.sum()) >= left, name
    with pytest.raises(InputError, match="strength must be one of"):
        WorstCaseASKDef(strength="slow")
    with pytest.raises(InputError, match="7"):
        WorstCaseASKDef("7")(knn, x, y, threat)
    with pytest.raises(InputError, match="names '1' twice"):
        WorstCaseASKDef(["1", "1"])
