"""Flags that several commands share, and how they become configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustknn.errors import InputError

if TYPE_CHECKING:
    from robustknn.cluster import RayCluster

DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="A data set's name, a folder of images, or module:function. [default: digits]"),
]
RootOption = Annotated[
    str | None,
    typer.Option("--data-root", help="Folder with the data files; by default the variable ROBUSTKNN_DATA."),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(help="standard (held-out calibration) or published (as the papers did). [default: standard]"),
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Fetch missing official files into the data folder.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A model's name, or module:function. [default: digits-cnn]"),
]
ModelSettings = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="key=value for the model, e.g. form=unpadded; repeatable."),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(help="Weights: a training run's folder, a .safetensors or a .pt/.pth/.th file."),
]
ConfigOption = Annotated[str | None, typer.Option("--config", help="A TOML file; flags win over it.")]
PrintConfigOption = Annotated[bool, typer.Option("--print-config", help="Print the configuration as TOML and stop.")]
SeedOption = Annotated[int, typer.Option(help="Of all randomness.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto. [default: auto]")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default otherwise.")]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A Python file or module that registers parts of your own; repeatable."),
]
ExecutorOption = Annotated[
    str, typer.Option(help="local, or ray: spread the work over a Ray cluster, with the same result.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(help="auto, or HOST:PORT of the head of a cluster; by default Ray runs on this machine alone."),
]
RayWorkersOption = Annotated[int | None, typer.Option(help="Workers; by default as many as there is room for.")]
RayCpusOption = Annotated[float | None, typer.Option(help="CPUs that a worker takes, 0.5 for half a one. [default: 1]")]
RayGpusOption = Annotated[float | None, typer.Option(help="GPUs that a worker takes. [default: 0]")]


def number(text: str | float) -> float:
    """A number as people write radii: 0.03, 8/255 (and the default, which is a number already)."""
    from robustknn.config import radius

    try:
        return float(radius(text))
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


HardeningOption = Annotated[
    list[float] | None,
    typer.Option("--hardening", parser=number, help="daeknn: strength of its adversarial references; repeatable."),
]
EpsOption = Annotated[float, typer.Option("--eps", "-e", parser=number, help="Radius, in the unit of the inputs.")]


Names = list[str] | None
ReferencesOption = Annotated[
    str | None, typer.Option("--references", help="Keep the reference set in this folder, or read it from there.")
]
PerClassOption = Annotated[
    int | None,
    typer.Option("--references-per-class", help="First training samples of each class; all by default."),
]
ClassifiersOption = Annotated[Names, typer.Option("--classifier", "-c", help="knn, dknn, …; repeatable.")]
ClassifierSettings = Annotated[
    Names,
    typer.Option(
        "--classifier-option",
        help="key=value for every classifier named, NAME.key=value for one: daeknn.weighting=released; repeatable.",
    ),
]
LayersOption = Annotated[Names, typer.Option("--layer", "-l", help="Layer that votes; repeatable (dknn).")]
NeighborsOption = Annotated[int | None, typer.Option("--k", "-k", help="Number of neighbors.")]
MetricOption = Annotated[str | None, typer.Option("--metric", help="l2, cosine or ip.")]
IndexOption = Annotated[str | None, typer.Option("--index", help="Search engine: exact, faiss, ….")]
AttackSettings = Annotated[Names, typer.Option("--attack-option", help="key=value, e.g. steps=100.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", help="Samples at once: memory and time, not results.")]


def use_threads(threads: int | None) -> None:
    """Set torch's number of CPU threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def cluster_of(executor: str, flags: Mapping[str, Any]) -> RayCluster | None:
    """The Ray cluster that a command's flags name; None to work in this process."""
    from robustknn.checks import check_choice

    given = _given({name: flags.get(f"ray_{name}") for name in ("address", "workers", "cpus", "gpus")})
    if check_choice(executor, ("local", "ray"), "--executor") == "local":
        if given:
            raise InputError(f"--ray-{next(iter(given))} is for work over Ray; ask for it: --executor ray.")
        return None
    from robustknn.cluster import RayCluster

    return RayCluster(**given)


