"""Detection by a score, against scikit-learn, counts by hand and DkNN's own thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from small import random_classifier
from torch import Tensor

from robustknn import KNN, DkNN, InputError, NotReadyError, ThreatModel
from robustknn.attacks import PGD
from robustknn.classifiers import Network, Rejecting
from robustknn.evaluation import ROC, Detection, detect, detect_by_credibility, neighbor_distance, roc, threshold_at
from robustknn.evaluation.metrics import wilson
from robustknn.reports.roc import roc_chart


def held() -> Tensor:
    return torch.rand(60, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def calibrated() -> tuple[DkNN, Tensor, Tensor]:
    classifier, x, y = random_classifier(k=5, n=80)
    return classifier.calibrate(held(), torch.arange(60) % 4), x, y


def at_every_step(curve: ROC) -> set[tuple[float, float]]:
    return set(zip(curve.false_positive_rate.tolist(), curve.detection_rate.tolist(), strict=True))


# ------------------------------------------------------------------------------------------------ ROC


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("suspicious", ["low", "high"])
def test_curve_and_area_are_those_of_scikit_learn(suspicious: str, rounded: bool) -> None:
    generator = np.random.default_rng(0)
    clean, adversarial = generator.normal(0, 1, 70), generator.normal(0.8, 1.3, 45)
    if rounded:
        clean, adversarial = clean.round(), adversarial.round()
    truth = np.repeat([0, 1], [70, 45])
    scores = np.concatenate([clean, adversarial])
    sign = -1 if suspicious == "low" else 1
    found = roc(sign * clean, torch.from_numpy(sign * adversarial), suspicious=suspicious)
    assert found.auc == pytest.approx(roc_auc_score(truth, scores))
    false, true, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(found.false_positive_rate, false)
    assert np.allclose(found.detection_rate, true)
    assert np.allclose(sign * found.thresholds[1:], thresholds[1:])
    assert found.thresholds[0] == sign * np.inf


def test_a_curve_by_hand() -> None:
    # Credibilities: clean .9 .5 .5 .2, adversarial .5 .1.
    found = roc([0.9, 0.5, 0.5, 0.2], [0.5, 0.1], suspicious="low")
    assert found.thresholds.tolist() == [-np.inf, 0.1, 0.2, 0.5, 0.9]
    assert found.false_positive_rate.tolist() == [0, 0, 0.25, 0.75, 1]
    assert found.detection_rate.tolist() == [0, 0.5, 0.5, 1, 1]
    # pairs won: .1 wins 4; .5 loses to .2, ties with two, wins one → (4 + 2) / 8
    assert found.auc == pytest.approx(6 / 8)


def test_scores_that_say_nothing_and_everything() -> None:
    assert roc([1.0, 1.0], [1.0]).auc == 0.5
    assert roc([0.0, 1.0], [2.0, 3.0]).auc == 1
    assert roc([2.0, 3.0], [0.0, 1.0]).auc == 0


# ---------------------------------------------------------------------------------------- thresholds


def test_thresholds_come_from_calibration_alone() -> None:
    calibration = np.arange(1.0, 21.0)  # of 20, one is 5 %
    assert threshold_at(calibration, 0.0) == 20
    assert threshold_at(calibration, 0.05) == 19
    assert threshold_at(calibration, 0.1) == 18
    assert threshold_at(calibration, 0.05, suspicious="low") == 2
    clean, adversarial = [1.0, 19.0, 19.5, 30.0], [18.5, 19.0, 19.1]
    found = detect(calibration, clean, adversarial, shares=(0.05, 0.1))
    assert [p.clean_rejected for p in found.points] == [0.5, 0.75]
    assert [p.detected for p in found.points] == [pytest.approx(1 / 3), 1]
    assert found.points[0].detected_interval == wilson(1, 3)
    assert (found.n_clean, found.n_adversarial) == (4, 3)
    other = detect(calibration, [25.0], adversarial, shares=(0.05, 0.1))
    assert [p.threshold for p in other.points] == [p.threshold for p in found.points]


@pytest.mark.parametrize("suspicious", ["low", "high"])
def test_a_threshold_rejects_at_most_its_share_and_is_the_strictest(suspicious: str) -> None:
    scores = np.random.default_rng(1).integers(0, 30, 200).astype(float)  # with ties
    sign = -1 if suspicious == "low" else 1
    for share in (0.0, 0.01, 0.05, 0.1, 0.5):
        threshold = threshold_at(sign * scores, share, suspicious=suspicious)
        rejected = scores > sign * threshold
        assert rejected.mean() <= share
        beyond = scores >= sign * threshold  # one step stricter
        assert beyond.mean() > share


def test_every_point_lies_on_the_curve() -> None:
    generator = np.random.default_rng(2)
    clean, adversarial = generator.normal(0, 1, 300).round(1), generator.normal(1, 1, 100).round(1)
    found = detect(generator.normal(0, 1, 500).round(1), clean, adversarial)
    assert [p.share for p in found.points] == [0.01, 0.05, 0.1]
    assert {(p.clean_rejected, p.detected) for p in found.points} <= at_every_step(found.roc)
    assert found.to_markdown().count("\n| ") == 3
    assert f"AUC {found.roc.auc:.3f} (300 clean, 100 adversarial)" in found.to_markdown()


# --------------------------------------------------------------------------------------- classifiers


def test_credibility_detects_what_rejecting_rejects() -> None:
    classifier, x, _ = calibrated()
    y = classifier.labels(x)
    result = PGD()(classifier, x, y, ThreatModel("l2", 0.15))
    attacked = result.x_adv[result.success]
    found = detect_by_credibility(classifier, x, attacked, shares=(0.05, 0.3))
    for point in found.points:
        rejecting = Rejecting(classifier, share=point.share)
        assert point.threshold == rejecting.threshold
        assert point.clean_rejected == float((rejecting.labels(x) < 0).double().mean())
        assert point.detected == float((rejecting.labels(attacked) < 0).double().mean())
    assert found.roc.auc == roc(classifier.credibility(x), classifier.credibility(attacked), suspicious="low").auc


def test_thresholds_of_credibility_are_those_of_the_dknn() -> None:
    classifier, _, _ = calibrated()
    scores = classifier.credibility(held())
    for share in (0.0, 0.01, 0.05, 0.1, 0.5):
        assert threshold_at(scores, share, suspicious="low") == classifier.rejection_threshold(share)


def test_neighbor_distance_is_a_plain_mean() -> None:
    classifier, x, _ = random_classifier(k=3)
    expected = []
    for layer, z in classifier.read(x, ["1", "3"]).items():
        rows = classifier.references_.vectors(layer)[0]
        expected.append(torch.cdist(z, rows).sort(1).values[:, :3].mean(1))
    plain = (expected[0] * expected[1]).sqrt()
    assert torch.allclose(neighbor_distance(classifier, x), plain)
    assert torch.allclose(neighbor_distance(classifier, x, batch_size=5), plain)
    one = KNN(classifier.references_, 3, layer="3")
    assert torch.allclose(neighbor_distance(one, x), expected[1])


def test_what_cannot_be_judged_is_refused() -> None:
    classifier, x, _ = random_classifier()
    with pytest.raises(NotReadyError, match="calibrate"):
        detect_by_credibility(classifier, x, x)
    with pytest.raises(InputError, match="DkNN"):
        detect_by_credibility(KNN(classifier.references_, 3, layer="3"), x, x)  # type: ignore[arg-type]
    assert classifier.extractor is not None
    with pytest.raises(InputError, match="no neighbors"):
        neighbor_distance(Network(classifier.extractor, 4), x)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="inner products"):
        neighbor_distance(KNN(classifier.references_, 3, layer="3", metric="ip"), x)
    with pytest.raises(InputError, match="at least one"):
        roc([], [1.0])
    with pytest.raises(InputError, match="NaN"):
        roc([1.0], [float("nan")])
    with pytest.raises(InputError, match="suspicious"):
        roc([1.0], [1.0], suspicious="middle")
    with pytest.raises(InputError, match="share"):
        threshold_at([1.0], 1.0)


def test_the_chart_shows_every_curve() -> None:
    generator = np.random.default_rng(2)

    def one(shift: float) -> Detection:
        return detect(generator.normal(size=50), generator.normal(size=40), generator.normal(shift, 1, 30))

    chart = roc_chart({"credibility": one(1), "distance": one(2)})
    text = chart.svg.decode()
    assert "credibility, AUC" in text
    assert "distance, AUC" in text
    assert "1, 5, 10 %" in chart.caption
    assert chart.png.startswith(b"\x89PNG")
    with pytest.raises(InputError, match="at least one"):
        roc_chart({})
