"""From samples to a database: the same bytes however often it was stopped, and whoever made the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robustknn import store
from robustknn.batching import Samples
from robustknn.checks import check_labels
from robustknn.database.arrays import writing
from robustknn.database.database import Database
from robustknn.database.extract import Executor, extract, payload_of
from robustknn.database.fill import classes_of, fill
from robustknn.database.layout import Array, Block, Description, Part, Settings, is_database
from robustknn.datasets.sources import as_source, describe
from robustknn.errors import InputError, ResumeError, brief
from robustknn.features import FeatureExtractor
from robustknn.payload import TopPayload, TopSoftmax
from robustknn.progress import Progress
from robustknn.reference import check_classes, check_extractor, save_preprocessing


def build_database(
    path: str | Path,
    features: FeatureExtractor,
    source: Any,
    *,
    payload: str | TopSoftmax | None = "softmax",
    labels: str = "data",
    n_classes: int | None = None,
    dtype: str = "float32",
    unit: bool = False,
    block_rows: int = 4096,
    batch_size: int = 256,
    executor: Executor | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Database:
    """Run the network once over samples and keep features, labels and payload on the disk; or go on with it.

    A stopped build, by `kill -9` too, goes on with the blocks that are not done when it is called again with the same
    arguments, and ends with the same bytes. Memory: the network, a batch and the rows of a block.

    Args:
        path: a new folder, or that of a build that was stopped.
        features: the extractor; its layers are the database's layers. What it learned (PCA) is kept with it.
        source: arrays (x, y) or x, a split, a map-style torch Dataset, or what `open_source` gave.
        payload: "softmax" keeps the network's softmax vector, a TopSoftmax its largest numbers in half precision.
        labels: "data" takes those of the source, "payload" the class of the largest payload.
        n_classes: the number of classes; by default the largest label plus one, and every class needs a sample.
            Given, a class may be empty until further sources are added.
        dtype: of the stored vectors, "float32" or "float16".
        unit: store vectors at unit length, and their lengths, so that a search by cosine needs no copy.
        block_rows: rows that are made, written and checked at a time.
        batch_size: samples a forward pass.
        executor: who makes the blocks; this process by default (see `local_executor`).
        options: what further is to be the same when the building goes on, as JSON; kept with the database.
        progress: where to report.

    Raises:
        ResumeError: the folder holds a database of another source, or made with other settings.
        IntegrityError: it was made with another model or extractor; a sample cannot be read.
        InputError: bad settings or samples (see the message).
        StorageError: the disk has no room; what is done is kept.
    """
    check_extractor(features)
    folder, settings = Path(path), Settings(payload, labels, dtype, unit, block_rows, batch_size)
    samples, wanted = as_source(source, labels == "data"), dict(options or {})
    if is_database(folder):
        _check_same(Database.open(folder), features, settings, wanted)
    else:
        _begin(folder, features, samples, settings, n_classes, wanted)
    fill(folder, features, samples, n_classes, executor=executor, progress=progress)
    return Database.open(folder)


def _begin(
    folder: Path,
    features: FeatureExtractor,
    samples: Samples,
    settings: Settings,
    n_classes: int | None,
    options: dict[str, Any],
) -> None:
    """Describe a new database, once a sample has shown the shapes."""
    _check_free(folder)
    if not len(samples):
        raise InputError("there is no sample to build a database of; pass at least one.")
    first = samples.batch(torch.zeros(1, dtype=torch.int64))
    rows = extract(features, [first], torch.zeros(1, dtype=torch.int64), settings, Block(0, 0, 1))
    payload = payload_of(features.with_output(features.place(first))[1], settings)
    classes = classes_of(samples, settings, n_classes)
    if settings.labels == "payload" and payload is not None:
        classes = payload.shape[1]
    elif n_classes is None:
        check_classes(check_labels(samples.labels, len(samples), None, "the labels"), None)
    source = describe(samples)
    with writing(folder):
        with store.disk("write", folder):
            save_preprocessing(folder, features.layers, features)
        Description(
            features.layers,
            {name: Array(value.numpy().dtype.str, tuple(value.shape[1:])) for name, value in rows.items()},
            settings,
            payload.settings() if isinstance(payload, TopPayload) else None,
            features.fingerprint(),
            features.preprocessing(),
            options,
            (Part(source, 0, len(samples), 0, classes),),
        ).write(folder)


def _check_free(folder: Path) -> None:
    """InputError when something else is in the folder than a build leaves that was stopped before its description."""
    if folder.exists():
        begun = (".", "transform-", "center-")
        if not folder.is_dir() or any(not held.name.startswith(begun) for held in folder.iterdir()):
            raise InputError(f"{str(folder)!r} exists and holds no database; choose a new folder.")


def _check_same(held: Database, features: FeatureExtractor, settings: Settings, options: dict[str, Any]) -> None:
    """Refuse to go on with a database that was begun with something else."""
    held.extractor(features)
    said = held.description
    begun = {"layers": list(said.layers), **said.settings.to_json(), **said.options}
    wanted = {"layers": list(features.layers), **settings.to_json(), **options}
    for name in begun | wanted:
        if begun.get(name) != wanted.get(name):
            raise ResumeError(
                f"the database in {str(held.path)!r} was begun with {name} = {brief(begun.get(name))}, not "
                f"{brief(wanted.get(name))}; use the same, or choose another folder."
            )
