"""The command line: what every command leaves on disk, how it goes on, how it ends. Bad input: test_cli_config.py."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from command import call, refuse, results, succeed, without_progress
from PIL import Image
from safetensors.torch import load_file

import robustknn
from robustknn import DkNN, FeatureExtractor, ReferenceSet, load_model, registry
from robustknn.cli import commands
from robustknn.datasets import load
from robustknn.evaluation import Cell, RunDirectory, read_summary

PER_CLASS = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of three epochs, by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    succeed("train", "--epochs", 3, "--lr", 2e-3, "--batch-size", 64, "--out", folder)
    return folder


ALONE = ("--no-published", "--worst-case", "off")
"""Without the report's two columns: what takes time."""


def flags(checkpoint: Path, *more: Any, n: int = 12) -> list[Any]:
    """A small evaluation."""
    few = ["--n", n, "--references-per-class", PER_CLASS, "--batch-size", 5, "--examples", 4, "--controls", 4]
    attacks = ["-a", "ask", "-a", "pgd-transfer", "--attack-option", "steps=4", *ALONE]
    return [
        "--checkpoint",
        checkpoint,
        "-c",
        "knn",
        "-c",
        "dknn",
        "-k",
        7,
        *few,
        *attacks,
        "-e",
        0.1,
        "-e",
        0.05,
        *more,
    ]


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    succeed("evaluate", *flags(checkpoint), "--out", folder)
    return folder


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "robustknn", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


# ---------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, succeed("demo", "--quick", "--out", folder)


def test_the_demo_leaves_a_whole_run(demo: tuple[Path, str]) -> None:
    folder, out = demo
    run = RunDirectory(folder)
    summary = read_summary(run)
    assert [c.name for c in summary.classifiers] == ["knn", "dknn"]
    assert summary.samples == 60
    for c in summary.classifiers:
        names = ["published", "ask-published", "pgd-transfer", "ask", "worst-case-fast"]
        assert [a.name for a in c.attacks] == names
        assert c.searched
        assert c.published_accuracy == c.attacks[0].robust_accuracy > c.worst_case_accuracy
        assert 30 <= c.n <= 60  # without those it was calibrated on
        assert c.clean_accuracy > 0.9
        assert c.worst_case_accuracy < 0.5
        assert f"{100 * c.clean_accuracy:.1f} %" in out
    assert summary.classifiers[0].n == 60
    for name in ("report.html", "rows.parquet", "summary.json", "gallery.safetensors", "gallery.json"):
        assert (folder / name).stat().st_size > 100
    assert out.splitlines()[-2:] == [f"page: {folder / 'report.html'}", f"summary: {folder / 'summary.json'}"]
    assert not list(folder.rglob("*.partial"))