_PLACES = {
    "out": "out",
    "seed": "seed",
    "device": "device",
    "batch_size": "batch_size",
    "examples": "examples",
    "controls": "controls",
    "fresh_draws": "fresh_draws",
    "plugin": "plugins",
    "data": "data.name",
    "data_root": "data.root",
    "protocol": "data.protocol",
    "download": "data.download",
    "n": "data.n",
    "model": "model.name",
    "checkpoint": "model.checkpoint",
    "model_option": "model.options",
    "references": "references.path",
    "references_per_class": "references.per_class",
    "norm": "threat.norm",
    "eps": "threat.eps",
}
"""Where a flag's value stands in an experiment's configuration."""


def experiment_changes(flags: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a command's flags change in an experiment's configuration, by dotted name.

    Args:
        flags: values by the name of the command's parameter; None (and no download) changes nothing.
        more: values for parts of the configuration that no single flag sets.
    """
    values = {place: flags.get(name) for name, place in _PLACES.items()}
    values["model.options"] = settings(flags.get("model_option"))
    values["data.download"] = flags.get("download") or None
    return _given({**values, **more})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def settings(pairs: Sequence[str] | None) -> dict[str, Any] | None:
    """key=value flags as a table: numbers, true/false, lists and text are read as JSON where they are JSON."""
    if not pairs:
        return None
    table: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"option {pair!r} is not of the form key=value.")
        owner, dot, option = key.strip().rpartition(".")  # a name before a dot is taken as it is
        name = owner + dot + option.replace("-", "_")
        if name in table:
            raise InputError(f'option {name} is given twice; of several values write a list, \'{name}=["a", "b"]\'.')
        table[name] = _value(text)
    return table


def _value(text: str) -> Any:
    """What a flag's text stands for: JSON, a number as `float` reads it (.1), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if re.fullmatch(r"\d+(\.\d+)?/\d+", text):  # a radius as people write it
            return number(text)
        return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text) else text


def classifier_entries(
    names: Sequence[str] | None,
    layers: Sequence[str] | None,
    k: int | None,
    metric: str | None,
    index: str | None,
    hardening: Sequence[float] | None,
    pairs: Sequence[str] | None,
    config: str | None = None,
) -> list[dict[str, Any]] | None:
    """Classifier tables from flags; None when no flag speaks of classifiers.

    Args:
        config: a configuration file, which may have classifiers of its own.
    """
    spoken = {"-k": k, "--layer": layers, "--metric": metric, "--index": index, "--hardening": hardening}
    flags = [flag for flag, value in spoken.items() if value] + (["--classifier-option"] if pairs else [])
    if config is not None and flags and not names:
        raise InputError(
            f"{flags[0]} is of classifiers that flags name; change the tables of {config}, or name some (-c knn) that "
            "stand in their place."
        )
    hardened = [name for name in names or [] if name.startswith("daeknn")]
    if hardening and not hardened:
        raise InputError("--hardening is of daeknn, whose adversarial references it makes; name it: -c daeknn.")
    shared = _given({"layers": list(layers) if layers else None, "n_neighbors": k, "metric": metric, "index": index})
    options = settings(pairs) or {}
    if options and not names:
        raise InputError("--classifier-option needs --classifier; name the classifiers it is for.")
    if not names and not shared:
        return None
    if shared and names and all(name in _WITHOUT_NEIGHBORS for name in names):
        raise InputError(f"{names[0]} has no neighbors, so {flags[0]} cannot be of it; leave that out.")
    own: dict[str, dict[str, Any]] = {name: {} for name in names or ["knn"]}
    if hardening:
        for name in hardened:
            own[name]["hardening"] = list(hardening)
    for key, value in options.items():
        one, dot, option = key.rpartition(".")
        if dot and one not in own:
            raise InputError(f"--classifier-option {key} is of {one!r}, which is not named; name it: -c {one}.")
        for name in [one] if dot else own:
            if option in own[name]:
                raise InputError(f"--classifier-option {key} says again what another flag says; leave one of them out.")
            own[name][option] = value
    return [{"name": name, **_shared_by(name, shared), **own[name]} for name in names or ["knn"]]


_WITHOUT_NEIGHBORS = ("network", "transformed", "joint")


def _shared_by(kind: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags for all classifiers say of one: nothing of one without neighbors of its own."""
    if kind == "rejecting":
        return {"classifier": {"name": "dknn", **shared}}
    return {} if kind in _WITHOUT_NEIGHBORS else dict(shared)


def attack_entries(names: Sequence[str] | None, pairs: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """Attack tables from flags; the options go to every attack named."""
    options = settings(pairs) or {}
    if not names:
        if options:
            raise InputError("--attack-option needs --attack; name the attacks it is for.")
        return None
    return [{"name": name, **options} for name in names]
