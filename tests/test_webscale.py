"""The web-scale defense's tables on a small CIFAR-10 in the real format; paired comparisons; published weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call, refuse
from scipy.stats import binomtest
from small_cifar import write_cifar
from small_mnist import write_mnist

from robustknn import PGD, Adaptive
from robustknn.errors import InputError, IntegrityError
from robustknn.evaluation.metrics import wilson
from robustknn.models import load_model
from robustknn.objectives import ThroughTransform
from robustknn.progress import Silent
from robustknn.recipes import worst_case
from robustknn.recipes.attacks import pgd_transfer
from robustknn.reproduce import WORST, Bench, Settings, experiments, webscale_networks_victim, webscale_victim
from robustknn.reproduce.paired import Pair, holm, packed, unpacked, verdict
from robustknn.reproduce.papers import published
from robustknn.reproduce.published_weights import WEIGHTS, weights_file
from robustknn.reproduce.webscale_victim import Database, Examples, Victim

TINY: dict[str, Any] = {
    "weights": "trained",
    "epochs": 2,
    "n": 30,
    "worst_n": 10,
    "references": 60,
    "share": 0.02,
    "shares": [0.05],
    "steps": 3,
    "k": 5,
    "components": 8,
    "sizes": [20],
}
OF = {
    "webscale-table1": {},
    "webscale-k": {"ks": [1, 5], "worst_ks": [5]},
    "webscale-features": {"layers": ["conv_3_3"], "recipes": ["rmac-bits"]},
    "webscale-defenses": {"draws": 2},
}


FEW_STEPS = {
    "transfer": pgd_transfer(steps=3, keep="best"),
    "adaptive": PGD(objective=Adaptive(), steps=3),
    "through-transform": PGD(objective=ThroughTransform(draws=2), steps=3),
}


def order(name: str, data: Path, work: Path, **changed: Any) -> tuple[Any, ...]:
    options = {**TINY, **OF[name], **changed}
    words = [w for key, value in options.items() for w in ("--set", f"{key}={json.dumps(value)}")]
    return ("reproduce", name, "--data", data, "--work", work, *words)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_cifar(tmp_path_factory.mktemp("cifar"))
    return write_mnist(root, folder="FashionMNIST/raw")


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    """So that few images and epochs are many steps; and attacks in few steps."""
    with pytest.MonkeyPatch.context() as patch:
        config = replace(webscale_networks_victim.CONFIG, batch_size=20, lr=0.05, precision="float32", augment=False)
        patch.setattr(webscale_networks_victim, "CONFIG", config)
        patch.setattr(worst_case, "_members", lambda strength: FEW_STEPS)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of work: the tables share networks and examples."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def bench(data: Path, work: Path) -> Bench:
    kind = experiments.create("webscale-table1")
    options = {**kind.presets["cpu"], **TINY}
    return Bench(Settings("webscale-table1", "cifar10", "cpu", 0, options, {}), work, data, progress=Silent())


# --------------------------------------------------------------------------------------------- pairs


def test_bits_are_kept_as_text() -> None:
    for n in (1, 7, 8, 30):
        right = np.random.default_rng(n).random(n) < 0.5
        assert np.array_equal(unpacked(packed(right), n), right)


def test_a_pair_is_counted_and_tested_exactly() -> None:
    first = np.array([1] * 12 + [0] * 4 + [1] * 50 + [0] * 34, dtype=bool)
    second = np.array([0] * 12 + [1] * 4 + [1] * 50 + [0] * 34, dtype=bool)
    pair = Pair.of("b", "a", "clean", first, second)
    assert (pair.gained, pair.lost, pair.n) == (12, 4, 100)
    assert pair.p == pytest.approx(binomtest(12, 16, alternative="greater").pvalue)
    assert pair.reverse == pytest.approx(binomtest(4, 16, alternative="greater").pvalue)
    cell = pair.cell()
    assert cell.value == pytest.approx(8.0)
    assert cell.interval is not None
    # Agresti & Min: half a pair is added to each of the four cells of the table.
    difference, spread = (12.5 - 4.5) / 102, ((12.5 + 4.5) - 8.0**2 / 102) ** 0.5 / 102
    assert cell.interval == pytest.approx(
        (100 * (difference - 1.96 * spread), 100 * (difference + 1.96 * spread)), abs=1e-2
    )
    assert Pair.of("b", "a", "clean", first, first).p == 1.0


def test_holm_keeps_the_error_of_all_tests_together() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    values = [0.002, 0.03, 0.011, 0.4]
    for level in (0.01, 0.05, 0.1):
        rejected, rest = [], sorted(range(4), key=lambda i: values[i])
        while rest and values[rest[0]] <= level / len(rest):  # the step-down procedure as Holm wrote it
            rejected.append(rest.pop(0))
        assert [i for i, p in enumerate(holm(values)) if p <= level] == sorted(rejected)


def test_a_verdict_says_how_it_came_out() -> None:
    many, few = np.arange(200) < 150, np.arange(200) < 100
    pairs = [Pair.of("b", "a", "x", many, few), Pair.of("b", "a", "y", few, many), Pair.of("b", "a", "z", few, few)]
    said = verdict(pairs, "The ordering")
    assert "of 3 paired comparisons 1 show it, 1 the reverse, and 1 no difference" in said
    assert "In this direction: b over a, x (only it right: 50, only the other: 0)" in said
    assert "Reversed: b over a, y" in said


# ---------------------------------------------------------------------------------------- the pieces


def test_one_search_decides_as_every_classifier_does(bench: Bench) -> None:
    victim = Victim(bench)
    bases = {"a": Database("unseen"), "b": Database("unseen", 20), "c": Database("unseen", mixed=True)}
    variants = {"UW, 3": ("UW", 3), "CBW-D, 7": ("CBW-D", 7), "CBW-E, 1": ("CBW-E", 1)}
    x, ids = victim.split.batch(torch.arange(20)), victim.split.ids[:20]
    found = victim.shares_of(bases, variants)(x, ids)
    assert len(found) == 9
    for (name, base), (variant, (weighting, k)) in [(b, v) for b in bases.items() for v in variants.items()]:
        assert torch.equal(found[f"{variant}, {name}"], victim.retrieval(base, weighting, k).labels(x))


def test_databases_are_of_the_images_they_say(bench: Bench, data: Path) -> None:
    victim, train = Victim(bench), bench.source().train
    assert victim.images("seen").ids.tolist() == list(range(60))
    assert victim.images("unseen").ids.tolist() == list(range(100, 160))
    small, mixed = (victim.references(Database("unseen", s, m)) for s, m in ((20, False), (None, True)))
    assert len(small) == 20
    assert len(mixed) == 120
    assert len(victim.references(Database("seen"))) == 60
    features = victim.features(Database("unseen"))
    layer = features.layers[0]
    expected = features(train.batch(torch.arange(100, 120)))[layer]
    assert torch.allclose(small.rows(layer, torch.arange(20)), expected, atol=1e-5)
    assert torch.allclose(mixed.rows(layer, torch.arange(20)), expected, atol=1e-5)


def test_examples_lie_in_the_ball(bench: Bench) -> None:
    victim = Victim(bench)
    for which in victim.attacks()[1:]:
        x, moved = victim.split.batch(victim.rows(which)), victim.examples("unseen", which)
        share = (moved - x).double().flatten(1).norm(dim=1) / x.double().flatten(1).norm(dim=1)
        assert float(share.max()) <= which.share * (1 + 1e-5)
        assert float(share.mean()) > 0.8 * which.share, which
        if which.kind == "FGSM":  # all values move alike but for the bounds
            steps = (moved - x).abs().flatten(1)
            inside = (moved > 0) & (moved < 1)
            assert float(((steps.amax(1, keepdim=True) - steps) * inside.flatten(1)).max()) < 1e-6


def test_black_box_examples_are_those_of_the_stranger(bench: Bench) -> None:
    victim = Victim(bench)
    black = Examples("black", "FGSM", 0.02)
    assert torch.equal(victim.examples("seen", black), victim.examples("unseen", black))
    gray = Examples("gray", "FGSM", 0.02)
    assert not torch.equal(victim.examples("seen", gray), victim.examples("unseen", gray))


def test_the_half_is_trained_on_the_first_half(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "robustknn.reproduce.networks.train", lambda net, source, *a, **k: seen.append(len(source.train)) or 1 / 0
    )
    for scene in ("unseen", "seen"):
        with pytest.raises(ZeroDivisionError):
            Victim(bench).recipes[scene].train(bench.source(), tmp_path, "cifar10", 0, torch.device("cpu"), Silent())
    assert seen == [100, 200]


# -------------------------------------------------------------------------------------- published weights


def test_published_weights_are_found_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTKNN_DATA", raising=False)
    with pytest.raises(InputError, match=r"put them there .*, or wait\.$"):
        weights_file(tmp_path, "resnet20", "wait")
    state = {f"module.{k}": v for k, v in load_model("resnet20").state_dict().items()}
    (tmp_path / "models").mkdir()
    torch.save({"state_dict": state}, tmp_path / "models" / "new.th")
    digest = hashlib.sha256((tmp_path / "models" / "new.th").read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "resnet20", f"resnet20-{digest[:8]}.th")
    file = (tmp_path / "models" / "new.th").rename(tmp_path / "models" / WEIGHTS["resnet20"])
    assert weights_file(tmp_path, "resnet20") == file
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match="not the published file"):
        weights_file(tmp_path, "resnet20")


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"weights": "published"}, "published weights"), ({"weights": "none"}, "'published' or 'trained'")],
)
def test_networks_that_are_not_there_are_refused(
    changed: dict[str, Any], said: str, data: Path, tmp_path: Path
) -> None:
    assert said in refuse(*order("webscale-k", data, tmp_path, **changed))


def test_missing_images_of_no_class_are_said_before_the_work(tmp_path: Path) -> None:
    root = write_cifar(tmp_path / "data")
    assert "fashion" in refuse(*order("webscale-table1", root, tmp_path / "work")).lower()


@pytest.mark.parametrize("name", OF)
def test_the_preset_of_the_paper_is_refused_in_a_sentence(name: str, data: Path, tmp_path: Path) -> None:
    said = refuse("reproduce", name, "--preset", "paper", "--data", data, "--work", tmp_path)
    assert "ImageNet" in said
    assert not any(tmp_path.rglob("*.json"))


def test_no_number_is_called_published() -> None:
    """The paper's tables could not be read: what is remembered of them is not shown as published."""
    assert all(not published(name, "cifar10") for name in OF)


