"""A classifier whose index is not exact: what is measured of it, and that attacks on it search exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import succeed
from safetensors.torch import save_file
from small import digits
from torch import Tensor, nn

from robustknn import (
    ASK,
    KNN,
    PGD,
    Credible,
    DkNN,
    ExactIndex,
    FeatureExtractor,
    FunctionClassifier,
    InputError,
    Joint,
    ReferenceSet,
    Rejecting,
    RetrievalClassifier,
    Square,
    ThreatModel,
    WorstCase,
)
from robustknn.attacks.suite import Members
from robustknn.classifiers import DAEkNN, VoterClassifier, exact_twin
from robustknn.evaluation import Cell, Options, RunDirectory, evaluate, finish, metrics, read_summary
from robustknn.evaluation.diagnostics import warnings_of
from robustknn.neighbors import ClassNeighbors, Neighbors
from robustknn.recipes import pgd_transfer
from robustknn.reports import write_report

generator = torch.Generator().manual_seed(0)
Y = torch.arange(700) % 4
X = (torch.rand(4, 1, 5, 5, generator=generator)[Y] + 0.3 * torch.randn(700, 1, 5, 5, generator=generator)).clamp(0, 1)
N, K = 600, 7
TEST, TRUTH = X[N:], Y[N:]
THREAT = ThreatModel("linf", 0.12)


class Forgetful(ExactIndex):
    """Finds every third reference only: a bad index on purpose."""

    exact = False

    def search(self, queries: Tensor, k: int) -> Neighbors:
        every = super().search(queries, len(self))
        ids, distances = every.ids.clone(), every.distances.clone()
        forgotten = ids % 3 > 0
        order = forgotten.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
        ids[forgotten], distances[forgotten] = -1, float("inf")
        return Neighbors(distances.gather(1, order), ids.gather(1, order))

    def search_both(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors]:
        return self.search(queries, k), super().search_both(queries, 1, per_class)[1]


@pytest.fixture(scope="module")
def references() -> ReferenceSet:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(25, 16), nn.Tanh(), nn.Linear(16, 4))
    extractor = FeatureExtractor(encoder, ["2", "3"])
    return ReferenceSet.build(extractor, (X[:N], Y[:N]), payload="softmax", keep_images=True)


def forgetful(references: ReferenceSet, layer: str = "2", metric: str = "l2") -> Forgetful:
    index = Forgetful(metric)
    index.build(references.rows(layer, torch.arange(len(references))))
    return index


@pytest.fixture(scope="module")
def deployed(references: ReferenceSet) -> KNN:
    return KNN(references, K, layer="2", index=forgetful(references))


@pytest.fixture(scope="module")
def exact(references: ReferenceSet) -> KNN:
    return KNN(references, K, layer="2")


def nearest(references: ReferenceSet, x: Tensor, k: int = K) -> np.ndarray[Any, Any]:
    """The ids of the k nearest references in float64, (N, k), by plain NumPy."""
    held = references.rows("2", torch.arange(N)).double().numpy()
    queries = references.extractor().select(["2"])(x)["2"].detach().double().numpy()
    distances = ((queries[:, None] - held[None]) ** 2).sum(2)
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


def decided(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Majorities, of equal ones the smallest class, (N,)."""
    return np.array([np.bincount(row, minlength=4).argmax() for row in labels])


# ------------------------------------------------------------------------------------------ the twin


def test_the_twin_is_the_same_classifier_over_the_same_storage(references: ReferenceSet, deployed: KNN) -> None:
    twin = exact_twin(deployed)
    assert isinstance(twin, KNN)
    assert twin.references is references
    assert (twin.n_neighbors, twin.metric, twin.voters[0].index.exact) == (K, "l2", True)
    vectors = references.vectors("2")[0]
    assert isinstance(twin.voters[0].index, ExactIndex)
    assert twin.voters[0].index.vectors.data_ptr() == vectors.data_ptr()
    truth = decided(Y.numpy()[nearest(references, TEST)])
    assert twin.labels(TEST).tolist() == truth.tolist()
    assert deployed.labels(TEST).tolist() != truth.tolist()
    assert deployed.index != "exact"  # it was not changed
    assert exact_twin(twin) is twin


