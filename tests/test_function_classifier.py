"""A function as a classifier: what it may answer, what it is asked, how it is attacked and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustknn import KNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, evaluate
from robustknn.attacks import FGSM, PGD, Square
from robustknn.classifiers import FunctionClassifier
from robustknn.evaluation import finish
from robustknn.evaluation.rows import succeeds_rounded
from robustknn.objectives import CrossEntropy
from robustknn.reports.checks import checks_of

generator = torch.Generator().manual_seed(3)
Y = torch.arange(24) % 3
X = (0.2 + 0.25 * Y[:, None] + 0.05 * torch.rand(24, 5, generator=generator)).clamp(0, 1)
THREAT = ThreatModel("linf", 0.15)


def label(x: Tensor) -> Tensor:
    """The mean of the coordinates in three parts: .35 and .6 are the borders."""
    mean = x.mean(1)
    return (mean > 0.35).long() + (mean > 0.6).long()


def score(x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return -(mean - torch.tensor([[0.225, 0.475, 0.725]]).to(x)).abs()


ANSWERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "torch labels": (label, {}),
    "torch int32": (lambda x: label(x).int(), {}),
    "whole numbers as floats": (lambda x: label(x).float(), {}),
    "a list": (lambda x: label(x).tolist(), {}),
    "numpy to numpy": (lambda x: label(torch.from_numpy(x)).numpy(), {"inputs": "numpy"}),
    "numpy to list": (lambda x: label(torch.from_numpy(x)).tolist(), {"inputs": "numpy"}),
    "scores": (score, {"kind": "scores"}),
    "scores, numpy": (lambda x: score(torch.from_numpy(x)).numpy(), {"kind": "scores", "inputs": "numpy"}),
    "scores with a gradient": (lambda x: score(x.requires_grad_(True)), {"kind": "scores"}),
    "whole scores": (lambda x: (100 * score(x)).round().long(), {"kind": "scores"}),
    "in float64": (label, {"dtype": torch.float64}),
    "two at a time": (label, {"batch_size": 2}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_form_of_answer_decides_alike(name: str) -> None:
    f, settings = ANSWERS[name]
    classifier = FunctionClassifier(f, 3, **settings)
    scores = classifier.scores(X)
    assert scores.dtype == torch.float64
    assert scores.shape == (24, 3)
    assert not scores.requires_grad
    assert torch.equal(classifier.labels(X), Y)
    if settings.get("kind") != "scores":
        assert torch.equal(scores, torch.eye(3, dtype=torch.float64)[Y])
    result = Square(queries=60)(classifier, X, Y, THREAT)
    assert bool(result.success.any())
    assert bool((label(result.x_adv)[result.success] != Y[result.success]).all())
    assert bool((label(result.x_adv)[~result.success] == Y[~result.success]).all())


def test_names_of_classes_are_what_labels_mean() -> None:
    names = ["ant", "bee", "cow"]
    classifier = FunctionClassifier(lambda x: [names[i] for i in label(x)], names)
    y = np.asarray(names)[Y.numpy()]
    assert classifier.scores(X).argmax(1).tolist() == Y.tolist()
    result = Square(queries=40)(classifier, X, y, THREAT, targets=np.roll(names, -1)[Y.numpy()])
    assert torch.equal(result.y, Y)
    with pytest.raises(InputError, match="what f returned holds the label 'dog', a class that"):
        FunctionClassifier(lambda x: ["dog"] * len(x), names).scores(X)
    with pytest.raises(InputError, match="holds the label 0, a class that"):
        Square(queries=2)(classifier, X, Y, THREAT)


BAD: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "too few": (lambda x: label(x)[1:], "labels", r"shape \(23,\) for 24 inputs; labels have shape \(24,\)"),
    "scores as labels": (score, "labels", "if these are scores, pass kind='scores'"),
    "labels as scores": (label, "scores", "if these are labels, pass kind='labels'"),
    "a class too many": (lambda x: label(x) + 1, "labels", r"holds the label 3, outside 0\.\.2"),
    "below zero": (lambda x: label(x) - 1, "labels", "holds the label -1"),
    "fractions": (lambda x: x.mean(1), "labels", "class labels are integers"),
    "nothing": (lambda x: None, "labels", r"shape \(\) for 24 inputs"),
    "text": (lambda x: ["a"] * len(x), "labels", "must be a tensor or an array of numbers"),
    "other classes": (lambda x: score(x)[:, :2], "scores", r"shape \(24, 2\) for 24 inputs; scores of 3 classes"),
    "NaN": (lambda x: score(x) * float("nan"), "scores", "what f returned has NaN or infinite values"),
    "infinite": (lambda x: score(x) / 0, "scores", "NaN or infinite"),
    "complex": (lambda x: score(x) + 1j, "scores", "complex; scores are real numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_cannot_be_read_is_one_sentence(name: str) -> None:
    f, kind, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        FunctionClassifier(f, 3, kind=kind).scores(X)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((label, 0), {}, "n_classes"),
        ((label, []), {}, "n_classes"),
        ((label, ["a", "a"]), {}, "distinct"),
        (("label", 3), {}, "f must be a function"),
        ((label, 3), {"kind": "logits"}, "kind"),
        ((label, 3), {"inputs": "jax"}, "inputs"),
        ((label, 3), {"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_made(arguments: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FunctionClassifier(*arguments, **settings)


def test_it_is_asked_for_every_sample_once_and_cannot_spoil_the_inputs() -> None:
    asked: list[Tensor] = []

    def greedy(x: Tensor) -> Tensor:
        asked.append(x.clone())
        answer = label(x)
        x.zero_()
        return answer

    x = X.clone()
    result = Square(queries=9)(FunctionClassifier(greedy, 3), x[:1], Y[:1], ThreatModel("linf", 1e-4))
    assert torch.equal(x, X)
    assert int(result.forward_passes) == 9
    assert [len(a) for a in asked] == [1] * 9  # the copies that fill up a small batch are not asked about
    asked.clear()
    twice = torch.cat([X[:3], X[:1], X[4:5], X[:1].expand(5, -1)])
    assert torch.equal(FunctionClassifier(greedy, 3, batch_size=4).labels(twice), label(twice))
    assert [len(a) for a in asked] == [4, 1]
    shared = X.numpy().copy()
    spoil = FunctionClassifier(lambda a: (label(torch.from_numpy(a)).numpy(), a.fill(0))[0], 3, inputs="numpy")
    assert spoil.labels(torch.from_numpy(shared)).tolist() == Y.tolist()
    assert np.array_equal(shared, X.numpy())


def test_gradient_attacks_refuse_it_and_name_those_that_work() -> None:
    classifier = FunctionClassifier(label, 3)
    for attack in (PGD(), FGSM(CrossEntropy())):
        with pytest.raises(InputError, match="square, hop-skip-jump") as caught:
            attack(classifier, X, Y, THREAT)
        assert "boundary" in str(caught.value)


def test_it_is_evaluated_and_told_from_another_function(tmp_path: Path) -> None:
    attacks = {"square": Square(queries=30)}
    named = FunctionClassifier(label, 3, name="thirds v1")
    run = evaluate({"f": named}, (X, Y), attacks=attacks, threat=THREAT, out=tmp_path / "run")
    rows = run.rows(run.cells[1])
    assert rows["success"].any()
    assert rows["forward_passes"].max() <= 30
    assert named.fingerprint() == FunctionClassifier(score, 3, name="thirds v1").fingerprint()
    assert named.fingerprint() != FunctionClassifier(label, 3, name="thirds v2").fingerprint()
    other = (label, lambda x: label(x.double()), lambda x: 2 - label(x))
    by_answer = [FunctionClassifier(f, 3, probe=X).fingerprint() for f in other]
    assert by_answer[0] == by_answer[1] != by_answer[2]
    with pytest.raises(InputError, match=r"pass name= .* or probe="):
        evaluate({"f": FunctionClassifier(label, 3)}, (X, Y), attacks=attacks, threat=THREAT, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(InputError, match="square, hop-skip-jump"):
        evaluate({"f": named}, (X, Y), attacks=["ask"], threat=THREAT, out=tmp_path / "ask")
    assert repr(named) == "FunctionClassifier(thirds v1, 3 classes, kind='labels')"


def test_a_worst_case_without_a_gradient_says_that_it_is_none(tmp_path: Path) -> None:
    run = evaluate(
        {"f": FunctionClassifier(label, 3, name="thirds")},
        (X, Y),
        attacks=["worst-case-fast"],
        threat=THREAT,
        out=tmp_path / "run",
    )
    (warned,) = [w for w in finish(run).warnings if w.code == "black-box-only"]
    assert (warned.classifier, warned.attack) == ("f", "worst-case-fast")
    most = int(run.rows(run.cells[1])["forward_passes"].max())
    assert f"{most:,} queries" in warned.message
    (check,) = [c for c in checks_of(run.header["plan"], finish(run)) if c.code == "black-box-only"]
    assert (check.ran, check.signs) == (1, 1)


def test_a_worst_case_that_climbs_says_nothing(tmp_path: Path) -> None:
    references = ReferenceSet.from_vectors(X, Y, features=FeatureExtractor(torch.nn.Identity()), n_classes=3)
    run = evaluate(KNN(references, 3), (X, Y), attacks=["worst-case-fast"], threat=THREAT, out=tmp_path / "run")
    assert "black-box-only" not in {w.code for w in finish(run).warnings}


def test_what_rounding_to_8_bits_undoes_is_counted_out() -> None:
    """The border lies between two values of a pixel: 100.45 / 255 is rounded back over it, 100.6 / 255 is not."""
    classifier = FunctionClassifier(lambda x: (x[:, 0] > 100.4 / 255).long(), 2, name="border", dtype=torch.float64)
    x = torch.full((4, 1), 99 / 255, dtype=torch.float64)
    result = Square(queries=2)(classifier, x, torch.zeros(4).long(), ThreatModel("linf", 0.0))
    moved = torch.tensor([[100.45], [100.6], [99.0], [101.0]], dtype=torch.float64) / 255
    result = replace(result, x_adv=moved, success=classifier.labels(moved) == 1)
    assert result.success.tolist() == [True, True, False, True]
    assert succeeds_rounded(classifier, result, torch.arange(4)).tolist() == [False, True, False, True]
