"""From a configuration to a finished run: data, network, references, classifiers, attacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustknn import registry, rng, store
from robustknn.attacks import Attack
from robustknn.attacks.hardening import Hardening, adversarial_references
from robustknn.certification import Certifier
from robustknn.checks import check_choice
from robustknn.classifiers import Classifier, DkNN
from robustknn.cluster import RayCluster
from robustknn.config import from_config, to_config
from robustknn.database import Database, is_database
from robustknn.datasets import DataSource, Split, load
from robustknn.errors import InputError, brief
from robustknn.evaluation.certificates import CertificateDirectory, certify
from robustknn.evaluation.experiment_config import ExperimentConfig
from robustknn.evaluation.plan import PUBLISHED, WORST_CASE
from robustknn.evaluation.ray_runner import ray_executor
from robustknn.evaluation.rundir import RunDirectory, check_name
from robustknn.evaluation.runner import Options, evaluate
from robustknn.features import FeatureExtractor
from robustknn.models import load_model
from robustknn.progress import Progress
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel


@dataclass
class Experiment:
    """The parts that a configuration names, made and checked."""

    config: ExperimentConfig
    source: DataSource
    samples: Split
    classifiers: dict[str, Classifier]
    attacks: dict[str, Attack]
    threat: ThreatModel
    eps: list[float]
    optional: list[str]

    def run(
        self,
        out: str | Path,
        command: str | None = None,
        progress: Progress | None = None,
        executor: str | RayCluster = "local",
    ) -> RunDirectory:
        """Evaluate, or go on with an evaluation that was stopped.

        Args:
            executor: "local" works on one batch after another; "ray", or a RayCluster that says more, spreads them over
                a cluster, whose workers make this experiment from its configuration. The rows are the same.
        """
        if isinstance(executor, str):
            executor = RayCluster() if check_choice(executor, ("local", "ray"), "executor") == "ray" else executor
        spread = None if isinstance(executor, str) else ray_executor(self.config, executor)
        return evaluate(**self.given(), out=out, command=command, progress=progress, executor=spread)

    def given(self) -> dict[str, Any]:
        """The parts and settings, as `evaluate` takes them."""
        config = self.config
        return {
            "classifiers": self.classifiers,
            "data": self.samples,
            "attacks": self.attacks,
            "threat": self.threat,
            "eps": self.eps,
            "optional": self.optional,
            "options": Options(
                config.seed, config.batch_size, config.examples, config.controls, fresh_draws=config.fresh_draws
            ),
            "exclude": self.exclude(),
            "class_names": self.source.class_names,
            "describe": self.describe(),
        }

    def certify(
        self,
        certifiers: Mapping[str, Certifier],
        out: str | Path,
        command: str | None = None,
        progress: Progress | None = None,
    ) -> CertificateDirectory:
        """Certify the classifiers' decisions, or go on with what was stopped."""
        return certify(
            self.classifiers,
            self.samples,
            certifiers=certifiers,
            out=out,
            bounds=self.source.bounds,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            exclude=self.exclude(),
            class_names=self.source.class_names,
            describe=self.describe(),
            command=command,
            progress=progress,
        )

    def exclude(self) -> dict[str, Tensor]:
        """By classifier, the positions of the samples that it was calibrated with."""
        calibrated = [name for name, c in self.classifiers.items() if isinstance(c, DkNN) and c.is_calibrated]
        return {name: calibration_overlap(self.source, self.samples) for name in calibrated}

    def describe(self) -> dict[str, Any]:
        """What a report says of data and model."""
        data, model = self.config.data, self.config.model
        return {"data": data.name, "protocol": data.protocol, "model": model.name, "checkpoint": model.checkpoint}


def prepare(config: ExperimentConfig, progress: Progress | None = None) -> Experiment:
    """Make what a configuration names.

    Raises:
        InputError: an unknown name, a wrong value, data or a checkpoint that is missing, before anything long runs.
        IntegrityError: a checkpoint or a saved reference set is not whole, or of another model.
    """
    for plugin in config.plugins:
        registry.load_plugin(plugin)
    attacks, optional = _attacks(config)
    for entry in config.classifiers:
        kind = entry.get("type", entry.get("name"))
        if not isinstance(kind, str):
            raise InputError(f"a classifier needs a name, e.g. name = 'knn'; got {brief(entry)}.")
        registry.classifiers.entry(kind)
    ThreatModel(config.threat.norm, config.threat.eps[0])  # a wrong radius is said before anything is loaded
    data = config.data
    source = load(
        data.name, root=data.root, protocol=data.protocol, download=data.download, progress=progress, **data.options
    )
    threat = ThreatModel(config.threat.norm, config.threat.eps[0], source.bounds)
    model = trained_network(config.model.name, config.model.checkpoint, config.model.options, config.device)
    classifiers = make_classifiers(config, model, source, progress)
    samples = choose(source.test, data.n, data.subset, config.seed)
    return Experiment(config, source, samples, classifiers, attacks, threat, config.threat.eps, optional)


