"""`robustknn index`: databases of references that outgrow memory, built, searched and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustknn.cli.index_app import index_app
from robustknn.cli.options import (
    CheckpointOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    ExecutorOption,
    ModelOption,
    ModelSettings,
    PluginOption,
    ProtocolOption,
    RayAddressOption,
    RayCpusOption,
    RayGpusOption,
    RayWorkersOption,
    RootOption,
    ThreadsOption,
    cluster_of,
    settings,
    use_threads,
)

if TYPE_CHECKING:
    from robustknn.progress import Progress

DatabaseArgument = Annotated[Path, typer.Argument(metavar="DB", help="Folder of the database.")]
ImagesOption = Annotated[
    str | None,
    typer.Option(help="A folder of images, archives (a folder, part-{000..012}.tar), hf:FOLDER or module:function."),
]
ImageSettings = Annotated[
    list[str] | None,
    typer.Option("--image-option", help="key=value for what reads the images, e.g. size=224, channels=1; repeatable."),
]
PartOption = Annotated[str, typer.Option(help="Of --data: train, calibration, validation or test.")]
WorkersOption = Annotated[int, typer.Option(min=0, help="Processes that read and decode images.")]
MetricOption = Annotated[str, typer.Option(help="l2, cosine or ip.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LayerOption = Annotated[str | None, typer.Option("--layer", "-l", help="Of a database with several layers.")]


@index_app.command()
def build(
    out: DatabaseArgument,
    images: ImagesOption = None,
    image_option: ImageSettings = None,
    data: DataOption = None,
    part: PartOption = "train",
    data_root: RootOption = None,
    protocol: ProtocolOption = None,
    download: DownloadOption = False,
    model: ModelOption = None,
    model_option: ModelSettings = None,
    checkpoint: CheckpointOption = None,
    layer: Annotated[
        list[str] | None, typer.Option("--layer", "-l", help="Layer whose features are kept; repeatable.")
    ] = None,
    pool: Annotated[str, typer.Option(help="flatten, avg, max, tokens or first.")] = "flatten",
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale features to unit length.")] = False,
    pca: Annotated[int | None, typer.Option(min=1, help="Reduce every layer to so many components.")] = None,
    whiten: Annotated[bool, typer.Option("--whiten", help="Scale the components to unit variance.")] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Features of the web-scale defense, for --pool: average, rmac or rmac-bits.")
    ] = None,
    pca_sample: Annotated[int, typer.Option(min=2, help="Images that components and bits are learned from.")] = 10_000,
    payload: Annotated[str, typer.Option(help="softmax, top:20 (the largest, in half precision) or none.")] = "softmax",
    labels: Annotated[str, typer.Option(help="data, or payload: the class the network gives.")] = "data",
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes, where not all are in yet.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16: how vectors are stored.")] = "float32",
    unit: Annotated[bool, typer.Option("--unit", help="Store vectors at unit length, for search by cosine.")] = False,
    block_rows: Annotated[int, typer.Option(min=1, help="Rows written and checked at a time.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 256,
    workers: WorkersOption = 0,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    ray_workers: RayWorkersOption = None,
    ray_cpus: RayCpusOption = None,
    ray_gpus: RayGpusOption = None,
    index: Annotated[
        list[str] | None, typer.Option("--index", help="Build this search index too, e.g. ivf-sq8; repeatable.")
    ] = None,
    metric: MetricOption = "l2",
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Build a database of images, or go on with one; with --index and no images, an index of one that is there."""
    from robustknn.database import Database, build_database, is_database
    from robustknn.progress import Console

    flags = dict(locals())
    _prepare(threads, plugin)
    _check_asked(flags)
    maker, progress = _executor(flags), Console()
    if images is None and data is None and index and is_database(out):
        database = Database.open(out)
    else:
        source = _source(flags, progress)
        features, wanted = _features(flags, out, source, progress)
        database = build_database(
            out,
            features,
            source,
            payload=_payload(payload),
            labels=labels,
            n_classes=classes,
            dtype=dtype,
            unit=unit,
            block_rows=block_rows,
            batch_size=batch_size,
            executor=maker,
            options=wanted,
            progress=progress,
        )
    for spec in index or []:
        _build_indexes(database, spec, metric, None if recipe else layer, progress)
    _print_info(database)


def _check_asked(flags: Mapping[str, Any]) -> None:
    """Refuse before hours of work what would be refused after them."""
    from robustknn.checks import check_choice
    from robustknn.errors import InputError
    from robustknn.neighbors import make_index
    from robustknn.recipes.retrieval import RECIPES

    if flags["pca"] is None and flags["whiten"]:
        raise InputError("--whiten scales the components of --pca; name how many: --pca 256 --whiten.")
    if flags["recipe"] is not None:
        check_choice(flags["recipe"], RECIPES, "--recipe")
        if flags["pool"] != "flatten" or flags["normalize"]:
            raise InputError("--recipe says how features are pooled and scaled; leave --pool and --normalize out.")
    names = [spec.partition(":")[0] for spec in flags["index"] or []]
    for place, spec in enumerate(flags["index"] or []):
        make_index(spec, flags["metric"])
        if names[place] in names[:place]:
            raise InputError(f"two indexes would be named {names[place]!r}; build one of them.")


