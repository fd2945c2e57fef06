"""From a configuration to a finished run: data, network, references, classifiers, attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustknn import registry, rng
from robustknn.attacks import Attack
from robustknn.certification import Certifier
from robustknn.checks import check_choice
from robustknn.classifiers import Classifier, DkNN, Joint, Rejecting
from robustknn.cluster import RayCluster
from robustknn.config import from_config
from robustknn.datasets import DataSource, Split, load
from robustknn.errors import InputError, brief, unknown_name
from robustknn.evaluation.certificates import CertificateDirectory, certify
from robustknn.evaluation.experiment_config import ExperimentConfig, configured
from robustknn.evaluation.making import kind_of, make_classifiers, taken_by
from robustknn.evaluation.plan import PUBLISHED, WORST_CASE
from robustknn.evaluation.ray_runner import ray_executor
from robustknn.evaluation.rundir import RunDirectory
from robustknn.evaluation.runner import Options, evaluate
from robustknn.models import load_model
from robustknn.progress import Progress
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
        calibrated = [name for name, c in self.classifiers.items() if any(_is_calibrated(part) for part in _parts(c))]
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
    _attacks(config, lambda _: None)  # a wrong name is said before anything is loaded
    for entry in config.classifiers:
        kind_of(entry)
    ThreatModel(config.threat.norm, config.threat.eps[0])  # a wrong radius is said before anything is loaded
    data = config.data
    source = load(
        data.name, root=data.root, protocol=data.protocol, download=data.download, progress=progress, **data.options
    )
    threat = ThreatModel(config.threat.norm, config.threat.eps[0], source.bounds)
    model = trained_network(config.model.name, config.model.checkpoint, config.model.options, config.device)
    classifiers = make_classifiers(config, model, source, progress)
    attacks, optional = _attacks(config, lambda table: _other(config, table, model, source, progress))
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


def _parts(classifier: Classifier) -> list[Classifier]:
    """A classifier and those it is made over."""
    inner = [classifier.classifier] if isinstance(classifier, Rejecting) else []
    return [classifier, *inner, *(classifier.members.values() if isinstance(classifier, Joint) else [])]


def _is_calibrated(classifier: Classifier) -> bool:
    return isinstance(classifier, DkNN) and classifier.is_calibrated


def _other(
    config: ExperimentConfig, table: Any, model: nn.Module, source: DataSource, progress: Progress | None
) -> Classifier:
    """The classifier that examples are made on, of a table with `model`, `references` and `classifier`.

    Without a model it stands on the network that is evaluated, and without a classifier it is the network itself.
    """
    named = {str(entry.get("name")): entry for entry in config.classifiers}
    classifier = table.get("classifier", "network")
    classifier = named.get(classifier, classifier) if isinstance(classifier, str) else classifier
    changed = {"classifiers": [classifier], "attacks": [], "references": table.get("references", {})}
    if isinstance(table.get("model"), Mapping):
        changed["model"] = {"name": config.model.name, **table["model"]}
    elif "model" in table:
        changed["model"] = table["model"]
    theirs = configured({**config.model_dump(), **changed}, _SOURCE)
    if "references" in table and "references" not in taken_by(theirs.classifiers[0]):
        raise InputError(f"{_SOURCE} has references, and its classifier has none; name one: classifier = 'knn'.")
    if "model" in table:
        model = trained_network(theirs.model.name, theirs.model.checkpoint, theirs.model.options, config.device)
    try:
        (made,) = make_classifiers(theirs, model, source, progress).values()
    except InputError as error:
        raise InputError(f"{_SOURCE}: {error}") from error
    return made


_SOURCE = "the source of 'transferred'"


def _check_source(table: Any) -> None:
    if not isinstance(table, Mapping):
        raise InputError(f"{_SOURCE} is a table, {{ model = … }}, not {brief(table)}.")
    known = ("model", "references", "classifier")
    for key in table:
        if key not in known:
            raise unknown_name(f"setting of {_SOURCE}:", str(key), known)


def _attacks(
    config: ExperimentConfig, other: Callable[[Any], Classifier | None]
) -> tuple[dict[str, Attack], list[str]]:
    """The attacks named, between the two that fill the report's columns; and those that nobody named.

    Args:
        other: the classifier that the table of a source describes; None leaves out the attacks that have one.
    """
    named: dict[str, Attack] = {}
    waiting = False
    for entry in config.attacks:
        options = dict(entry)
        label = options.pop("label", options.get("name", ""))
        for given in (label, options.get("name", "")):
            if not isinstance(given, str):
                raise InputError(f"an attack's name and label are text, not {brief(given)}.")
        if label in named:
            raise InputError(f"two attacks are named {label!r}; give one of them another label.")
        if "source" in options:
            _check_source(options["source"])
            source = other(options["source"])
            if source is None:
                waiting = True
                continue
            options["source"] = source
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
    if not made and not waiting:
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
