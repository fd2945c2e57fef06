"""The scikit-learn face: parameters, clones, searches, pipelines and scikit-learn's own checks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joblib import parallel_config
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_iris, make_classification
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from robustknn import KNN, PGD, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.classifiers import NeighborEstimator
from robustknn.datasets import Split
from robustknn.evaluation import evaluate, finish

Array = np.ndarray[Any, Any]
KINDS = [KNN(), DkNN(n_neighbors=5)]
IDS = ["knn", "dknn"]
PGD_ONE = {"a": PGD(steps=1)}


def blobs(n: int = 300) -> tuple[Array, Array]:
    return make_classification(n, 8, n_informative=5, n_classes=3, random_state=0)


def references() -> ReferenceSet:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh()).double()
    x, y = blobs(60)
    return ReferenceSet.build(FeatureExtractor(net, ["1"]), (x, y))


@pytest.mark.parametrize("estimator", KINDS, ids=IDS)
def test_scikit_learns_checks_pass(estimator: NeighborEstimator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert len(results) > 40
    for result in results:
        reason = str(result["exception"])
        # What may be left out needs a package or a switch that is not there.
        missing = result["status"] == "skipped" and ("is not installed" in reason or "SCIPY_ARRAY_API" in reason)
        assert result["status"] == "passed" or missing, (result["check_name"], reason)


@pytest.mark.parametrize("estimator", KINDS, ids=IDS)
def test_before_fit_it_says_so(estimator: NeighborEstimator) -> None:
    fresh = clone(estimator)
    assert is_classifier(fresh)
    with pytest.raises(NotFittedError):
        check_is_fitted(fresh)
    for call in (fresh.predict, fresh.predict_proba, lambda x: fresh.score(x, [0])):
        with pytest.raises(NotFittedError, match=r"has no references; pass references= or call fit\(X, y\)"):
            call(np.zeros((1, 8)))
    assert not hasattr(fresh, "classes_")
    assert not hasattr(fresh, "n_features_in_")
    fitted = fresh.fit(*blobs())
    check_is_fitted(fitted)
    assert fitted.n_features_in_ == 8
    check_is_fitted(KNN(references()))


def test_parameters_are_those_of_the_constructor() -> None:
    held, features = references(), FeatureExtractor(nn.Identity())
    given = {
        "references": held,
        "n_neighbors": 7,
        "metric": "cosine",
        "layers": ["1"],
        "comparison": ">",
        "correction": "conformal",
        "features": features,
        "index": "exact",
        "batch_size": 31,
    }
    ours = DkNN(**given)  # type: ignore[arg-type]
    assert ours.get_params() == ours.get_params(deep=False) == given
    assert DkNN(**ours.get_params()).get_params() == given
    assert ours.set_params(n_neighbors=3, metric="l2") is ours
    assert ours.get_params() == {**given, "n_neighbors": 3, "metric": "l2"}
    with pytest.raises(InputError, match="unknown parameter of DkNN: 'neighbors'; did you mean 'n_neighbors'"):
        ours.set_params(neighbors=3)


@pytest.mark.parametrize("kind", [KNN, DkNN])
def test_clones_share_references_and_model(kind: type[NeighborEstimator]) -> None:
    held = references()
    features = held.extractor()
    ours = kind(held, n_neighbors=7, features=features)  # type: ignore[call-arg]
    for twin in (clone(ours), clone(make_pipeline(StandardScaler(), ours))[-1]):
        assert twin is not ours
        assert twin.references is held
        assert twin.features is features
        assert twin.get_params() == ours.get_params()
    fitted = kind(n_neighbors=7).fit(*blobs())  # type: ignore[call-arg]
    assert not hasattr(clone(fitted), "classes_")  # a clone is not fitted


def test_a_clone_is_not_calibrated() -> None:
    x, y = blobs()
    ours = DkNN(n_neighbors=5).fit(x, y).calibrate(x[:20], y[:20])
    assert ours.is_calibrated
    assert not clone(ours).fit(x, y).is_calibrated


@pytest.mark.parametrize("kind", [KNN, DkNN])
def test_a_grid_search_finds_what_it_finds_with_scikit_learns(kind: type[NeighborEstimator]) -> None:
    x, y = blobs()
    grid = {"n_neighbors": np.arange(1, 12, 2)}
    ours = GridSearchCV(kind(), grid, cv=4).fit(x, y)  # type: ignore[call-arg]
    theirs = GridSearchCV(KNeighborsClassifier(algorithm="brute"), grid, cv=4).fit(x, y)
    assert np.allclose(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"], atol=1e-12)
    assert ours.best_params_ == theirs.best_params_
    assert np.array_equal(ours.predict(x), theirs.predict(x))
    metrics = GridSearchCV(kind(n_neighbors=3), {"metric": ["l2", "cosine"]}, cv=3).fit(x, y)  # type: ignore[call-arg]
    for place, metric in enumerate(["euclidean", "cosine"]):
        expected = cross_val_score(KNeighborsClassifier(3, algorithm="brute", metric=metric), x, y, cv=3).mean()
        assert metrics.cv_results_["mean_test_score"][place] == pytest.approx(expected)


def test_cross_validation_in_pipelines_with_other_estimators() -> None:
    x, y = load_iris(return_X_y=True)
    x = x + np.random.default_rng(0).normal(scale=1e-4, size=x.shape)  # no two samples equally far
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    for ours, theirs in (
        (KNN(n_neighbors=7), KNeighborsClassifier(7, algorithm="brute")),
        (DkNN(n_neighbors=7, metric="cosine"), KNeighborsClassifier(7, algorithm="brute", metric="cosine")),
    ):
        mine, other = make_pipeline(StandardScaler(), ours), make_pipeline(StandardScaler(), theirs)
        assert np.allclose(cross_val_score(mine, x, names, cv=5), cross_val_score(other, x, names, cv=5))
        proba = cross_val_predict(mine, x, names, cv=5, method="predict_proba")
        assert np.allclose(proba, cross_val_predict(other, x, names, cv=5, method="predict_proba"))
    search = GridSearchCV(Pipeline([("scale", StandardScaler()), ("knn", KNN())]), {"knn__n_neighbors": [1, 5]}, cv=3)
    assert search.fit(x, names).best_score_ > 0.9
    voting = VotingClassifier([("knn", KNN()), ("dknn", DkNN(n_neighbors=9))], voting="soft").fit(x, names)
    assert voting.score(x, names) > 0.9


def test_searches_run_in_threads() -> None:
    x, y = blobs(120)
    with parallel_config(backend="threading", n_jobs=2):
        together = cross_val_score(KNN(), x, y, cv=4)
    assert np.array_equal(together, cross_val_score(KNN(), x, y, cv=4))


@pytest.mark.slow
def test_searches_run_in_processes() -> None:
    x, y = blobs(120)
    features = references().extractor()
    ours = KNN(features=features)
    assert np.array_equal(cross_val_score(ours, x, y, cv=4, n_jobs=2), cross_val_score(ours, x, y, cv=4))


def test_fitting_through_a_network_on_images_and_tensors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 2))
    x = torch.rand(60, 1, 6, 6)
    y = np.array(["dark", "light"])[(x.mean((1, 2, 3)) > 0.5).long().numpy()]
    ours = KNN(features=FeatureExtractor(net, "0", pool="avg"), n_neighbors=3)
    from_array = ours.fit(x.numpy(), y).predict(x.numpy())
    assert np.array_equal(KNN(features=ours.features, n_neighbors=3).fit(x, y).predict(x.numpy()), from_array)
    by_hand = nn.functional.conv2d(x, net[0].weight, net[0].bias).mean((2, 3)).detach().numpy()
    theirs = KNeighborsClassifier(3, algorithm="brute").fit(by_hand, y)
    assert np.mean(from_array == theirs.predict(by_hand)) == 1.0
    assert not hasattr(ours, "n_features_in_")
    scores = cross_val_score(ours, x.numpy(), y, cv=3)
    assert np.allclose(scores, cross_val_score(KNeighborsClassifier(3, algorithm="brute"), by_hand, y, cv=3))


NAMES = {
    "one up": np.array([1, 2, 3]),
    "gaps": np.array([7, 20, 1000]),
    "text": np.array(["ant", "bee", "cat"]),
    "truth": np.array([False, True]),
}


@pytest.mark.parametrize("kind", [KNN, DkNN])
@pytest.mark.parametrize("which", NAMES)
def test_labels_mean_the_same_to_score_attack_and_evaluate(
    kind: type[NeighborEstimator], which: str, tmp_path: Path
) -> None:
    """The attack on a classifier fitted on any labels is the attack on its twin fitted on 0..C-1, which is known."""
    names = NAMES[which]
    x, y = make_classification(200, 8, n_informative=5, n_classes=len(names), random_state=0)
    test, truth, threat = x[150:], y[150:], ThreatModel("l2", 1.0, bounds=None)
    ours = kind(n_neighbors=5).fit(x[:150], names[y[:150]])  # type: ignore[call-arg]
    twin = kind(n_neighbors=5).fit(x[:150], y[:150])  # type: ignore[call-arg]
    attack, targets = PGD(steps=8), (truth + 1) % len(names)
    for goal, told in ((None, None), (targets, names[targets])):
        plain = attack(twin, test, truth, threat, targets=goal)
        for given in (names[truth], names[truth].tolist()):
            found = attack(ours, test, given, threat, targets=told)
            assert torch.equal(found.x_adv, plain.x_adv)
            assert torch.equal(found.success, plain.success)
            assert torch.equal(found.y, torch.from_numpy(truth))
            assert torch.equal(found.robust, plain.robust)
            assert np.array_equal(names[found.labels.numpy()], ours.predict(found.x_adv.numpy()))
            assert float((found.clean_labels == found.y).double().mean()) == ours.score(test, names[truth])

    run = evaluate(ours, (test, names[truth]), attacks={"a": attack}, threat=threat, out=tmp_path / "ours")
    other = evaluate(twin, (test, truth), attacks={"a": attack}, threat=threat, out=tmp_path / "twin")
    assert finish(run).classifiers[0].clean_accuracy == ours.score(test, names[truth])
    assert run.header["plan"]["class_names"] == [str(n) for n in names]
    for cell in run.cells:
        mine, theirs = run.rows(cell), other.rows(cell)
        assert all(np.array_equal(mine[column], theirs[column]) for column in theirs)


def test_labels_that_are_no_class_are_named(tmp_path: Path) -> None:
    x, y = blobs(60)
    ours, threat = KNN(n_neighbors=3).fit(x, np.array(["a", "b", "c"])[y]), ThreatModel("l2", 1.0, bounds=None)
    with pytest.raises(InputError, match=r"y holds the label 'd', a class that the references lack; .*'a', 'b', 'c'"):
        PGD()(ours, x[:2], ["a", "d"], threat)
    with pytest.raises(InputError, match="targets holds the label 0, a class"):
        PGD()(ours, x[:2], ["a", "b"], threat, targets=[0, 1])
    with pytest.raises(InputError, match="y holds the label 0, a class"):
        evaluate(ours, (x[:2], [0, 1]), threat=threat, out=tmp_path / "a")
    with pytest.raises(InputError, match="'one' and 'two' were fitted on other labels"):
        evaluate({"one": ours, "two": KNN(n_neighbors=3).fit(x, y)}, (x, y), threat=threat, out=tmp_path / "a")
    with pytest.raises(InputError, match="y must be a tensor or an array of numbers"):
        PGD()(KNN(n_neighbors=3).fit(x, y), x[:2], ["a", "b"], threat)
    assert not (tmp_path / "a").exists()


def test_a_split_of_the_labels_that_fit_saw_is_evaluated(tmp_path: Path) -> None:
    x, y = blobs(60)
    ours, split = KNN(n_neighbors=3).fit(x, y + 1), Split(torch.from_numpy(x).float(), y + 1, "test")
    run = evaluate(ours, split, attacks=PGD_ONE, threat=ThreatModel("l2", 0.1, bounds=None), out=tmp_path / "r")
    assert finish(run).classifiers[0].clean_accuracy == ours.score(x, y + 1)
    assert split.labels.tolist() == (y + 1).tolist()


def test_fitting_past_the_network_of_the_references_is_said() -> None:
    x, y = blobs(60)
    net = nn.Sequential(nn.Linear(x.shape[1], 4), nn.Tanh())
    given = ReferenceSet.build(FeatureExtractor(net), (torch.as_tensor(x).float(), torch.as_tensor(y)))
    with pytest.warns(UserWarning, match="pass features=references.features"):
        KNN(given, 3).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KNN(given, 3, features=given.features).fit(torch.as_tensor(x).float(), y)
        KNN(n_neighbors=3).fit(x, y)


def test_targets_that_are_no_classes_are_refused() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    for data in (x, torch.from_numpy(x)):
        with pytest.raises(ValueError, match="Unknown label type: continuous"):
            KNN().fit(data, x[:, 0])


def test_fitting_again_replaces_references_and_classes() -> None:
    x, y = blobs(60)
    ours = KNN(references(), 5)
    first = ours.predict(x)
    assert np.array_equal(ours.classes_, [0, 1, 2])
    ours.fit(x, np.array(["a", "b", "c"])[y])
    assert set(ours.predict(x)) <= {"a", "b", "c"}
    ours.fit(x[:, :4], y % 2)
    assert ours.n_features_in_ == 4
    assert ours.classes_.tolist() == [0, 1]
    with pytest.raises(InputError, match="X has 8 features, but KNN is expecting 4"):
        ours.predict(x)
    assert np.array_equal(KNN(references(), 5).predict(x), first)
