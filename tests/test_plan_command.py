"""`robustknn index plan`: bytes counted by hand, times that give back the runs they come from, borders, notations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, refuse, succeed

from robustknn import registry
from robustknn.database.notation import count, said, size
from robustknn.database.plan import Machine, Plan, Prices, Row, Task, payload_bytes, plan, recommend
from robustknn.database.plan_constants import ASSUMED, CONSTANTS, MEASURED, PUBLISHED, RECALL
from robustknn.database.plan_engines import ENGINES, Share
from robustknn.errors import InputError
from robustknn.neighbors.auto import choose
from robustknn.neighbors.faiss_kinds import IVFFlatIndex
from robustknn.payload import TopPayload

ROOT = Path(__file__).parent.parent
HUGE = Machine(memory=1e18, disk=1e18, cores=2)
MEASURED_ON = Machine(memory=23e9, disk=1e18, cores=2)


def row(made: Plan, engine: str) -> Row:
    return next(r for r in made.rows if r.engine == engine)


# -------------------------------------------------------------------------------------------- notation


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50e9", 50_000_000_000), ("1M", 1_000_000), ("1_000_000", 1_000_000), ("100k", 100_000), ("1.3M", 1_300_000),
        ("2B", 2_000_000_000), ("2G", 2_000_000_000), ("7", 7), (" 5E3 ", 5000), ("1.1M", 1_100_000),
    ],
)  # fmt: skip
def test_counts(text: str, value: int) -> None:
    assert count(text, "n") == value


@pytest.mark.parametrize("text", ["", "M", "-5", "1.5", "0", "5x", "1 2", "nan", "inf", "1e999", "1,000", "0.0001k"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(InputError, match=r"^--vectors "):
        count(text, "--vectors")


@pytest.mark.parametrize(
    ("text", "value"),
    [("64GB", 64e9), ("2TB", 2e12), ("512GiB", 2.0**39), ("1.5 tb", 1.5e12), ("1000", 1000), ("1kB", 1e3), ("8b", 8)],
)
def test_sizes(text: str, value: float) -> None:
    assert size(text, "memory") == value


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "64 gigs", "inf"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=r"^--machine-memory "):
        size(text, "--machine-memory")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (51.2e12, "bytes", "51 TB"), (999.9e9, "bytes", "1 TB"), (1.3e9, "bytes", "1.3 GB"), (12, "bytes", "12 B"),
        (0.0042, "s", "4.2 ms"), (3.2e-5, "s", "32 µs"), (90, "s", "1.5 min"), (0, "s", "0 s"),
        (36 * 3600, "s", "36 h"),
        (86400 * 3, "s", "3 days"), (86400 * 1000, "s", "2.7 years"), (255_000, "$", "$255k"), (0.35, "$", "$0.35"),
        (1234.5, "1/s", "1,230"), (0.193, "1/s", "0.19"), (61.4, "1/s", "61"),
    ],
)  # fmt: skip
def test_figures_are_said_shortly(value: float, unit: str, text: str) -> None:
    assert said(value, unit) == text


# ----------------------------------------------------------------------------------------------- bytes


def test_bytes_by_hand() -> None:
    """A billion vectors of length 256 with 88 bytes beside each; 4 √n = 126,488 lists, 1,024 bytes a center."""
    made = plan(Task(10**9, 256), HUGE, 1)
    centers = 126_488 * 1024
    n = 10**9
    memory = {
        "exact": 1024 * n, "ivf-flat": 1032 * n + centers, "ivf-sq8": 264 * n + centers, "ivf-pq": 40 * n + centers,
        "hnsw": 1288 * n, "exact-fp16": 256e6, "ivf-flat-disk": 256e6 + centers, "ivf-sq8-disk": 256e6 + centers,
        "diskann (Milvus)": 32 * n, "ivf-sq8 (Milvus)": 264 * n + centers,
    }  # fmt: skip
    disk = {
        "exact": 1112 * n, "ivf-flat": (512 + 88 + 1032) * n + centers, "ivf-sq8": (512 + 88 + 264) * n + centers,
        "ivf-pq": (512 + 88 + 40) * n + centers, "hnsw": (512 + 88 + 1288) * n, "exact-fp16": 600 * n,
        "ivf-flat-disk": (512 + 88 + 1032) * n + centers, "ivf-sq8-disk": (512 + 88 + 264) * n + centers,
        "diskann (Milvus)": (1280 + 88) * n, "ivf-sq8 (Milvus)": (1024 + 264 + 88) * n + centers,
    }  # fmt: skip
    assert {r.engine: r.memory.value for r in made.rows} == memory
    assert {r.engine: r.disk.value for r in made.rows} == disk
    assert all(r.machines == 1 and r.fits for r in made.rows)
    assert all(not figure.constants for r in made.rows for figure in (r.memory, r.disk))  # arithmetic alone


@pytest.mark.parametrize(("classes", "top"), [(50, 20), (40_000, 20), (32_767, 1), (32_768, 1), (10, 20)])
def test_bytes_beside_a_vector_are_those_stored(classes: int, top: int) -> None:
    packed = TopPayload.encode(torch.rand(1, classes).softmax(1), top)
    stored = sum(t.numel() * t.element_size() for t in packed.tensors().values())
    assert payload_bytes(classes, top) == torch.tensor([0]).element_size() + stored


def test_bytes_beside_a_vector_by_hand() -> None:
    assert payload_bytes() == payload_bytes(1000) == 88
    assert payload_bytes(100_000) == 128
    assert payload_bytes(1000, None) == 4008


# ----------------------------------------------------------------------------------------------- times


def figure(engine: str, what: str, n: int, machine: Machine = MEASURED_ON) -> float:
    value: float = getattr(row(plan(Task(n, 256), machine, 1), engine), what).value
    return value


def test_the_figures_give_back_the_runs_they_come_from() -> None:
    """What the record of the run says: a million vectors on two cores."""
    n, cores = 1_000_000, 2
    record = json.loads((ROOT / "benchmarks" / "results" / "engines_ours.json").read_text())
    found = {entry["what"]: entry["value"] for entry in record["figures"]}
    assert (record["settings"]["n"], record["settings"]["dim"], record["threads"]) == (n, 256, cores)
    for engine in ("exact", "ivf-flat", "ivf-sq8", "ivf-pq", "hnsw"):
        rate = found[f"batch 1000: {engine}, queries/s"]
        assert figure(engine, "throughput", n) == pytest.approx(rate, rel=0.02), engine
    for engine in ("exact", "ivf-flat"):
        rate = found[f"batch 1: {engine}, queries/s"]
        assert 1 / figure(engine, "latency", n) == pytest.approx(rate, rel=0.02), engine
    assert figure("ivf-flat", "build", n) == pytest.approx(found["ivf-flat: core seconds to build"] / cores, rel=0.02)
    assert figure("hnsw", "build", n) == pytest.approx(found["hnsw: core seconds to build"], rel=0.02)
    for engine in ("exact", "ivf-flat", "ivf-sq8", "ivf-pq", "hnsw"):
        assert float(RECALL[engine][0]) == pytest.approx(found[f"{engine}: recall"], abs=0.006), engine


def test_reading_from_the_disk_by_hand() -> None:
    """100M vectors on 64 GB: 40,000 lists, 320 looked through, of 2,500 entries of 1,032 bytes."""
    found = row(plan(Task(10**8, 256), Machine(), 1), "ivf-flat-disk")
    compared = (40_000 + 320 * 2500) * 256
    read = 320 * 2500 * 1032 / 3e9 + 50 * 2 / 500e3
    assert found.latency.value == pytest.approx(compared / 2.6e9 + read)
    assert found.throughput.value == pytest.approx(1 / read)
    assert found.throughput.kinds == (ASSUMED, MEASURED)
    assert "320 of 40,000 lists" in found.latency.formula
    written = 2 * (1032e8 + 40_000 * 1024) / 1e9
    clustered = 2 * (10 * 64 * 40_000 + 1e8) * 40_000 * 256 / (89e9 * 16)
    assert found.build.value == pytest.approx(clustered + written)


def test_a_disk_that_the_cache_holds_is_not_read() -> None:
    small = row(plan(Task(10**6, 256), Machine(), 1), "ivf-sq8")
    assert "disk rows" not in small.latency.constants
    assert small.throughput.kinds == (MEASURED,)
    assert row(plan(Task(10**6, 256), Machine(memory=1e9), 1), "ivf-sq8").throughput.kinds == (ASSUMED, MEASURED)


def test_more_vectors_never_take_less() -> None:
    sizes = [10**4 * 2**i for i in range(0, 24, 2)]
    plans = [plan(Task(n, 256), replace(HUGE, memory=64e9), 1) for n in sizes]
    for engine in ENGINES:
        rows = [row(made, engine) for made in plans]
        for what in ("memory", "disk", "build", "latency", "month"):
            values = [getattr(r, what).value for r in rows]
            if None not in values:
                assert values == sorted(values), (engine, what)
        rates: list[Any] = [r.throughput.value for r in rows]
        assert rates == sorted(rates, reverse=True), engine


# ---------------------------------------------------------------------------------- machines and money


def test_as_many_machines_as_hold_it() -> None:
    made = plan(Task(50 * 10**9, 256), Machine())
    exact = row(made, "exact")
    assert exact.machines == 1600  # 51.2 TB, 32 GB each
    assert exact.fits
    assert exact.memory.value == 1600 * 31_250_000 * 1024
    for r in made.rows:
        few = plan(made.task, made.machine, r.machines - 1)
        assert not row(few, r.engine).fits, r.engine
        assert row(plan(made.task, made.machine, r.machines), r.engine).fits, r.engine
    assert made.sentences[0] == "Nothing here fits one machine (64 GB memory, 2 TB disk, 16 cores)."
    few = plan(made.task, made.machine, 3)
    assert any(s.startswith("Not held by the 3 given: exact, ") for s in few.sentences)
    with pytest.raises(InputError, match="no number of machines of 1 MB memory"):
        plan(Task(10**6, 256), Machine(memory=1e6))


def test_money_by_hand() -> None:
    prices = Prices(memory=7, disk=0.2, core=0.05)
    made = plan(Task(10**9, 256), Machine(cores=8), None, prices)
    for engine, memory, disk in (("exact", 1024, 1112), ("hnsw", 1288, 1888)):
        r = row(made, engine)
        vectors = -(-(10**9) // r.machines) * r.machines
        cores = r.machines * 8 * 730 * 0.05
        assert r.month.value == pytest.approx(vectors * (memory * 7 + disk * 0.2) / 1e9 + cores)
        assert r.month.kinds == ()  # all prices were given
    assert row(plan(Task(10**9, 256)), "exact").month.kinds == (ASSUMED,)
    assert "$1.1M" in plan(Task(10**12, 256), HUGE, 1, Prices(gpu=10)).sentences[-1]  # 111,111 hours


def test_the_borders_are_those_of_auto() -> None:
    machine = Machine()
    assert recommend(Task(976_562, 256), machine) == "exact"  # 249,999,872 numbers
    assert recommend(Task(976_563, 256), machine) == "ivf-flat"
    task = Task(10**8, 256)
    lists = 1032 * 10**8
    assert recommend(task, replace(machine, memory=2 * lists)) == "ivf-flat"
    assert recommend(task, replace(machine, memory=2 * lists - 2)) == "ivf-sq8-disk"
    smaller = (512 + 88 + 264) * 10**8 + 40_000 * 1024
    assert recommend(task, replace(machine, disk=smaller)) == "ivf-sq8-disk"
    assert recommend(task, replace(machine, disk=smaller - 1)) == "diskann (Milvus)"
    for memory in (10**9, 64 * 10**9, 10**12):
        for n in (10**5, 10**6, 10**7, 10**8):
            assert recommend(Task(n, 256), replace(machine, memory=memory)) == choose(n, 256, memory).spec


def test_lists_and_probes_are_those_of_the_engines() -> None:
    pytest.importorskip("faiss")
    vectors = torch.rand(900, 8, generator=torch.Generator().manual_seed(0))
    for n in (200, 900):
        index = IVFFlatIndex().build(vectors[:n])
        share = Share(n, 8, 5, 0, 1e9, 1)
        assert (share.lists, share.probes) == (index._index.nlist, index.probes)
    assert (Share(10**8, 8, 5, 0, 1e9, 1).lists, Share(10**8, 8, 5, 0, 1e9, 1).probes) == (40_000, 320)


def test_bytes_in_lists_are_those_of_faiss() -> None:
    """What an index file grows by for each vector."""
    faiss = pytest.importorskip("faiss")
    vectors = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0))
    for engine in ("ivf-flat", "ivf-sq8", "ivf-pq", "hnsw"):
        options = {} if engine == "hnsw" else {"nlist": 8, "train_size": 512}
        small, large = (
            len(faiss.serialize_index(registry.indexes.create(engine, **options).build(vectors[:n])._index))
            for n in (1000, 4000)
        )
        planned = ENGINES[engine](Share(1000, 64, 5, 0, 1e9, 1)), ENGINES[engine](Share(4000, 64, 5, 0, 1e9, 1))
        centers = [0 if engine == "hnsw" else 4 * 64 * Share(n, 64, 5, 0, 1e9, 1).lists for n in (1000, 4000)]
        few, many = (p.memory.value - c for p, c in zip(planned, centers, strict=True))  # type: ignore[operator]
        assert (large - small) / 3000 == pytest.approx((many - few) / 3000, rel=0.06), engine


# ------------------------------------------------------------------------------------- what it rests on


def test_every_figure_says_what_it_rests_on() -> None:
    for c in CONSTANTS.values():
        assert c.kind in (MEASURED, PUBLISHED, ASSUMED)
        assert c.value > 0
        assert c.unit
        assert c.source
        if c.kind == MEASURED:  # of how many vectors, on what machine
            assert "2 cores" in c.source
    assert set(RECALL) == set(ENGINES)
    content = plan(Task(50 * 10**9, 256)).to_json()
    used = {name for r in content["rows"] for f in r.values() if isinstance(f, dict) for name in f["constants"]}
    assert used == set(content["constants"])
    assert set(CONSTANTS) - used == {"extraction", "GPU price"}  # in the last sentence


def test_what_was_not_run_is_said() -> None:
    assert any("50,000,000,000 vectors were not run" in s for s in plan(Task(50 * 10**9, 256)).sentences)
    assert not any("not run" in s for s in plan(Task(10**6, 256)).sentences)


def test_the_page_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "scale" / "plan.md").read_text() == succeed("index", "plan", "--markdown")


# --------------------------------------------------------------------------------------------- command


def test_the_command_prints_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = succeed("index", "plan", "--vectors", "50e9", "--dim", 256, "--k", 50)
    assert "50,000,000,000 vectors of length 256, k 50" in out
    for text in (*ENGINES, "51 TB", "1,600", "index='auto'", "were not run", "DiskANN, NeurIPS 2019"):
        assert text in out, text
    content = json.loads(succeed("index", "plan", "--vectors", "1_000_000", "--machine-memory", "1GB", "--json"))
    assert content["task"] == {"vectors": 10**6, "dim": 256, "k": 50, "payload": 88}
    assert content["machine"]["memory"] == 1e9
    assert content["recommended"] == "ivf-sq8-disk"
    exact = next(r for r in content["rows"] if r["engine"] == "exact")
    assert (exact["machines"], exact["memory"]["value"]) == (3, 3 * 1024 * 333_334)  # half a GB each
    assert content["constants"]["exact product"]["kind"] == "measured"


MISTAKES = [
    ([], "say how many vectors"),
    (["--vectors", "many"], r"--vectors 'many' is not understood; write it as"),
    (["--vectors", "1.5"], "--vectors must be a whole number of at least 1, not 1.5"),
    (["--vectors", "1M", "--dim", "0"], "--dim must be a whole number"),
    (["--vectors", "10", "--k", "50"], "k = 50 neighbors were asked of 10 vectors"),
    (["--vectors", "1M", "--machine-memory", "a lot"], "--machine-memory 'a lot' is not understood"),
    (["--vectors", "1M", "--machine-memory", "10MB"], "no number of machines of 10 MB memory"),
    (["--vectors", "1M", "--machines", "0"], "--machines must be a whole number of at least 1"),
    (["--vectors", "1M", "--price-memory", "-1"], "the price of memory must be at least 0"),
    (["--vectors", "1M", "--price-disk", "nan"], "the price of disk must be at least 0"),
    (["--vectors", "1M", "--payload-top", "all"], "known number of classes"),
    (["--vectors", "1M", "--payload-top", "x"], "--payload-top 'x' is not understood"),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence(flags: list[str], sentence: str) -> None:
    assert sentence in refuse("index", "plan", *flags)


def test_the_group_shows_its_commands() -> None:
    assert "plan" in call("index", "--help").out