def test_calibration_rejection_and_members_are_kept(references: ReferenceSet) -> None:
    own = DkNN(references, K, layers=["2"]).set_params(index=forgetful(references)).calibrate(X[500:N], Y[500:N])
    twin = exact_twin(own)
    assert isinstance(twin, DkNN)
    assert twin.is_calibrated
    assert torch.equal(twin.calibration_, own.calibration_)
    assert twin.rejection_threshold(0.1) == own.rejection_threshold(0.1)

    rejecting = exact_twin(Rejecting(own, share=0.1))
    assert isinstance(rejecting, Rejecting)
    assert rejecting.threshold == own.rejection_threshold(0.1)
    assert torch.equal(rejecting.labels(TEST), Rejecting(twin, rejecting.threshold).labels(TEST))

    plain = KNN(references, 3, layer="2")
    joint = exact_twin(Joint({"dknn": own, "knn": plain}))
    assert isinstance(joint, Joint)
    assert joint.members["knn"] is plain
    assert torch.equal(joint.labels(TEST), Joint({"dknn": twin, "knn": plain}).labels(TEST))

    retrieval = RetrievalClassifier(references, 9, layer="2", index=forgetful(references))
    found = exact_twin(retrieval)
    assert isinstance(found, RetrievalClassifier)
    assert torch.equal(found.scores(TEST), RetrievalClassifier(references, 9, layer="2").scores(TEST))


def test_daeknn_and_what_has_no_twin(references: ReferenceSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustknn import registry

    monkeypatch.setitem(registry.indexes._entries, "forgetful", registry.Entry("forgetful", Forgetful, ""))
    both = DAEkNN(references, references, 5, layers=["2"], index="forgetful")
    assert not both.voters[0].index.exact
    twin = exact_twin(both)
    assert isinstance(twin, DAEkNN)
    assert torch.equal(twin.scores(TEST), DAEkNN(references, references, 5, layers=["2"]).scores(TEST))
    seen = FunctionClassifier(lambda x: x.flatten(1)[:, :4], n_classes=4)
    assert exact_twin(seen) is seen

    class Own(VoterClassifier):
        voters, rule, n_classes = both.voters, both.rule, 4

        def fingerprint(self) -> str:
            return ""

    with pytest.raises(InputError, match="Own decides by an index that is not exact"):
        exact_twin(Own())


# ---------------------------------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def run(deployed: KNN, exact: KNN, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    attacks = {
        "ask": PGD(steps=8),
        "own": PGD(ASK(allow_approximate=True), steps=8),
        "square": Square(queries=5, feedback="labels"),
        "suite": Members((("transfer", pgd_transfer(steps=5)), ("ask", PGD(steps=8)))),
        "worst": WorstCase("fast"),
    }
    made = evaluate(
        {"deployed": deployed, "exact": exact}, (TEST, TRUTH), attacks=attacks, threat=THREAT,
        out=tmp_path_factory.mktemp("run") / "r",
        options=Options(seed=5, batch_size=32, examples=4, controls=10, approximation=70),
    )  # fmt: skip
    finish(made)
    write_report(made)
    return made


def test_recall_and_agreement_are_those_of_brute_force(
    run: RunDirectory, references: ReferenceSet, deployed: KNN
) -> None:
    rows = run.rows(Cell("deployed", "clean"))
    true = nearest(references, TEST[:70])
    found = np.array([[i for i in nearest(references, x[None], N)[0] if i % 3 == 0][:K] for x in TEST[:70]])
    recall = [len(set(t) & set(f)) / K for t, f in zip(true, found, strict=True)]
    assert rows["recall 0"][:70].tolist() == pytest.approx(recall)
    assert 0 < np.mean(recall) < 0.6
    alike = decided(Y.numpy()[true]) == decided(Y.numpy()[found])
    assert rows["agrees"][:70].tolist() == alike.tolist()
    assert np.isnan(rows["agrees"][70:]).all()
    assert np.isnan(rows["recall 0"][70:]).all()

    by_name = {c.name: c for c in read_summary(run).classifiers}
    assert by_name["exact"].approximation is None
    made = by_name["deployed"].approximation
    assert made is not None
    assert made.n == 70
    assert made.recall == pytest.approx(np.mean(recall))
    assert made.vote_agreement == pytest.approx(alike.mean())
    assert made.vote_agreement_interval == metrics.wilson(int(alike.sum()), 70)
    assert [(e.layer, e.n_neighbors, e.index) for e in made.engines] == [("2", K, "Forgetful")]
    assert made.engines[0].settings == {"precision": "float32"}