def test_the_demo_leaves_another_run_alone_and_takes_the_next_folder(demo: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("run.json", "environment.json"):  # enough to be another run for another seed
        (tmp_path / "d").mkdir(exist_ok=True)
        shutil.copy(demo[0] / name, tmp_path / "d" / name)
    before = {p: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    done = call("demo", "--quick", "--seed", 1, "--out", tmp_path / "d")
    assert done.code == 0
    assert done.err == f"{str(tmp_path / 'd')!r} holds another run and is left alone.\n"
    assert {p: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    assert read_summary(tmp_path / "d-2") == read_summary(RunDirectory(tmp_path / "d-2"))
    assert read_summary(tmp_path / "d-2").seed == 1


# --------------------------------------------------------------------------------------------- train


def test_train_leaves_a_checkpoint_that_says_what_was_printed(checkpoint: Path) -> None:
    printed = succeed("train", "--epochs", 3, "--lr", 2e-3, "--batch-size", 64, "--out", checkpoint)  # finished before
    assert f"checkpoint: {checkpoint / 'epoch-00003'}" in printed
    source = load("digits")
    model = load_model("digits-cnn", checkpoint).eval()
    with torch.no_grad():
        right = model(source.test.batch(torch.arange(500))).argmax(1) == source.test.labels
    assert f"test accuracy {float(right.double().mean()):.4f} on 500 samples" in printed
    assert float(right.double().mean()) > 0.6


def test_train_takes_every_setting(tmp_path: Path) -> None:
    out = succeed(
        *("train", "--epochs", 2, "--optimizer", "sgd", "--momentum", 0.8, "--weight-decay", 1e-4, "--augment"),
        *("--schedule", "step", "--milestone", 1, "--gamma", 0.5, "--select", "best", "--seed", 5, "--lr", 0.05),
        *("--threads", 1),
        *("--model-option", "n_classes=10", "--device", "cpu", "--out", tmp_path / "m"),
        *("--method", "ask-def", "--method-option", "layers=relu3", "--method-option", "eps=8/255"),
        *("--method-option", "steps=1", "--precision", "bf16", "--channels-last"),
    )
    assert "validation accuracy" in out
    assert "under attack" in out
    log = (tmp_path / "m").glob("*.csv")
    assert next(log).read_text().count("\n") == 3


def test_train_validates_under_an_attack_of_its_own(tmp_path: Path) -> None:
    flags = ("--robust-eps", "1/255", "--robust-norm", "l2", "--select", "robust", "--threads", 1)
    one_cycle = ("--schedule", "one-cycle", "--warmup", 0.5, "--epochs", 1)
    assert "under attack" in succeed("train", *one_cycle, *flags, "--out", tmp_path / "m")
    (log,) = (tmp_path / "m").glob("*.csv")
    (row,) = csv.DictReader(log.open())
    assert float(row["robust_accuracy"]) == pytest.approx(float(row["validation_accuracy"]), abs=0.02)  # a tiny radius
    assert "robust-eps" in refuse("train", "--robust-eps", "x", "--out", tmp_path / "n")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--method", "ask-deff"), "did you mean 'ask-def'"),
        (("--method", "ask-def"), "name their layers"),
        (("--method", "trades", "--method-option", "betta=2"), "beta"),
        (("--method", "fast", "--method-option", "eps=-1/255"), "eps"),
        (("--select", "robust"), "needs an attack to validate under"),
    ],
)
def test_train_refuses_a_method_that_cannot_work(tmp_path: Path, flags: tuple[str, ...], part: str) -> None:
    assert part in refuse("train", *flags, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------ evaluate


def test_evaluate_writes_what_it_prints(evaluated: Path, checkpoint: Path) -> None:
    run = RunDirectory(evaluated)
    summary = read_summary(run)
    assert [c.name for c in summary.classifiers] == ["knn", "dknn"]
    assert [[a.name for a in c.attacks] for c in summary.classifiers] == [["ask", "pgd-transfer"]] * 2
    assert [p.eps for p in summary.classifiers[0].attacks[0].curve] == [0.05, 0.1]
    assert summary.threat["eps"] == 0.1
    out = succeed("evaluate", *flags(checkpoint), "--out", evaluated)  # finished: nothing is done again
    for c in summary.classifiers:
        for line in (x for x in out.splitlines() if f"│ {c.name} " in x and "none" in x):
            assert f"{100 * c.clean_accuracy:.1f} %" in line
    described = run.header["plan"]["describe"]
    assert described == {
        "data": "digits",
        "protocol": "standard",
        "model": "digits-cnn",
        "checkpoint": str(checkpoint),
    }


def test_a_printed_configuration_gives_the_same_run(evaluated: Path, checkpoint: Path, tmp_path: Path) -> None:
    printed = succeed("evaluate", *flags(checkpoint), "--out", "elsewhere", "--print-config")
    assert not Path("elsewhere").exists()
    file = tmp_path / "run.toml"
    file.write_text(printed)
    assert succeed("evaluate", "--config", file, "--print-config") == printed
    succeed("evaluate", "--config", file, "--out", tmp_path / "again")  # a flag wins over the file
    assert results(tmp_path / "again") == results(evaluated)
    changed = succeed("evaluate", "--config", file, "--n", 3, "-a", "fgsm", "--seed", 9, "--print-config")
    assert "n = 3\n" in changed
    assert 'name = "fgsm"' in changed
    assert "seed = 9" in changed
    assert 'name = "ask"' not in changed


def test_every_setting_of_a_file_comes_back_from_its_print(tmp_path: Path) -> None:
    text = """
seed = 3
plugins = ["a \\"b\\".py", "ü.py"]
out = "C:\\\\runs"
classifiers = ["knn", {name = "deep", type = "dknn", layers = ["relu1", "relu2"], n_neighbors = 9}]
[data]
name = "digits"
subset = "first"
options = {size = [8, 8], flip = true, deep = {a = 1}}
[references]
pool = {relu1 = "avg"}
[threat]
norm = "l2"
eps = 0.5
[[attacks]]
name = "pgd"
label = "strong"
objective = {name = "ask", kind = "instance-wise"}
"""
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    first = succeed("evaluate", "--config", tmp_path / "a.toml", "--print-config")
    (tmp_path / "b.toml").write_text(first, encoding="utf-8")
    assert succeed("evaluate", "--config", tmp_path / "b.toml", "--print-config") == first
    from robustknn.evaluation.experiment_config import read_config

    config = read_config(tmp_path / "b.toml", {})
    assert config == read_config(tmp_path / "a.toml", {})
    assert config.plugins == ['a "b".py', "ü.py"]
    assert config.threat.eps == [0.5]
    assert config.attacks[0]["objective"] == {"name": "ask", "kind": "instance-wise"}


def test_a_reference_set_is_kept_and_read_again(evaluated: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        kept = ["--references", tmp_path / "bank"]
        succeed("evaluate", *flags(checkpoint), *kept, "--out", tmp_path / name)
        assert (tmp_path / "bank" / "manifest.json").is_file()
        assert results(tmp_path / name) == results(evaluated)
    other = ["--references", tmp_path / "bank", "--references-per-class", PER_CLASS + 1]
    assert "holds 200 references where" in refuse("evaluate", *flags(checkpoint), *other, "--out", tmp_path / "c")
    more = ["--references", tmp_path / "bank", "-l", "conv1"]
    assert "conv1" in refuse("evaluate", *flags(checkpoint), *more, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_run_goes_on_where_it_was(evaluated: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(evaluated, copy)
    whole = results(copy)
    batches = sorted((copy / "cells").rglob("*.json"))
    for path in [*batches[1::2], copy / "rows.parquet", copy / "gallery.json"]:
        path.unlink()
    kept = {p: p.stat().st_mtime_ns for p in batches[::2]}
    succeed("evaluate", *flags(checkpoint), "--batch-size", 3, "--out", copy)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert RunDirectory(copy).gallery().keys() == RunDirectory(evaluated).gallery().keys()
    for cell in RunDirectory(evaluated).cells:
        a, b = RunDirectory(evaluated).rows(cell), RunDirectory(copy).rows(cell)
        assert all(np.array_equal(a[c], b[c]) for c in a)
    assert results(copy)["rows.parquet"] == whole["rows.parquet"]
    before = results(copy)
    sentence = refuse("evaluate", *flags(checkpoint), "--seed", 8, "--out", copy)
    assert "was made with another config" in sentence
    assert results(copy) == before


# -------------------------------------------------------------------------------------------- attack


def test_attack_decides_by_the_engine_that_is_named(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    arguments = ["attack", "--checkpoint", checkpoint, "--n", 5, "--attack-option", "steps=2", "--index", "ivf-flat"]
    succeed(*arguments, "--eps", 0.1, "--out", tmp_path / "adv")
    assert '"index": "IVFFlatIndex"' in (tmp_path / "adv" / "run" / "run.json").read_text()


def test_attack_writes_the_examples_that_were_decided_on(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "adv"
    arguments = ["attack", "--checkpoint", checkpoint, "--n", 10, "-c", "dknn", "-k", 9, "-a", "ask"]
    arguments += ["--attack-option", "steps=6", "--references-per-class", PER_CLASS, "--eps", 0.12, "--batch-size", 4]
    printed = succeed(*arguments, "--out", out)
    tensors = load_file(out / "examples.safetensors")
    with (out / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    source = load("digits")
    assert source.calibration is not None
    model = load_model("digits-cnn", checkpoint)
    references = ReferenceSet.build(FeatureExtractor(model, model.feature_layers), source.train.per_class(PER_CLASS))
    classifier = DkNN(references, 9).calibrate(source.calibration)
    ids = tensors["sample_id"]
    assert len(ids) == 10
    assert [int(r["sample_id"]) for r in rows] == ids.tolist()
    assert torch.equal(tensors["x"], source.test.batch(ids))
    assert torch.equal(tensors["label"], source.test.labels[ids])
    distance = (tensors["x_adv"] - tensors["x"]).abs().flatten(1).amax(1)
    assert float(distance.max()) <= 0.12 + 1e-6
    decided = torch.as_tensor(classifier.predict(tensors["x_adv"]))
    assert [int(r["prediction"]) for r in rows] == decided.tolist()
    assert [float(r["credibility"]) for r in rows] == classifier.credibility(tensors["x_adv"]).tolist()
    assert [float(r["linf"]) for r in rows] == pytest.approx(distance.tolist(), rel=1e-6)
    clean = torch.as_tensor(classifier.predict(tensors["x"])) == tensors["label"]
    assert [r["clean_correct"] == "True" for r in rows] == clean.tolist()
    for row, wrong in zip(rows, decided != tensors["label"], strict=True):
        assert (row["success"] == "True") <= bool(wrong)  # a tie that goes wrong counts for the defender
    assert any(r["success"] == "True" for r in rows)
    robust = sum(r["clean_correct"] == "True" and r["success"] == "False" for r in rows) / 10
    assert printed.startswith(f"10 examples: accuracy {float(clean.double().mean()):.3f} clean, {robust:.3f} attacked")

    pictures = sorted((out / "images").iterdir())
    assert len(pictures) == 20
    for place, sample in enumerate(ids.tolist()):
        for kind, x in (("clean", tensors["x"]), ("attacked", tensors["x_adv"])):
            pixels = np.asarray(Image.open(out / "images" / f"{sample:06d}-{kind}.png"))
            assert pixels.dtype == np.uint8
            assert np.abs(pixels / 255 - x[place, 0].numpy()).max() <= 0.5 / 255 + 1e-6

    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert succeed(*arguments, "--out", out) == printed
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}.keys() == before.keys()
    assert all(p.read_bytes() == data for p, data in before.items() if p.suffix != ".json")


# -------------------------------------------------------------------------------------------- report


def test_report_makes_the_page_again_from_the_folder_alone(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(evaluated, copy)
    made = [copy / "report.html", copy / "summary.json", copy / "rows.parquet", *(copy / "figures").iterdir()]
    before = {p: p.read_bytes() for p in made}
    for path in made:
        path.unlink()
    monkeypatch.chdir(tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the report opened a model or a data set")

    monkeypatch.setattr("robustknn.datasets.load", never)
    monkeypatch.setattr("robustknn.models.load_model", never)
    out = succeed("report", "moved")
    assert "page: moved/report.html" in out.replace(os.sep, "/")
    assert {p: p.read_bytes() for p in made} == before


@pytest.mark.parametrize("name", ["gallery.safetensors", "gallery.json", "run.json", "environment.json", "cells"])
def test_report_refuses_an_altered_run_in_one_sentence(evaluated: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "r"
    shutil.copytree(evaluated, copy)
    path = copy / name if name != "cells" else sorted((copy / "cells" / "knn" / "clean").glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    assert path.name in refuse("report", copy)


def test_report_refuses_an_unfinished_run(evaluated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "r"
    shutil.copytree(evaluated, copy)
    sorted((copy / "cells").rglob("*.json"))[0].unlink()
    assert "run the same evaluation again to finish it" in refuse("report", copy)
    assert "does not exist" in refuse("report", tmp_path / "none")


# ---------------------------------------------------------------------------------- list, version, help


def test_list_names_what_is_registered(tmp_path: Path) -> None:
    from robustknn import registry

    out = succeed("list")
    for kind, known in registry.ALL.items():
        assert f"{kind}:\n" in out
        for entry in known:
            assert f"\n  {entry.name} " in out
    only = succeed("list", "attacks")
    assert only.startswith("attacks:\n  adaptive ")
    assert "models:" not in only
    assert refuse("list", "attack") == "unknown kind 'attack'; did you mean 'attacks'?"


def test_the_help_of_train_names_every_method() -> None:
    """Written out there, so that help comes without importing torch."""
    (option,) = get_type_hints(commands.train, include_extras=True)["method"].__metadata__
    own = {e.name for e in registry.methods if str(e.build.__module__).startswith("robustknn.")}
    assert set(re.split(", | or ", option.help.rstrip("."))) == own


def test_version_and_help() -> None:
    assert succeed("--version") == f"{robustknn.__version__}\n"
    assert "demo" in succeed("--help")
    for command in ("demo", "train", "evaluate", "attack", "report", "list"):
        assert "Usage:" in succeed(command, "-h")
    done = call()
    assert done.code == 2
    assert "Usage:" in done.out + done.err
    assert "Traceback" not in done.err
    assert refuse("evalute") == "No such command 'evalute'. Did you mean 'evaluate'? (see --help)"


def test_the_module_and_the_script_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("robustknn")
    if not script.exists():
        pytest.skip("left out: the package is not installed, so there is no script")
    for arguments in (["--version"], ["list", "indexes"], ["list", "nothing"]):
        module = process(*arguments)
        installed = subprocess.run([script, *arguments], capture_output=True, text=True, check=False, timeout=300)
        assert (module.returncode, module.stdout, module.stderr) == (
            installed.returncode,
            installed.stdout,
            installed.stderr,
        )
    assert module.returncode == 2
    assert module.stderr.startswith("robustknn: unknown kind 'nothing'; known: ")


# ------------------------------------------------------------------------------------------- stopping


# Under a shell that runs its jobs in the background, SIGINT is ignored, and children inherit that.
LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from robustknn.cli import main
sys.exit(main())
"""


def stopped(arguments: list[Any], ready: Any) -> subprocess.CompletedProcess[str]:
    """A process that gets SIGINT as soon as `ready()`; how it ended."""
    command = [sys.executable, "-c", LISTENING, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        until = time.monotonic() + 120
        while not ready() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert child.poll() is None, "it ended before it could be stopped"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    return subprocess.CompletedProcess(command, child.returncode, out, without_progress(err))


MESSAGE = "robustknn: stopped; the same command goes on after what was finished.\n"


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent otherwise there")
def test_an_evaluation_stopped_by_ctrl_c_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    few = ["--n", 60, "--references-per-class", PER_CLASS, "--batch-size", 2, "--controls", 0, "--examples", 5]
    arguments = ["evaluate", "--checkpoint", checkpoint, *few, "-a", "ask", "--attack-option", "steps=30", "-e", 0.1]
    arguments += ["--threads", 1, *ALONE]
    cell = tmp_path / "a" / "cells" / "knn" / "ask@0.1"
    done = stopped([*arguments, "--out", tmp_path / "a"], lambda: any(cell.glob("*.json")))
    assert (done.returncode, done.stderr, done.stdout) == (130, MESSAGE, "")
    finished = {p: p.stat().st_mtime_ns for p in cell.glob("*.json")}
    assert 0 < len(finished) < 30
    assert not list((tmp_path / "a").rglob("*.partial"))
    succeed(*arguments, "--out", tmp_path / "a")
    succeed(*arguments, "--out", tmp_path / "b")
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert {p: p.stat().st_mtime_ns for p in finished} == finished  # not made again


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent otherwise there")
def test_a_training_stopped_by_ctrl_c_goes_on(tmp_path: Path) -> None:
    arguments = ["train", "--epochs", 8, "--batch-size", 32, "--lr", 2e-3, "--threads", 1]
    done = stopped([*arguments, "--out", tmp_path / "a"], (tmp_path / "a" / "epoch-00002").exists)
    assert (done.returncode, done.stderr, done.stdout) == (130, MESSAGE, "")
    assert not (tmp_path / "a" / "epoch-00008").exists()
    printed = [succeed(*arguments, "--out", tmp_path / name) for name in ("a", "b")]
    assert printed[0].replace(str(tmp_path / "a"), str(tmp_path / "b")) == printed[1]
    a, b = (load_model("digits-cnn", tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_exit_codes_of_a_process(checkpoint: Path, evaluated: Path, tmp_path: Path) -> None:
    done = process("report", evaluated, env={**os.environ, "PYTHONIOENCODING": "ascii"})  # prints what it can
    assert (done.returncode, done.stderr) == (0, "")
    assert "worst of these" in done.stdout
    assert done.stdout.isascii()
    done = process("evaluate", "--checkpoint", checkpoint, "-a", "asq", "--out", tmp_path / "r")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "robustknn: unknown attack 'asq'; did you mean 'ask'?\n"
    assert not (tmp_path / "r").exists()


def test_the_summary_is_json_of_the_documented_shape(evaluated: Path) -> None:
    content = json.loads((evaluated / "summary.json").read_text())
    assert content["schema_version"] == 5
    assert content["run"] == RunDirectory(evaluated).key
    rows = RunDirectory(evaluated).rows(Cell("knn", "ask", 0.1))
    assert content["classifiers"][0]["attacks"][0]["robust_accuracy"] == rows["robust"].mean()


# ---------------------------------------------------------------------------------------- defenses


def test_labels_are_filtered_by_a_preliminary_run(checkpoint: Path, tmp_path: Path) -> None:
    out = succeed("train", "--filter-labels", checkpoint, "--epochs", 1, "--out", tmp_path / "m")
    kept, every = map(int, re.findall(r"labels kept: (\d+) of (\d+)", out)[0])
    assert 0.9 * every < kept <= every
    assert "n_neighbors" in refuse(
        "train", "--filter-labels", checkpoint, "--filter-k", 10**6, "--epochs", 1, "--out", tmp_path / "n"
    )
    quick = ["train", "--epochs", 1, "--out", tmp_path / "o"]
    filtered = [*quick, "--filter-labels", checkpoint, "--filter-option"]
    other = ["layer=relu2", "--filter-option", "metric=cosine", "--filter-option", "leave_out_itself=false"]
    again = re.findall(r"labels kept: (\d+) of", succeed(*filtered, *other))
    assert int(again[0]) != kept  # judged in another space
    assert "unknown option of the label filter: 'metrik'; did you mean 'metric'" in refuse(*filtered, "metrik=l2")
    assert "metric must be one of" in refuse(*filtered, "metric=l3")
    assert "unknown layer 'relu9'" in refuse(*filtered, "layer=relu9")
    assert "--filter-option is of --filter-labels" in refuse(*quick, "--filter-option", "metric=l2")


def test_daeknn_is_evaluated_with_adversarial_references_that_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    few = [
        "--n",
        10,
        "--references-per-class",
        PER_CLASS,
        "--controls",
        0,
        "-e",
        0.1,
        "--references",
        tmp_path / "refs",
    ]
    command = ["evaluate", "--checkpoint", checkpoint, "-c", "daeknn", "-c", "dknn", *few, *ALONE, "-a", "pgd-transfer"]
    hardened = ["--hardening", "0.1", "--hardening", "8/255"]
    succeed(*command, *hardened, "--out", tmp_path / "a")
    voters = RunDirectory(tmp_path / "a").header["plan"]["classifiers"]["daeknn"]["voters"]
    assert len({v["bank"] for v in voters}) == 3
    assert {v["attacked"] for v in voters} == {
        None,
        "adversarial, pgd, linf 0.1",
        "adversarial, pgd, linf 0.03137",
    }
    assert "reference set 2 (adversarial, pgd, linf 0.1)" in (tmp_path / "a" / "report.html").read_text()
    kept = sorted(p for p in tmp_path.iterdir() if p.name.startswith("refs-hardened-"))
    assert len(kept) == 2
    before = {p: p.stat().st_mtime_ns for folder in kept for p in folder.rglob("*.npy")}
    succeed(*command, *hardened, "--out", tmp_path / "b")  # read, not made again
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert "needs adversarial references" in refuse(*command, "--out", tmp_path / "c")
    assert "name it: -c daeknn" in refuse(
        "evaluate", "--checkpoint", checkpoint, "-c", "dknn", *few, *hardened, "--out", tmp_path / "c"
    )


def test_retrieval_is_evaluated_with_the_softmax_of_its_references(checkpoint: Path, tmp_path: Path) -> None:
    few = ["--n", 10, "--references-per-class", PER_CLASS, "--controls", 0, "-e", 0.1, *ALONE, "-a", "fgsm-transfer"]
    succeed("evaluate", "--checkpoint", checkpoint, "-c", "retrieval", "-k", 10, *few, "--out", tmp_path / "a")
    (found,) = read_summary(RunDirectory(tmp_path / "a")).classifiers
    assert found.clean_accuracy >= 0.7
