"""From shards to a measured defense, over two nodes and on one: `python -m benchmarks.reproduce.ray_cifar --work DIR`.

CIFAR-10's first -n training images as tar shards → ResNet-20 features, averaged and reduced by PCA → a database with
its largest softmax numbers → a flat FAISS index → retrieval (the network's labels, k = 50), clean and under two attacks
on --attacked test images. Once in this process; once over a Ray cluster of two nodes with one CPU each, started here,
where one worker is killed in the middle of the building and another in the evaluation (or none: --spare-workers). Says
whether every file of the two databases and of the two evaluations is the same, and what took how long. The folder
--data holds cifar-10-batches-py, --models holds resnet20-12fca82f.th.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import kept
from benchmarks.reproduce.mortal import HOME, MARK, Mortal
from robustknn import FeatureExtractor
from robustknn.cluster import RayCluster
from robustknn.database import Executor, build_database, fit_projection, local_executor
from robustknn.database.ray_executor import ray_executor
from robustknn.datasets import load
from robustknn.datasets.shards import shards, write_shards
from robustknn.evaluation import Summary, finish
from robustknn.evaluation.experiment import prepare
from robustknn.evaluation.experiment_config import read_config
from robustknn.models import load_model
from robustknn.payload import TopSoftmax
from robustknn.progress import Console

SEED, COMPONENTS, SHARD = 0, 32, 500


def build(out: Path, executor: Executor, args: argparse.Namespace) -> float:
    """Make the database and its index; the seconds that the blocks took."""
    model = load_model("resnet20", args.weights).eval()
    source = Mortal(shards(args.work / "shards"))
    features = fit_projection(FeatureExtractor(model, "avgpool"), source, COMPONENTS, sample=2000, seed=SEED)
    began = time.perf_counter()
    database = build_database(
        out,
        features,
        source,
        payload=TopSoftmax(9),
        labels="payload",
        block_rows=args.block_rows,
        batch_size=128,
        executor=executor,
        progress=Console(),
    )
    seconds = time.perf_counter() - began
    database.build_index("faiss")
    assert not database.verify(model)
    return seconds


def measure(out: Path, database: Path, executor: str | RayCluster, args: argparse.Namespace) -> tuple[float, Summary]:
    """Evaluate retrieval over a database; the seconds it took, and the figures."""
    settings = {
        "plugins": ["benchmarks.reproduce.mortal"],
        "data.name": "cifar10",
        "data.root": str(args.data),
        "data.protocol": "published",
        "data.n": args.attacked,
        "model.name": "resnet20",
        "model.checkpoint": str(args.weights),
        "references.path": str(database),
        "classifiers": [{"name": "retrieval", "n_neighbors": 50, "index": "faiss"}],
        "attacks": [{"name": "fgsm-transfer"}, {"name": "mortal-adaptive", "steps": 20}],
        "published": False,
        "worst_case": "off",
        "threat.eps": [1 / 255],
        "batch_size": 20,
        "controls": 20,
        "device": "cpu",
    }
    experiment = prepare(read_config(None, settings))
    began = time.perf_counter()
    run = experiment.run(out, progress=Console(), executor=executor)
    return time.perf_counter() - began, finish(run)


def road(
    out: Path,
    name: str,
    builder: Executor,
    runner: str | RayCluster,
    seconds: dict[str, float],
    args: argparse.Namespace,
) -> Summary:
    """Build and evaluate. Both databases are evaluated at one place: a run's identity knows the path of an index."""
    database = args.work / "database"
    seconds[f"build, {name}"] = build(database, builder, args)
    seconds[f"evaluation, {name}"], figures = measure(out / "run", database, runner, args)
    database.rename(out / "database")
    return figures


@contextmanager
def two_nodes() -> Iterator[RayCluster]:
    """A cluster of two nodes on this machine, a CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=200_000_000, include_dashboard=False)
        yield RayCluster(cluster.address)
    finally:
        cluster.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    """Every file that must repeat: all but locks, clock times and what shows these."""
    skipped = (".lock", "environment.json", "summary.json")
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".time" and p.name not in skipped]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def compared(what: str, a: Path, b: Path) -> dict[str, int]:
    """How many files two folders hold, and how many of them differ or are in one alone."""
    one, two = content(a), content(b)
    differing = sum(one.get(name) != two.get(name) for name in {*one, *two})
    print(f"{what}: {len(one)} files, {sum(map(len, one.values()))} bytes; {differing} differ", flush=True)
    return {"files": len(one), "bytes": sum(map(len, one.values())), "differing": differing}


def main(argv: Sequence[str] | None = None) -> int:
    """Build and evaluate twice, and compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.ray_cifar")
    parser.add_argument("--data", type=Path, required=True, help="the folder with cifar-10-batches-py")
    parser.add_argument("--models", type=Path, required=True, help="the folder with resnet20-12fca82f.th")
    parser.add_argument("--work", type=Path, required=True, help="a folder for shards, databases and runs")
    parser.add_argument("-n", type=int, default=10_000, help="images of the database")
    parser.add_argument("--attacked", type=int, default=100, help="test images")
    parser.add_argument("--block-rows", type=int, default=500)
    parser.add_argument("--spare-workers", action="store_true", help="kill none")
    parser.add_argument("--results", type=Path, help="where to write a record")
    args = parser.parse_args(argv)
    args.data, args.work = args.data.resolve(), args.work.resolve()
    args.weights = args.models.resolve() / "resnet20-12fca82f.th"
    torch.set_num_threads(1)  # as a worker of one CPU
    args.work.mkdir(parents=True, exist_ok=True)
    if any(args.work.iterdir()):
        parser.error(f"{args.work} is not empty; choose a new folder")
    os.environ[HOME], os.environ[MARK] = str(os.getpid()), os.devnull if args.spare_workers else str(args.work)
    # Workers import what this file brings along, the attack and the source.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    train = load("cifar10", root=args.data, protocol="published").train
    write_shards(train.first(args.n), args.work / "shards", SHARD)
    one, two = args.work / "one", args.work / "two"
    seconds: dict[str, float] = {}
    figures = road(one, "one process", local_executor(), "local", seconds, args)
    with two_nodes() as cluster:
        road(two, "two nodes", ray_executor(cluster.address), cluster, seconds, args)
    differing = {kind: compared(kind, one / kind, two / kind) for kind in ("database", "run")}
    deaths = sorted(mark.name for mark in args.work.glob("*-died"))
    print("workers killed:", ", ".join(deaths) or "none")
    for what, took in seconds.items():
        print(f"{what}: {took:.0f} s")
    (retrieval,) = figures.classifiers
    accuracy = {"clean": retrieval.clean_accuracy, **{a.name: a.robust_accuracy for a in retrieval.attacks}}
    print(*(f"{name} {share:.3f}" for name, share in accuracy.items()), sep=", ")
    kept.write_record(
        args.results,
        n=args.n,
        attacked=args.attacked,
        seed=SEED,
        seconds=seconds,
        compared=differing,
        killed=deaths,
        accuracy=accuracy,
    )
    return int(any(found["differing"] for found in differing.values()))


if __name__ == "__main__":
    sys.exit(main())
