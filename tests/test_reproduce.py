"""Experiments: parts that survive a stop, records that gather seeds, pages made of records, refusals."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from command import call, refuse, succeed
from small_mnist import write_mnist

from robustknn import registry
from robustknn.errors import IntegrityError
from robustknn.evaluation.metrics import wilson
from robustknn.models import load_model
from robustknn.progress import Silent
from robustknn.reproduce import (
    WORST,
    Bench,
    Cell,
    Experiment,
    Front,
    Part,
    Presets,
    Recipe,
    Settings,
    by_block,
    experiments,
)
from robustknn.reproduce.advknn_victim import COMMON, Victim
from robustknn.reproduce.command import Order, ordered, perform
from robustknn.reproduce.figures import packed, unpacked
from robustknn.reproduce.pages import pages_of
from robustknn.reproduce.papers import printed, published
from robustknn.reproduce.record import read_record, rows_of
from robustknn.reproduce.scenes_victim import suite_of
from robustknn.training import TrainConfig

TINY = ("n=12", "references=150", "epochs=1", "steps=2", "k=5", "worst_n=6")
SMALL = [word for change in TINY for word in ("--set", change)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _no_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTKNN_DATA", raising=False)


class Toy(Experiment):
    """Counts what it did, part by part."""

    paper, table, title = "A paper", "Table 9", "nothing"
    data = ("mnist",)
    presets: ClassVar[Presets] = {
        "cpu": {"n": 20, "text": "a", "all": None},
        "paper": {"n": 40, "text": "a", "all": None},
    }
    cuda = ("paper",)
    front: ClassVar[Front] = {"toy": (("toy", "clean"), ("toy", "attacked"), ("toy", WORST))}
    done: ClassVar[list[str]] = []
    stop_at = ""

    def parts(self, bench: Bench) -> list[Part]:
        return [Part(key, 60.0, lambda folder, key=key: self._do(key, bench)) for key in ("one", "two", "three/3")]

    def _do(self, key: str, bench: Bench) -> int:
        if key == self.stop_at:
            raise KeyboardInterrupt
        self.done.append(key)
        return len(key) * bench["n"] + bench.seed

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        return [
            Cell.share("toy", "clean", 3 + bench.seed, bench["n"]),
            Cell.share("toy", WORST, 0, 10, WORST),
            Cell("toy", "sum", float(sum(found.values())), 3, unit="points"),
        ]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Toy]]:
    entries = dict(experiments._entries) or {entry.name: entry for entry in experiments}
    monkeypatch.setattr(experiments, "_entries", entries)
    experiments.register("toy")(Toy)
    Toy.done, Toy.stop_at = [], ""
    return Toy


def without_times(record: Path) -> Any:
    held = json.loads(record.read_text())
    for run in held["runs"].values():
        del run["seconds"]
    return held


# ------------------------------------------------------------------------------------------- the frame


def test_parts_are_done_once_and_a_stop_loses_one(toy: type[Toy], data: Path, tmp_path: Path) -> None:
    order = ("reproduce", "toy", "--data", data, "--work", tmp_path)
    toy.stop_at = "three/3"
    done = call(*order)
    assert done.code == 130
    assert "stopped; the same command goes on" in done.err
    assert toy.done == ["one", "two"]
    toy.stop_at = ""
    done = call(*order)
    assert done.code == 0, done.err
    assert toy.done == ["one", "two", "three/3"]
    assert "1 of 3 parts to do, about 60 s" in done.err
    record = Path(done.out.strip())
    assert {r["column"]: r["mean"] for r in json.loads(record.read_text())["rows"]}["sum"] == 20 * (3 + 3 + 7)
    assert call(*order).code == 0
    assert toy.done == ["one", "two", "three/3"]


def test_other_settings_are_other_work(toy: type[Toy], data: Path, tmp_path: Path) -> None:
    order = ("reproduce", "toy", "--data", data, "--work", tmp_path)
    assert call(*order).code == 0
    assert len(toy.done) == 3
    assert "at other settings" in refuse_last(call(*order, "--set", "n=5"))
    assert len(toy.done) == 3
    assert call(*order, "--set", "n=5", "--out", tmp_path / "other").code == 0
    assert len(toy.done) == 6


def refuse_last(done: Any) -> str:
    """The sentence of a refusal that came before any work."""
    assert done.code == 2
    assert done.err.startswith("robustknn: ")
    return str(done.err)


def test_an_altered_row_is_not_taken(toy: type[Toy], data: Path, tmp_path: Path) -> None:
    order = ("reproduce", "toy", "--data", data, "--work", tmp_path)
    assert call(*order).code == 0
    row = next((tmp_path / "toy").rglob("one-*.json"))
    row.write_text(row.read_text().replace('"row": 60', '"row": 61'))
    done = call(*order)
    assert done.code == 2
    assert "truncated or altered" in done.err


def test_seeds_gather_in_one_record(toy: type[Toy], data: Path, tmp_path: Path) -> None:
    order = ("reproduce", "toy", "--data", data, "--work", tmp_path)
    assert call(*order, "--seeds", "0,2").code == 0
    record = Path(call(*order, "--seed", "1").out.strip())
    held = json.loads(record.read_text())
    clean = next(r for r in held["rows"] if r["column"] == "clean")
    assert {seed: found["value"] for seed, found in clean["seeds"].items()} == {"0": 15.0, "1": 20.0, "2": 25.0}
    assert clean["mean"] == 20.0
    assert clean["sd"] == 5.0  # of 15, 20, 25
    assert clean["n"] == 20
    assert clean["interval"] == [round(100 * end, 4) for end in wilson(4, 20)]
    assert list(held["runs"]) == ["0", "1", "2"]
    assert held["runs"]["1"]["command"].endswith("--preset cpu --seed 1")


def test_what_a_seed_held_in_memory_is_given_back(toy: type[Toy], data: Path, tmp_path: Path) -> None:
    order = Order("toy", "cpu", (), "cpu", (0, 1, 2), {}, str(data), tmp_path, tmp_path / "out")
    runs, _ = ordered(order, Silent())
    alive = [weakref.ref(run.bench) for run in runs]
    for done, _ in enumerate(perform(order, runs, lambda _: None)):
        gc.collect()
        assert [held() is not None for held in alive] == [place > done for place in range(3)]


def test_seeds_share_their_samples_so_the_interval_stays_wide() -> None:
    one = rows_of([], "0", [Cell.share("a", "b", 50, 100)], {})
    two = rows_of(one, "1", [Cell.share("a", "b", 50, 100)], {("a", "b"): 51.0})
    assert two[0]["interval"] == one[0]["interval"]
    assert two[0]["sd"] == 0.0
    assert two[0]["published"] == 51.0


def test_the_bootstrap_covers_the_mean_as_the_normal_interval_does() -> None:
    values = [float(v) for v in torch.linspace(0, 10, 400)]
    cell = Cell.mean("a", "b", values, "L2")
    reach = 1.96 * float(torch.tensor(values).std()) / 20
    assert cell.value == pytest.approx(5.0)
    assert cell.interval is not None
    assert cell.interval == pytest.approx((5 - reach, 5 + reach), abs=0.06)
    assert Cell.mean("a", "b", values, "L2") == cell
    assert Cell.mean("a", "b", [2.5], "L2").interval == (2.5, 2.5)
    # In single precision the ends were 1.0992499: rounded to four decimals, below the mean.
    assert Cell.mean("a", "b", [1.09925, 1.09925], "ms").interval == (1.09925, 1.09925)


def test_blocks_are_measured_once_and_checked(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def measure(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(rows.tolist())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"square": rows * rows}

    with pytest.raises(KeyboardInterrupt):
        by_block(tmp_path, 7, 3, measure, Silent(), "squares")
    assert by_block(tmp_path, 7, 3, measure, Silent(), "squares")["square"].tolist() == [i * i for i in range(7)]
    assert seen == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6]]
    file = tmp_path / "00000003-00000005.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match="missing or altered"):
        by_block(tmp_path, 7, 3, measure, Silent(), "squares")


@pytest.mark.skipif(os.name == "nt", reason="no file locks of this kind there")
def test_two_processes_take_turns(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom robustknn.reproduce.blocks import alone\n"
        "print('ready', flush=True)\nwith alone(Path(sys.argv[1])):\n"
        "    print('in', flush=True)\n    sys.stdin.readline()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "work")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen(command, env=environment, **pipes)
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == [b"ready\n", b"in\n"]
    second = subprocess.Popen(command, env=environment, **pipes)
    assert second.stdout is not None
    assert second.stdout.readline() == b"ready\n"
    assert not select.select([second.stdout], [], [], 0.5)[0]
    first.kill()  # the lock ends with the process
    assert second.communicate(b"\n", timeout=60)[0] == b"in\n"
    first.communicate()


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name an experiment"),
        (("advknn-table9",), "did you mean 'advknn-table"),
        (("advknn-table2", "--preset", "gpu"), "preset of advknn-table2"),
        (("advknn-table2", "--dataset", "mnits"), "did you mean 'mnist'"),
        (("advknn-table2", "--set", "epoch=3"), "did you mean 'epochs'"),
        (("advknn-table2", "--set", "epochs"), "key=value"),
        (("advknn-table2", "--set", "epochs=many"), "of another kind"),
        (("advknn-table2", "--set", "epochs=0"), "of another kind"),
        (("advknn-table2", "--set", "worst_n=100.5"), "of another kind"),
        (("advknn-table2", "--seeds", "0,x"), "list of whole numbers"),
        (("advknn-table2", "--seeds", "1,1"), "different whole numbers"),
        (("advknn-table2", "--device", "cuda:99"), "not available"),
        (("advknn-table2", "--dataset", "svhn"), "'svhn' was not found"),
        (("toy", "--preset", "paper", "--device", "cpu"), "needs a CUDA device"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(
    words: tuple[str, ...], said: str, toy: type[Toy], data: Path, tmp_path: Path
) -> None:
    assert said in refuse("reproduce", *words, "--data", data, "--work", tmp_path)


def test_missing_data_is_said(tmp_path: Path) -> None:
    assert "no folder is known" in refuse("reproduce", "advknn-table2", "--work", tmp_path)
    assert "was not found" in refuse("reproduce", "advknn-table2", "--data", tmp_path, "--work", tmp_path)
    assert "no folder 'data'" in refuse("reproduce", "--pages", tmp_path)


def test_every_experiment_is_listed_and_has_both_presets() -> None:
    shown = succeed("reproduce", "--list")
    for entry in experiments:
        experiment = experiments.create(entry.name)
        assert f"{entry.name} " in shown
        assert {"cpu", "paper"} <= set(experiment.presets)
        assert set(experiment.presets["cpu"]) == set(experiment.presets["paper"])


# -------------------------------------------------------------------------------------- a whole experiment


@pytest.fixture(scope="module")
def table2(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of AdvKNN's second table on the small data, never stopped."""
    work = tmp_path_factory.mktemp("work")
    done = call("reproduce", "advknn-table2", "--data", data, "--work", work, *SMALL)
    assert done.code == 0, done.err
    return Path(done.out.strip())