# ------------------------------------------------------------------------------------- whole experiments


@pytest.fixture(scope="module")
def records(data: Path, work: Path) -> dict[str, dict[str, Any]]:
    made = {}
    for name in OF:
        done = call(*order(name, data, work))
        assert done.code == 0, done.err
        made[name] = json.loads(Path(done.out.strip()).read_text())
    return made


def rows_of(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["row"], r["column"]): r for r in record["rows"]}


@pytest.mark.parametrize("name", OF)
def test_a_table_is_whole(name: str, records: dict[str, dict[str, Any]]) -> None:
    rows = rows_of(records[name])
    lines = [row for row, column in rows if column == "gray PGD"]
    for line in lines:
        assert rows[line, "clean"]["n"] == rows[line, "gray FGSM"]["n"] == 30
        assert rows[line, "gray PGD"]["n"] == 10
        worst = rows.get((line, WORST))
        if worst is not None:
            assert worst["n"] == 10
            assert worst["mean"] <= min(rows[line, c]["mean"] for c in ("black PGD", "gray PGD"))
    for places in experiments.create(name).front.values():
        assert all(place in rows for place in places)
    assert max(rows[line, "clean"]["mean"] for line in lines) > 30  # of ten classes, after two epochs


def test_the_tables_agree_where_they_meet(records: dict[str, dict[str, Any]]) -> None:
    first, k = rows_of(records["webscale-table1"]), rows_of(records["webscale-k"])
    defenses, features = rows_of(records["webscale-defenses"]), rows_of(records["webscale-features"])
    for column in ("clean", "black FGSM", "gray FGSM", "gray PGD", WORST):
        expected = first["CBW-D, seen", column]["mean"]
        assert k["CBW-D, K = 5, seen", column]["mean"] == expected
        assert defenses["retrieval, CBW-D", column]["mean"] == expected
        assert defenses["network", column]["mean"] == first["network, seen", column]["mean"]
    assert ("UW, conv_4_3, rmac-bits", "clean") in features
    for a, b in combinations(("UW", "CBW-E", "CBW-D"), 2):  # with one neighbor nothing is weighted
        assert k[f"{a}, K = 1, unseen", "gray FGSM"]["mean"] == k[f"{b}, K = 1, unseen", "gray FGSM"]["mean"]


