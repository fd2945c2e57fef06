"""Every file in `examples/` does what its first lines say, and what comes out is in range and right."""

from __future__ import annotations

import csv
import io
import re
import runpy
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import refuse, succeed
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from robustknn import FeatureExtractor, load_model, registry
from robustknn.datasets import load
from robustknn.evaluation import Cell, RunDirectory, read_summary

EXAMPLES = Path(__file__).parent.parent / "examples"
PER_CLASS = 20


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an example registers is forgotten again, and it draws from a random state of its own."""
    for kind in registry.ALL.values():
        list(kind)  # loads the built-in entries
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    succeed("train", "--epochs", 4, "--lr", 2e-3, "--batch-size", 64, "--out", folder)
    return folder


def commands(name: str, runs: Path, *more: Any) -> list[list[str]]:
    """The commands in an example's docstring, as arguments; "…" stands for `more`, and runs/ for a folder."""
    text = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1].replace("\\\n", " ")
    found = []
    for line in re.findall(r"^ *robustknn (.*)$", text, re.M):
        words: list[str] = []
        for word in shlex.split(line):
            words += map(str, more) if word == "…" else [word]
        words = [str(EXAMPLES / w.removeprefix("examples/")) if w.startswith("examples/") else w for w in words]
        found.append([str(runs / w.removeprefix("runs/")) if w.startswith("runs/") else w for w in words])
    assert found, f"{name} says no command"
    return found


ALONE = ("--no-published", "--worst-case", "off")
"""Without the report's two columns: what takes time."""


def small(checkpoint: Path, out: Path, *more: Any) -> list[Any]:
    few = ["--n", 30, "--references-per-class", PER_CLASS, "--threads", 1]
    return ["--checkpoint", checkpoint, *few, "--eps", 0.2, "--out", out, *more]


def script(name: str) -> tuple[dict[str, Any], str]:
    """An example run as a program: its names and what it printed."""
    out = io.StringIO()
    with redirect_stdout(out):
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return names, out.getvalue()


def test_every_example_is_tested_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    files = sorted(p.name for p in EXAMPLES.glob("*.py"))
    assert len(files) >= 6
    assert [f for f in files if f'"{f}"' not in here] == []


