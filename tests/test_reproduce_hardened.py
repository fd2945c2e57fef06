"""The experiments on DAEkNN and ASK: from end to end on small files, and their numbers against plain formulas."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import call, refuse, succeed
from small_mnist import write_mnist
from test_datasets_files import write_cifar

from robustknn import store
from robustknn.datasets import Split, load
from robustknn.models import MnistCNN, checkpoint, create
from robustknn.reproduce import WORST, experiments
from robustknn.reproduce.ask_attack import _key, _worst_of_all
from robustknn.reproduce.ask_defense_victim import SCENES, passes
from robustknn.reproduce.ask_loss import information_bound, spearman
from robustknn.reproduce.ask_victim import COMPARED, chosen
from robustknn.reproduce.papers import published
from robustknn.reproduce.published_weights import WEIGHTS
from robustknn.training import Adversarial, ASKDef, TrainConfig, train

TINY = ("n=12", "per_class=15", "epochs=1", "standard_epochs=1", "worst_n=4", "strength=fast")
DEFENSE = ("n=12", "per_class=15", "epochs=1", "worst_n=4", "images=64")
ATTACK = (*TINY, "worst_n=12", "steps_n=4", "most_steps=2")
SCALE = ("images=4", "repeats=1", "most_references=1000", "most_dimensions=512")


def words(changes: tuple[str, ...]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred images of CIFAR-10's form, and weights of a ResNet-20 that learned nothing."""
    root = tmp_path_factory.mktemp("cifar")
    write_cifar(root / "cifar-10-batches-py")
    (root / "models").mkdir()
    torch.manual_seed(0)
    torch.save({"state_dict": create("resnet20").state_dict()}, root / "new.th")
    digest = hashlib.sha256((root / "new.th").read_bytes()).hexdigest()
    (root / "new.th").rename(root / "models" / f"resnet20-{digest[:8]}.th")
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def _no_other_data(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTKNN_DATA", raising=False)
    (weights,) = (cifar / "models").iterdir()
    monkeypatch.setitem(WEIGHTS, "resnet20", weights.name)


def record_of(name: str, root: Path, work: Path, changes: tuple[str, ...], dataset: str = "mnist") -> dict[str, Any]:
    done = call("reproduce", name, "--dataset", dataset, "--data", root, "--work", work, *words(changes))
    assert done.code == 0, done.err
    return dict(json.loads(Path(done.out.strip()).read_text()))


def by_place(record: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {(r["row"], r["column"]): r for r in record["rows"]}


def check(name: str, record: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Every published number has its place, every share lies in its interval, and figures are files."""
    rows = by_place(record)
    for place, value in published(name, record["data"]).items():
        if place in rows:
            assert rows[place]["published"] == value
    for row in record["rows"]:
        if row["interval"] is not None:
            slack = 1e-6 * abs(row["mean"]) + 1e-9  # sums round
            assert row["interval"][0] - slack <= row["mean"] <= row["interval"][1] + slack
    charts = experiments.create(name).draw(record)
    assert len({chart.stem for chart in charts}) == len(charts)
    for chart in charts:
        assert chart.svg.lstrip().startswith(b"<?xml")
        assert chart.png.startswith(b"\x89PNG")
    return rows


# --------------------------------------------------------------------------------------------- DAEkNN


@pytest.fixture(scope="module")
def table1(data: Path, work: Path) -> dict[str, Any]:
    return record_of("daeknn-table1", data, work, TINY)


def test_table_1_is_whole(table1: dict[str, Any]) -> None:
    rows = check("daeknn-table1", table1)
    assert set(published("daeknn-table1", "mnist")) <= set(rows)
    for name in ("CNN", "AT-CNN", "DkNN", "DAEkNN"):
        sa, aa, hm = (rows[name, column]["mean"] for column in ("SA", "AA", "HM"))
        assert rows[name, "SA"]["n"] == 12
        assert hm == pytest.approx(2 * sa * aa / (sa + aa) if sa + aa else 0.0, abs=1e-3)
        assert rows[name, WORST]["n"] == 4
        assert rows[name, WORST]["protocol"] == WORST
    assert len(table1["runs"]["0"]["networks"]) == 2


def blocks(work: Path, kind: str) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Every shared folder of a kind, with its tensors."""
    found = []
    for folder in sorted((work / "shared").glob(f"{kind}-mnist-*")):
        parts = [store.load_tensors(file) for file in sorted(folder.glob("*.safetensors"))]
        found.append((folder, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}))
    return found


def plain_features(weights: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The activations behind the second and third convolution, by plain calls."""
    net = MnistCNN(form="unpadded", dropout=0.5)
    net.load_state_dict(store.load_tensors(weights))
    net.eval()
    with torch.no_grad():
        second = torch.relu(net.conv2(torch.relu(net.conv1(images))))
        third = torch.relu(net.conv3(second))
    return {"relu2": second.flatten(1).double().numpy(), "relu3": third.flatten(1).double().numpy()}


def plain_votes(
    clean: dict[str, np.ndarray], hard: dict[str, np.ndarray] | None, queries: dict[str, np.ndarray], labels: np.ndarray
) -> np.ndarray:
    """Equations 2, 6, 7 and 11 of arXiv 2108.06797 by brute force in float64, k = 5."""
    total = np.zeros((len(next(iter(queries.values()))), 10))
    for layer, z in queries.items():
        shares, means = [], []
        for held in (clean, hard):
            if held is None:
                continue
            distances = np.sqrt(((z[:, None] - held[layer][None]) ** 2).sum(2))
            nearest = np.argsort(distances, 1, kind="stable")[:, :5]
            shares.append(np.stack([(labels[nearest] == c).sum(1) for c in range(10)], 1) / 5)
            means.append(np.take_along_axis(distances, nearest, 1).mean(1))
        weights = np.exp(-np.stack(means, 1) + np.min(means, 0)[:, None])
        weights /= weights.sum(1, keepdims=True)
        total += sum(w[:, None] * p for w, p in zip(weights.T, shares, strict=True))
    return np.round(total, 6).argmax(1)


def test_table_1_is_what_plain_votes_give(table1: dict[str, Any], data: Path, work: Path) -> None:
    """The DkNN and DAEkNN of the record, by brute force on the images that were kept."""
    source = load("mnist", root=data, protocol="standard")
    rows, references = by_place(table1), source.train.per_class(15)
    held = {len(v["x"]): v["x"] for _, v in blocks(work, "hardened")}[len(references)]
    images = references.batch(torch.arange(len(references)))
    assert float((held - images).abs().max()) <= 60 / 255 + 1e-6
    assert 0 <= float(held.min()) <= float(held.max()) <= 1
    examples = [v["x"] for _, v in blocks(work, "examples")]
    assert len(examples) == 2
    labels = references.labels.numpy()
    for name, model, hardened in (("DkNN", "standard", None), ("DAEkNN", "adversarial", held)):
        weights = next((work / "models").glob(f"mnist-cnn-{model}-*/epoch-00001/weights.safetensors"))
        clean = plain_features(weights, images)
        hard = None if hardened is None else plain_features(weights, hardened)
        right = []
        for x in examples:  # of the two networks; one of them is this one's
            scores = [v for _, v in blocks(work, "scores")]
            y = scores[0]["label"].numpy()
            right.append(100 * float((plain_votes(clean, hard, plain_features(weights, x), labels) == y).mean()))
        assert rows[name, "AA"]["mean"] in [pytest.approx(value, abs=1e-3) for value in right]


def test_tables_share_networks_references_and_examples(table1: dict[str, Any], data: Path, work: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in work.glob("shared/*/*.safetensors")}
    rows = check("daeknn-table2", record_of("daeknn-table2", data, work, TINY))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len([home for home in (work / "models").iterdir() if home.is_dir()]) == 2
    assert len(list((work / "shared").glob("hardened-*"))) == 2  # the new one is of the network without training
    first = by_place(table1)
    for column in ("SA", "AA", "HM", WORST):
        assert rows["DAEkNN", column]["mean"] == first["DAEkNN", column]["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["daeknn-fig1", "daeknn-fig3"])
def test_figures_of_daeknn(name: str, table1: dict[str, Any], data: Path, work: Path) -> None:
    rows = check(name, record_of(name, data, work, TINY))
    assert set(published(name, "mnist")) <= set(rows)
    ours = "DAEkNN, layers 2 + 3" + (", 60/255" if name.endswith("3") else "")
    for column in ("SA", "AA", "HM"):
        assert rows[ours, column]["mean"] == by_place(table1)["DAEkNN", column]["mean"]


@pytest.mark.slow
def test_killed_while_references_are_attacked(table1: dict[str, Any], data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "robustknn", "reproduce", "daeknn-table1", "--data", str(data)]
    command += ["--work", str(tmp_path), "--threads", "1", *words(TINY)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("shared/hardened-*")):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    again = json.loads((tmp_path / "results" / "daeknn-table1.mnist.cpu.json").read_text())
    assert again["rows"] == table1["rows"]


@pytest.mark.slow
def test_cifar_on_a_fine_tuned_network(cifar: Path, work: Path, tmp_path: Path) -> None:
    changes = ("n=8", "per_class=5", "epochs=1", "images=16", "worst_n=2")
    record = record_of("daeknn-table1", cifar, work, changes, "cifar10")
    rows = check("daeknn-table1", record)
    assert set(published("daeknn-table1", "cifar10")) <= set(rows)
    (network,) = record["runs"]["0"]["networks"]
    assert network["command"].endswith(f"--checkpoint {WEIGHTS['resnet20']} --first 16")
    # The line that is printed gives the same network.
    typed = network["command"].replace(WEIGHTS["resnet20"], str(cifar / "models" / WEIGHTS["resnet20"]))
    program, *line = shlex.split(typed.replace("--out RUN", f"--out {tmp_path / 'run'}"))
    assert program == "robustknn"
    succeed(*line, "--data-root", cifar, "--threads", 1)
    weights = tmp_path / "run" / "epoch-00001" / checkpoint.WEIGHTS
    assert store.sha256_file(weights) == network["sha256_weights"]


@pytest.mark.parametrize("name", ["daeknn-table1", "daeknn-fig3", "ask-attack", "ask-defense"])
def test_what_is_missing_is_said_before_any_work(name: str, cifar: Path, tmp_path: Path) -> None:
    order = ("reproduce", name, "--dataset", "cifar10", "--work", tmp_path / "work")
    assert "needs a CUDA device" in refuse(*order, "--data", cifar, "--preset", "paper", "--device", "cpu")
    write_cifar(tmp_path / "bare" / "cifar-10-batches-py")
    missing = (
        f"the published weights {WEIGHTS['resnet20']!r} are not in 'models' below the folder of the data; put them"
    )
    assert missing in refuse(*order, "--data", tmp_path / "bare")
    assert not (tmp_path / "work").exists()


# ----------------------------------------------------------------------------------------------- ASK


@pytest.mark.slow
def test_ask_attack(data: Path, work: Path) -> None:
    record = record_of("ask-attack", data, work, ATTACK)
    rows = check("ask-attack", record)
    column = "layer 3, 80/255"
    others = [rows[name, column]["mean"] for name in ("AdvKNN", "Sitawarin & Wagner 1")]
    lead = rows["ASK's lead over AdvKNN and S&W 1, as compared", column]
    assert lead["mean"] == pytest.approx(min(others) - rows["ASK", column]["mean"], abs=1e-3)
    assert lead["unit"] == "points"
    for name in ("ASK", "AdvKNN", "PGD on the network"):
        assert rows[f"{name}, 100 steps", column]["mean"] <= rows["no attack", column]["mean"]
        radii = [rows[f"{name}, 100 steps", f"layer 3, {r}/255"]["mean"] for r in (40, 60, 80, 100)]
        assert radii == sorted(radii, reverse=True)
    assert {place for place in rows if place[1] == WORST} == {
        (f"DkNN, {label}", WORST) for label in ("layer 1", "layer 2", "layer 3", "layers 2 + 3")
    }
    for label in ("layer 1", "layer 2", "layer 3", "layers 2 + 3"):
        least = min(rows[name + end, f"{label}, 80/255"]["mean"] for name in COMPARED for end in ("", ", 100 steps"))
        assert rows[f"DkNN, {label}", WORST]["mean"] <= least  # the same images
    assert [t for t, _, n in record["pictures"]["steps"]["ASK"] if n == 4] == [1, 2]


def test_the_worst_case_of_ask_attack_is_also_over_its_rows() -> None:
    """Places by hand: of 40 images the rows have 6, the worst case 4 of these."""
    rows, worst = chosen(40, 6).tolist(), chosen(40, 4).tolist()
    assert set(worst) < set(rows)
    held = "1" * 6
    found = {key: {"flags": held, "n": 6, "of": 40} for key in every_row("layer 1", 0.1)}
    found["worst case, layer 1"] = {"flags": "1011", "n": 4}
    assert _worst_of_all(found, "layer 1", 0.1).tolist() == [True, False, True, True]
    fooled, other = rows.index(worst[3]), next(place for place in range(6) if rows[place] not in worst)
    for key, place in zip(found, (fooled, other), strict=False):
        found[key] = {**found[key], "flags": held[:place] + "0" + held[place + 1 :]}
    assert _worst_of_all(found, "layer 1", 0.1).tolist() == [True, False, True, False]


def every_row(label: str, eps: float) -> list[str]:
    return [_key(name, label, eps) + end for name in COMPARED for end in ("", ", full")]


@pytest.mark.slow
def test_ask_defense(data: Path, work: Path) -> None:
    record = record_of("ask-defense", data, work, DEFENSE)
    rows = check("ask-defense", record)
    for column in ("clean", "PGD on the network", "ASK-Atk", WORST):
        gain = rows["ASK-Def", column]["mean"] - rows["adversarial", column]["mean"]
        assert rows["gain of ASK-Def", column]["mean"] == pytest.approx(gain, abs=1e-3)
    networks = record["runs"]["0"]["networks"]
    assert len(networks) == 4
    longer = next(n for n in networks if n["network"] == "adversarial-longer")
    assert "--epochs 2 " in longer["command"]  # one epoch of ASK-Def has the passes of 2.4


@pytest.mark.slow
def test_ask_defense_as_published(data: Path, work: Path) -> None:
    """The cross-entropy of both has half the radius of the attack, ASK all of it."""
    record = record_of("ask-defense-published", data, work, DEFENSE)
    check("ask-defense-published", record)
    commands = {n["network"]: n["command"] for n in record["runs"]["0"]["networks"]}
    assert all("eps=0.1 " in command + " " for command in commands.values())
    assert "ask_eps=0.2" in commands["ask-def-half"]


@pytest.mark.parametrize("name", ["adversarial", "ask-def"])
def test_passes_are_those_of_a_training_step(name: str) -> None:
    """Rows that go through the network with a gradient in one step."""
    scene = SCENES["mnist", "cpu"]
    options: dict[str, Any] = {"eps": 0.1, "steps": scene.steps}
    method = Adversarial(**options) if name == "adversarial" else ASKDef(layers=("relu3",), **options)
    network, seen = create("mnist-cnn"), []
    network.register_forward_hook(lambda _, given, __: seen.append(len(given[0])) if torch.is_grad_enabled() else None)
    split = Split(torch.rand(40, 1, 28, 28), torch.arange(40) % 10, "train")
    train(network, SimpleNamespace(train=split, validation=None), TrainConfig(epochs=1, batch_size=40), method=method)
    assert sum(seen) == passes(scene, name, 40)


def test_ask_loss(data: Path, work: Path) -> None:
    rows = check("ask-loss", record_of("ask-loss", data, work, ("n=12", "per_class=15", "epochs=1")))
    correlations = [r["mean"] for place, r in rows.items() if r["unit"] == "rank correlation"]
    assert len(correlations) >= 7
    assert all(-1 <= value <= 1 for value in correlations)
    information = {place: r["mean"] for place, r in rows.items() if r["unit"] == "nats"}
    assert len(information) == 12
    assert all(0 <= value <= math.log(10) + 1e-6 for value in information.values())


def test_rank_correlation() -> None:
    """With two pairs of ties, by hand: ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3, 4."""
    found = spearman(torch.tensor([0.0, 5.0, 5.0, 9.0]), torch.tensor([1.0, 1.0, 2.0, 7.0]))
    assert found == pytest.approx(3.75 / 4.5)
    assert spearman(torch.ones(5), torch.arange(5.0)) is None


def test_information_of_a_channel() -> None:
    """A symmetric channel of four classes: the bound reaches its information at the true shares alone."""
    classes, wrong, each = 4, 0.3, 3000
    sent, received = [], []
    for y in range(classes):
        for z in range(classes):
            count = round(each * (1 - wrong)) if y == z else round(each * wrong / (classes - 1))
            sent += [y] * count
            received += [z] * count
    y, z = torch.tensor(sent), torch.tensor(received)
    true = math.log(classes) + (1 - wrong) * math.log(1 - wrong) + wrong * math.log(wrong / (classes - 1))

    def shares(error: float) -> torch.Tensor:
        p = torch.where(y == z, 1 - error, error / (classes - 1)).double()
        return (p + 1e-6).log()[:, None]

    assert information_bound(shares(wrong), classes) == pytest.approx(true, abs=1e-4)
    for error in (0.05, 0.2, 0.5, 0.74):
        assert information_bound(shares(error), classes) < true
    assert information_bound(torch.cat([shares(0.5), shares(wrong)], 1), classes) == pytest.approx(true, abs=1e-4)


def test_ask_scale(data: Path, work: Path) -> None:
    record = record_of("ask-scale", data, work, SCALE, "digits")
    rows = check("ask-scale", record)
    for classes in (10, 100, 1000):
        row = f"1,000 references, {classes:,} classes, 512 dimensions"
        # Of every class a mean vector, its mean square and a share; the center; four bytes each.
        kept = {"as released": classes, "here": min(classes, 5)}
        for said, m in kept.items():
            size = 4 * (m * 512 + 512 + 2 * m) / 1000
            assert rows[row, f"memory of guides {said}, kB"]["mean"] == pytest.approx(size, abs=1e-3)
        assert rows[row, "gradient step here, ms"]["mean"] > 0


@pytest.mark.parametrize(
    ("experiment", "data_set", "row", "column", "value"),
    [
        ("daeknn-table1", "mnist", "DAEkNN", "AA", 68.26),
        ("daeknn-table1", "cifar10", "AT-CNN", "HM", 46.18),
        ("daeknn-table2", "cifar10", "WAT", "AA", 13.1),
        ("daeknn-fig1", "mnist", "DkNN, layers 2 + 3", "AA", 68.3),
        ("daeknn-fig3", "cifar10", "DAEkNN, layer 4, 4/255", "SA", 81.9),
        ("ask-attack", "cifar10", "ASK", "layer 4, 8/255", 36.56),
        ("ask-defense-published", "cifar10", "gain of ASK-Def", "ASK-Atk", 6.9),
        ("ask-defense-published", "imagenette", "gain of ASK-Def", "ASK-Atk", 3.5),
    ],
)
def test_published_values(experiment: str, data_set: str, row: str, column: str, value: float) -> None:
    assert published(experiment, data_set)[row, column] == value
