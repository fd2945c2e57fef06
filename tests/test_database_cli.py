"""`robustknn index`, from archives to an evaluation over a database, as a user would run it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call, refuse, succeed
from small import digits

from robustknn import FeatureExtractor, ReferenceSet, store
from robustknn.classifiers import KNN
from robustknn.database import Database, spread
from robustknn.datasets import Split, open_source, write_shards
from robustknn.evaluation import RunDirectory
from robustknn.models import DigitsCNN, load_model
from robustknn.recipes import web_scale_features

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, archives of 300 training and 60 test digits, and a folder of images."""
    folder = tmp_path_factory.mktemp("place")
    source, model = digits(epochs=2)
    store.save_tensors(folder / "net.safetensors", model.state_dict())
    write_shards(source.train.first(300), folder / "train", 70)
    write_shards(source.train.subset(torch.arange(300, 400)), folder / "more", 100)
    write_shards(source.test.first(60), folder / "test", 60)
    return folder


def model_flags(place: Path) -> list[str]:
    return ["--model", "digits-cnn", "--checkpoint", str(place / "net.safetensors")]


def built(place: Path, out: Path, *more: str) -> str:
    images = ["--images", str(place / "train"), "--image-option", "channels=1"]
    return succeed("index", "build", out, *images, *model_flags(place), "--layer", "relu3", "--block-rows", "64", *more)


