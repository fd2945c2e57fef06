"""Rejecting by credibility, and attacks that have to be credible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import digits, digits_references, random_classifier, random_net
from torch import Tensor

from robustknn import (
    KNN,
    PGD,
    DkNN,
    InputError,
    IntegrityError,
    NotReadyError,
    Options,
    ThreatModel,
    evaluate,
    finish,
    load_classifier,
    write_report,
)
from robustknn.attacks import Attack, Credible
from robustknn.classifiers import REJECTED, Rejecting, decide
from robustknn.evaluation import Cell
from robustknn.evaluation.rows import succeeds_rounded
from robustknn.evaluation.rundir import CLEAN
from robustknn.objectives.adaptive import Adaptive
from robustknn.recipes import WorstCase

Victim = tuple[DkNN, Tensor, Tensor]


def _held() -> Tensor:
    return torch.rand(60, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def calibrated() -> Victim:
    classifier, x, y = random_classifier(k=5, n=80)
    return classifier.calibrate(_held(), torch.arange(60) % 4), x, y


def test_the_threshold_rejects_at_most_its_share_of_the_calibration_samples(
    calibrated: Victim,
) -> None:
    classifier, _, _ = calibrated
    credibility = classifier.credibility(_held())
    for share in (0.0, 0.05, 0.1, 0.5):
        threshold = classifier.rejection_threshold(share)
        assert float((credibility < threshold).double().mean()) <= share
        higher = credibility[credibility > threshold]
        if len(higher):  # the next possible threshold would reject more than the share
            assert float((credibility < higher.min()).double().mean()) > share
    with pytest.raises(InputError, match="share"):
        classifier.rejection_threshold(1.0)


def test_decisions_and_leads_by_a_plain_count(calibrated: Victim) -> None:
    classifier, x, y = calibrated
    scores = classifier.scores(x)
    credibility = classifier.credibility(x)
    threshold = float(credibility.sort().values[len(x) // 2])
    rejecting = Rejecting(classifier, threshold)
    for i in range(len(x)):
        rejected = float(credibility[i]) < threshold
        assert int(rejecting.labels(x)[i]) == (REJECTED if rejected else int(decide(scores)[i]))
        others = torch.cat([scores[i, : y[i]], scores[i, y[i] + 1 :]])
        vote = float(scores[i, y[i]] - others.max())
        expected = max(vote, threshold - float(credibility[i])) if rejected else vote
        assert float(rejecting.lead(scores, y)[i]) == pytest.approx(expected)


def test_a_credible_example_is_wrong_and_accepted(calibrated: Victim) -> None:
    classifier, x, y = calibrated
    y, threat = classifier.labels(x), ThreatModel("l2", 0.15)
    plain = PGD()(classifier, x, y, threat)
    credible = Credible(PGD(), share=0.5)(classifier, x, y, threat)
    threshold = classifier.rejection_threshold(0.5)
    accepted = classifier.credibility(credible.x_adv) >= threshold
    wrong = classifier.labels(credible.x_adv) != y
    assert torch.equal(credible.success, wrong & accepted)
    assert bool((plain.success | ~credible.success).all())
    assert int(credible.success.sum()) > int((plain.success & (classifier.credibility(plain.x_adv) >= threshold)).sum())
    assert torch.equal(credible.labels, classifier.labels(credible.x_adv))
    assert torch.equal(credible.clean_labels, classifier.labels(x))
    direct = PGD()(Rejecting(classifier, share=0.5), x, y, threat)
    assert torch.equal(direct.x_adv, credible.x_adv)


def test_an_example_that_is_rejected_when_it_is_rounded_succeeds_no_more(calibrated: Victim) -> None:
    classifier, x, _ = calibrated
    y, threat = classifier.labels(x), ThreatModel("l2", 0.15)
    found, threshold = Credible(PGD(), share=0.5)(classifier, x, y, threat), classifier.rejection_threshold(0.5)
    rounded = (found.x_adv * 255).round() / 255
    wrong, accepted = classifier.labels(rounded) != y, classifier.credibility(rounded) >= threshold
    judge = Credible(PGD(), share=0.5).judge(classifier)
    assert torch.equal(succeeds_rounded(judge, found, torch.arange(len(x))), found.success & wrong & accepted)
    # Examples that nobody told of the threshold: some that fool the DkNN are rejected.
    plain = PGD()(classifier, x, y, threat)
    rounded = (plain.x_adv * 255).round() / 255
    wrong, accepted = classifier.labels(rounded) != y, classifier.credibility(rounded) >= threshold
    judged = [succeeds_rounded(by, plain, torch.arange(len(x))) for by in (judge, classifier)]
    assert torch.equal(judged[0], plain.success & wrong & accepted)
    assert int(judged[0].sum()) < int(judged[1].sum())


def test_what_cannot_reject_is_refused() -> None:
    classifier, x, y = random_classifier()
    with pytest.raises(NotReadyError, match="calibrate"):
        Rejecting(classifier, 0.5)
    knn = KNN(classifier.references_, 5, layer="3")
    with pytest.raises(InputError, match="DkNN"):
        Rejecting(knn, 0.5)  # type: ignore[arg-type]
    for bad in (classifier, knn):
        with pytest.raises(InputError, match="calibrate"):
            Credible()(bad, x, y, ThreatModel("l2", 0.1))
    classifier.calibrate(x, y)
    with pytest.raises(InputError, match="either"):
        Rejecting(classifier)
    with pytest.raises(InputError, match="either"):
        Rejecting(classifier, 0.5, share=0.1)
    with pytest.raises(InputError, match="credibility"):
        Rejecting(classifier, 1.5)
    with pytest.raises(InputError, match="share"):
        Credible(share=None)
    with pytest.raises(InputError, match="Attack"):
        Credible(attack="ask")  # type: ignore[arg-type]


def test_the_threshold_survives_saving(calibrated: Victim, tmp_path: Path) -> None:
    classifier, _, _ = calibrated
    place = tmp_path / "dknn"
    classifier.save(place)
    loaded = load_classifier(place, random_net())
    assert isinstance(loaded, DkNN)
    assert loaded.rejection_threshold(0.1) == classifier.rejection_threshold(0.1)
    assert loaded.fingerprint() == classifier.fingerprint()


def test_it_is_saved_with_its_classifier(calibrated: Victim, tmp_path: Path) -> None:
    classifier, x, _ = calibrated
    careful = Rejecting(classifier, 1.0)
    careful.save(tmp_path / "careful")
    loaded = load_classifier(tmp_path / "careful", random_net())
    assert isinstance(loaded, Rejecting)
    assert loaded.threshold == careful.threshold
    assert torch.equal(loaded.labels(x), careful.labels(x))
    assert bool((careful.labels(x) == REJECTED).any())
    assert loaded.fingerprint() == careful.fingerprint()
    with pytest.raises(IntegrityError, match="holds a Rejecting, not a DkNN"):
        DkNN.load(tmp_path / "careful", random_net())
    DkNN(classifier.references_, 3).calibrate(_held(), torch.arange(60) % 4).save(
        tmp_path / "careful" / "classifier", overwrite=True
    )
    with pytest.raises(IntegrityError, match="is not the one that it was saved with"):
        load_classifier(tmp_path / "careful", random_net())


@pytest.mark.parametrize("attack", [PGD(objective=Adaptive(), steps=2), WorstCase("fast")], ids=["adaptive", "suite"])
def test_an_attack_that_is_checked_on_a_rejected_sample_runs(calibrated: Victim, attack: Attack) -> None:
    classifier, x, y = calibrated
    credibility = classifier.credibility(x)
    rejecting = Rejecting(classifier, float(credibility.max()))
    order = credibility.argsort()
    assert int(rejecting.labels(x[order])[0]) == REJECTED
    result = attack(rejecting, x[order], y[order], ThreatModel("l2", 0.1))
    assert torch.equal(rejecting.labels(result.x_adv), result.labels)


def test_a_rejected_example_is_no_tie_on_the_page(tmp_path: Path) -> None:
    source, model = digits()
    references = digits_references(source, model)
    assert source.calibration is not None
    dknn = DkNN(references, 15).calibrate(source.calibration)
    threat, options = ThreatModel("linf", 0.1), Options(examples=6, controls=0)
    x, y = source.test.batch(torch.arange(200, 240)), source.test.labels[200:240]
    named = {"plain": dknn, "rejecting": Rejecting(dknn, share=0.2)}
    run = evaluate(named, (x, y), attacks=["ask"], threat=threat, out=tmp_path / "r", options=options)
    summary = finish(run)
    plain, rejecting = (run.rows(Cell(name, "ask", 0.1)) for name in named)
    rejected = rejecting["prediction"] == REJECTED
    assert bool(rejected.any())
    assert bool((rejecting["robust"] <= rejecting["clean_correct"]).all())
    assert summary.classifiers[1].attacks[0].tied == 0
    # what the summary says of the thresholds, from the rows of the plain one, by hand
    for entry in summary.classifiers[0].attacks[0].rejection:
        assert entry.threshold == dknn.rejection_threshold(entry.share)
        fooled = plain["clean_correct"] & ~plain["robust"]
        caught = plain["credibility"] < entry.threshold
        assert entry.detected == pytest.approx(float((fooled & caught).sum() / fooled.sum()))
        clean = run.rows(Cell("plain", CLEAN))["credibility"] < entry.threshold
        assert entry.clean_rejected == pytest.approx(float(clean.mean()))
        stands = plain["clean_correct"] & ~clean & (~fooled | caught)
        assert entry.robust_accuracy == pytest.approx(float(stands.mean()))
    assert "rejected" in write_report(run).read_text()


def test_nothing_saved_is_lost_by_saving_something_else(calibrated: Victim, tmp_path: Path) -> None:
    classifier, _, _ = calibrated
    place = tmp_path / "here"
    classifier.save(place)
    careful = Rejecting(classifier, 0.5)
    with pytest.raises(InputError, match="exists; choose another path or allow overwriting it"):
        careful.save(place)
    assert load_classifier(place, random_net()).fingerprint() == classifier.fingerprint()
    careful.save(place, overwrite=True)
    assert load_classifier(place, random_net()).fingerprint() == careful.fingerprint()
    assert sorted(p.name for p in place.iterdir()) == ["classifier", "classifier.json"]  # nothing of the first
    with pytest.raises(InputError, match="exists; choose another path"):
        classifier.save(place)
    (place / "classifier" / "mine.txt").write_text("notes")
    with pytest.raises(InputError, match=r"holds 'mine.txt', which is no part of the classifier"):
        classifier.save(place, overwrite=True)
    assert (place / "classifier" / "mine.txt").read_text() == "notes"


def test_a_stop_while_overwriting_leaves_what_was_there(
    calibrated: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, _, _ = calibrated
    careful, place = Rejecting(classifier, 0.5), tmp_path / "here"
    careful.save(place)
    other = Rejecting(DkNN(classifier.references_, 3).calibrate(_held(), torch.arange(60) % 4), 0.25)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("robustknn.store.sync_directory", stop)
        with pytest.raises(KeyboardInterrupt):
            other.save(place, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    assert load_classifier(place, random_net()).fingerprint() == careful.fingerprint()
    # Killed between the two steps of the swap: the old one has stepped aside, the new one is not there.
    place.rename(tmp_path / ".here.old")
    assert load_classifier(place, random_net()).fingerprint() == careful.fingerprint()


def test_what_cannot_be_loaded_says_what_to_pass(calibrated: Victim, tmp_path: Path) -> None:
    classifier, _, _ = calibrated
    Rejecting(classifier, 0.5).save(tmp_path / "here")
    with pytest.raises(InputError, match="saved around a model, which is not saved with it; pass it as model="):
        load_classifier(tmp_path / "here")
    with pytest.raises(InputError, match="model must be a torch module or a FeatureExtractor, not 'x'"):
        load_classifier(tmp_path / "here", "x")  # type: ignore[arg-type]
