"""The commands: each reads its flags, calls the library and prints what came out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from robustknn.cli.app import app
from robustknn.cli.options import (
    AttackSettings,
    BatchOption,
    CheckpointOption,
    ClassifierSettings,
    ClassifiersOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    EpsOption,
    ExecutorOption,
    HardeningOption,
    IndexOption,
    LayersOption,
    MetricOption,
    ModelOption,
    ModelSettings,
    NeighborsOption,
    PerClassOption,
    PluginOption,
    PrintConfigOption,
    ProtocolOption,
    RayAddressOption,
    RayCpusOption,
    RayGpusOption,
    RayWorkersOption,
    ReferencesOption,
    RootOption,
    SeedOption,
    ThreadsOption,
    attack_entries,
    classifier_entries,
    cluster_of,
    experiment_changes,
    number,
    settings,
    use_threads,
)

FLOOR_NOT_MET = 1
_FILTER_OPTIONS = ("layer", "leave_out_itself", "metric")

Text = str | None
Whole = int | None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a second one is taken when it holds another.")] = Path(
        "runs/demo"
    ),
    seed: SeedOption = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few images and radii: a check that everything works.")
    ] = False,
) -> None:
    """Train a small network on handwritten digits and see its nearest neighbors fooled (about a minute)."""
    from robustknn.cli.demo import run_demo
    from robustknn.cli.printing import print_run

    print_run(run_demo(out, seed, quick))


@app.command()
def evaluate(
    out: Annotated[Path | None, typer.Option(help="Folder of the run, new or to be continued.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    data_root: RootOption = None,
    protocol: ProtocolOption = None,
    download: DownloadOption = False,
    n: Annotated[
        Whole, typer.Option("-n", "--n", help="Score this many test samples (a counted random choice).")
    ] = None,
    model: ModelOption = None,
    model_option: ModelSettings = None,
    checkpoint: CheckpointOption = None,
    references: ReferencesOption = None,
    references_per_class: PerClassOption = None,
    classifier: ClassifiersOption = None,
    layer: LayersOption = None,
    k: NeighborsOption = None,
    metric: MetricOption = None,
    index: IndexOption = None,
    hardening: HardeningOption = None,
    classifier_option: ClassifierSettings = None,
    attack: Annotated[list[str] | None, typer.Option("--attack", "-a", help="Name of an attack; repeatable.")] = None,
    attack_option: AttackSettings = None,
    worst_case: Annotated[
        Text, typer.Option(help="The column of the worst case: fast, standard, thorough or off. [default: fast]")
    ] = None,
    published: Annotated[
        bool | None,
        typer.Option("--published/--no-published", help="The column of its own paper's protocol."),
    ] = None,
    norm: Annotated[Text, typer.Option(help="linf, l2 or l1.")] = None,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            "--eps", "-e", parser=number, help="Radius, e.g. 8/255; the first is the tables', more make the curve."
        ),
    ] = None,
    batch_size: BatchOption = None,
    examples: Annotated[Whole, typer.Option(help="How many samples the page shows.")] = None,
    controls: Annotated[
        Whole, typer.Option(help="Samples for the checks for gradient masking; 0 leaves them out.")
    ] = None,
    fresh_draws: Annotated[
        Whole,
        typer.Option(help="Draws that no attack has seen, in which a randomized classifier decides again; 0 for none."),
    ] = None,
    seed: Annotated[Whole, typer.Option(help="Of all randomness.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    ray_workers: RayWorkersOption = None,
    ray_cpus: RayCpusOption = None,
    ray_gpus: RayGpusOption = None,
    print_config: PrintConfigOption = False,
) -> None:
    """Measure how robust classifiers are: flags, or a TOML file (flags win). Stopped runs go on."""
    flags = dict(locals())
    from robustknn.cli.printing import print_run
    from robustknn.errors import InputError
    from robustknn.evaluation.experiment import prepare
    from robustknn.evaluation.experiment_config import read_config, to_toml
    from robustknn.progress import Console

    use_threads(threads)
    wanted = experiment_changes(
        {**flags, "out": None if out is None else str(out)},
        classifiers=classifier_entries(classifier, layer, k, metric, index, hardening, classifier_option, config),
        attacks=attack_entries(attack, attack_option),
        worst_case=worst_case,
        published=published,
    )
    effective = read_config(config, wanted)
    if print_config:
        print(to_toml(effective), end="")
        return
    if effective.out is None:
        raise InputError("name the folder of the run: --out runs/NAME (or out = in the configuration file).")
    cluster = cluster_of(executor, flags)
    progress = Console()
    print_run(prepare(effective, progress).run(effective.out, progress=progress, executor=cluster or executor))


@app.command()
def attack(
    out: Annotated[Path, typer.Option(help="Folder for the examples, new or to be continued.")],
    data: DataOption = None,
    data_root: RootOption = None,
    protocol: ProtocolOption = None,
    download: DownloadOption = False,
    n: Annotated[Whole, typer.Option("-n", "--n", help="Attack this many test samples.")] = 100,
    model: ModelOption = None,
    model_option: ModelSettings = None,
    checkpoint: CheckpointOption = None,
    references: ReferencesOption = None,
    references_per_class: PerClassOption = None,
    classifier: Annotated[str, typer.Option("--classifier", "-c", help="knn, dknn, …")] = "knn",
    layer: LayersOption = None,
    k: NeighborsOption = None,
    metric: MetricOption = None,
    index: IndexOption = None,
    hardening: HardeningOption = None,
    classifier_option: ClassifierSettings = None,
    name: Annotated[str, typer.Option("--attack", "-a", help="Name of the attack.")] = "ask",
    attack_option: AttackSettings = None,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    eps: EpsOption = 8 / 255,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Write adversarial examples: exact tensors (safetensors), 8-bit images, and a row each (CSV)."""
    flags = dict(locals())
    from robustknn.cli.export import export_examples
    from robustknn.evaluation.experiment import prepare
    from robustknn.evaluation.experiment_config import read_config
    from robustknn.progress import Console

    use_threads(threads)
    wanted = experiment_changes(
        {**flags, "out": None, "eps": [eps]},
        examples=2**31,
        controls=0,
        classifiers=classifier_entries([classifier], layer, k, metric, index, hardening, classifier_option),
        attacks=attack_entries([name], attack_option),
        published=False,
        worst_case="off",
    )
    progress = Console()
    experiment = prepare(read_config(None, wanted), progress)
    export_examples(experiment.run(out / "run", progress=progress), out)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the training run, new or to be continued.")],
    data: DataOption = None,
    data_root: RootOption = None,
    protocol: ProtocolOption = None,
    download: DownloadOption = False,
    model: ModelOption = None,
    model_option: ModelSettings = None,
    checkpoint: CheckpointOption = None,
    method: Annotated[
        str, typer.Option(help="standard, gaussian, lipschitz-margin, adversarial, fast, trades or ask-def.")
    ] = "standard",
    method_option: Annotated[
        list[str] | None,
        typer.Option("--method-option", help="key=value for the method, e.g. eps=8/255, layers=relu3; repeatable."),
    ] = None,
    first: Annotated[
        int | None, typer.Option(min=1, help="Train on so many training samples, the first ones; all by default.")
    ] = None,
    filter_labels: Annotated[
        Text,
        typer.Option(help="A preliminary training run: samples whose label its neighbors contradict are left out."),
    ] = None,
    filter_k: Annotated[Whole, typer.Option(help="Neighbors that judge a label. [default: 20]")] = None,
    filter_option: Annotated[
        list[str] | None,
        typer.Option(help="key=value for the filter: metric, layer (the logits by default), leave_out_itself."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training samples.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 128,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.")] = "adam",
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    nesterov: Annotated[bool, typer.Option("--nesterov", help="Nesterov momentum, of sgd.")] = False,
    schedule: Annotated[str, typer.Option(help="constant, step, cosine or one-cycle.")] = "constant",
    milestone: Annotated[list[int] | None, typer.Option(help="Of the step schedule; repeatable.")] = None,
    gamma: Annotated[float, typer.Option(help="Of the step schedule: the factor at a milestone.")] = 0.1,
    warmup: Annotated[float, typer.Option(help="Of one-cycle: the share of the steps in which the rate rises.")] = 0.3,
    augment: Annotated[bool, typer.Option("--augment", help="Random crops and horizontal flips.")] = False,
    select: Annotated[str, typer.Option(help="last, or best or robust by validation accuracy.")] = "last",
    robust_eps: Annotated[
        float | None,
        typer.Option(parser=number, help="Validate under PGD at this radius; by default at that of the method."),
    ] = None,
    robust_norm: Annotated[Text, typer.Option(help="Of that validation: linf, l2 or l1. [default: linf]")] = None,
    precision: Annotated[str, typer.Option(help="float32 or bf16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Store images channels last.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard logs into the run.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Train a network; a stopped training goes on after its last finished epoch, with the same result."""
    from robustknn import registry
    from robustknn.cli.printing import print_epoch, print_training
    from robustknn.datasets import load
    from robustknn.errors import InputError, unknown_name
    from robustknn.evaluation.experiment import pick_device
    from robustknn.features import FeatureExtractor, model_fingerprint
    from robustknn.models import load_model
    from robustknn.progress import Console
    from robustknn.training import RobustCheck, TrainConfig, accuracy, initialise
    from robustknn.training import filter_labels as judge
    from robustknn.training import train as fit

    use_threads(threads)
    for flag, given in (("--filter-k", filter_k), ("--filter-option", filter_option)):
        if given is not None and filter_labels is None:
            raise InputError(f"{flag} is of --filter-labels; name the preliminary training run with that.")
    if robust_norm is not None and robust_eps is None:
        raise InputError("--robust-norm is of --robust-eps; name the radius of the validation with that.")
    for place in plugin or []:
        registry.load_plugin(place)
    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        schedule=schedule,
        milestones=tuple(milestone or ()),
        gamma=gamma,
        warmup=warmup,
        augment=augment,
        select=select,
        seed=seed,
        precision=precision,
        channels_last=channels_last,
        robust=None if robust_eps is None else RobustCheck(robust_norm or "linf", robust_eps),
    )
    trained_by = registry.methods.create(method, **(settings(method_option) or {}))
    where, progress = pick_device(device or "auto"), Console()
    source = load(
        data or "digits", root=data_root, protocol=protocol or "standard", download=download, progress=progress
    )
    if first is not None:
        source = replace(source, train=source.train.first(first))
    options: dict[str, Any] = settings(model_option) or {}
    if filter_labels is not None:
        preliminary = load_model(model or "digits-cnn", filter_labels, **options).to(where)
        asked = settings(filter_option) or {}
        for name in asked:
            if name not in _FILTER_OPTIONS:
                raise unknown_name("option of the label filter:", name, _FILTER_OPTIONS)
        layer = asked.pop("layer", None)
        space = preliminary if layer is None else FeatureExtractor(preliminary, [layer])
        found = judge(space, source.train, 20 if filter_k is None else filter_k, **asked)
        print(f"labels kept: {int(found.kept.sum())} of {len(found.kept)}")
        source = replace(source, train=found.split)
    network = initialise(lambda: load_model(model or "digits-cnn", checkpoint, **options), seed)
    result = fit(
        network,
        source,
        config,
        out,
        method=trained_by,
        device=where,
        progress=progress,
        on_epoch=lambda record: print_epoch(record, epochs),
        tensorboard=tensorboard,
        started_from=None if checkpoint is None else model_fingerprint(network),
    )
    print_training(result, accuracy(network, source.test), len(source.test))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    floor: Annotated[
        list[str] | None,
        typer.Option(
            "--floor",
            help="Exit with 1 unless 'worst-case>=0.2', 'clean>=0.9', 'ATTACK>=…' or 'CLASSIFIER:…' holds; repeatable.",
        ),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write floors and checks as JUnit XML, for a CI.")] = None,
) -> None:
    """Write the page, the figures and the summary of a run again, from its folder alone."""
    from robustknn.cli.printing import print_certificates, print_floors, print_run
    from robustknn.errors import InputError
    from robustknn.evaluation import CertificateDirectory, RunDirectory, holds_certificates
    from robustknn.reports.floors import MET, Floor, check_floors

    floors = [Floor.of(text) for text in floor or []]
    if holds_certificates(run):
        if floors or junit:
            raise InputError(f"{str(run)!r} holds certificates; --floor and --junit are for the run of an evaluation.")
        print_certificates(CertificateDirectory(run))
        return
    directory = RunDirectory(run)
    check_floors(directory.header["plan"], floors)
    judged = print_floors(print_run(directory), floors, junit)
    if any(j.outcome != MET for j in judged):
        raise typer.Exit(FLOOR_NOT_MET)


@app.command("list")
def list_parts(
    kind: Annotated[
        Text, typer.Argument(help="attacks, certifiers, objectives, classifiers, …; all when left out.")
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """What is registered, by kind: the names that flags and configuration files take."""
    from robustknn import registry
    from robustknn.cli.printing import print_registry
    from robustknn.errors import unknown_name

    for place in plugin or []:
        registry.load_plugin(place)
    if kind is not None and kind not in registry.ALL:
        raise unknown_name("kind", kind, registry.ALL)
    print_registry({kind: registry.ALL[kind]} if kind else registry.ALL)