def test_from_archives_to_an_evaluation(place: Path, tmp_path: Path) -> None:
    db = tmp_path / "db"
    said = built(place, db, "--pca", "24", "--pca-sample", "200", "--payload", "top:4", "--index", "ivf-sq8:nlist=4")
    assert f"{db}: 300 rows, 10 classes, " in said
    assert "layers: relu3 (24), float32" in said
    assert "blocks: 5 done, 0 missing, of 64 rows" in said
    assert f"part: 300 rows of shards {place / 'train'}" in said
    assert "index: ivf-sq8 = ivf-sq8:nlist=4 by l2 over relu3\n" in said
    assert built(place, db, "--pca", "24", "--pca-sample", "200", "--payload", "top:4") == said  # nothing is left to do

    flags = [*model_flags(place), "--block-rows", "64", "--pca", "24", "--pca-sample", "200", "--payload", "top:4"]
    images = ["--images", str(place / "train"), "--image-option", "channels=1"]
    for other, sentence in (
        (["--layer", "relu2"], "was begun with layers = ['relu3'], not ['relu2']"),
        (["--layer", "relu3", "--pool", "avg"], "was begun with pool = 'flatten', not 'avg'"),
        (["--layer", "relu3", "--pca", "9"], "was begun with pca = 24, not 9"),
    ):
        assert sentence in refuse("index", "build", db, *images, *flags, *other)

    told = json.loads(succeed("index", "info", db, "--json"))
    assert (told["rows"], told["layers"], told["options"]["pca"]) == (300, {"relu3": 24}, 24)
    assert succeed("index", "verify", db, *model_flags(place)) == f"{db}: 300 rows as they were written.\n"

    # What a search finds is what one in memory finds.
    test = ["--images", str(place / "test"), "--image-option", "channels=1"]
    lines = succeed("index", "search", db, *test, *model_flags(place), "--k", "3", "-n", "10", "--json").splitlines()
    model = load_model("digits-cnn", place / "net.safetensors")
    references = Database.open(db).references(model)
    source, _ = digits(epochs=1)
    x = (source.test.batch(torch.arange(10)) * 255).round() / 255
    distances, ids = KNN(references, 3).kneighbors(x)
    for row, line in enumerate(lines):
        found = json.loads(line)
        assert found["query"] == row
        assert [one["id"] for one in found["neighbors"]] == ids[row].tolist()
        assert np.allclose([one["distance"] for one in found["neighbors"]], distances[row])
        assert [one["label"] for one in found["neighbors"]] == references.labels[ids[row]].tolist()
    text = succeed("index", "search", db, *test, *model_flags(place), "--k", "3", "-n", "2", "--index", "ivf-sq8")
    assert [line.split(":")[0] for line in text.splitlines()] == ["0", "1"]

    # The database takes the place of a saved reference set.
    run = tmp_path / "run"
    evaluate = [
        "evaluate",
        "--data",
        "digits",
        "-n",
        "20",
        *model_flags(place),
        "--references",
        str(db),
        "-c",
        "retrieval",
    ]
    light = [
        "--layer",
        "relu3",
        "--k",
        "9",
        "--eps",
        "0.05",
        "--worst-case",
        "off",
        "--controls",
        "0",
        "--examples",
        "2",
    ]
    succeed(*evaluate, *light, "--no-published", "-a", "fgsm", "--out", run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["samples"] == 20
    assert summary["classifiers"][0]["clean_accuracy"] > 0.7

    # After an addition the index is of something else.
    more = ["--images", str(place / "more"), "--image-option", "channels=1"]
    said = succeed("index", "add", db, *more, *model_flags(place))
    assert "400 rows" in said
    assert "(stale: build it again)" in said
    sentence = refuse("index", "search", db, *test, *model_flags(place), "--index", "ivf-sq8")
    assert f"build it again: robustknn index build {db} --index ivf-sq8:nlist=4." in sentence
    assert "stale" not in succeed("index", "build", db, "--index", "ivf-sq8:nlist=4")
    assert succeed("index", "verify", db) == f"{db}: 400 rows as they were written.\n"
    assert refuse("index", "add", db, "--drop-unfinished").endswith("there is nothing to drop.")


def test_a_database_decides_as_references_in_memory(place: Path, tmp_path: Path) -> None:
    """The same samples as rows of a data set: the evaluation gives the same rows but for what names the references."""
    db, runs = tmp_path / "db", {}
    succeed(
        *("index", "build", db, "--data", "digits", "--part", "train", *model_flags(place)),
        *("--layer", "relu3", "--workers", "2"),
    )
    for name, where in (("disk", db), ("memory", tmp_path / "kept")):
        run = tmp_path / name
        succeed(
            *("evaluate", "--data", "digits", "-n", "20", *model_flags(place), "--references", where, "-c", "knn"),
            *("--layer", "relu3", "--k", "9", "--eps", "0.05", "--worst-case", "off", "--controls", "0"),
            *("--examples", "0", "--no-published", "-a", "ask", "--attack-option", "steps=5", "--out", run),
        )
        opened = RunDirectory(run)
        runs[name] = {(cell, column): v for cell in opened.cells for column, v in opened.rows(cell).items()}
    assert len(runs["disk"]) > 10
    assert runs["disk"].keys() == runs["memory"].keys()
    assert all(np.array_equal(v, runs["memory"][key], equal_nan=v.dtype.kind == "f") for key, v in runs["disk"].items())


def test_damage_is_told_by_lines_and_the_exit_code(place: Path, tmp_path: Path) -> None:
    db = tmp_path / "db"
    built(place, db, "--labels", "payload", "--dtype", "float16", "--unit")
    data = bytearray((db / "vectors-0.npy").read_bytes())
    data[-1] ^= 1
    (db / "vectors-0.npy").write_bytes(data)
    (db / "blocks" / "00000001.json").unlink()
    done = call("index", "verify", db)
    assert done.code == 1
    assert [line.split(" (")[0] for line in done.out.splitlines()] == ["block 1", "block 4"]
    assert done.err == ""
    (db / "blocks" / "00000004.json").unlink()
    assert "blocks: 3 done, 2 missing" in succeed("index", "info", db)
    built(place, db, "--labels", "payload", "--dtype", "float16", "--unit")
    assert "float16 at unit length" in succeed("index", "info", db)
    assert call("index", "verify", db).code == 0


def test_mistakes_are_told_in_one_sentence(place: Path, tmp_path: Path) -> None:
    db = tmp_path / "db"
    images = ["--images", str(place / "train"), "--image-option", "channels=1"]
    net = [*model_flags(place), "--layer", "relu3"]
    for flags, said in (
        ([*net], "name the images: --images PLACE, or --data NAME"),
        ([*images, "--data", "digits", *net], "name the images"),
        (["--images", "nowhere", *net], "'nowhere' does not exist"),
        ([*images, "--model", "digits-cnn"], "has no weights yet"),
        ([*images, *net, "--payload", "top:x"], "--payload is softmax, top:20 or none, not 'top:x'"),
        ([*images, *net, "--layer", "relu9"], "unknown layer 'relu9'"),
        ([*images, *net, "--pca", "400"], "400 components need as many samples"),
        (["--data", "digits", "--part", "validatoin", *net], "--part must be one of"),
        (["--data", "digits", "--protocol", "published", "--part", "validation", *net], "has no validation part"),
        (["--images", str(place / "train"), "--image-option", "chanels=1", *net], "did you mean 'channels'"),
    ):
        assert said in refuse("index", "build", db, *flags), flags
    assert not db.exists()
    assert "holds no database" in refuse("index", "info", tmp_path)
    built(place, db)
    assert "was begun with pca = None, not 8" in refuse(
        "index", "build", db, *images, *net, "--block-rows", "64", "--pca", "8"
    )
    assert "knows 10 classes" not in succeed("index", "info", db)
    torch.manual_seed(3)
    store.save_tensors(tmp_path / "other.safetensors", DigitsCNN().state_dict())
    other = ["--model", "digits-cnn", "--checkpoint", str(tmp_path / "other.safetensors")]
    assert "made with another model" in refuse("index", "search", db, *images, *other)
    done = call("index", "verify", db, *other)
    assert done.code == 1
    assert "made with another model" in done.out
    evaluate = [
        "evaluate",
        "--data",
        "digits",
        *model_flags(place),
        "--references",
        str(db),
        "--out",
        str(tmp_path / "r"),
    ]
    assert "a database is taken as it is" in refuse(*evaluate, "--layer", "relu3", "--references-per-class", "3")
    assert "unknown reference layer 'relu1'" in refuse(*evaluate, "--layer", "relu1")


def test_references_of_bare_features_equal_the_database(place: Path, tmp_path: Path) -> None:
    built(place, tmp_path / "db", "--payload", "none")
    model = load_model("digits-cnn", place / "net.safetensors")
    source, _ = digits(epochs=1)
    x = (source.train.batch(torch.arange(300)) * 255).round() / 255
    expected = ReferenceSet.build(FeatureExtractor(model, "relu3"), (x, source.train.labels[:300]))
    assert torch.equal(
        Database.open(tmp_path / "db").references(model).vectors("relu3")[0], expected.vectors("relu3")[0]
    )


@pytest.mark.parametrize("damage", ["cut", "gone", "header"])
def test_a_build_does_not_pass_over_damaged_arrays(place: Path, tmp_path: Path, damage: str) -> None:
    db = tmp_path / "db"
    built(place, db)
    array, whole = db / "vectors-0.npy", (db / "vectors-0.npy").read_bytes()
    if damage == "gone":
        array.unlink()
    else:
        array.write_bytes(whole[:-100] if damage == "cut" else whole[:30] + b"x" + whole[31:])
    images = ["--images", str(place / "train"), "--image-option", "channels=1"]
    again = ["index", "build", db, *images, *model_flags(place), "--layer", "relu3", "--block-rows", "64"]
    said = refuse(*again)
    assert "vectors-0.npy' is missing, truncated or altered; remove" in said
    assert "all blocks anew" in call("index", "verify", db).out
    shutil.rmtree(db / "blocks")  # the remedy
    succeed(*again)
    assert array.read_bytes() == whole


def test_a_damaged_index_is_built_again_and_harms_no_other(place: Path, tmp_path: Path) -> None:
    db = tmp_path / "db"
    built(place, db, "--index", "ivf-flat:nlist=4", "--index", "hnsw")
    file = db / "indexes" / "ivf-flat" / "index.faiss"
    whole = file.read_bytes()
    file.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    (db / "indexes" / "hnsw.json").write_text("{}")
    assert call("index", "verify", db).code == 1
    search = ["index", "search", db, "--images", str(place / "test"), "--image-option", "channels=1", "-n", "1"]
    assert "build the index again" in refuse(*search, *model_flags(place), "--index", "hnsw")
    succeed("index", "build", db, "--index", "ivf-flat:nlist=4", "--index", "hnsw")
    assert file.read_bytes() == whole
    assert call("index", "verify", db).code == 0
    succeed(*search, *model_flags(place), "--index", "hnsw")


def test_features_of_the_web_scale_defense_by_name(place: Path, tmp_path: Path) -> None:
    """Bits of R-MAC: those that Python gives from the same sample, kept, gone on with, and decided by."""
    db, images = tmp_path / "db", ["--images", str(place / "train"), "--image-option", "channels=1"]
    flags = [*images, *model_flags(place), "--layer", "relu2", "--recipe", "rmac-bits", "--pca", "16"]
    said = succeed("index", "build", db, *flags, "--pca-sample", "100")
    assert "layers: relu2 (16), float32" in said
    assert succeed("index", "build", db, *flags, "--pca-sample", "100") == said
    model = load_model("digits-cnn", place / "net.safetensors")
    source = open_source(str(place / "train"), channels=1)
    features = web_scale_features(model, "relu2", spread(source, 100), n_components=16, recipe="rmac-bits")
    held, images_of = Database.open(db).references(model), source.batch(torch.arange(300))
    bits = held.rows("relu2", torch.arange(300))
    assert set(bits.flatten().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(bits, features(images_of)["relu2"])
    assert "was begun with recipe = 'rmac-bits', not 'rmac'" in refuse(
        "index", "build", db, *flags, "--pca-sample", "100", "--recipe", "rmac"
    )
    out = tmp_path / "run"
    # The layer of a database that has one alone need not be named, though the network recommends another.
    over = ["--references", db, "-c", "retrieval", "--k", "9", "--eps", "8/255", "-n", "6"]
    succeed("evaluate", "--data", "digits", *model_flags(place), *over, "--controls", "0", "--out", out)
    (found,) = json.loads((out / "summary.json").read_text())["classifiers"]
    assert found["name"] == "retrieval"


def test_a_block_by_the_name_of_its_paper(tmp_path: Path) -> None:
    """The index is over the tap that the name stands for; a build that learns nothing asks for no sample."""
    model, images = load_model("resnet20"), torch.rand(24, 3, 32, 32)
    store.save_tensors(tmp_path / "net.safetensors", model.state_dict())
    write_shards(Split((images * 255).byte(), torch.arange(24) % 3, "train"), tmp_path / "images", 24)
    flags = ["--images", str(tmp_path / "images"), "--model", "resnet20", "--checkpoint", tmp_path / "net.safetensors"]
    flags += ["--layer", "conv_2_3", "--recipe", "average"]
    said = succeed("index", "build", tmp_path / "db", *flags, "--pca", "4", "--index", "ivf-flat:nlist=2")
    assert "layers: layer1.2.relu:input@1 (4), float32" in said
    assert "index: ivf-flat = ivf-flat:nlist=2 by l2 over layer1.2.relu:input@1" in said
    plain = succeed("index", "build", tmp_path / "plain", *flags)
    assert succeed("index", "build", tmp_path / "plain", *flags, "--pca-sample", "9") == plain
    assert "layers: layer1.2.relu:input@1 (16), float32" in plain


def test_what_would_be_refused_in_the_end_is_refused_at_the_beginning(place: Path, tmp_path: Path) -> None:
    images = ["--images", str(place / "train"), "--image-option", "channels=1", *model_flags(place), "--layer", "relu3"]
    for more, sentence in (
        (["--index", "ivf-flatt"], "ivf-flat"),
        (["--index", "hnsw:neighbours=3"], "neighbors"),
        (["--index", "hnsw", "--index", "hnsw:neighbors=9"], "two indexes would be named 'hnsw'"),
        (["--whiten"], "--whiten scales the components of --pca"),
        (["--recipe", "rmac-bit"], "'rmac-bits'"),
        (["--recipe", "rmac", "--pool", "avg"], "leave --pool and --normalize out"),
        (["--recipe", "rmac", "--normalize"], "leave --pool and --normalize out"),
        (["--recipe", "rmac", "--layer", "relu2"], "--recipe makes the features of one layer"),
    ):
        assert sentence in refuse("index", "build", tmp_path / "db", *images, *more)
        assert not (tmp_path / "db").exists()


def test_a_warning_is_one_line_without_a_place_in_the_source(place: Path, tmp_path: Path) -> None:
    images = ["--images", str(place / "train"), "--image-option", "channels=1", "--index", "auto"]
    command = ["index", "build", str(tmp_path / "db"), *images, *model_flags(place), "--layer", "relu3"]
    whole = [sys.executable, "-m", "robustknn", *command]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "index:" not in done.stdout  # the database's own vectors are searched
    noted = [line for line in done.stderr.splitlines() if "auto chose" in line]
    assert len(noted) == 1
    assert noted[0].startswith("robustknn: note: index auto chose exact: 300 × 256 numbers are few enough")
    assert ".py" not in done.stderr


def test_a_folder_without_images_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refuse("index", "build", tmp_path / "db", "--images", tmp_path / "empty", *model_flags(place))
    assert said.startswith(f"'{tmp_path / 'empty'}' holds no image (")
    assert said.endswith("and no class folder; name another.")