def test_a_table_is_whole(table2: Path) -> None:
    record = json.loads(table2.read_text())
    rows = {(r["row"], r["column"]): r for r in record["rows"]}
    for place, value in published("advknn-table2", "mnist").items():
        assert rows[place]["published"] == value
        assert rows[place]["n"] == 12
    assert rows["kNN", "clean"]["mean"] > 80  # the classes are easy
    assert rows["kNN", WORST]["n"] == 6
    assert rows["kNN", WORST]["mean"] <= rows["kNN, DkNNB", "FGSM"]["mean"]
    network = record["runs"]["0"]["networks"][0]
    assert re.fullmatch("[0-9a-f]{64}", network["sha256_weights"])
    assert network["command"].startswith("robustknn train --data mnist --protocol published --model mnist-cnn")


def test_killed_and_gone_on_with_gives_the_same_record(table2: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "robustknn", "reproduce", "advknn-table2", "--data", str(data)]
    command += ["--work", str(tmp_path), "--threads", "1", *SMALL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for parts in (2, 6):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("advknn-table2/*/*/*.json"))) <= parts:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert without_times(tmp_path / "results" / table2.name) == without_times(table2)


def test_pages_are_made_of_records_alone(table2: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / table2.name).write_bytes(table2.read_bytes())
    succeed("reproduce", "--pages", tmp_path)
    page = (tmp_path / "advknn-table2.md").read_text()
    assert "## mnist, preset cpu" in page
    assert "(44.48)" in page
    assert "## svhn\n\nNot run." in page
    front = (tmp_path / "README.md").read_text()
    assert "| kNN | fashion-mnist | not run | not run | 5.82 | not run |" in front
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    succeed("reproduce", "--pages", tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ------------------------------------------------------------------------------------ the other experiments

FURTHER: dict[str, tuple[str, ...]] = {
    "advknn-table1": (),
    "advknn-table3": (),
    "advknn-fig3": (),
    "advknn-fig4": ("few=8", "sw_n=4", "sw_steps=10", "head_references=100", "radii=[0.25]"),
    "advknn-fig5": ("sw_n=4", "sw_steps=10"),
    "advknn-fig6": ("few=8", "head_references=100", "radii=[0.25]"),
    "advknn-fig7": ("few=8", "worst_few=4", "head_references=100", "ks=[3,5]"),
    "dknn-tables": ("cw_n=4", "cw_steps=10"),
}


@pytest.fixture(scope="module")
def shared_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


QUICK = ("advknn-table1", "advknn-fig3", "advknn-fig5")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FURTHER])
def test_every_experiment_runs_and_is_shown(name: str, data: Path, shared_work: Path) -> None:
    pages = shared_work / "pages"
    changes = [word for change in (*TINY, *FURTHER[name]) for word in ("--set", change)]
    done = call("reproduce", name, "--data", data, "--work", shared_work, "--out", pages / "data", *changes)
    assert done.code == 0, done.err
    record = json.loads(Path(done.out.strip()).read_text())
    rows = {(r["row"], r["column"]): r for r in record["rows"]}
    assert any(r["protocol"] == WORST for r in record["rows"])
    for r in record["rows"]:
        if r["unit"] == "%":
            assert 0 <= r["interval"][0] <= r["mean"] <= r["interval"][1] <= 100
    # What the paper printed has its place among the numbers, but for radii that this test leaves out.
    missing = [place for place in published(name, "mnist") if place not in rows]
    assert not [place for place in missing if name != "advknn-fig5"], missing
    assert not missing or record["pictures"]["credibility"]
    charts = experiments.create(name).draw(record)
    assert len({chart.stem for chart in charts}) == len(charts)
    for chart in charts:
        assert chart.svg.lstrip().startswith(b"<?xml")
        assert chart.png.startswith(b"\x89PNG")
    assert [chart.svg for chart in experiments.create(name).draw(record)] == [chart.svg for chart in charts]
    succeed("reproduce", "--pages", pages)
    page = (pages / f"{name}.md").read_text()
    assert "## mnist, preset cpu" in page
    assert all(f"-{chart.stem}.svg)" in page for chart in charts)