def test_an_attack_that_looks_at_neighbors_searches_exactly(
    run: RunDirectory, exact: KNN, deployed: KNN, references: ReferenceSet
) -> None:
    with pytest.raises(InputError, match="allow_approximate"):
        PGD(steps=8)(deployed, TEST, TRUTH, THREAT)
    found = PGD(steps=8)(exact, TEST, TRUTH, THREAT, seed=5)
    rows, tensors = run.rows(Cell("deployed", "ask", 0.12)), run.tensors(Cell("deployed", "ask", 0.12))
    assert torch.equal(tensors["x"], found.x_adv[:4])
    assert rows["linf"].tolist() == pytest.approx(found.linf.tolist())
    every_third = np.array([[i for i in row if i % 3 == 0][:K] for row in nearest(references, found.x_adv, N)])
    decision = decided(Y.numpy()[every_third])
    assert rows["prediction"].tolist() == decision.tolist()
    assert tensors["ids 0"].tolist() == every_third[:4].tolist()  # the neighbors shown are the deployed classifier's
    shares = np.array([np.bincount(row, minlength=4) for row in Y.numpy()[every_third]]) / K
    own = shares[np.arange(100), TRUTH.numpy()]
    shares[np.arange(100), TRUTH.numpy()] = -1
    assert rows["margin"].tolist() == pytest.approx((own - shares.max(1)).tolist())
    assert rows["success"].tolist() == (own < shares.max(1)).tolist()
    clean = run.rows(Cell("deployed", "clean"))["correct"]
    assert not clean.all()
    assert rows["clean_correct"].tolist() == clean.tolist()
    assert rows["robust"].tolist() == (clean & ~rows["success"]).tolist()
    assert rows["twin_robust"].tolist() == found.robust.tolist()
    assert rows["exact_robust"].tolist() == rows["robust"].tolist()
    # Both ways: examples that fool one and not the other.
    assert (rows["robust"] & ~rows["twin_robust"]).any()


def test_where_each_attack_searches(run: RunDirectory, deployed: KNN, exact: KNN) -> None:
    summary = {c.name: {a.name: a for a in c.attacks} for c in read_summary(run).classifiers}
    assert {n: a.searches for n, a in summary["deployed"].items()} == {
        "ask": "exact",
        "own": "deployed",
        "square": "deployed",
        "suite": "exact, then deployed",
        "worst": "exact, then deployed",
    }
    assert {a.searches for a in summary["exact"].values()} == {""}
    assert all(a.exact_search is None for a in summary["exact"].values())
    for name, attack in (("own", PGD(ASK(allow_approximate=True), steps=8)), ("square", Square(5, feedback="labels"))):
        result = attack(deployed, TEST, TRUTH, THREAT, seed=5)
        rows = run.rows(Cell("deployed", name, 0.12))
        assert rows["success"].tolist() == result.success.tolist()
        assert "twin_robust" not in rows
        assert summary["deployed"][name].exact_search is None


def test_the_worst_case_is_that_of_both_searches(run: RunDirectory, deployed: KNN, exact: KNN) -> None:
    for name, attack in (
        ("suite", Members((("transfer", pgd_transfer(steps=5)), ("ask", PGD(steps=8))))),
        ("worst", WorstCase("fast")),
    ):
        on_twin = attack(exact, TEST, TRUTH, THREAT, seed=5)
        on_own = attack(deployed, TEST, TRUTH, THREAT, seed=5)
        clean = deployed.labels(TEST) == TRUTH
        # An example counts when the deployed classifier is wrong on it: by the twin's, and where that fails its own.
        by_twin = deployed.lead(deployed.scores(on_twin.x_adv), TRUTH) < -1e-6
        rows = run.rows(Cell("deployed", name, 0.12))
        assert rows["exact_robust"].tolist() == (clean & ~by_twin).tolist()
        assert rows["robust"].tolist() == (clean & ~by_twin & ~on_own.success).tolist()
        assert rows["robust"].sum() < rows["exact_robust"].sum()
        told = {a.name: a for a in read_summary(run).classifiers[0].attacks}[name]
        assert told.exact_search is not None
        assert told.exact_search.robust_accuracy == rows["exact_robust"].mean()
        assert told.exact_search.twin_robust_accuracy == on_twin.robust.double().mean()
        assert told.robust_accuracy == rows["robust"].mean()
    parts = {p.name: p.fooled for p in told.parts}
    assert parts["ask"] is not None  # the twin can be attacked by all of it
    assert parts["evolved"] is None