def trained_network(name: str, checkpoint: str | None, options: Mapping[str, Any], device: str) -> nn.Module:
    """The network of a name with its weights, on its device.

    Raises:
        InputError: an unknown name or device, a wrong option, no weights.
        IntegrityError: a checkpoint that is not whole, or of another network.
    """
    if checkpoint is None and name in registry.models:
        raise InputError(
            f"model {name!r} has no weights yet; name a checkpoint, such as the folder that `robustknn train` wrote."
        )
    return load_model(name, checkpoint, **options).to(pick_device(device))


def make_classifiers(
    config: ExperimentConfig, model: nn.Module, source: DataSource, progress: Progress | None = None
) -> dict[str, Classifier]:
    """The configured classifiers over one shared reference set, calibrated where they can be."""
    entries = [_classifier_entry(entry, model) for entry in config.classifiers]
    layers = list(dict.fromkeys(layer for entry in entries for layer in entry.layers))
    kept = [getattr(registry.classifiers.entry(entry.kind).build, "needs_payload", None) for entry in entries]
    references = _references(config, model, layers, next(filter(None, kept), None), source, progress)
    place = config.references.path
    database = Database.open(place) if place is not None and is_database(place) else None
    made: dict[str, Classifier] = {}
    for entry in entries:
        if check_name(entry.name, "classifier") in made:
            raise InputError(f"two classifiers are named {entry.name!r}; give one another name and keep its type.")
        taps = {"layers": list(entry.layers)} if entry.several else {"layer": entry.layers[0]}
        further = {}
        if "hardening" in entry.options:
            given = entry.options.pop("hardening")
            further["adversarial"] = [
                _hardened(config, references, each, source, progress)
                for each in (given if isinstance(given, list) else [given])
            ]
        if database is not None and isinstance(entry.options.get("index"), str):
            entry.options["index"] = database.index_spec(entry.options["index"])
        classifier = registry.classifiers.create(entry.kind, references=references, **taps, **entry.options, **further)
        if isinstance(classifier, DkNN) and source.calibration is not None:
            classifier.calibrate(source.calibration)
        made[entry.name] = classifier
    return made


@dataclass(frozen=True)
class _Entry:
    """A configured classifier: `several` says whether its factory takes `layers` or one `layer`."""

    name: str
    kind: str
    layers: tuple[str, ...]
    several: bool
    options: dict[str, Any]


def _classifier_entry(entry: Mapping[str, Any], model: nn.Module) -> _Entry:
    """Name, type, layers and options; layers default to those the model recommends."""
    options = dict(entry)
    name = str(options.pop("name", options.get("type", "")))
    kind = str(options.pop("type", name))
    several = "layers" in inspect.signature(registry.classifiers.entry(kind).build).parameters
    chosen = [options.pop(key, None) for key in ("layers", "layer")]
    named = next((c for c in chosen if c), None)
    if named is None:
        named = getattr(model, "feature_layers" if several else "embedding_layer", None)
    if named is None:
        known = [n for n, _ in model.named_modules() if n]
        shown = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
        raise InputError(f"{type(model).__name__} recommends no layer for {kind!r}; name some of: {shown}.")
    if not isinstance(named, (str, list, tuple)):
        raise InputError(f"a layer of {kind!r} is named by text, not by {brief(named)}.")
    layers = (named,) if isinstance(named, str) else tuple(str(layer) for layer in named)
    if not several and len(layers) > 1:
        raise InputError(f"{kind!r} votes in one layer, not in {len(layers)} ({', '.join(layers)}); choose one.")
    return _Entry(name, kind, layers, several, options)


def _references(
    config: ExperimentConfig,
    model: nn.Module,
    layers: list[str],
    payload: str | None,
    source: DataSource,
    progress: Progress | None,
) -> ReferenceSet:
    wanted = config.references
    if wanted.path is not None and is_database(wanted.path):
        return _of_database(config, model, layers, source)
    extractor = FeatureExtractor(model, layers, pool=wanted.pool, normalize=wanted.normalize)
    split = _reference_split(config, source)
    held = _kept(
        wanted.path,
        extractor,
        lambda: ReferenceSet.build(
            extractor, split, n_classes=source.n_classes, payload=payload, keep_images=True, progress=progress
        ),
    )
    if len(held) != len(split):
        raise InputError(
            f"the reference set in {wanted.path!r} holds {len(held)} references where this evaluation takes "
            f"{len(split)}; choose another path to build it anew."
        )
    if held.labelled and not torch.equal(held.labels.cpu(), split.labels.cpu()):
        raise InputError(
            f"the reference set in {wanted.path!r} was made of other samples than this evaluation takes (another "
            "protocol or data set); choose another path to build it anew."
        )
    return held


