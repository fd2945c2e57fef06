"""The classifiers that a configuration names: those without references, those over others, hardened ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refuse, succeed
from small import digits

from robustknn import InputError, ThreatModel, load_classifier
from robustknn.attacks import Transferred
from robustknn.attacks.hardening import Hardening, adversarial_references
from robustknn.classifiers import JPEG, DAEkNN, DkNN, Joint, Network, Rejecting, Transformed
from robustknn.datasets import DataSource, load
from robustknn.evaluation import finish
from robustknn.evaluation.experiment import prepare
from robustknn.evaluation.experiment_config import configured, read_config
from robustknn.evaluation.making import make_classifiers
from robustknn.models import DigitsCNN
from robustknn.recipes.attacks import pgd_transfer


@pytest.fixture(scope="module")
def victim() -> tuple[DataSource, DigitsCNN]:
    return load("digits"), digits(epochs=1)[1]


def made(victim: tuple[DataSource, DigitsCNN], *tables: Any, **more: Any) -> dict[str, Any]:
    source, model = victim
    content = {"references": {"per_class": 10}, "classifiers": list(tables), **more}
    return dict(make_classifiers(configured(content, "the test"), model, source))


def test_what_has_no_references_reads_none(victim: tuple[DataSource, DigitsCNN], monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("references were read")

    monkeypatch.setattr("robustknn.reference.ReferenceSet.build", refuse)
    found = made(
        victim, "network", {"type": "transformed", "name": "jpeg", "transform": {"name": "jpeg", "quality": 9}}
    )
    network, jpeg = found["network"], found["jpeg"]
    assert isinstance(network, Network)
    assert isinstance(jpeg, Transformed)
    assert jpeg.transform == JPEG(9)
    x = victim[0].test.batch(torch.arange(20))
    assert torch.equal(network.labels(x), victim[1](x).argmax(1))


def test_classifiers_over_others(victim: tuple[DataSource, DigitsCNN]) -> None:
    careful = {"name": "careful", "type": "rejecting", "share": 0.1, "classifier": {"name": "dknn", "layer": "relu2"}}
    found = made(victim, "knn", "dknn", {"name": "both", "type": "joint", "members": ["dknn", "knn"]}, careful)
    both, rejecting = found["both"], found["careful"]
    assert isinstance(both, Joint)
    assert both.members == {"dknn": found["dknn"], "knn": found["knn"]}
    assert isinstance(rejecting, Rejecting)
    assert rejecting.threshold == rejecting.classifier.rejection_threshold(0.1)
    assert [v.layer for v in rejecting.voters] == ["relu2"]
    assert rejecting.voters[0].references is found["knn"].references_  # one set, of every layer that votes


def test_hardening_by_an_attack_on_the_votes(victim: tuple[DataSource, DigitsCNN], tmp_path: Path) -> None:
    source = victim[0]
    on_votes = {"eps": "25/255", "attack": {"name": "ask", "steps": 3}, "classifier": {"name": "knn", "layer": "relu3"}}
    on_network = {"eps": 0.1, "norm": "l2"}
    place = {"references": {"per_class": 10, "path": str(tmp_path / "refs")}}
    found = made(victim, "knn", {"name": "daeknn", "hardening": [on_votes, on_network]}, **place)["daeknn"]
    assert isinstance(found, DAEkNN)
    clean, votes, network = found.reference_sets
    assert votes.made_by is not None
    assert network.made_by is not None
    assert (votes.made_by["threat"]["eps"], votes.made_by["attack"]["name"]) == (25 / 255, "pgd")
    assert network.made_by["threat"]["norm"] == "l2"
    knn = made(victim, {"name": "knn", "layer": "relu3"}, **place)["knn"]
    assert votes.made_by["classifier"] == knn.fingerprint() != network.made_by["classifier"]
    assert len(list(tmp_path.glob("refs-hardened-*"))) == 2
    by_hand = adversarial_references(
        clean.extractor(),
        source.train.per_class(10),
        Hardening(ThreatModel("l2", 0.1, source.bounds), pgd_transfer(steps=10)),
        n_classes=10,
    )
    assert torch.equal(by_hand.vectors("relu3")[0], network.vectors("relu3")[0])


def test_a_name_is_that_of_a_table_before_it(victim: tuple[DataSource, DigitsCNN]) -> None:
    near = {"name": "near", "type": "dknn", "n_neighbors": 3}
    careful = {"name": "careful", "type": "rejecting", "share": 0.1, "classifier": "near"}
    hardened = {
        "name": "daeknn",
        "hardening": {"eps": 0.1, "attack": {"name": "ask", "steps": 2}, "classifier": "near"},
    }
    found = made(victim, near, careful, hardened)
    assert found["careful"].classifier.n_neighbors == 3
    assert found["daeknn"].reference_sets[1].made_by["classifier"] == found["near"].fingerprint()
    with pytest.raises(InputError, match="unknown classifier 'near'"):
        made(victim, careful, near)  # it stands after


def test_the_leave_one_out_variants_by_name(victim: tuple[DataSource, DigitsCNN], tmp_path: Path) -> None:
    assert {c.n_neighbors for c in made(victim, *({"name": n, "hardening": 0.2} for n in VARIANTS)).values()} == {5}
    options = {"hardening": 0.2, "n_neighbors": 3}
    found = made(victim, *({"name": name, **options} for name in VARIANTS))
    radii = [held.made_by["threat"]["eps"] for held in found["daeknn"].reference_sets[1:]]
    weak = [held.made_by["threat"]["eps"] for held in found["daeknn-wat"].reference_sets[1:]]
    assert (radii, weak) == ([0.2], [0.05])
    assert isinstance(found["daeknn-wad"], DkNN)
    assert found["daeknn-wad"].n_neighbors == 3
    # One table has all three, under the protocol of one paper.
    assert {str(dict(c.published_attack)) for c in found.values()} == {"{'name': 'pgd-transfer', 'steps': 10}"}
    found["daeknn-wad"].save(tmp_path / "wad")
    assert type(load_classifier(tmp_path / "wad", victim[1])) is type(found["daeknn-wad"])


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("rejecting", "pass either credibility= or share="),
        ({"name": "rejecting", "share": 0.1, "classifier": "knn"}, "needs a calibrated DkNN, not KNN"),
        ({"name": "rejecting", "share": 0.1, "classifier": 3}, "a classifier is a name or a table with one, not 3"),
        ("transformed", "classifier 'transformed' needs transform; name it among its options."),
        ({"name": "transformed", "transform": "jpg"}, "unknown input transformation 'jpg'; did you mean 'jpeg'"),
        ({"name": "transformed", "transform": {"name": "jpeg", "quality": 0}}, "quality"),
        ({"name": "joint", "members": "knn"}, "members of 'joint' are classifiers named before it"),
        ({"name": "joint", "members": ["knn", "later"]}, "unknown member of 'joint', named before it: 'later'"),
        ({"name": "network", "layer": "relu3"}, "unknown option of classifier 'network': 'layer'"),
        ({"name": "other", "type": "knn", "hardening": 0.1}, "unknown option of classifier 'knn': 'hardening'"),
        ({"name": "daeknn", "hardening": {"norm": "l2"}}, "a hardening of 'daeknn' names its strength"),
        ({"name": "daeknn", "hardening": "8/0"}, "'8/0' is not a number; write 0.03 or 8/255."),
        ({"name": "daeknn", "hardening": {"eps": 5, "bounds": [0, 255]}}, "in the hardening of 'daeknn': 'bounds'"),
        ({"name": "daeknn", "hardening": [True]}, "the strength of a hardening of 'daeknn' is a number or '8/255'"),
        ({"name": "daeknn-wad", "hardening": ["bogus"]}, "'bogus' is not a number"),
        ({"name": "network", "n_classes": 5}, "n_classes of 'network' comes from other tables"),
        ({"name": "dknn", "n_neighbors": 10**6}, "classifier 'dknn': n_neighbors = 1000000 exceeds"),
        ({"name": "daeknn", "hardening": {"eps": 0.1, "classifier": "nn"}}, "unknown classifier 'nn'"),
        ({"name": "daeknn", "hardening": {"eps": 0.1, "attack": "aks"}}, "unknown attack 'aks'"),
    ],
)
def test_bad_tables(victim: tuple[DataSource, DigitsCNN], table: Any, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        made(victim, "knn", table)
    assert sentence in str(refused.value)


VARIANTS = ("daeknn", "daeknn-wat", "daeknn-wad")
PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("making") / "model"
    succeed("train", "--epochs", 1, "--out", folder)
    return folder


def test_the_configuration_page_shows_what_works(checkpoint: Path, tmp_path: Path) -> None:
    """All of its tables are read; its classifiers and attacks are made on digits, and those that can be run."""
    whole, *parts = re.findall(r"(?m)^```toml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "whole.toml").write_text(whole)
    assert read_config(tmp_path / "whole.toml", {}).threat.eps == [80 / 255, 40 / 255]
    text = "\n".join(parts).replace("mnist-cnn", "digits-cnn").replace("runs/another", str(checkpoint))
    text = text.replace("steps = 500", "steps = 3").replace("steps = 100", "steps = 3")
    (tmp_path / "parts.toml").write_text(text)
    changes = {"model.checkpoint": str(checkpoint), "references.per_class": 12, "data.n": 2, "controls": 0}
    config = read_config(tmp_path / "parts.toml", {**changes, "worst_case": "off", "threat.eps": 0.1})
    experiment = prepare(config)
    assert list(experiment.classifiers) == ["network", "knn", "dknn", "both", "careful", "jpeg", "daeknn", "rails"]
    black, gray, own = (experiment.attacks[name] for name in ("black-box", "gray-box", "own-references"))
    assert isinstance(black, Transferred)
    assert isinstance(gray, Transferred)
    assert isinstance(own, Transferred)
    assert isinstance(own.source, DkNN)
    assert gray.attack == pgd_transfer(steps=3)
    assert len(own.source.references_) == 1000  # all there are of fewer than 100 a class
    del experiment.classifiers["rails"], experiment.attacks["adaptive-500"]  # no voters, no adaptive climb
    rows = finish(experiment.run(tmp_path / "run")).classifiers
    assert {a.name for a in rows[1].attacks} == {"published", "black-box", "gray-box", "own-references"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ('"knn"', "the source of 'transferred' is a table, { model = … }, not 'knn'."),
        (
            "{ clasifier = 'knn' }",
            "unknown setting of the source of 'transferred': 'clasifier'; did you mean",
        ),
        ("{ classifier = 'knnn' }", "unknown classifier 'knnn'; did you mean 'knn'"),
        ("{ model = { name = 'digits-cnn' } }", "model 'digits-cnn' has no weights yet; name a checkpoint"),
        ("{ references = { per_class = 3 } }", "has references, and its classifier has none; name one"),
        (
            "{ classifier = 'dknn', references = { per_class = 2 } }",
            "the source of 'transferred': n_neighbors = 75",
        ),
        ("{ model = 'digits-cnn' }", "model in the source of 'transferred': must be a table of settings, not 'digits"),
        ("{ model = { nam = 'x' } }", "unknown setting in the source of 'transferred': 'model.nam'"),
        ("{ references = { per_class = 0 } }", "references.per_class in the source of 'transferred': input should be"),
    ],
)
def test_bad_sources(checkpoint: Path, tmp_path: Path, source: str, sentence: str) -> None:
    (tmp_path / "x.toml").write_text(f"[[attacks]]\nname = 'transferred'\nsource = {source}\n")
    config = ["--config", tmp_path / "x.toml", "--out", tmp_path / "r"]
    assert sentence in refuse("evaluate", "--checkpoint", checkpoint, "--references-per-class", 5, *config)
    assert not (tmp_path / "r").exists()


def test_a_transferred_attack_may_be_the_only_one(checkpoint: Path, tmp_path: Path) -> None:
    source = f'source={{"model": {{"checkpoint": "{checkpoint}"}}}}'
    few = ["--checkpoint", checkpoint, "-c", "knn", "--references-per-class", 10, "-n", 4, "-e", 0.1]
    said = succeed("attack", *few, "-a", "transferred", "--attack-option", source, "--out", tmp_path / "a")
    assert "4 examples" in said


def test_what_a_classifier_cannot_take_is_said_before_the_folder_is_made(checkpoint: Path, tmp_path: Path) -> None:
    crop = ["-c", "transformed", "--classifier-option", 'transform={"name": "random-crop"}', "--out", tmp_path / "r"]
    assert "a crop of 28 pixels does not fit" in refuse("evaluate", "--checkpoint", checkpoint, "--n", 5, *crop)
    assert not (tmp_path / "r").exists()