def test_differences_and_curves_are_those_of_the_rows(records: dict[str, dict[str, Any]]) -> None:
    record = records["webscale-table1"]
    rows, shown = rows_of(record), record["pictures"]
    for column in ("clean", "black FGSM", "gray FGSM"):
        big, small = (rows[f"CBW-D, unseen, {size}", column]["mean"] for size in ("all", "20"))
        gain = rows["CBW-D, unseen, all minus CBW-D, unseen, 20", column]
        assert gain["mean"] == pytest.approx(big - small, abs=1e-3)
        assert gain["unit"] == "points"
    points = shown["curves"]["unseen, gray-box FGSM"]["CBW-D"]
    assert [round(p[0], 2) for p in points] == [0.0, 0.02, 0.05]
    assert [p[2] for p in points] == [30, 30, 10]
    assert 100 * points[1][1] / 30 == pytest.approx(rows["CBW-D, unseen, all", "gray FGSM"]["mean"], abs=1e-3)
    steps = shown["curves"]["unseen, gray-box PGD"]["CBW-D"]  # of the few images
    assert [p[2] for p in steps] == [30, 10, 10]
    assert 10 * steps[1][1] == pytest.approx(rows["CBW-D, unseen, all", "gray PGD"]["mean"], abs=1e-3)
    assert steps[1][0] == pytest.approx(0.02, abs=1e-3)
    interval = rows["CBW-D, unseen, all", "gray FGSM"]["interval"]
    assert interval == pytest.approx([100 * end for end in wilson(int(points[1][1]), 30)], abs=1e-3)
    assert [p[0] for p in shown["sizes"]["clean"]] == [20, 60]
    assert shown["said"][0].startswith("The ordering CBW-D over CBW-E over UW: of 24 paired comparisons")
    assert shown["said"][1].startswith("The gain of a larger database (CBW-D): of 3 paired comparisons")