def test_own_attack(checkpoint: Path, tmp_path: Path) -> None:
    (command,) = commands("own_attack.py", tmp_path, *small(checkpoint, tmp_path / "adv"))
    assert command[command.index("--attack-option") + 1] == "tries=20"
    succeed(*command)
    tensors = load_file(tmp_path / "adv" / "examples.safetensors")
    distance = (tensors["x_adv"] - tensors["x"]).abs().flatten(1).amax(1)
    assert 0.19 < float(distance.max()) <= 0.2 + 1e-6
    with (tmp_path / "adv" / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert 1 <= sum(r["success"] == "True" for r in rows) <= 30
    plugin = ["--plugin", EXAMPLES / "own_attack.py", "-a", "noise", "-a", "ask", "--attack-option"]
    assert "unknown option of attack 'ask': 'tries'" in refuse(
        "evaluate", *plugin, "tries=3", *small(checkpoint, tmp_path / "r")
    )
    assert "noise" in succeed("list", "attacks", *plugin[:2])
    succeed("evaluate", *plugin[:4], "--attack-option", "tries=1", *small(checkpoint, tmp_path / "one"), *ALONE)
    summary = read_summary(RunDirectory(tmp_path / "one"))
    assert [a.name for a in summary.classifiers[0].attacks] == ["noise"]
    one = RunDirectory(tmp_path / "one").rows(Cell("knn", "noise", 0.2))["success"]
    twenty = np.array([r["success"] == "True" for r in rows])
    assert (one <= twenty).all()  # the first of twenty tries is that one


def test_own_classifier(checkpoint: Path, tmp_path: Path) -> None:
    more = small(
        checkpoint, tmp_path / "r", "-k", 6, "-a", "ask", "-a", "pgd-transfer", "--attack-option", "steps=5", *ALONE
    )
    (command,) = commands("own_classifier.py", tmp_path, *more)
    succeed(*command)
    run = RunDirectory(tmp_path / "r")
    (found,) = read_summary(run).classifiers
    assert found.name == "weighted-knn"
    assert found.clean_accuracy > 0.8
    assert found.attacks[0].robust_accuracy < found.clean_accuracy
    source, model = load("digits"), load_model("digits-cnn", checkpoint)
    features, train = FeatureExtractor(model, ["relu3"]), source.train.per_class(PER_CLASS)

    def embed(x: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return features(x)["relu3"].flatten(1).double().numpy()

    truth = KNeighborsClassifier(6, weights="distance").fit(
        embed(train.batch(torch.arange(len(train)))), train.labels.numpy()
    )
    rows = run.rows(Cell("weighted-knn", "clean"))
    expected = truth.predict(embed(source.test.batch(torch.from_numpy(rows["sample_id"]))))
    assert rows["prediction"].tolist() == expected.tolist()


def test_own_objective(checkpoint: Path, tmp_path: Path) -> None:
    more = small(checkpoint, tmp_path / "r", "--attack-option", "steps=15", "-c", "knn", "-c", "dknn", *ALONE)
    (command,) = commands("own_objective.py", tmp_path, *more)
    succeed(*command)
    run = RunDirectory(tmp_path / "r")
    assert run.header["plan"]["attacks"]["pgd"]["objective"] == {"name": "centroid"}
    for c in read_summary(run).classifiers:
        (attack,) = c.attacks
        assert attack.name == "pgd"
        assert not attack.transfer
        assert attack.robust_accuracy < c.clean_accuracy - 0.1  # it finds the way out
        assert attack.mean_linf <= 0.2 + 1e-6


def test_own_data_and_model(tmp_path: Path) -> None:
    train, evaluate = commands("own_data_and_model.py", tmp_path)
    out = succeed(*train, "--lr", 0.01, "--batch-size", 32)
    accuracy = float(re.search(r"test accuracy ([0-9.]+) on 200 samples", out)[1])  # type: ignore[index]
    assert accuracy > 0.8
    succeed(*evaluate, "--n", 60, "-a", "ask", "-a", "pgd-transfer", "--attack-option", "steps=10")
    run = RunDirectory(tmp_path / "moons")
    summary = read_summary(run)
    assert run.header["plan"]["describe"]["data"] == "moons"
    assert [v["layer"] for v in run.header["plan"]["classifiers"]["knn"]["voters"]] == ["1"]
    assert summary.classifiers[0].clean_accuracy > 0.8
    assert summary.classifiers[0].worst_case_accuracy < summary.classifiers[0].clean_accuracy
    assert "moons" in succeed("list", "datasets", "--plugin", EXAMPLES / "own_data_and_model.py")
    assert (tmp_path / "moons" / "report.html").stat().st_size > 10_000


def test_own_data_and_model_without_registering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    named = ["--data", "own_data_and_model:moons", "--model", "own_data_and_model:MLP"]
    succeed("train", *named, "--epochs", 2, "--out", tmp_path / "m")
    few = ["--checkpoint", tmp_path / "m", "--n", 10, "-a", "fgsm", "--eps", 0.1, "--controls", 0]
    succeed("evaluate", *named, *few, "--out", tmp_path / "r")
    assert read_summary(RunDirectory(tmp_path / "r")).samples == 10


def test_own_embedding() -> None:
    names, out = script("own_embedding.py")
    shares = [float(s) for s in re.findall(r"^eps 0\.\d{4}: (\d\.\d\d) of the queries stay right$", out, re.M)]
    assert len(shares) == len(out.splitlines()) == 3
    assert shares == sorted(shares, reverse=True)
    clean = (names["classifier"].predict(names["x"]) == names["y"]).double().mean()
    assert shares[0] <= float(clean) + 0.005
    assert shares[2] < shares[0]
    # The classifier is scikit-learn's on the same embeddings.
    z, y = names["embeddings"].double().numpy(), names["labels"].numpy()
    truth = KNeighborsClassifier(5, metric="cosine").fit(z[100:], y[100:])
    assert (truth.predict(z[:100]) == names["classifier"].predict(names["x"]).numpy()).mean() > 0.98


def test_quickstart() -> None:
    names, out = script("quickstart.py")
    found = re.findall(r"(accuracy|mean credibility|robust accuracy|mean L2) (\d+\.\d+)", out)
    said = {name: float(value) for name, value in found}
    assert list(said) == ["accuracy", "mean credibility", "robust accuracy", "mean L2"]
    assert said["accuracy"] > 0.9
    assert 0.1 < said["mean credibility"] <= 1
    assert 0 <= said["robust accuracy"] < 0.6
    assert 0 < said["mean L2"] <= 0.15 * 8
    assert float((names["result"].x_adv - names["x"]).abs().max()) <= 0.15 + 1e-6


def test_attack_a_function() -> None:
    names, out = script("attack_a_function.py")
    said = dict(re.findall(r"^(labels|scores): (\d\.\d\d) of the images stay right after \d+ queries each$", out, re.M))
    assert len(said) == len(out.splitlines()) == 2
    assert float(said["scores"]) < float(said["labels"]) < 1
    # The classifier is the function: scikit-learn's decision, also on what was found.
    result = names["result"]
    truth = names["model"].predict(result.x_adv.numpy().reshape(-1, 64))
    assert (truth[result.success.numpy()] != names["y"][result.success.numpy()]).all()
    assert float(result.linf.max()) <= 0.2 + 1e-6


def test_attack_a_faiss_index() -> None:
    pytest.importorskip("faiss")
    names, out = script("attack_a_faiss_index.py")
    shares = [float(s) for s in re.findall(r": (\d\.\d\d) (?:of the queries are|stay) right$", out, re.M)]
    assert len(shares) == len(out.splitlines()) == 4
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[3] < 0.1
    found = names["index"].search(names["nn"].functional.normalize(names["encoder"](names["x"])).detach().numpy(), 5)[1]
    votes = names["labels"][100:][torch.from_numpy(found)]
    truth = torch.nn.functional.one_hot(votes, 5).sum(1).argmax(1)
    assert (truth == names["classifier"].predict(names["x"])).double().mean() > 0.98
