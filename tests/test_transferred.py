"""Examples made on one classifier and shown to another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import random_classifier, random_net

from robustknn import KNN, PGD, FeatureExtractor, InputError, Options, ReferenceSet, ThreatModel, evaluate, finish
from robustknn.attacks import Transferred
from robustknn.classifiers import Network
from robustknn.evaluation import transferability
from robustknn.objectives import ASK

THREAT = ThreatModel("linf", 0.2)


def other() -> Network:
    return Network(random_net(seed=1), 4)


def test_the_examples_are_those_of_the_source() -> None:
    classifier, x, _ = random_classifier()
    y = classifier.labels(x)
    inner = PGD(objective=ASK(), steps=5, keep="last", start="random")
    source = random_classifier(k=3, seed=1)[0]
    result = Transferred(source, inner)(classifier, x, y, THREAT, seed=4)
    there = inner(source, x, y, THREAT, seed=4)
    assert torch.equal(result.x_adv, there.x_adv)
    assert torch.equal(result.labels, classifier.labels(there.x_adv))
    assert torch.equal(result.clean_labels, y)
    assert torch.equal(result.gradient_passes, there.gradient_passes)
    assert not torch.equal(result.success, there.success)  # the two do not fall for the same
    assert Transferred(source, inner).transfer


def test_on_the_classifier_itself_it_is_the_attack() -> None:
    classifier, x, y = random_classifier()
    inner = PGD(objective=ASK(), steps=5, keep="last")
    assert torch.equal(
        Transferred(classifier, inner)(classifier, x, y, THREAT).success, inner(classifier, x, y, THREAT).success
    )


def test_an_evaluation_counts_what_a_transfer_matrix_counts(tmp_path: Path) -> None:
    classifier, x, y = random_classifier()
    y = classifier.labels(x)
    attack = Transferred(other())
    run = evaluate(
        classifier,
        (x, y),
        attacks={"black-box": attack},
        threat=THREAT,
        out=tmp_path / "r",
        options=Options(controls=0),
    )
    (found,) = finish(run).classifiers[0].attacks
    matrix = transferability({"source": other()}, x, y, attack.attack, THREAT, targets={"knn": classifier})
    assert found.transfer
    tied = 0 if found.tied is None else found.tied
    assert found.robust_accuracy - tied == pytest.approx(matrix.accuracy[1][0])
    assert 0 < matrix.accuracy[1][0] < 1
    told = run.header["plan"]["attacks"]["black-box"]["source"]
    assert told == {"type": "Network", "fingerprint": other().fingerprint()}


def test_a_source_that_cannot_serve_is_refused() -> None:
    classifier, x, y = random_classifier()
    with pytest.raises(InputError, match="needs the classifier that examples are made on"):
        Transferred()(classifier, x, y, THREAT)
    with pytest.raises(InputError, match="source is a model"):
        Transferred(random_net())  # type: ignore[arg-type]
    few = Network(torch.nn.Linear(6, 3).double(), 3)
    with pytest.raises(InputError, match="3 classes apart and the classifier 4"):
        Transferred(few)(classifier, x, y, THREAT)
    named = KNN(features=FeatureExtractor(random_net(), ["1"])).fit(x.numpy(), list("abcd" * 3))
    with pytest.raises(InputError, match="other names"):
        Transferred(named)(classifier, x, y, THREAT)
    with pytest.raises(InputError, match="attack must be an Attack"):
        Transferred(classifier, "pgd")  # type: ignore[arg-type]


def test_a_gray_box_has_references_of_its_own() -> None:
    """The same network, other references: the examples cross over, though less surely than the classifier's own."""
    classifier, x, _ = random_classifier(n=200)
    y = classifier.labels(x)
    theirs = torch.rand(80, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    labels = classifier.labels(theirs)
    references = ReferenceSet.build(classifier.extractor, (theirs, labels), n_classes=4)
    gray = Transferred(type(classifier)(references, 5), PGD(objective=ASK()))(classifier, x, y, THREAT)
    white = PGD(objective=ASK())(classifier, x, y, THREAT)
    assert int(white.robust.sum()) <= int(gray.robust.sum()) < len(y)