@pytest.mark.parametrize("model", ["mnist-cnn", "lenet5"])
@pytest.mark.parametrize(("name", "shape"), [("svhn", (3, 32, 32)), ("fashion-mnist", (1, 28, 28))])
def test_every_data_set_has_a_network_that_takes_it(
    model: str, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    bench = Bench(Settings("advknn-table3", name, "cpu", 0, COMMON, {}), tmp_path)
    recipe = Victim(bench, model).recipe
    network = load_model(recipe.model, None, **recipe.options)
    assert network(torch.zeros(2, *shape)).shape == (2, 10)
    assert recipe.config.epochs == 18  # as the paper's release


def test_what_tables_share_is_done_once(data: Path, tmp_path: Path) -> None:
    order = ("--data", data, "--work", tmp_path, *SMALL)
    assert call("reproduce", "advknn-table2", *order).code == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/*.safetensors")}
    assert call("reproduce", "advknn-fig3", *order).code == 0
    shared = {p: t for p, t in before.items() if p.parts[-3] in ("shared", "models")}
    assert len(shared) > 5
    assert {p: p.stat().st_mtime_ns for p in shared} == shared


@pytest.mark.parametrize(("shape", "channels"), [((4, 1, 5, 6), 0), ((4, 3, 5, 6), 3)])
def test_packed_images_come_back(shape: tuple[int, ...], channels: int) -> None:
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    held = json.loads(json.dumps(packed(pixels / 255)))
    expected = pixels.permute(0, 2, 3, 1) if channels else pixels[:, 0]
    assert unpacked(held).tolist() == expected.tolist()


def test_a_recipe_is_a_command() -> None:
    recipe = Recipe(
        "net",
        "vgg16",
        TrainConfig(
            epochs=3, optimizer="sgd", lr=0.1, nesterov=False, schedule="step", milestones=(1, 2), augment=True
        ),
        options={"width": 8},
        method="adversarial",
        method_options={"eps": 0.1, "layers": ("a", "b")},
        protocol="standard",
    )
    assert recipe.command("cifar10", 7) == (
        "robustknn train --data cifar10 --protocol standard --model vgg16 --model-option width=8 --method adversarial "
        "--method-option eps=0.1 --method-option layers=a,b --epochs 3 --optimizer sgd --lr 0.1 --schedule step "
        "--milestone 1 --milestone 2 --augment --seed 7 --out RUN"
    )


# ------------------------------------------------------------------------------------ what is committed

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_committed_pages_are_those_of_the_committed_records() -> None:
    made = pages_of(RESULTS)
    # Another matplotlib draws the same with other bytes.
    same = f"matplotlib=={version('matplotlib')}" in (RESULTS.parents[1] / "constraints.txt").read_text().split()
    for path, content in made.items():
        if path.suffix == ".md" or (path.suffix == ".svg" and same):
            assert path.read_bytes() == content, f"run robustknn reproduce --pages docs/results: {path.name} is stale"
        else:
            assert path.is_file(), f"run robustknn reproduce --pages docs/results: {path.name} is missing"
    left = {p for p in (RESULTS / "figures").iterdir() if p.suffix in (".svg", ".png")} - set(made)
    assert not left, f"no page shows them: {sorted(p.name for p in left)}"


def test_committed_records_carry_the_published_values() -> None:
    for path in sorted((RESULTS / "data").glob("*.json")):
        record = read_record(path)
        printed = published(record["experiment"], record["data"])
        for row in record["rows"]:
            assert row["published"] == printed.get((row["row"], row["column"])), path.name


def test_committed_pages_show_the_published_values_beside_ours() -> None:
    shown = 0
    for path in sorted((RESULTS / "data").glob("*.json")):
        record = json.loads(path.read_text())
        page = (RESULTS / f"{record['experiment']}.md").read_text()
        section = page[page.index(f"\n## {record['data']}, preset {record['preset']}\n") :].split("\n## ")[1]
        printed = published(record["experiment"], record["data"])
        for row in record["rows"]:
            (line,) = [v for v in section.splitlines() if v.startswith(f"| {row['row']}, {row['column']} | ")]
            value = printed.get((row["row"], row["column"]))
            assert line.split("|")[3].strip() == ("" if value is None else f"{value:g}"), (path.name, line)
            shown += value is not None
    assert shown > 50


def test_every_suite_is_named_beside_its_figures() -> None:
    front = (RESULTS / "README.md").read_text()
    for path in sorted((RESULTS / "data").glob("*.json")):
        record = json.loads(path.read_text())
        if any(row["column"] == WORST for row in record["rows"]):
            suite = suite_of(record)
            assert suite in registry.attacks
            commits = ", ".join(dict.fromkeys(run["commit"] for run in record["runs"].values()))
            assert f"(`{suite}` of commit {commits})" in (RESULTS / f"{record['experiment']}.md").read_text()
            lines = [
                v for v in front.splitlines() if v.endswith(f"[{record['experiment']}]({record['experiment']}.md) |")
            ]
            assert all(f"| `{suite}` |" in v for v in lines if f"| {record['data']} |" in v and "not run" not in v)


@pytest.mark.parametrize(
    ("experiment", "data", "row", "column", "value"),
    [
        ("advknn-table2", "mnist", "kNN, plain", "FGSM", 44.48),
        ("advknn-table2", "mnist", "DkNN, DkNNB + CL", "BIM", 5.97),
        ("advknn-table2", "svhn", "kNN, DkNNB", "FGSM", 19.05),
        ("advknn-table2", "fashion-mnist", "DkNN, DkNNB", "BIM", 14.87),
        ("advknn-table2", "fashion-mnist", "kNN", "clean", 89.87),
        ("advknn-table1", "mnist", "DNN", "clean", 99.17),
        ("advknn-table1", "svhn", "DkNNB", "clean", 88.32),
        ("advknn-table3", "mnist", "kNN", "BIM, plain", 59.72),
        ("advknn-table3", "mnist", "DkNN", "FGSM, DkNNB + CL", 75.70),
        ("advknn-fig4", "mnist", "relu3, eps 0.25", "mean L2", 4.584),  # 1.4909 in the unit of its code
        ("advknn-fig4", "mnist", "Sitawarin & Wagner", "DkNN", 17.44),
        ("advknn-fig5", "mnist", "DkNNB + CL, BIM", "mean credibility", 0.4608),
        ("advknn-fig5", "mnist", "clean", "below 0.5", 47.54),
        ("dknn-tables", "mnist", "DkNN", "BIM", 16.8),
        ("dknn-tables", "svhn", "DkNN", "FGSM", 28.6),
    ],
)
def test_published_values(experiment: str, data: str, row: str, column: str, value: float) -> None:
    """Some of every table, as the papers print them."""
    assert published(experiment, data)[row, column] == value


def test_a_published_bound_is_shown_as_one() -> None:
    place = ("ASK's lead over AdvKNN and S&W 1, as compared", "layer 4, 8/255")
    assert printed("ask-attack", "cifar10")[place] == "≥ 13"
    assert published("ask-attack", "cifar10")[place] == 13
    assert "(≥ 13)" in (RESULTS / "ask-attack.md").read_text()
