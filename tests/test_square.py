"""Square: its schedule, its geometry, its budget, and what it makes of scores and of labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import random_classifier
from torch import Tensor

from robustknn import KNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks.square import Square, _bump, _Canvas
from robustknn.classifiers import TIE, Classifier, FunctionClassifier, margin

SHAPES = {"image": (3, 9, 7), "gray": (1, 8, 8), "tiny": (2, 2, 2), "series": (2, 11), "vector": (6,), "one": (1,)}
SHAPES["volume"] = (2, 3, 2, 2)
RADII = {"linf": 0.2, "l2": 0.8, "l1": 2.0}


class Linear(Classifier):
    """Two classes by the sign of the sum of all coordinates, and a memory of everything that was asked."""

    n_classes = 2

    def __init__(self, offset: float = 0.0) -> None:
        self.offset, self.asked = offset, []  # type: ignore[var-annotated]

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        self.asked.append((x.clone(), sample_ids))
        value = x.double().flatten(1).mean(1) - self.offset
        return torch.stack([value, -value], 1)

    def fingerprint(self) -> str:
        return str(self.offset)


def inputs(shape: tuple[int, ...], n: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def images() -> tuple[KNN, Tensor, Tensor]:
    """Small images of four classes that nine neighbors tell apart, and 40 to attack."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 4
    x = 0.6 * torch.rand(240, 1, 6, 6, generator=generator) + 0.4 * torch.rand(4, 1, 6, 6, generator=generator)[y]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity())
    return KNN(ReferenceSet.build(FeatureExtractor(model), (x[40:], y[40:])), 9), x[:40], y[:40]


# --------------------------------------------------------------------------------------------- schedule


def test_the_share_is_halved_where_the_paper_says() -> None:
    square = Square(p_init=0.8)
    # Section 5: with 10,000 iterations p is halved at 10, 50, 200, 1000, 2000, 4000, 6000 and 8000.
    table = [(0, 1), (9, 1), (10, 2), (49, 2), (50, 4), (199, 4), (200, 8), (999, 8), (1000, 16), (1999, 16)]
    table += [(2000, 32), (3999, 32), (4000, 64), (5999, 64), (6000, 128), (7999, 128), (8000, 256), (9999, 256)]
    for step, divisor in table:
        assert square.covered(step, 10_000) == 0.8 / divisor
    # Other budgets rescale it: step 5 of 500 is step 100 of 10,000.
    assert [Square(p_init=0.3).covered(s, 500) for s in (0, 1, 3, 5, 100, 499)] == [
        0.3 / d for d in (1, 2, 4, 4, 32, 256)
    ]


def test_the_bump_is_two_pyramids_of_opposite_sign() -> None:
    # By hand: the pyramids of a 3 × 3 window are 1 × 3 and 2 × 3, centered at half their length.
    ring = {0: 1 + 1 / 4, 1: 1 / 4}
    upper = torch.tensor([[ring[1], ring[0], ring[1]]], dtype=torch.float64)
    lower = torch.tensor([[ring[1]] * 3, [ring[1], ring[0], ring[1]]], dtype=torch.float64)
    expected = torch.cat([upper / upper.norm(), -lower / lower.norm()]) / math.sqrt(2)
    assert torch.allclose(_bump((3, 3), "l2"), expected)
    for side in ((1, 2), (1, 7), (5, 5), (8, 8), (1, 1)):
        for norm, order in (("l2", 2), ("l1", 1)):
            assert float(torch.linalg.vector_norm(_bump(side, norm), order)) == pytest.approx(1)


# --------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("norm", RADII)
def test_everything_asked_lies_inside_the_ball_and_the_bounds(norm: str, shape: tuple[int, ...]) -> None:
    for bounds in ((0.0, 1.0), None):
        for dtype in (torch.float32, torch.float64):
            model, x = Linear(-9.0), inputs(shape, dtype=dtype)  # never fooled
            threat = ThreatModel(norm, torch.linspace(0.01, RADII[norm], 5), bounds)
            result = Square(queries=25)(model, x, torch.zeros(5, dtype=torch.long), threat, seed=2)
            assert len(model.asked) == 25
            assert bool((result.forward_passes == 25).all())
            assert int(result.gradient_passes.sum()) == 0
            for asked, ids in model.asked:
                where = ids.tolist()
                far = threat.select(ids).distance(asked.double(), x[where].double())
                assert bool((far <= threat.eps[ids].double() * (1 + 1e-6)).all())  # type: ignore[index]
                assert bounds is None or (float(asked.min()) >= 0 and float(asked.max()) <= 1)
            assert result.x_adv.dtype == dtype
            assert result.x_adv.shape == x.shape


