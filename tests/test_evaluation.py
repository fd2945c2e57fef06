"""The runner, the run directory, the summary and the diagnostics, against figures counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small import digits, digits_references
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, InputError, IntegrityError, ReferenceSet, ResumeError, ThreatModel
from robustknn.attacks import PGD, Attack, Job
from robustknn.classifiers import Classifier
from robustknn.datasets import Split
from robustknn.errors import RobustKNNError
from robustknn.evaluation import Cell, Options, RunDirectory, evaluate, finish, metrics, read_summary
from robustknn.evaluation.diagnostics import warnings_of
from robustknn.objectives import CrossEntropy
from robustknn.recipes import ask_published, pgd_transfer

N = 40


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    source, model = digits(epochs=5)
    references = digits_references(source, model)
    assert source.calibration is not None
    dknn = DkNN(references, 15).calibrate(source.calibration)
    return {"source": source, "references": references, "knn": KNN(references, 15, layer="relu3"), "dknn": dknn}


def run(parts: dict[str, Any], out: Path, **given: Any) -> RunDirectory:
    settings: dict[str, Any] = {
        "attacks": {"ask": PGD(steps=6), "transfer": pgd_transfer(steps=6)},
        "threat": ThreatModel("linf", 0.1),
        "eps": [0.05],
        "options": Options(seed=3, batch_size=16, examples=6, controls=20),
        "class_names": parts["source"].class_names,
    }
    classifiers = given.pop("classifiers", {"knn": parts["knn"], "dknn": parts["dknn"]})
    samples = given.pop("samples", parts["source"].test.first(N))
    return evaluate(classifiers, samples, out=out, **{**settings, **given})


@pytest.fixture(scope="module")
def whole(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = run(parts, tmp_path_factory.mktemp("run") / "r", exclude={"dknn": torch.arange(0, N, 5)})
    finish(made)
    return made


# ------------------------------------------------------------------------------------------- the rows


def test_one_row_a_sample_says_what_the_classifier_says(parts: dict[str, Any], whole: RunDirectory) -> None:
    split = parts["source"].test.first(N)
    x, y = split.batch(torch.arange(N)), split.labels
    for name in ("knn", "dknn"):
        classifier = parts[name]
        scored = np.arange(N) if name == "knn" else np.array([i for i in range(N) if i % 5])
        clean = whole.rows(Cell(name, "clean"))
        assert clean["position"].tolist() == scored.tolist()
        assert clean["sample_id"].tolist() == split.ids[scored].tolist()
        assert clean["prediction"].tolist() == classifier.predict(x[scored]).tolist()
        assert clean["correct"].tolist() == (classifier.predict(x[scored]) == y[scored]).tolist()
        for attack, made in (("ask", PGD(steps=6)), ("transfer", pgd_transfer(steps=6))):
            for eps in (0.05, 0.1):
                rows = whole.rows(Cell(name, attack, eps))
                result = made(
                    classifier, x[scored], y[scored], ThreatModel("linf", eps), sample_ids=split.ids[scored], seed=3
                )
                assert rows["success"].tolist() == result.success.tolist()
                assert rows["prediction"].tolist() == classifier.predict(result.x_adv).tolist()
                correct = classifier.predict(x[scored]) == y[scored]
                assert rows["robust"].tolist() == (correct & ~result.success).tolist()
                assert rows["l2"].tolist() == pytest.approx(result.l2.tolist(), rel=1e-6)
                assert rows["gradient_passes"].tolist() == result.gradient_passes.tolist()
    assert whole.rows(Cell("dknn", "ask", 0.1))["credibility"].tolist() == pytest.approx(
        parts["dknn"]
        .credibility(
            PGD(steps=6)(
                parts["dknn"], x[scored], y[scored], ThreatModel("linf", 0.1), sample_ids=split.ids[scored], seed=3
            ).x_adv
        )
        .tolist()
    )


def test_examples_and_their_neighbors_are_kept(parts: dict[str, Any], whole: RunDirectory) -> None:
    for name, positions in (("knn", [0, 1, 2, 3, 4, 5]), ("dknn", [1, 2, 3, 4, 6, 7])):
        classifier = parts[name]
        clean, attacked = whole.tensors(Cell(name, "clean")), whole.tensors(Cell(name, "ask", 0.1))
        assert clean["position"].tolist() == attacked["position"].tolist() == positions
        assert torch.equal(clean["x"], parts["source"].test.batch(torch.tensor(positions)))
        assert float((clean["x"] - attacked["x"]).abs().max()) <= 0.1 + 1e-6
        for place, voter in enumerate(classifier.voters):
            found = voter.index.search(classifier.read(attacked["x"], [voter.layer])[voter.layer], 8)
            assert torch.equal(attacked[f"ids {place}"], found.ids)
            assert torch.equal(attacked[f"labels {place}"], parts["references"].labels[found.ids])
    gallery = whole.gallery()
    assert torch.equal(gallery["images 0"], parts["references"].image(gallery["ids 0"]))
    every = torch.cat([t for c in whole.cells for n, t in whole.tensors(c).items() if n.startswith("ids ")], 0)
    assert set(every.flatten().tolist()) == set(gallery["ids 0"].tolist())


# ----------------------------------------------------------------------------------------- the summary


def test_the_summary_counts_the_rows(whole: RunDirectory) -> None:
    summary = json.loads((whole.path / "summary.json").read_text())
    assert [c["name"] for c in summary["classifiers"]] == ["knn", "dknn"]
    for c in summary["classifiers"]:
        clean = whole.rows(Cell(c["name"], "clean"))["correct"]
        n = len(clean)
        assert c["clean_accuracy"] == clean.sum() / n
        standing = clean.copy()
        assert [a["name"] for a in c["attacks"]] == ["ask", "transfer"]
        for a in c["attacks"]:
            rows = whole.rows(Cell(c["name"], a["name"], 0.1))
            standing &= rows["robust"]
            assert a["robust_accuracy"] == rows["robust"].sum() / n
            assert a["error_rate"] == pytest.approx(1 - a["robust_accuracy"])
            assert a["attack_success_rate"] == pytest.approx((clean & ~rows["robust"]).sum() / clean.sum())
            p, q = c["clean_accuracy"], a["robust_accuracy"]
            assert a["harmonic_mean"] == pytest.approx(2 * p * q / (p + q))
            assert a["mean_l2"] == pytest.approx(rows["l2"].mean())
            assert a["mean_linf"] == pytest.approx(rows["linf"].mean())
            assert a["transfer"] is (a["name"] == "transfer")
            assert [p["eps"] for p in a["curve"]] == [0.05, 0.1]
            assert a["curve"][1]["robust_accuracy"] == a["robust_accuracy"]
            assert a["seconds"] > 0
        assert c["worst_case_accuracy"] == standing.sum() / n
    assert {"warnings", "seed", "threat", "environment"} <= set(summary)
    assert read_summary(whole).classifiers[0].n == N


def test_all_rows_are_in_one_table(whole: RunDirectory) -> None:
    table = pq.read_table(whole.path / "rows.parquet").to_pylist()
    assert len(table) == sum(len(whole.rows(c)["position"]) for c in whole.cells)
    mine = [r for r in table if (r["classifier"], r["attack"], r["eps"], r["control"]) == ("knn", "ask", 0.1, "")]
    assert [r["robust"] for r in mine] == whole.rows(Cell("knn", "ask", 0.1))["robust"].tolist()


# ----------------------------------------------------------------------------------- resume, refusal


def result_files(path: Path) -> dict[str, bytes]:
    """Everything a run leaves but clock times and what is made from them."""
    kept = [p for p in path.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".parquet")]
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in kept
        if p.name not in ("environment.json", "summary.json")
    }


def test_a_run_repeated_or_continued_has_the_same_files(parts: dict[str, Any], tmp_path: Path) -> None:
    first = run(parts, tmp_path / "a")
    finish(first)
    again = run(parts, tmp_path / "b")
    finish(again)
    assert result_files(tmp_path / "a") == result_files(tmp_path / "b")
    before = result_files(tmp_path / "b")
    lost = sorted((tmp_path / "b" / "cells").rglob("*.json"))[1::3]
    for path in lost:
        path.unlink()
    (tmp_path / "b" / "cells" / "knn" / "clean" / ".x.json.123.partial").write_text("half")
    finish(run(parts, tmp_path / "b"))
    assert result_files(tmp_path / "b") == before
    assert not list((tmp_path / "b").rglob("*.partial"))


def test_the_batch_size_changes_no_row(parts: dict[str, Any], tmp_path: Path) -> None:
    few: dict[str, Any] = {"samples": parts["source"].test.first(20), "attacks": {"ask": PGD(steps=4)}, "eps": []}
    one = run(parts, tmp_path / "a", **few)
    for size in (1, 7, 64):
        other = run(parts, tmp_path / f"b{size}", options=Options(3, size, 6, 20), **few)
        for cell in one.cells:
            a, b = one.rows(cell), other.rows(cell)
            assert list(a) == list(b)
            for column in a:
                assert np.array_equal(a[column], b[column]), (size, cell, column)
            for name, tensor in one.tensors(cell).items():
                assert torch.equal(tensor, other.tensors(cell)[name])
    # half done with one batch size, finished with another
    for path in sorted((tmp_path / "b7" / "cells").rglob("*.json"))[::2]:
        path.unlink()
    mixed = run(parts, tmp_path / "b7", options=Options(3, 5, 6, 20), **few)
    for cell in one.cells:
        a, b = one.rows(cell), mixed.rows(cell)
        assert all(np.array_equal(a[c], b[c]) for c in a)


def test_a_resume_with_anything_changed_is_refused_by_name(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(parts, tmp_path / "r", classifiers=parts["knn"])
    source, references = parts["source"], parts["references"]
    other_model = digits(seed=1, epochs=1)[1]
    other_references = ReferenceSet.build(references.extractor(), source.train.first(900), keep_images=True)
    wrong_labels = Split(source.test.first(N).batch(torch.arange(N)), (source.test.first(N).labels + 1) % 10, "test")
    changes: dict[str, dict[str, Any]] = {
        "another data": {"samples": wrong_labels},
        "another model": {"classifiers": KNN(digits_references(source, other_model), 15, layer="relu3")},
        "another references": {"classifiers": KNN(other_references, 15, layer="relu3")},
        "another config": {"classifiers": parts["knn"], "threat": ThreatModel("linf", 0.11)},
    }
    for name, change in changes.items():
        with pytest.raises(ResumeError, match=name):
            run(parts, tmp_path / "r", **{"classifiers": parts["knn"], **change})
    for change in (
        {"options": Options(4, 16, 6, 20)},
        {"attacks": {"ask": PGD(steps=7)}},
        {"eps": [0.06]},
        {"classifiers": KNN(references, 14, layer="relu3")},
        {"classifiers": KNN(references, 15, layer="relu3", metric="cosine")},
        {"exclude": {"knn": torch.tensor([1])}},
    ):
        with pytest.raises(ResumeError, match="was made with another"):
            run(parts, tmp_path / "r", **{"classifiers": parts["knn"], **change})
    for change, sentence in (
        ({"threat": ThreatModel("linf", 0.11)}, r" \(eps.1: 0.1, now 0.11; threat.eps: 0.1, now 0.11\); "),
        ({"classifiers": KNN(references, 14, layer="relu3")}, r"\(classifiers.knn.voters.0.n_neighbors: 15, now 14\)"),
        ({"classifiers": KNN(other_references, 15, layer="relu3")}, r"voters.0.references: .*, now 900\)"),
    ):
        with pytest.raises(ResumeError, match=sentence):
            run(parts, tmp_path / "r", **{"classifiers": parts["knn"], **change})
    monkeypatch.setattr("robustknn.evaluation.given.code_fingerprint", lambda: "0.0.0+other")
    with pytest.raises(ResumeError, match="another code version; choose"):
        run(parts, tmp_path / "r", classifiers=parts["knn"], describe={"where": tmp_path})  # which decides nothing


def test_a_folder_with_something_else_is_left_alone(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no run"):
        run(parts, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("damage", ["flip", "truncate", "other run", "repeat", "tensors", "missing"])
def test_damaged_rows_are_refused(parts: dict[str, Any], tmp_path: Path, damage: str) -> None:
    made = run(parts, tmp_path / "r", classifiers=parts["knn"])
    path = sorted((tmp_path / "r" / "cells" / "knn" / "ask@0.1").glob("*.json"))[0]
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "other run":
        other = run(parts, tmp_path / "o", classifiers=parts["knn"], options=Options(9, 16, 6, 20))
        path.write_bytes((other.path / path.relative_to(made.path)).read_bytes())
    elif damage == "repeat":
        path.with_name("00000099-00000099.json").write_bytes(path.read_bytes())
    elif damage == "tensors":
        file = path.with_suffix(".safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    else:
        path.unlink()
    fresh = RunDirectory(tmp_path / "r")
    with pytest.raises(IntegrityError):
        fresh.tensors(Cell("knn", "ask", 0.1)) if damage == "tensors" else finish(fresh)


# --------------------------------------------------------------------------------- bad input, bad parts


class Cheat(Attack):
    """Breaks the rules in one of several ways."""

    def __init__(self, how: str) -> None:
        self.how = how

    def run(self, job: Job) -> None:
        rows = torch.arange(len(job.x))
        job.begin(job.look(job.x, rows)[0])
        far = (job.x + 0.5 if self.how == "far" else job.x + 0.05).clone()
        if self.how != "bounds":
            far = far.clamp(0, 1)
        scores = job.look(far, rows)[0]
        if self.how == "lie":
            scores = torch.nn.functional.one_hot((job.y + 1) % 10, 10).double()
        job.settle(far, rows, scores)


@pytest.mark.parametrize(
    ("how", "message"),
    [("far", "outside the threat model"), ("bounds", "outside the threat model"), ("lie", "does not repeat")],
)
def test_an_attack_that_cheats_is_not_counted(
    parts: dict[str, Any], tmp_path: Path, how: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustknn.evaluation.runner.to_config", lambda attack, registry: {"name": "cheat"})
    with pytest.raises(RobustKNNError, match=message):
        run(parts, tmp_path / "r", classifiers=parts["knn"], attacks={"cheat": Cheat(how)}, eps=[])
    clean = RunDirectory(tmp_path / "r").rows(Cell("knn", "clean"))
    assert len(clean["position"]) == N  # what was finished before is kept


BAD: list[tuple[dict[str, Any], str]] = [
    ({"classifiers": {}}, "no classifier"),
    ({"attacks": ["ask", "ask"]}, "two attacks are named"),
    ({"attacks": ["asq"]}, "did you mean 'ask'"),
    ({"attacks": {"clean": PGD()}}, "no attack may be named 'clean'"),
    ({"attacks": {"a/b": PGD()}}, "cannot be used"),
    ({"attacks": {"a": PGD(), "A": PGD()}}, "differ in case alone"),
    ({"attacks": {"a": "ask"}}, "must be an Attack"),
    ({"threat": ThreatModel("linf", torch.full((N,), 0.1))}, "one eps for all samples"),
    ({"options": Options(batch_size=0)}, "batch_size"),
    ({"exclude": {"knn": torch.arange(N), "dknn": torch.arange(N)}}, "every sample is excluded"),
    ({"samples": (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]))}, "label 10"),
    ({"samples": (torch.rand(4, 1, 8, 8) + 1, torch.tensor([0, 1, 2, 3]))}, "outside the bounds"),
    ({"samples": (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2]))}, "3 labels for 4 samples"),
    ({"samples": torch.rand(4, 1, 8, 8)}, r"data must be a Split or a pair \(x, y\), not Tensor"),
    ({"samples": (torch.rand(2, 1, 8, 8), ["a", "b"])}, "must be a tensor or an array of numbers"),
    ({"threat": 0.1}, r"threat must be a ThreatModel, such as ThreatModel\('linf', 8 / 255\), not 0.1"),
    ({"eps": ["a"]}, "eps must be a tensor or an array of numbers"),
    ({"eps": -0.1}, "eps must be finite and at least 0"),
    ({"attacks": 3}, "attacks must be a name, a list of names, or"),
    ({"attacks": [3]}, "attacks must be a name, a list of names, or"),
    ({"attacks": {3: PGD()}}, "attack name 3 cannot be used"),
    ({"classifiers": [1, 2]}, "several classifiers are passed by name"),
    ({"classifiers": nn.Linear(2, 2)}, r"classifier is a model \(Linear\); make a classifier of it first"),
    ({"classifiers": {"a": nn.Linear(2, 2)}}, r"classifier 'a' is a model \(Linear\)"),
    ({"exclude": {"knn": torch.tensor([999])}}, r"position 999 in exclude\['knn'\] is outside 0..39"),
    ({"exclude": {"knn": [-1]}}, r"position -1 in exclude\['knn'\] is outside 0..39"),
    ({"exclude": {"kn": [1]}}, "unknown classifier in exclude: 'kn'; did you mean 'knn'"),
    ({"exclude": [1]}, "exclude gives positions by classifier"),
    ({"options": Options(controls=-1)}, "controls must be a whole number of at least 0, not -1"),
    ({"options": Options(examples=-1)}, "examples must be a whole number of at least 0, not -1"),
    ({"options": Options(seed="a")}, "seed must be a whole number"),  # type: ignore[arg-type]
    ({"options": {"seed": 1}}, "options must be Options"),
    ({"classifiers": None}, "classifier must be a Classifier"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_before_anything_runs(
    parts: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(parts, tmp_path / "r", **change)
    assert not (tmp_path / "r").exists()


def test_one_eps_may_be_a_number_and_excluded_positions_a_list(parts: dict[str, Any], tmp_path: Path) -> None:
    few: dict[str, Any] = {"classifiers": parts["knn"], "samples": parts["source"].test.first(4), "attacks": "fgsm"}
    made = run(parts, tmp_path / "r", eps=0.05, exclude={"knn": [0, 2]}, **few)
    assert made.header["plan"]["eps"] == [0.05, 0.1]
    assert made.rows(Cell("knn", "fgsm", 0.05))["position"].tolist() == [1, 3]


def test_radii_that_differ_in_the_last_digit_have_their_own_folders(parts: dict[str, Any], tmp_path: Path) -> None:
    near = [8 / 255, 0.031372549, 0.03137255, math.nextafter(8 / 255, 1)]
    assert len({Cell("c", "a", eps).folder for eps in near}) == 4
    assert all(float(Cell("c", "a", eps, "one-step").folder.split("@")[1].split("~")[0]) == eps for eps in near)
    made = run(
        parts,
        tmp_path / "r",
        classifiers=parts["knn"],
        samples=parts["source"].test.first(4),
        attacks={"a": PGD(steps=1)},
        threat=ThreatModel("linf", near[0]),
        eps=near[1:],
    )
    assert [p.eps for p in finish(made).classifiers[0].attacks[0].curve] == sorted(near)


def test_references_older_than_their_model_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.rand(30, 5), torch.arange(30) % 3
    built = ReferenceSet.build(FeatureExtractor(net, "1"), (x, y))
    given = ReferenceSet.from_vectors(x, y, features=FeatureExtractor(net[0]))
    for references in (built, given):
        with torch.no_grad():
            net[0].weight += 1
        with pytest.raises(InputError, match=r"the model has changed since the references were made.*build the ref"):
            evaluate(KNN(references, 3), (x, y), attacks="ask", out=tmp_path / "r")
        with torch.no_grad():
            net[0].weight -= 1
    assert not (tmp_path / "r").exists()


def test_every_attack_checks_every_classifier_before_anything_is_written(parts: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import dataclass

    seen: list[tuple[str, Any, Tensor]] = []

    @dataclass(frozen=True)
    class Picky(PGD):
        name: str = "a"

        def check(self, classifier: Classifier, x: Tensor) -> None:
            seen.append((self.name, classifier, x))
            if self.name == "b" and classifier is parts["dknn"]:
                raise InputError("b does not like dknn.")

    with pytest.raises(InputError, match="b does not like dknn"):
        run(parts, tmp_path / "r", attacks={"a": Picky(), "b": Picky(name="b")}, exclude={"dknn": [0]})
    every = [("a", "knn"), ("b", "knn"), ("a", "dknn"), ("b", "dknn")]
    assert [(n, c) for n, c, _ in seen] == [(n, parts[c]) for n, c in every]
    x = parts["source"].test.batch(torch.arange(2))
    assert all(torch.equal(sample, x[[place]]) for (_, _, sample), place in zip(seen, (0, 0, 1, 1), strict=True))
    assert not (tmp_path / "r").exists()


def test_one_class_cannot_be_attacked(tmp_path: Path) -> None:
    x = torch.rand(9, 3)
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, [0] * 9)), 3)
    with pytest.raises(InputError, match="has one class, so nothing can be taken for another"):
        evaluate(classifier, (x, [0] * 9), attacks="ask", out=tmp_path / "r")
    assert finish(evaluate(classifier, (x, [0] * 9), attacks={}, out=tmp_path / "r")).classifiers[0].n == 9


@pytest.mark.parametrize("magnitude", [1e3, 1e5])
def test_inputs_of_large_magnitude_are_evaluated(magnitude: float, tmp_path: Path) -> None:
    """float32 has steps of 6e-5 at 1e3 and 8e-3 at 1e5: rounding must not carry an example out of the ball."""
    x = magnitude + 2 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > magnitude).long()
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x[:30], y[:30])), 3)
    for norm in ("linf", "l2", "l1"):
        threat = ThreatModel(norm, 1.0, bounds=None)
        made = evaluate(classifier, (x[30:], y[30:]), attacks={"a": PGD(steps=5)}, threat=threat, out=tmp_path / norm)
        assert len(made.rows(Cell("knn", "a", 1.0))["position"]) == 10


class Labels(Classifier):
    """A label function that knows no network."""

    n_classes = 10

    def __init__(self, inner: KNN) -> None:
        self.inner = inner

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        return nn.functional.one_hot(self.inner.labels(x), 10).double()

    def fingerprint(self) -> str:
        return "labels"


def test_a_label_function_meets_its_attacks_and_refuses_others(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="black-box"):
        run(parts, tmp_path / "a", classifiers={"labels": Labels(parts["knn"])})

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Noise(Attack):
        def run(self, job: Job) -> None:
            rows = torch.arange(len(job.x))
            job.begin(job.look(job.x, rows)[0])
            x = job.threat.random_start(job.x, job.ids, job.seed, "noise")
            job.offer(x, rows, job.look(x, rows)[0])

    made = run(parts, tmp_path / "b", classifiers={"labels": Labels(parts["knn"])}, attacks={"noise": Noise()})
    summary = finish(made)
    assert summary.classifiers[0].clean_accuracy > 0.9
    assert made.tensors(Cell("labels", "noise", 0.1))["x"].shape == (6, 1, 8, 8)


# ---------------------------------------------------------------------------------------- diagnostics


def test_planted_masking_is_flagged_and_an_honest_attack_is_not(parts: dict[str, Any], tmp_path: Path) -> None:
    made = run(
        parts,
        tmp_path / "r",
        classifiers=parts["knn"],
        samples=parts["source"].test.first(150),
        attacks={
            "ask": PGD(steps=20),
            "saturated": ask_published(steps=20),
            "lazy": PGD(steps=2, schedule="constant", step=0.01, momentum=0.0),
            "transfer": pgd_transfer(steps=20),
        },
        threat=ThreatModel("linf", 0.15),
        eps=[0.05],
        options=Options(batch_size=75, controls=100),
    )
    flagged = {(w.attack, w.code) for w in finish(made).warnings}
    assert ("saturated", "zero-gradient") in flagged
    assert ("saturated", "transfer-beats-white-box") in flagged
    assert ("lazy", "one-step-beats-many") in flagged
    assert ("lazy", "unbounded-not-broken") in flagged
    assert not [f for f in flagged if f[0] in ("ask", "transfer")]


def test_accuracy_that_rises_with_eps_is_flagged() -> None:
    plan = {
        "threat": {"eps": 0.1},
        "attack_names": ["a"],
        "attacks": {"a": {"transfer": False}},
        "classifier_names": ["knn"],
        "cells": [{"classifier": "knn", "attack": "a"}],
    }

    def rows(robust: int) -> dict[str, Any]:
        flags = np.arange(100) < robust
        ones = np.ones(100, dtype=bool)
        label = np.zeros(100, dtype=np.int64)
        said = {"label": label, "prediction": label + ~flags, "margin": np.where(flags, 0.5, -0.5)}
        return {"robust": flags, "clean_correct": ones, "zero_gradient": ~ones, "position": np.arange(100), **said}

    cells = {Cell("knn", "a", 0.1): rows(20), Cell("knn", "a", 0.2): rows(60)}
    assert [w.code for w in warnings_of(plan, cells)] == ["more-eps-helps-the-defender"]
    cells[Cell("knn", "a", 0.2)] = rows(21)  # within chance
    assert warnings_of(plan, cells) == []


def test_ties_that_are_decided_wrongly_are_counted_and_flagged(tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Walk(Attack):
        """Moves the first samples from 1 to 0.4, where k = 2 gives each class one vote."""

        first: int

        def run(self, job: Job) -> None:
            rows = torch.arange(len(job.x))
            job.begin(job.look(job.x, rows)[0])
            x = job.x - 0.6 * (job.ids < self.first)[:, None]
            job.settle(x, rows, job.look(x, rows)[0])

    vectors, labels = torch.tensor([[0.0], [1.0], [1.1]]), torch.tensor([0, 1, 1])
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (vectors, labels)), 2)
    x, y = torch.ones(200, 1), torch.ones(200, dtype=torch.int64)
    for first, codes in ((2, []), (3, ["ties"])):  # 1 % of 200 is not more than 1 %
        made = evaluate(
            classifier,
            (x, y),
            attacks={"walk": Walk(first)},
            threat=ThreatModel("linf", 0.7),
            out=tmp_path / str(first),
        )
        rows, summary = made.rows(Cell("knn", "walk", 0.7)), finish(made)
        assert (rows["prediction"] == 0).tolist() == [i < first for i in range(200)]
        figures = summary.classifiers[0].attacks[0]
        assert (figures.robust_accuracy, figures.tied) == (1.0, first / 200)
        assert [w.code for w in summary.warnings] == codes
    assert summary.warnings[0].message.startswith("1.5 % of the samples end in a tie that the classifier decides wrong")
    assert "the accuracy is 98.5 %" in summary.warnings[0].message


def test_no_decision_is_no_tie() -> None:
    """Of three samples that stand at no lead: one is decided rightly, one wrongly, one not at all."""
    rows = {"robust": np.ones(3), "prediction": np.array([2, 0, -1]), "label": np.full(3, 2), "margin": np.zeros(3)}
    assert metrics.tied(rows).tolist() == [False, True, False]


# -------------------------------------------------------------------------------------------- metrics


def test_wilson_and_mcnemar_against_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20, 1/29 by the score method.
    for (r, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert metrics.wilson(r, n) == pytest.approx((low, high), abs=5e-5)
    assert metrics.wilson(20, 20)[1] == 1.0
    a = np.array([True] * 8 + [False] * 2 + [True] * 5)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5)
    assert metrics.mcnemar(a, b) == pytest.approx(sum(math.comb(10, k) for k in (8, 9, 10)) / 1024)
    assert metrics.mcnemar(a, a) == 1.0
    assert metrics.harmonic_mean(0.984, 0.6228) == pytest.approx(0.7628, abs=5e-5)  # DAEkNN's table I, AT-CNN
    assert metrics.harmonic_mean(0.0, 0.0) == 0.0


def test_series_vectors_and_a_network_without_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for shape in ((5,), (2, 7)):
        x, y = torch.randn(60, *shape), torch.arange(60) % 3
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 4))
        references = ReferenceSet.build(FeatureExtractor(encoder), (x, y))
        made = evaluate(
            KNN(references, 5),
            (x[:10] + 0.1, y[:10]),
            attacks={"ask": PGD(steps=3)},
            threat=ThreatModel("l2", 0.5, bounds=None),
            out=tmp_path / str(len(shape)),
        )
        assert finish(made).classifiers[0].n == 10
    with pytest.raises(InputError, match="no class scores"):  # four outputs, three classes
        evaluate(
            KNN(references, 5),
            (x[:10], y[:10]),
            attacks={"ce": PGD(CrossEntropy(), steps=2)},
            threat=ThreatModel("l2", 0.5, bounds=None),
            out=tmp_path / "h",
        )
    assert not (tmp_path / "h").exists()
    threat = ThreatModel("l2", 0.5, bounds=None)
    made = evaluate(KNN(references, 5), (x[:10], y[:10]), threat=threat, out=tmp_path / "by default")
    assert [a.name for a in finish(made).classifiers[0].attacks] == ["worst-case-fast"]
    assert [w.code for w in finish(made.path).warnings if "transfer" in w.code] == []
