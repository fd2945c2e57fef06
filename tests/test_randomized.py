"""Classifiers that draw random numbers: what examples do in draws that no attack has seen, against what is expected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small import digits
from torch import Tensor

from robustknn import FeatureExtractor, Network, ReferenceSet, ThreatModel, rng
from robustknn.attacks import Attack, Members
from robustknn.attacks.base import Job
from robustknn.certification import Smoothed, SmoothedEmbedding
from robustknn.classifiers import JPEG, KNN, RAILS, Classifier, RandomCrop, Randomized, Transformed
from robustknn.cli.printing import print_run
from robustknn.errors import InputError
from robustknn.evaluation import Options, evaluate, finish
from robustknn.evaluation.rows import fresh_columns


class Coin(Randomized):
    """Class 0 with probability x, else class 1: what any number of draws gives is known."""

    n_classes = 2

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        ids = torch.arange(len(x)) if sample_ids is None else sample_ids
        won = rng.uniform(ids, (1,), self.seed, "coin", dtype=torch.float64)[:, 0] < x[:, 0].double()
        return torch.stack([won, ~won], 1).double()

    def fingerprint(self) -> str:
        return f"{self.seed:064x}"


@dataclass(frozen=True)
class Lower(Attack):
    """Takes as much from every value as it may."""

    def run(self, job: Job) -> None:
        rows = torch.arange(len(job.x))
        job.begin(job.look(job.x, rows)[0])
        low = (job.x - float(job.threat.select(rows).radii(job.x).max())).clamp_min(0)
        job.settle(low, rows, job.look(low, rows)[0])


def test_the_share_of_fresh_draws_is_the_probability() -> None:
    x = torch.linspace(0, 1, 11)[:, None]
    y = torch.zeros(11, dtype=torch.int64)
    found = Coin().fooled(x, y, draws=2000)
    assert torch.allclose(found, 1 - x[:, 0].double(), atol=4 * 0.5 / 2000**0.5)
    assert found[0] == 1
    assert found[-1] == 0
    assert torch.equal(Coin().fooled(x, y, draws=50), Coin().fooled(x, y, draws=50))
    assert not torch.equal(Coin().fooled(x, y, draws=50), Coin().fooled(x, y, draws=50, seed=2))
    with pytest.raises(InputError, match="draws"):
        Coin().fooled(x, y, draws=0)


class Shy(Coin):
    """A coin that does not decide about x = 1: who attacks such an input has won nothing."""

    def decide(self, scores: Tensor) -> Tensor:
        return torch.where(scores.isnan().any(1), -1, super().decide(scores.nan_to_num()))

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        scores = super().scores(x, sample_ids)
        scores[x[:, 0] == 1] = torch.nan
        return scores

    def lead(self, scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
        return torch.where(scores.isnan().any(1), 0.0, super().lead(scores.nan_to_num(), y, target))


def test_no_decision_is_an_error_without_attack_and_none_under_it() -> None:
    x, ids, y = torch.tensor([[1.0], [1.0], [0.5]]), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    assert fresh_columns(Shy(), x, None, y, ids, 400)["fresh"][:2].tolist() == [0, 0]
    clean = torch.full((3, 1), 0.5)
    assert torch.equal(fresh_columns(Shy(), x, clean, y, ids, 50)["fresh"][:2], torch.zeros(2).double())
    alone = fresh_columns(Shy(), clean, None, y, ids, 50)["fresh"]
    assert torch.equal(fresh_columns(Shy(), clean, x, y, ids, 50)["fresh"][:2], alone[:2])
    assert bool(((alone > 0.2) & (alone < 0.8)).all())


def test_a_run_shows_both_accuracies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n, eps = 400, 0.2
    x = torch.linspace(0.4, 0.9, n)[:, None]
    y = torch.zeros(n, dtype=torch.int64)
    run = evaluate(
        {"coin": Coin()},
        (x, y),
        attacks={"lower": Lower()},
        threat=ThreatModel("linf", eps),
        out=tmp_path / "r",
        options=Options(batch_size=64, controls=0, fresh_draws=5),
    )
    found = finish(run).classifiers[0]
    drawn = rng.uniform(torch.arange(n), (1,), 0, "coin", dtype=torch.float64)[:, 0]
    assert found.clean_accuracy == pytest.approx(float((drawn < x[:, 0].double()).double().mean()))
    assert found.attacks[0].robust_accuracy == pytest.approx(float((drawn < x[:, 0].double() - eps).double().mean()))
    spread = 4 * 0.5 / (5 * n) ** 0.5
    assert found.fresh_accuracy == pytest.approx(0.65, abs=spread)
    assert found.attacks[0].fresh_accuracy == pytest.approx(0.45, abs=spread)
    print_run(run)
    said = capsys.readouterr().out
    assert "accuracy over 5 fresh draws" in said
    assert f"{100 * found.attacks[0].fresh_accuracy:.1f} %" in said


def test_it_may_be_left_out_and_is_nothing_where_nothing_is_random(tmp_path: Path) -> None:
    x, y = torch.rand(6, 1), torch.zeros(6, dtype=torch.int64)
    given = {"attacks": {"lower": Lower()}, "threat": ThreatModel("linf", 0.1)}
    run = evaluate({"coin": Coin()}, (x, y), out=tmp_path / "r", options=Options(controls=0, fresh_draws=0), **given)
    assert finish(run).classifiers[0].fresh_accuracy is None
    with pytest.raises(InputError, match="fresh_draws"):
        evaluate({"coin": Coin()}, (x, y), out=tmp_path / "s", options=Options(fresh_draws=-1), **given)


def test_who_is_random_and_draws_anew() -> None:
    source, model = digits()
    references = ReferenceSet.build(FeatureExtractor(model, ["relu3"]), source.train, keep_images=True)
    x = source.test.batch(torch.arange(12))
    noisy = 0.6
    random: list[Randomized] = [
        RAILS(references, population=40, generations=2, n_neighbors=3, plasma=0.2),
        Transformed(model, 10, RandomCrop(size=7)),
        Smoothed(KNN(references, 5), noisy, 20),
        SmoothedEmbedding(KNN(references, 5, metric="cosine"), noisy, 20),
    ]
    for classifier in random:
        assert classifier.random
        again = classifier.with_seed(classifier.seed)
        assert torch.equal(again.scores(x), classifier.scores(x))
        assert any(not torch.equal(classifier.with_seed(s).scores(x), classifier.scores(x)) for s in (1, 2, 3))
        assert classifier.with_seed(1).fingerprint() != classifier.fingerprint()
        shares = classifier.fooled(x, source.test.labels[:12], draws=2)
        assert bool(((shares >= 0) & (shares <= 1)).all())
    fixed: list[Classifier] = [Transformed(model, 10, JPEG()), Network(model, 10), KNN(references, 5)]
    assert not any(isinstance(c, Randomized) and c.random for c in fixed)


class Leaning(Coin):
    """Scores x and 1 − x, whatever is drawn; `chance` says whether it counts as random."""

    def __init__(self, chance: bool) -> None:
        super().__init__()
        self.chance = chance

    @property
    def random(self) -> bool:
        return self.chance

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        return torch.cat([x, 1 - x], 1).double()


@dataclass(frozen=True)
class To(Attack):
    """Moves to a value."""

    value: float = 0.0

    def run(self, job: Job) -> None:
        rows = torch.arange(len(job.x))
        job.begin(job.look(job.x, rows)[0])
        there = torch.full_like(job.x, self.value)
        job.offer(there, rows, job.look(there, rows)[0])


@pytest.mark.parametrize("chance", [True, False])
def test_a_narrow_win_is_not_enough_where_draws_decide(chance: bool) -> None:
    """What wins by a hair is lost in the next draw; where nothing is drawn it is won for good."""
    x, y = torch.full((5, 1), 0.9), torch.zeros(5, dtype=torch.int64)
    suite = Members((("narrow", To(0.45)), ("wide", To(0.1)), ("wider", To(0.0))))
    result = suite(Leaning(chance), x, y, ThreatModel("linf", 1.0))
    assert result.success.all()
    assert torch.equal(result.x_adv, torch.full_like(x, 0.1 if chance else 0.45))
    assert (result.winner == (1 if chance else 0)).all()