def canvas(shape: tuple[int, ...], norm: str, eps: float, n: int = 40) -> tuple[_Canvas, Tensor]:
    x = torch.full((n, *shape), 0.5, dtype=torch.float64)
    return _Canvas(x, torch.arange(n), ThreatModel(norm, eps), 0, 0), x


def test_linf_starts_with_stripes_and_changes_one_square() -> None:
    drawn, x = canvas((3, 8, 6), "linf", 0.1)
    start = drawn.start()
    assert torch.allclose((start - x).abs(), torch.full_like(x, 0.1))
    assert torch.equal(start, start[:, :, :1].expand(-1, -1, 8, -1))  # a sign for each column and channel
    covered = 0.2
    moved = drawn.propose(start, 3, covered)
    changed = (moved != start).any(1)
    side = round(math.sqrt(covered * 8 * 6))
    assert bool(changed.flatten(1).any(1).all())  # no proposal is wasted
    seen = set()
    for image, delta in zip(changed, moved - x, strict=True):
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        assert int(rows[-1] - rows[0]) < side
        assert int(columns[-1] - columns[0]) < side
        assert torch.allclose(delta.abs(), torch.full_like(delta, 0.1))
        seen |= {(int(rows[0]), int(columns[0]))}
    assert len(seen) > 8  # every sample has its own place


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_bump_spends_the_whole_radius_and_leaves_the_rest_in_proportion(norm: str) -> None:
    order = 2 if norm == "l2" else 1
    drawn, x = canvas((2, 10, 10), norm, 0.5)
    start = drawn.start()
    sizes = torch.linalg.vector_norm((start - x).flatten(1), order, dim=1)
    assert torch.allclose(sizes, torch.full_like(sizes, 0.5))
    assert bool(((start - x) != 0).flatten(1).all(1).all())  # 5 × 5 tiles of 2 × 2 cover it
    moved = drawn.propose(start, 0, 0.09)  # windows of 3 × 3
    delta, before = moved - x, start - x
    sizes = torch.linalg.vector_norm(delta.flatten(1), order, dim=1)
    assert torch.allclose(sizes, torch.full_like(sizes, 0.5))
    emptied = (delta == 0).all(1).flatten(1).sum(1)
    assert bool(((emptied <= 9) & (emptied >= 0)).all())
    assert int((emptied == 9).sum()) > 20  # the windows seldom meet
    ratio = delta / before
    for r in ratio:  # outside the two windows all is scaled alike
        usual = r.flatten().median()
        assert int(((r - usual).abs() < 1e-9).sum()) >= 200 - 2 * 2 * 9


def test_the_windows_reach_every_place() -> None:
    drawn, _ = canvas((1, 5, 5), "linf", 0.1, n=400)
    inside, _ = drawn._window((2, 2), "there")
    assert torch.equal(inside.flatten(1).sum(1), torch.full((400,), 4))
    assert len({tuple(w.flatten().tolist()) for w in inside}) == 16  # 4 × 4 places


# ------------------------------------------------------------------------------------- what comes out of it


def test_it_finds_what_a_linear_classifier_gives_away() -> None:
    """The mean moves by at most eps: exactly those whose mean is below it can be fooled, and are."""
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2 + 0.4
    y = (x.flatten(1).mean(1) - 0.5 < 0).long()
    lead = (x.flatten(1).mean(1) - 0.5).abs()
    eps = float(lead.median())
    result = Square(queries=800)(Linear(0.5), x, y, ThreatModel("linf", eps))
    assert not bool(result.success[lead > eps * 1.000001].any())
    assert bool(result.success[lead < 0.98 * eps].all())


def test_a_tie_counts_for_the_defender() -> None:
    tied = FunctionClassifier(lambda x: torch.zeros(len(x), 3), 3, kind="scores")
    x = inputs((1, 4, 4))
    result = Square(queries=12)(tied, x, torch.tensor([0, 1, 2, 0, 1]), ThreatModel())
    assert not bool(result.success.any())
    assert bool((result.forward_passes == 12).all())