def test_examples_stay_inside_and_batches_change_nothing(run: RunDirectory, deployed: KNN, tmp_path: Path) -> None:
    few = {"ask": PGD(steps=8), "worst": WorstCase("fast")}
    runs = [
        evaluate(
            {"deployed": deployed}, (TEST[:20], TRUTH[:20]), attacks=few, threat=THREAT, out=tmp_path / str(size),
            options=Options(seed=5, batch_size=size, examples=20, controls=0, approximation=11),
        )
        for size in (3, 20)
    ]  # fmt: skip
    for cell in runs[0].cells:
        a, b = (r.rows(cell) for r in runs)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{cell} {name}")
        x = runs[0].tensors(cell)["x"]
        assert float((x - TEST[:20]).abs().max()) <= 0.12 + 1e-6


# --------------------------------------------------------------------------------------- what is said


def test_robustness_by_missing_neighbors_alone_is_warned_of() -> None:
    plan = {
        "classifier_names": ["a"], "attack_names": ["ask"], "threat": {"eps": 0.1},
        "attacks": {"ask": {"transfer": False}}, "classifiers": {"a": {}},
        "cells": [{"classifier": "a", "attack": "ask", "eps": 0.1, "control": ""}],
    }  # fmt: skip

    def codes(stands: int, both: int, twin: int) -> list[str]:
        """`stands` samples stand on the deployed classifier alone, `both` on both, `twin` on the twin alone."""
        n = stands + both + twin + 4
        robust, on_twin = np.zeros(n, bool), np.zeros(n, bool)
        robust[: stands + both] = True
        on_twin[stands : stands + both + twin] = True
        rows = {
            "robust": robust, "twin_robust": on_twin, "clean_correct": np.ones(n, bool), "label": np.zeros(n),
            "zero_gradient": np.zeros(n, bool), "prediction": np.zeros(n), "margin": np.ones(n),
        }  # fmt: skip
        return [w.code for w in warnings_of(plan, {Cell("a", "ask", 0.1): rows})]

    assert codes(5, 20, 0) == ["approximate-disagrees"]  # 2⁻⁵ < .05
    assert codes(4, 20, 0) == []  # 2⁻⁴ > .05
    assert codes(5, 20, 5) == []
    assert codes(0, 20, 9) == []


def test_the_page_and_the_summary_say_it(run: RunDirectory) -> None:
    page = (run.path / "report.html").read_text()
    summary = read_summary(run)
    made, ask = summary.classifiers[0].approximation, summary.classifiers[0].attacks[0]
    assert made is not None
    assert ask.exact_search is not None
    text = " ".join(page.split())
    assert "These attacks searched exactly" in text
    assert f"on {100 * made.vote_agreement:.1f} % of 70" in text
    assert f"<td>{100 * made.recall:.1f}</td>" in text
    assert "Forgetful" in text
    assert f"{100 * ask.exact_search.twin_robust_accuracy:.1f}" in text
    assert any(w.code == "approximate-disagrees" and w.attack == "ask" for w in summary.warnings)
    assert "keep no more right than the same references searched exactly" in text


def test_an_exact_run_says_nothing_of_it(exact: KNN, tmp_path: Path) -> None:
    made = evaluate(
        exact, (TEST[:8], TRUTH[:8]), attacks={"ask": PGD(steps=2)}, threat=THREAT, out=tmp_path / "r",
        options=Options(controls=0),
    )  # fmt: skip
    (c,) = finish(made).classifiers
    assert c.approximation is None
    page = write_report(made).read_text()
    assert "Approximate indexes" not in page
    assert "agrees" not in made.rows(Cell("knn", "clean"))


def test_a_credible_example_must_be_credible_to_the_deployed_classifier(
    references: ReferenceSet, tmp_path: Path
) -> None:
    own = DkNN(references, K, layers=["2"]).set_params(index=forgetful(references)).calibrate(X[400:N], Y[400:N])
    attack = Credible(PGD(steps=8), share=0.2)
    made = evaluate(
        {"dknn": own}, (TEST[:40], TRUTH[:40]), attacks={"credible": attack}, threat=THREAT, out=tmp_path / "r",
        options=Options(controls=0, examples=40),
    )  # fmt: skip
    rows, x = made.rows(Cell("dknn", "credible", 0.12)), made.tensors(Cell("dknn", "credible", 0.12))["x"]
    rejecting = Rejecting(own, share=0.2)
    lead = rejecting.lead(rejecting.scores(x), TRUTH[:40])
    assert rows["success"].tolist() == (lead < -1e-6).tolist()
    by_vote = own.lead(own.scores(x), TRUTH[:40]) < -1e-6
    assert (by_vote & ~torch.from_numpy(rows["success"])).any()  # fooled, and not credibly


