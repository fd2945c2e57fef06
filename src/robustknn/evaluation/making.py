"""The classifiers that a configuration names: over one shared reference set, over no references, over each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustknn import registry, store
from robustknn.attacks.hardening import Hardening, adversarial_references
from robustknn.classifiers import Classifier, DkNN
from robustknn.config import from_config, radius, to_config
from robustknn.database import Database, is_database
from robustknn.datasets import DataSource, Split
from robustknn.errors import InputError, brief, unknown_name
from robustknn.evaluation.experiment_config import ExperimentConfig
from robustknn.evaluation.rundir import check_name
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel


def make_classifiers(
    config: ExperimentConfig, model: nn.Module, source: DataSource, progress: Progress | None = None
) -> dict[str, Classifier]:
    """The configured classifiers over one shared reference set, calibrated where they can be.

    Each is given what its factory asks for by name: `references`, `layers` or one `layer`, `adversarial` references
    (made as its table's `hardening` says), the network itself as `model`, `n_classes`, another `classifier` (a table of
    its own, or a name), or other `members` of the configuration by their names.

    Raises:
        InputError: an unknown name, a wrong option, references that cannot be used.
        IntegrityError: saved references are not whole, or of another model.
    """
    entries: list[_Entry] = []
    for given in config.classifiers:
        entries.append(_entry(given, model, {entry.name: entry for entry in entries}))
    names = [check_name(entry.name, "classifier") for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two classifiers are named {name!r}; give one another name and keep its type.")
    maker = _Maker(config, model, source, progress, [part for entry in entries for part in entry.every()])
    for entry in entries:
        try:
            maker.made[entry.name] = maker.make(entry)
        except InputError as error:
            if len(entries) == 1:
                raise
            raise InputError(f"classifier {entry.name!r}: {error}") from error
    return maker.made


@dataclass(frozen=True)
class _Entry:
    """A configured classifier.

    Attributes:
        takes: what its factory takes by name.
        layers: that it votes in; none where it takes none.
        named: whether these were named, not taken from what the model recommends.
        inner: the classifier that it is made over.
        victims: what its adversarial references are attacks on, by their place in `hardening`; None for the network.
    """

    name: str
    kind: str
    takes: frozenset[str]
    layers: tuple[str, ...]
    named: bool
    options: dict[str, Any]
    inner: _Entry | None
    hardening: tuple[dict[str, Any], ...]
    victims: tuple[_Entry | None, ...]

    def every(self) -> list[_Entry]:
        """Itself and what it is made of."""
        parts = [part for part in (self.inner, *self.victims) if part is not None]
        return [self, *(each for part in parts for each in part.every())]


def kind_of(given: Mapping[str, Any]) -> str:
    """The registered name of a configured classifier; InputError where there is none."""
    kind = given.get("type", given.get("name"))
    if not isinstance(kind, str):
        raise InputError(f"a classifier needs a name, e.g. name = 'knn'; got {brief(given)}.")
    return registry.classifiers.entry(kind).name


def taken_by(given: Mapping[str, Any]) -> frozenset[str]:
    """What the factory of a configured classifier takes by name."""
    return frozenset(inspect.signature(registry.classifiers.entry(kind_of(given)).build).parameters)


def _entry(given: Any, model: nn.Module, known: Mapping[str, _Entry]) -> _Entry:
    """Name, type, layers and options of a table; layers default to those the model recommends.

    Args:
        given: a table, the name of one of those known, or a registered name.
        known: the classifiers configured before it.
    """
    if isinstance(given, str) and given in known:
        return known[given]
    if not isinstance(given, (str, Mapping)):
        raise InputError(f"a classifier is a name or a table with one, not {brief(given)}.")
    options: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    kind = kind_of(options)
    name = str(options.pop("name", kind))
    options.pop("type", None)
    takes = taken_by({"name": kind})
    for reserved in _GIVEN:
        if reserved in options:
            raise InputError(f"{reserved} of {name!r} comes from other tables of the configuration; leave it out.")
    layers: tuple[str, ...] = ()
    chosen = None
    if takes & {"layer", "layers"}:
        chosen = next((c for c in [options.pop(key, None) for key in ("layers", "layer")] if c), None)
        layers = _layers(chosen, kind, "layers" in takes, model)
    inner = _entry(options.pop("classifier", "dknn"), model, known) if "classifier" in takes else None
    share = getattr(registry.classifiers.entry(kind).build, "hardening_share", None)
    wanted = None if share is None else options.pop("hardening", None)
    tables = [] if wanted is None else wanted if isinstance(wanted, list) else [wanted]
    hardening = [_strength(table, name) for table in tables]
    victims = [table.pop("classifier", None) for table in hardening]
    made = tuple(None if victim is None else _entry(victim, model, known) for victim in victims)
    if not share:  # the variant without adversarial references stands beside those that have them
        hardening, made = [], ()
    return _Entry(name, kind, takes, layers, chosen is not None, options, inner, tuple(hardening), made)


_GIVEN = ("references", "adversarial", "model", "n_classes", "features")
"""What a configuration gives classifiers from its other tables."""
_HARDENING = ("attack", "classifier", "eps", "norm")


def _strength(given: Any, name: str) -> dict[str, Any]:
    """A table of `hardening`, from a radius too."""
    table = dict(given) if isinstance(given, Mapping) else {"eps": given}
    for key in table:
        if key not in _HARDENING:
            raise unknown_name(f"setting in the hardening of {name!r}:", str(key), _HARDENING)
    if "eps" not in table:
        raise InputError(f"a hardening of {name!r} names its strength: {{ eps = 0.1 }}.")
    table["eps"] = radius(table["eps"])
    if isinstance(table["eps"], bool) or not isinstance(table["eps"], (int, float)):
        raise InputError(f"the strength of a hardening of {name!r} is a number or '8/255', not {brief(table['eps'])}.")
    return table


def _layers(named: Any, kind: str, several: bool, model: nn.Module) -> tuple[str, ...]:
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
    return layers


class _Maker:
    """Makes classifiers of entries; what was made is kept by name."""

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module,
        source: DataSource,
        progress: Progress | None,
        entries: list[_Entry],
    ) -> None:
        self.config, self.model, self.source, self.progress = config, model, source, progress
        self.made: dict[str, Classifier] = {}
        place = config.references.path
        self.database = Database.open(place) if place is not None and is_database(place) else None
        over = [entry for entry in entries if "references" in entry.takes]
        self.references = self._references(over) if over else None

    def make(self, entry: _Entry) -> Classifier:
        """The classifier, calibrated where it can be."""
        given: dict[str, Any] = dict(entry.options)
        if "references" in entry.takes:
            given["references"] = self.references
            layers = self._layers(entry)
            given |= {"layers": list(layers)} if "layers" in entry.takes else {"layer": layers[0]}
        if entry.hardening:
            each = zip(entry.hardening, entry.victims, strict=True)
            given["adversarial"] = [self._hardened(entry.kind, *one) for one in each]
        if self.database is not None and isinstance(given.get("index"), str):
            given["index"] = self.database.index_spec(given["index"])
        if "model" in entry.takes:
            given["model"] = self.model
        if "n_classes" in entry.takes:
            given["n_classes"] = self.source.n_classes
        if entry.inner is not None:
            given["classifier"] = self.make(entry.inner)
        if "transform" in given:
            given["transform"] = from_config(given["transform"], registry.transformations)
        if "members" in given:
            given["members"] = self._members(entry.name, given["members"])
        made: Classifier = registry.classifiers.create(entry.kind, **given)
        if isinstance(made, DkNN) and self.source.calibration is not None:
            made.calibrate(self.source.calibration)
        return made

    def _layers(self, entry: _Entry) -> tuple[str, ...]:
        """The layers that an entry votes in: where none was named that of the database, if it has one alone."""
        held = () if self.database is None else tuple(self.database.layers)
        return held if len(held) == 1 and not entry.named else entry.layers

    def _members(self, name: str, members: Any) -> dict[str, Classifier]:
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise InputError(f"members of {name!r} are classifiers named before it, ['knn', 'dknn'].")
        for member in members:
            if member not in self.made:
                raise unknown_name(f"member of {name!r}, named before it:", member, self.made)
        return {member: self.made[member] for member in members}

    def _references(self, entries: list[_Entry]) -> ReferenceSet:
        config, source, wanted = self.config, self.source, self.config.references
        layers = list(dict.fromkeys(layer for entry in entries for layer in self._layers(entry)))
        if self.database is not None:
            return _of_database(self.database, config, self.model, layers, source)
        kept = [getattr(registry.classifiers.entry(entry.kind).build, "needs_payload", None) for entry in entries]
        payload = next(filter(None, kept), None)
        extractor = FeatureExtractor(self.model, layers, pool=wanted.pool, normalize=wanted.normalize)
        split = _reference_split(config, source)
        held = _kept(
            wanted.path,
            extractor,
            lambda: ReferenceSet.build(
                extractor, split, n_classes=source.n_classes, payload=payload, keep_images=True, progress=self.progress
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

    def _hardened(self, kind: str, table: dict[str, Any], victim: _Entry | None) -> ReferenceSet:
        """One set of adversarial references, kept beside the references where these are kept."""
        assert self.references is not None  # what takes adversarial references takes clean ones
        config, options = self.config, dict(table)
        attack = options.pop("attack", None)
        threat = ThreatModel.from_config({"norm": config.threat.norm, "bounds": self.source.bounds, **options})
        parts = {} if attack is None else {"attack": from_config(attack, registry.attacks)}
        hardening, extractor = Hardening(threat, **parts), self.references.extractor()
        share: float = getattr(registry.classifiers.entry(kind).build, "hardening_share", 1.0)
        hardening = hardening if share == 1 else hardening.weakened(share)
        attacked = None if victim is None else self.make(victim)
        place = None
        if config.references.path is not None:
            described = {
                "threat": hardening.threat.to_config(),
                "attack": to_config(hardening.attack, registry.attacks),
                "seed": config.seed,
                "references": self.references.fingerprint(),
            }
            described |= {} if attacked is None else {"classifier": attacked.fingerprint()}
            place = f"{config.references.path}-hardened-{store.fingerprint_config(described)[:8]}"
        return _kept(
            place,
            extractor,
            lambda: adversarial_references(
                extractor,
                _reference_split(config, self.source),
                hardening,
                classifier=attacked,
                n_classes=self.source.n_classes,
                keep_images=True,
                seed=config.seed,
                progress=self.progress,
            ),
        )


def _of_database(
    database: Database, config: ExperimentConfig, model: nn.Module, layers: list[str], source: DataSource
) -> ReferenceSet:
    """The references of a database: whatever samples it was made of, with its own pooling and transforms."""
    if config.references.per_class is not None:
        raise InputError("references per class are chosen when they are built; a database is taken as it is.")
    held = database.references(model)
    for layer in layers:
        held.layer(layer)
    if held.n_classes != source.n_classes:
        raise InputError(
            f"the database in {config.references.path!r} knows {held.n_classes} classes where data set "
            f"{config.data.name!r} has {source.n_classes}; evaluate it on data of its classes."
        )
    return held.to(held.extractor().device)


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