def test_equal_answers_move_on_unless_told_otherwise() -> None:
    """Scores that only tell the decision: with "better" every proposal is one square away from the first one."""
    x = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    for accept, walks in (("better", False), ("equal", True)):
        model = Linear(-9.0)
        model.scores = lambda x, ids=None, m=model: (m.asked.append(x.clone()), torch.eye(2)[[0] * len(x)].double())[1]  # type: ignore[method-assign,misc]
        Square(queries=40, accept=accept)(model, x, torch.zeros(1, dtype=torch.long), ThreatModel("linf", 0.1))
        first = model.asked[1][0]
        differing = [int((asked[0] != first).any(0).sum()) for asked in model.asked[2:]]
        side = [max(1, round(math.sqrt(Square().covered(t, 38) * 64))) for t in range(38)]
        within = all(d <= s * s for d, s in zip(differing, side, strict=True))
        assert within is not walks


def test_labels_alone_are_enough_and_tell_less() -> None:
    classifier, x, y = images()
    threat = ThreatModel("linf", 0.15)
    asked = []
    for feedback in ("scores", "labels"):
        result = Square(queries=150, feedback=feedback)(classifier, x, y, threat)
        assert torch.equal(result.success, margin(classifier.scores(result.x_adv), y) < -TIE)
        asked.append(float(result.forward_passes.double().sum()))
    assert asked[0] < asked[1]
    # Where no vote ties, scores beside the decision make no difference to the search by labels.
    odd, x, y = random_classifier(k=5, layers=("3",), n_classes=2)
    one, other = (
        Square(queries=80, feedback="labels")(c, x, y, ThreatModel("linf", 0.05))
        for c in (odd, FunctionClassifier(odd.labels, 2))
    )
    assert 0 < int(one.success.sum()) < 12
    assert torch.equal(one.success, other.success)
    assert torch.equal(one.x_adv[one.success], other.x_adv[one.success])


@pytest.mark.parametrize("norm", RADII)
def test_the_same_in_every_batch_and_never_more_queries_than_allowed(norm: str) -> None:
    classifier, x, y = images()
    x, y = x[:15], y[:15]
    attack, threat = Square(queries=31, restarts=3), ThreatModel(norm, {"linf": 0.15, "l2": 0.6, "l1": 2.0}[norm])
    whole = attack(classifier, x, y, threat, seed=5)
    assert 0 < int(whole.success.sum()) < len(x)
    assert int(whole.forward_passes.max()) == 31
    wrong = whole.clean_labels != y
    assert bool((whole.forward_passes[wrong] == 1).all())
    for size in (1, 7):
        parts = attack(classifier, x, y, threat, seed=5, batch_size=size)
        for name in ("x_adv", "success", "forward_passes", "margin"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    other = attack(classifier, x, y, threat, seed=6)
    assert not torch.equal(other.x_adv, whole.x_adv)
    assert torch.equal(attack(classifier, x, y, threat.with_eps(0.0)).x_adv, x)


def test_targets_are_reached_strictly() -> None:
    classifier, x, y = random_classifier(k=3)
    target = (y + 1) % 4
    result = Square(queries=400)(classifier, x, y, ThreatModel("linf", 1.0), targets=target)
    scores = classifier.scores(result.x_adv)
    assert torch.equal(result.success, margin(scores, target) > TIE)
    assert int(result.success.sum()) >= 4


def test_votes_on_images_give_way() -> None:
    knn, x, y = images()
    for norm, eps in (("linf", 0.15), ("l2", 0.6), ("l1", 3.0)):
        threat = ThreatModel(norm, eps)
        clean = float((knn.labels(x) == y).double().mean())
        left = [float(Square(queries=q)(knn, x, y, threat).robust.double().mean()) for q in (2, 10, 300)]
        assert clean > 0.9
        assert clean >= left[0] >= left[1] > left[2] + 0.2


def test_it_is_made_by_name_and_refuses_what_cannot_work() -> None:
    assert registry.attacks.create("square", queries=7) == Square(queries=7)
    bad: list[dict[str, Any]] = [{"queries": 0}, {"p_init": 0.0}, {"p_init": 1.5}, {"restarts": 0}]
    bad += [{"feedback": "logits"}, {"accept": "all"}]
    for settings in bad:
        with pytest.raises(InputError, match=next(iter(settings))):
            Square(**settings)