def _of_database(config: ExperimentConfig, model: nn.Module, layers: list[str], source: DataSource) -> ReferenceSet:
    """The references of a database: whatever samples it was made of, with its own pooling and transforms."""
    wanted, database = config.references, Database.open(config.references.path or "")
    if wanted.per_class is not None:
        raise InputError("references per class are chosen when they are built; a database is taken as it is.")
    held = database.references(model)
    for layer in layers:
        held.layer(layer)
    if held.n_classes != source.n_classes:
        raise InputError(
            f"the database in {wanted.path!r} knows {held.n_classes} classes where data set {config.data.name!r} has "
            f"{source.n_classes}; evaluate it on data of its classes."
        )
    return held.to(held.extractor().device)


def _hardened(
    config: ExperimentConfig, references: ReferenceSet, given: Any, source: DataSource, progress: Progress | None
) -> ReferenceSet:
    """One set of adversarial references, kept beside the references where these are kept.

    Args:
        given: a radius, or a table with one, a norm and an attack.
    """
    table = dict(given) if isinstance(given, Mapping) else {"eps": given}
    attack = table.pop("attack", None)
    threat = ThreatModel.from_config({"norm": config.threat.norm, "bounds": source.bounds, **table})
    parts = {} if attack is None else {"attack": from_config(attack, registry.attacks)}
    hardening, extractor = Hardening(threat, **parts), references.extractor()
    place = None
    if config.references.path is not None:
        described = {
            "threat": threat.to_config(),
            "attack": to_config(hardening.attack, registry.attacks),
            "seed": config.seed,
            "references": references.fingerprint(),
        }
        place = f"{config.references.path}-hardened-{store.fingerprint_config(described)[:8]}"
    return _kept(
        place,
        extractor,
        lambda: adversarial_references(
            extractor,
            _reference_split(config, source),
            hardening,
            n_classes=source.n_classes,
            keep_images=True,
            seed=config.seed,
            progress=progress,
        ),
    )


def _kept(path: str | None, extractor: FeatureExtractor, make: Callable[[], ReferenceSet]) -> ReferenceSet:
    """The references in a folder, or new ones, which are written there; without a folder they are not kept."""
    if path is not None and Path(path).exists():
        return ReferenceSet.load(path, extractor).to(extractor.device)
    made = make()
    if path is not None:
        made.save(path)
    return made


def _reference_split(config: ExperimentConfig, source: DataSource) -> Split:
    per_class = config.references.per_class
    return source.train if per_class is None else source.train.per_class(per_class)


def _attacks(config: ExperimentConfig) -> tuple[dict[str, Attack], list[str]]:
    """The attacks named, between the two that fill the report's columns; and those that nobody named."""
    named: dict[str, Attack] = {}
    for entry in config.attacks:
        options = dict(entry)
        label = options.pop("label", options.get("name", ""))
        for given in (label, options.get("name", "")):
            if not isinstance(given, str):
                raise InputError(f"an attack's name and label are text, not {brief(given)}.")
        if label in named:
            raise InputError(f"two attacks are named {label!r}; give one of them another label.")
        named[label] = from_config(options, registry.attacks)
    for column in (PUBLISHED, WORST_CASE):
        if column in named and named[column].role != column:
            raise InputError(f"the attack labelled {column!r} has the name of a column of the report; rename it.")
    roles = {attack.role for attack in named.values()}
    made: dict[str, Attack] = {}
    if config.published and PUBLISHED not in roles:
        made[PUBLISHED] = registry.attacks.create(PUBLISHED)
    made |= named
    if config.worst_case != "off" and WORST_CASE not in roles:
        made[WORST_CASE] = registry.attacks.create(WORST_CASE, strength=config.worst_case)
    if not made:
        raise InputError("there is nothing to run; name an attack, or leave the published one or the worst case on.")
    return made, [PUBLISHED] if PUBLISHED in made and PUBLISHED not in roles else []


def choose(split: Split, n: int | None, subset: str, seed: int) -> Split:
    """n samples of a split, in its order: a counted random choice, or the first."""
    if n is None or n >= len(split):
        return split
    if subset == "first":
        return split.first(n)
    return split.subset(rng.permutation(len(split), seed, "samples")[:n].sort().values)


def calibration_overlap(source: DataSource, samples: Split) -> Tensor:
    """Positions of the samples that the calibration set holds too, (n,) int64."""
    calibration = source.calibration
    if calibration is None or calibration.part != samples.part:
        return torch.zeros(0, dtype=torch.int64)
    return torch.isin(samples.ids, calibration.ids).nonzero()[:, 0]


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU where there is one. InputError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not available here; choose cpu, or auto.") from error
    return device