@pytest.mark.parametrize("name", ["webscale-table1", "webscale-k", "webscale-defenses"])
def test_figures_are_drawn_of_the_record_alone(name: str, records: dict[str, dict[str, Any]]) -> None:
    experiment = experiments.create(name)
    charts = experiment.draw(json.loads(json.dumps(records[name])))
    again = experiment.draw(records[name])
    assert len({chart.stem for chart in charts}) == len(charts) > 1
    assert [chart.svg for chart in charts] == [chart.svg for chart in again]


def test_stopped_in_a_worst_case_and_gone_on_with_gives_the_same_record(
    records: dict[str, dict[str, Any]], data: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "webscale-features"
    monkeypatch.setattr("robustknn.reproduce.webscale_victim._WORST_BLOCK", 4)
    plain, calls = webscale_victim.normalized_l2, []

    def stopping(x: torch.Tensor, moved: torch.Tensor) -> Any:
        calls.extend([1] * (len(x) <= 4))  # the blocks of the worst case alone
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(x, moved)

    monkeypatch.setattr(webscale_victim, "normalized_l2", stopping)
    words = order(name, data, tmp_path)
    for part in ("models", "shared"):
        (tmp_path / part).mkdir()
    for source in [*(work / "models").iterdir(), *(work / "shared").iterdir()]:
        if not source.name.startswith("worst-case"):
            (tmp_path / source.parent.name / source.name).symlink_to(source)
    assert call(*words).code == 130
    assert call(*words).code == 0
    held = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    assert held["rows"] == records[name]["rows"]