@index_app.command()
def add(
    out: DatabaseArgument,
    images: ImagesOption = None,
    image_option: ImageSettings = None,
    data: DataOption = None,
    part: PartOption = "train",
    data_root: RootOption = None,
    protocol: ProtocolOption = None,
    download: DownloadOption = False,
    model: ModelOption = None,
    model_option: ModelSettings = None,
    checkpoint: CheckpointOption = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes from now on.")] = None,
    workers: WorkersOption = 0,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    ray_workers: RayWorkersOption = None,
    ray_cpus: RayCpusOption = None,
    ray_gpus: RayGpusOption = None,
    drop_unfinished: Annotated[
        bool, typer.Option("--drop-unfinished", help="Take back an addition that was not finished, and stop.")
    ] = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Append images to a database, or go on with that; indexes must be built again then."""
    from robustknn.database import Database
    from robustknn.progress import Console

    flags = dict(locals())
    _prepare(threads, plugin)
    database = Database.open(out)
    if drop_unfinished:
        _print_info(database.drop_unfinished())
        return
    maker, progress = _executor(flags), Console()
    source = _source(flags, progress)
    network = _model(flags)
    _print_info(database.add(network, source, n_classes=classes, executor=maker, progress=progress))


@index_app.command()
def search(
    database: DatabaseArgument,
    images: ImagesOption = None,
    image_option: ImageSettings = None,
    data: DataOption = None,
    part: PartOption = "test",
    data_root: RootOption = None,
    protocol: ProtocolOption = None,
    download: DownloadOption = False,
    n: Annotated[int | None, typer.Option("-n", "--n", min=1, help="The first so many images; all by default.")] = None,
    model: ModelOption = None,
    model_option: ModelSettings = None,
    checkpoint: CheckpointOption = None,
    layer: LayerOption = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of neighbors.")] = 5,
    metric: MetricOption = "l2",
    index: Annotated[str, typer.Option(help="An engine, or the name of an index of the database.")] = "exact",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 100,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Find the nearest references of images: their ids, distances and labels."""
    from robustknn.classifiers import KNN
    from robustknn.database import Database
    from robustknn.progress import Console

    flags = dict(locals())
    _prepare(threads, plugin)
    opened = Database.open(database)
    source = _source(flags, Console())
    references = opened.references(_model(flags))
    knn = KNN(references, k, layer=layer, metric=metric, index=opened.index_spec(index))
    import torch

    for positions in torch.arange(min(len(source), n or len(source))).split(batch_size):
        distances, ids = knn.kneighbors(source.batch(positions), k)
        for position, far, near in zip(positions.tolist(), distances.tolist(), ids.tolist(), strict=True):
            found = [
                {"id": i, "distance": d, "label": int(references.labels[i])}
                for i, d in zip(near, far, strict=True)
                if i >= 0
            ]
            if as_json:
                print(json.dumps({"query": position, "neighbors": found}))
            else:
                shown = "  ".join(f"{one['id']} ({one['distance']:.4g}, class {one['label']})" for one in found)
                print(f"{position}: {shown}")


@index_app.command()
def info(database: DatabaseArgument, as_json: JsonOption = False) -> None:
    """What a database holds: rows, layers, bytes, blocks, payload, sources, indexes."""
    from robustknn.database import Database

    opened = Database.open(database)
    if as_json:
        print(json.dumps(opened.describe(), indent=1))
    else:
        _print_info(opened)


@index_app.command()
def verify(
    database: DatabaseArgument,
    model: ModelOption = None,
    model_option: ModelSettings = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = None,
    plugin: PluginOption = None,
) -> None:
    """Read all of a database and compare checksums; a line for everything that is wrong, and exit code 1 then."""
    from robustknn.database import Database
    from robustknn.progress import Console

    flags = dict(locals())
    _prepare(None, plugin)
    opened = Database.open(database)
    found = opened.verify(None if model is None and checkpoint is None else _model(flags), Console())
    for sentence in found:
        print(sentence)
    if found:
        raise typer.Exit(1)
    print(f"{database}: {len(opened)} rows as they were written.")


# ------------------------------------------------------------------------------------------- helpers


def _prepare(threads: int | None, plugins: list[str] | None) -> None:
    from robustknn import registry

    use_threads(threads)
    for place in plugins or []:
        registry.load_plugin(place)


def _source(flags: dict[str, Any], progress: Any) -> Any:
    """The samples that --images, or --data with --part, names."""
    from robustknn.checks import check_choice
    from robustknn.datasets import load, open_source
    from robustknn.errors import InputError

    options = settings(flags["image_option"]) or {}
    if (flags["images"] is None) == (flags["data"] is None):
        raise InputError("name the images: --images PLACE, or --data NAME with --part.")
    if flags["images"] is not None:
        return open_source(flags["images"], **options)
    chosen = check_choice(flags["part"], ("train", "calibration", "validation", "test"), "--part")
    held = load(
        flags["data"],
        root=flags["data_root"],
        protocol=flags["protocol"] or "standard",
        download=flags["download"],
        progress=progress,
        **options,
    )
    split = getattr(held, chosen)
    if split is None:
        raise InputError(f"data set {flags['data']!r} has no {chosen} part by this protocol; choose another.")
    return split


def _model(flags: dict[str, Any]) -> Any:
    """The network with its weights, on its device."""
    from robustknn.evaluation.experiment import trained_network

    options = settings(flags["model_option"]) or {}
    return trained_network(flags["model"] or "digits-cnn", flags["checkpoint"], options, flags["device"] or "auto")


def _features(flags: dict[str, Any], out: Path, source: Any, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """The extractor, and what must be asked for in the same way when the building goes on."""
    from robustknn.database import Database, fit_projection, is_database, spread
    from robustknn.errors import InputError
    from robustknn.features import FeatureExtractor
    from robustknn.recipes import web_scale_features

    network, recipe = _model(flags), flags["recipe"]
    layers = flags["layer"] or getattr(network, "embedding_layer", None)
    if layers is None:
        raise InputError(f"{type(network).__name__} recommends no layer; name one: --layer.")
    names = [layers] if isinstance(layers, str) else list(layers)
    features = None
    learned: tuple[str, ...] = ("pca", "whiten", "pca_sample")
    chosen = {name: flags[name] for name in ("pool", "normalize")}
    if recipe is None:
        features = FeatureExtractor(network, names, **chosen)
        if flags["pca"] is None:
            return features, {}
        names = list(features.layers)
    elif len(names) > 1:
        raise InputError("--recipe makes the features of one layer; name one: --layer.")
    else:
        chosen["recipe"] = recipe
        learned = learned if flags["pca"] or recipe == "rmac-bits" else ()
    asked = {**{name: flags[name] for name in learned}, **chosen, "layers": names}
    if is_database(out):  # learned once; that all was asked for in the same way is checked by who builds
        return Database.open(out).extractor(network), asked
    fitting = {key: flags[key] for key in ("whiten", "batch_size")}
    fitting |= {"sample": flags["pca_sample"], "progress": progress}
    if features is not None:
        return fit_projection(features, source, flags["pca"], **fitting), asked
    few = spread(source, flags["pca_sample"])
    return web_scale_features(network, names[0], few, n_components=flags["pca"], recipe=recipe, **fitting), asked


def _executor(flags: dict[str, Any]) -> Any:
    """Who makes the blocks: this process, with others that read for it, or a Ray cluster."""
    from robustknn.database import local_executor
    from robustknn.errors import InputError

    cluster = cluster_of(flags["executor"], flags)
    if cluster is None:
        return local_executor(flags["workers"])
    if flags["workers"]:
        raise InputError("--workers are processes of this machine; with --executor ray say --ray-workers.")
    from robustknn.database.ray_executor import ray_executor

    return ray_executor(cluster.address, cluster.workers, cluster.cpus, cluster.gpus)


def _payload(text: str) -> Any:
    """softmax, top:M or none."""
    from robustknn.errors import InputError
    from robustknn.payload import TopSoftmax

    kind, colon, number = text.partition(":")
    if kind == "top" and (not colon or number.isdecimal()):
        return TopSoftmax(int(number or 20))
    if text not in ("softmax", "none"):
        raise InputError(f"--payload is softmax, top:20 or none, not {text!r}.")
    return None if text == "none" else text


def _build_indexes(database: Any, spec: str, metric: str, layers: list[str] | None, progress: Any) -> None:
    """An index over every layer named; of several layers each has the layer in its name."""
    chosen = layers or list(database.layers)
    for layer in chosen:
        engine = spec.partition(":")[0]
        name = engine if len(database.layers) == 1 else f"{engine}-{layer}"
        database.build_index(spec, metric, layer=layer, name=name, progress=progress)


def _print_info(database: Any) -> None:
    from robustknn.database.arrays import size

    said = database.describe()
    done, missing = said["blocks"]["done"], said["blocks"]["missing"]
    layers = ", ".join(f"{name} ({dim})" for name, dim in said["layers"].items())
    print(f"{said['path']}: {said['rows']} rows, {said['classes']} classes, {size(said['bytes'])}")
    print(f"layers: {layers}, {said['dtype']}{' at unit length' if said['unit'] else ''}")
    payload = said["payload"]
    kept = f"the {payload['top']} largest, tail {payload['tail']}" if isinstance(payload, dict) else payload or "none"
    print(f"payload: {kept}; labels: {'those of the network' if said['labels'] == 'payload' else 'of the data'}")
    print(f"blocks: {done} done, {missing} missing, of {said['block_rows']} rows")
    for part in said["parts"]:
        print(f"part: {part['rows']} rows of {part['name']} {part.get('path', '')}".rstrip())
    print(f"model: {said['model']}")
    for index in said["indexes"]:
        stale = " (stale: build it again)" if index["stale"] else ""
        print(f"index: {index['name']} = {index['spec']} by {index['metric']} over {index['layer']}{stale}")