def test_an_ivf_index_that_visits_one_list(references: ReferenceSet, exact: KNN, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    from robustknn import FaissIndex

    rows = references.rows("2", torch.arange(N)).numpy()
    ivf = faiss.index_factory(16, "IVF12,Flat")
    ivf.train(rows)
    ivf.add(rows)
    ivf.nprobe = 1
    own = KNN(references, K, layer="2", index=FaissIndex.wrap(ivf))
    made = evaluate(
        {"ivf": own}, (TEST, TRUTH), attacks={"ask": PGD(steps=8)}, threat=THREAT, out=tmp_path / "r",
        options=Options(seed=5, controls=0),
    )  # fmt: skip
    (c,) = finish(made).classifiers
    queries = references.extractor().select(["2"])(TEST)["2"].detach().numpy()
    true = nearest(references, TEST)
    found = ivf.search(queries, K)[1]
    recall = np.mean([len(set(t) & set(f)) / K for t, f in zip(true, found, strict=True)])
    assert c.approximation is not None
    assert c.approximation.recall == pytest.approx(recall, abs=1e-9)
    assert c.approximation.n == 100
    assert 0.3 < recall < 1
    ivf.nprobe = 12
    assert ivf.search(queries, K)[1].tolist() == true.tolist()


@pytest.mark.parametrize("spec", ["ivf-flat:nlist=12,nprobe=1", "ivf-pq:nlist=12,nprobe=1", "hnsw:neighbors=2"])
def test_engines_by_name(references: ReferenceSet, spec: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    own = KNN(references, K, layer="2", index=spec)
    made = evaluate(
        {"own": own}, (TEST[:40], TRUTH[:40]), attacks={"ask": PGD(steps=5)}, threat=THREAT, out=tmp_path / "r",
        options=Options(seed=5, controls=0),
    )  # fmt: skip
    (c,) = finish(made).classifiers
    found = own.kneighbors(TEST[:40], return_distance=False)
    recall = np.mean(
        [len(set(t) & set(f)) / K for t, f in zip(nearest(references, TEST[:40]), found.numpy(), strict=True)]
    )
    assert c.approximation is not None
    (engine,) = c.approximation.engines
    assert (engine.index, engine.recall) == (spec.partition(":")[0], pytest.approx(recall))
    assert 0.2 < recall < 1
    for setting in spec.partition(":")[2].split(","):
        name, _, value = setting.partition("=")
        assert engine.settings[name] == int(value)
    assert c.attacks[0].searches == "exact"
    expected = PGD(steps=5)(KNN(references, K, layer="2"), TEST[:40], TRUTH[:40], THREAT, seed=5)
    assert torch.equal(made.tensors(Cell("own", "ask", 0.12))["x"], expected.x_adv[:24])


PLUGIN = """
import torch
from robustknn import registry
from robustknn.neighbors import ExactIndex, Neighbors

@registry.indexes.register("halved")
class Halved(ExactIndex):
    "Finds references of even number only."
    exact = False

    def search(self, queries, k):
        every = super().search(queries, len(self))
        order = (every.ids % 2).argsort(dim=1, stable=True)[:, :k]
        return Neighbors(every.distances.gather(1, order), every.ids.gather(1, order))

    def search_both(self, queries, k, per_class):
        return self.search(queries, k), super().search_both(queries, 1, per_class)[1]
"""


def test_the_command_line_evaluates_it(tmp_path: Path) -> None:
    save_file(digits(epochs=2)[1].state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "halved.py").write_text(PLUGIN)
    out = succeed(
        "evaluate", "--checkpoint", tmp_path / "weights.safetensors", "--plugin", tmp_path / "halved.py",
        "--index", "halved", "-k", 5, "--n", 30, "--references-per-class", 20, "-a", "ask", "--attack-option",
        "steps=5", "-e", 0.1, "--out", tmp_path / "r", "--controls", 0, "--threads", 1,
    )  # fmt: skip
    assert "approximate indexes, beside exact search" in out
    assert "These attacks searched exactly" in " ".join(out.split())
    content = json.loads((tmp_path / "r" / "summary.json").read_text())
    (c,) = content["classifiers"]
    assert content["schema_version"] == 5
    assert c["approximation"]["engines"][0]["index"] == "halved"
    assert 0 < c["approximation"]["recall"] < 1
    assert {a["name"]: a["searches"] for a in c["attacks"]} == {
        "published": "deployed",
        "ask": "exact",
        "worst-case": "exact, then deployed",
    }
