"""`robustknn certify`: what no attacker can do, beside what attackers were seen to do."""

from __future__ import annotations

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
    HardeningOption,
    IndexOption,
    LayersOption,
    MetricOption,
    ModelOption,
    ModelSettings,
    NeighborsOption,
    PerClassOption,
    PluginOption,
    ProtocolOption,
    ReferencesOption,
    RootOption,
    ThreadsOption,
    attack_entries,
    classifier_entries,
    experiment_changes,
    number,
    settings,
    use_threads,
)

Text = str | None
Whole = int | None


@app.command()
def certify(
    out: Annotated[Path, typer.Option(help="Folder of the certificates, new or to be continued.")],
    certifier: Annotated[
        list[str] | None,
        typer.Option("--certifier", help="Name of a certifier (robustknn list certifiers); repeatable."),
    ] = None,
    certifier_option: Annotated[
        list[str] | None, typer.Option("--certifier-option", help="key=value for every certifier named; repeatable.")
    ] = None,
    radius: Annotated[
        list[float] | None,
        typer.Option("--radius", "-r", parser=number, help="State certified accuracy here; repeatable."),
    ] = None,
    attacked: Annotated[
        Path | None, typer.Option(help="A finished evaluation of the same samples and classifiers, to draw beside.")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", "-a", help="Attack too, into OUT/attacked; repeatable.")
    ] = None,
    attack_option: AttackSettings = None,
    norm: Annotated[Text, typer.Option(help="Of the attacks: linf, l2 or l1.")] = None,
    eps: Annotated[list[float] | None, typer.Option("--eps", "-e", parser=number, help="Radii of the attacks.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    data_root: RootOption = None,
    protocol: ProtocolOption = None,
    download: DownloadOption = False,
    n: Annotated[
        Whole, typer.Option("-n", "--n", help="Certify this many test samples (a counted random choice).")
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
    batch_size: BatchOption = None,
    seed: Annotated[Whole, typer.Option(help="Of all randomness.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Guarantee decisions: how far an attacker may go without changing them. Stopped runs go on."""
    flags = dict(locals())
    from robustknn import registry
    from robustknn.cli.printing import print_certificates
    from robustknn.errors import InputError
    from robustknn.evaluation import attach, finish
    from robustknn.evaluation.experiment import prepare
    from robustknn.evaluation.experiment_config import read_config
    from robustknn.progress import Console

    if attack and attacked is not None:
        raise InputError("--attack makes an evaluation and --attacked names one; give one of the two.")
    use_threads(threads)
    for place in plugin or []:
        registry.load_plugin(place)
    if not certifier:
        known = ", ".join(entry.name for entry in registry.certifiers)
        raise InputError(f"name what to certify by: --certifier {known.replace(', ', ' | ')}.")
    options: dict[str, Any] = settings(certifier_option) or {}
    certifiers = {name: registry.certifiers.create(name, **options) for name in certifier}
    wanted = experiment_changes(
        {**flags, "out": None},
        classifiers=classifier_entries(classifier, layer, k, metric, index, hardening, classifier_option, config),
        attacks=attack_entries(attack, attack_option),
        published=False if attack else None,
        worst_case="off" if attack else None,
    )
    progress = Console()
    experiment = prepare(read_config(config, wanted), progress)
    run = experiment.certify(certifiers, out, progress=progress)
    if attack:
        attacked = out / "attacked"
        finish(experiment.run(attacked, progress=progress))
    if attacked is not None:
        attach(run, attacked)
    print_certificates(run, radius)
