"""The two columns: the protocol of a classifier's own paper, and the worst case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, refuse
from small import digits, digits_references
from torch import nn

from robustknn import KNN, DkNN, FeatureExtractor, FunctionClassifier, ReferenceSet, Rejecting, ThreatModel, registry
from robustknn.attacks import BIM, FGSM
from robustknn.errors import InputError
from robustknn.evaluation import Options, evaluate, finish
from robustknn.evaluation.experiment import prepare
from robustknn.evaluation.experiment_config import read_config
from robustknn.objectives import CrossEntropy
from robustknn.recipes import Published, WorstCase
from robustknn.reports import write_report

THREAT = ThreatModel("linf", 0.2)


@pytest.fixture(scope="module")
def scene() -> Any:
    source, model = digits(epochs=3)
    references = digits_references(source, model)
    places = torch.arange(40)
    return source, references, source.test.batch(places), source.test.labels[places]


def test_the_published_attack_is_the_one_the_classifier_names(scene: Any) -> None:
    source, references, x, y = scene

    class Mine(KNN):
        published_attack = {"name": "fgsm-transfer"}  # noqa: RUF012 - read alone

    knn, dknn = KNN(references, 5, layer=references.layers[-1]), DkNN(references, 5).calibrate(source.calibration)
    bim = BIM(objective=CrossEntropy(), steps=100, step=0.04)
    expected = [
        (knn, bim),
        (dknn, bim),
        (Rejecting(dknn, share=0.05), bim),
        (Mine(references, 5, layer=references.layers[-1]), FGSM(objective=CrossEntropy())),
    ]
    for classifier, attack in expected:
        got, want = (a(classifier, x, y, THREAT) for a in (Published(), attack))
        assert torch.equal(got.x_adv, want.x_adv)
        assert torch.equal(got.gradient_passes, want.gradient_passes)


def test_a_step_of_four_hundredths_is_the_papers() -> None:
    """AdvKNN, section 4: eps .25, step .01, 100 steps."""
    made = registry.attacks.create("bim-transfer", **{k: v for k, v in KNN.published_attack.items() if k != "name"})
    assert made.step * 0.25 == pytest.approx(0.01)
    assert made.steps == 100


def test_a_function_has_no_published_protocol(scene: Any) -> None:
    _, _, x, y = scene
    with pytest.raises(InputError, match="black-box"):
        Published()(FunctionClassifier(lambda v: torch.zeros(len(v), dtype=torch.int64), 10), x, y, THREAT)


def run(scene: Any, out: Path, attacks: Any, **more: Any) -> Any:
    _, references, x, y = scene
    classifiers = {"knn": KNN(references, 5, layer=references.layers[-1]), "dknn": DkNN(references, 5)}
    options = Options(controls=0, examples=2)
    made = evaluate(classifiers, (x, y), attacks=attacks, threat=THREAT, out=out, options=options, **more)
    return made, finish(made)


def test_both_columns_are_run_by_default_and_shown(scene: Any, tmp_path: Path) -> None:
    made, summary = run(scene, tmp_path / "r", None)
    for c in summary.classifiers:
        assert [a.name for a in c.attacks] == ["published", "worst-case-fast"]
        assert [a.role for a in c.attacks] == ["published", "worst-case"]
        assert c.published_accuracy == c.attacks[0].robust_accuracy
        assert c.published_attack == {"name": "bim-transfer", "steps": 100, "step": 0.04}
        assert c.searched
        assert c.worst_case_accuracy <= min(a.robust_accuracy for a in c.attacks)
    page = write_report(made).read_text()
    assert "What papers report, and what is left" in page
    assert "bim-transfer (steps 100, step 0.04)" in page or "bim-transfer (step 0.04, steps 100)" in page


def test_a_column_that_was_not_run_says_so(scene: Any, tmp_path: Path) -> None:
    made, summary = run(scene, tmp_path / "r", ["ask"])
    assert [(c.published_accuracy, c.searched) for c in summary.classifiers] == [(None, False)] * 2
    page = write_report(made).read_text()
    assert "not run" in page
    assert "not searched" in page


def test_an_optional_attack_is_left_out_where_it_cannot_work(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Unflatten(1, (2, 4)))
    x, y = torch.rand(30, 1, 4, 4), torch.arange(30) % 3
    references = ReferenceSet.build(FeatureExtractor(encoder, "1"), (x, y))
    for optional, refused in (((), True), (("published",), False)):
        arguments: dict[str, Any] = {"attacks": ["published", "ask"], "optional": optional, "threat": THREAT}
        if refused:
            with pytest.raises(InputError, match="no class scores"):
                evaluate(KNN(references, 3), (x[:4], y[:4]), out=tmp_path / "r", **arguments)
        else:
            summary = finish(evaluate(KNN(references, 3), (x[:4], y[:4]), out=tmp_path / "r", **arguments))
            assert [a.name for a in summary.classifiers[0].attacks] == ["ask"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["published", "worst-case"]),
        ({"attacks": [{"name": "ask"}]}, ["published", "ask", "worst-case"]),
        ({"attacks": [{"name": "worst-case-fast"}]}, ["published", "worst-case-fast"]),
        ({"attacks": [{"name": "published"}, {"name": "ask"}]}, ["published", "ask", "worst-case"]),
        ({"attacks": [{"name": "ask"}], "published": False, "worst_case": "off"}, ["ask"]),
        ({"attacks": [{"name": "ask", "label": "a"}], "worst_case": "standard"}, ["published", "a", "worst-case"]),
    ],
)
def test_what_the_command_line_runs(tmp_path: Path, changes: dict[str, Any], names: list[str]) -> None:
    config = read_config(None, {**changes, "model.checkpoint": str(weights(tmp_path)), "references.per_class": 5})
    attacks = prepare(config).attacks
    assert list(attacks) == names
    if "worst-case" in attacks:
        assert attacks["worst-case"] == WorstCase(changes.get("worst_case", "fast"))


def test_nothing_to_run_is_refused(tmp_path: Path) -> None:
    more = ("--checkpoint", weights(tmp_path), "--out", tmp_path / "r")
    assert "there is nothing to run" in refuse("evaluate", "--no-published", "--worst-case", "off", *more)
    assert "worst_case" in refuse("evaluate", "--worst-case", "quick", *more)


def test_the_command_prints_both_columns(tmp_path: Path) -> None:
    few = ["--n", 10, "--references-per-class", 5, "--controls", 0, "-e", 0.2, "--threads", 1]
    done = call("evaluate", "--checkpoint", weights(tmp_path), *few, "--out", tmp_path / "r")
    assert done.code == 0, done.err
    assert "published protocol" in done.out
    assert "worst case" in done.out


def weights(tmp_path: Path) -> Path:
    from robustknn import store

    _, model = digits(epochs=3)
    file = tmp_path / "weights.safetensors"
    store.save_tensors(file, dict(model.state_dict()))
    return file


def test_strengths_have_the_role() -> None:
    assert {WorstCase(s).role for s in ("fast", "standard", "thorough")} == {"worst-case"}
    assert replace(WorstCase(), strength="fast").role == "worst-case"


def test_where_one_classifier_has_no_head_the_others_keep_the_column(scene: Any, tmp_path: Path) -> None:
    _, references, x, y = scene
    knn = KNN(references, 5, layer=references.layers[-1])
    plain = FunctionClassifier(knn.predict, 10, name="as the knn")
    arguments: dict[str, Any] = {"attacks": ["published", "square"], "optional": ["published"], "threat": THREAT}
    made = evaluate(
        {"knn": knn, "f": plain}, (x[:8], y[:8]), out=tmp_path / "r", options=Options(controls=0), **arguments
    )
    first, second = finish(made).classifiers
    assert [a.name for a in first.attacks] == ["published", "square"]
    assert [a.name for a in second.attacks] == ["square"]
    assert second.published_accuracy is None
    assert "not run" in write_report(made).read_text()


def test_a_protocol_that_does_not_exist_is_named(scene: Any, tmp_path: Path) -> None:
    _, references, x, y = scene

    class Mine(KNN):
        published_attack = {"name": "pgd-trnasfer"}  # noqa: RUF012

    with pytest.raises(InputError, match="did you mean 'pgd-transfer'"):
        evaluate(Mine(references, 5, layer=references.layers[-1]), (x, y), out=tmp_path / "r")


def test_a_protocol_that_sees_the_neighbors_is_not_called_blind(scene: Any, tmp_path: Path) -> None:
    _, references, x, y = scene

    class Mine(KNN):
        published_attack = {"name": "ask", "steps": 3}  # noqa: RUF012

    made = evaluate(
        Mine(references, 5, layer=references.layers[-1]),
        (x, y),
        attacks=["published"],
        threat=THREAT,
        out=tmp_path / "r",
    )
    assert [a.transfer for a in finish(made).classifiers[0].attacks] == [False]


def test_columns_that_agree_rest_on_the_attack_that_sees_the_neighbors(scene: Any, tmp_path: Path) -> None:
    """Of two attacks that leave the same accuracy the blind one is no sign of weakness in the other."""
    _, references, x, y = scene
    knn = KNN(references, 5, layer=references.layers[-1])
    made = evaluate(knn, (x, y), threat=ThreatModel("linf", 0.9), out=tmp_path / "r", options=Options(controls=0))
    (found,) = finish(made).classifiers
    assert found.published_accuracy == found.worst_case_accuracy == 0
    page = write_report(made).read_text()
    assert "does not even see the neighbors" not in page


@pytest.mark.parametrize("label", ["published", "worst-case"])
def test_another_attack_cannot_take_the_name_of_a_column(tmp_path: Path, label: str) -> None:
    changes = {"attacks": [{"name": "ask", "label": label}], "model.checkpoint": str(weights(tmp_path))}
    with pytest.raises(InputError, match="name of a column"):
        prepare(read_config(None, changes))


def test_a_name_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    changes = {"attacks": [{"name": "ask", "label": ["a"]}], "model.checkpoint": str(weights(tmp_path))}
    with pytest.raises(InputError, match="name and label are text"):
        prepare(read_config(None, changes))
