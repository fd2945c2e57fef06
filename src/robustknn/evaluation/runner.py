"""evaluate(): classifiers × attacks × eps, one row a sample, in whole batches that survive a kill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.attacks import Attack, AttackResult, GradientAttack
from robustknn.checks import check_inputs, check_labels, check_positive_int
from robustknn.classifiers import Classifier, Look, VoterClassifier, decide, margin
from robustknn.classifiers.voters import Voter
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.errors import InputError, RobustKNNError
from robustknn.evaluation.diagnostics import ONE_STEP, UNBOUNDED
from robustknn.evaluation.rundir import CLEAN, Cell, RunDirectory, check_name, code_fingerprint, environment
from robustknn.progress import Progress, Silent
from robustknn.recipes import is_transfer
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel

SHOWN_NEIGHBORS = 8


@dataclass(frozen=True)
class Options:
    """What an evaluation does beside attacking.

    Args:
        seed: of all randomness.
        batch_size: samples worked on at once, and rows in a file; it changes memory and time, not results.
        examples: how many samples (the first) keep their adversarial example and neighbors, for the report.
        controls: on how many samples (the first) the controls for gradient masking run; 0 leaves them out.
    """

    seed: int = 0
    batch_size: int = 100
    examples: int = 24
    controls: int = 100


def evaluate(
    classifiers: Classifier | Mapping[str, Classifier],
    data: Split | tuple[Any, Any],
    *,
    attacks: Sequence[str | Attack] | Mapping[str, Attack] = ("pgd-transfer", "ask"),
    threat: ThreatModel | None = None,
    eps: Sequence[float] = (),
    out: str | Path,
    options: Options | None = None,
    exclude: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    describe: Mapping[str, Any] | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> RunDirectory:
    """Attack classifiers and write one row for every sample.

    A run that was stopped at any moment goes on when it is called again with the same arguments, and ends with
    the same files. `robustknn.evaluation.finish` then writes the summary.

    Args:
        classifiers: one, or several by name.
        data: the samples to score: a split or (x, y).
        attacks: names (`robustknn list attacks`), attacks, or attacks by name.
        threat: norm, bounds and the radius that the tables show; L∞ 8/255 by default.
        eps: further radii, for the curve of accuracy against eps.
        out: the run's folder, new or to be continued.
        options: seed, batch size and what is kept.
        exclude: for a classifier, positions of samples not to score it on (those it was calibrated with).
        class_names: for the report.
        describe: what else the report should say of the run (data set, model), as JSON.
        command: the command that makes this run, for the record.
        progress: where to report.

    Returns:
        The run's directory, whole.

    Raises:
        InputError: bad data or names, or an attack that cannot work on a classifier, before anything runs.
        ResumeError: the folder holds a run made with something else, named in the sentence.
    """
    options, threat = options or Options(), threat or ThreatModel()
    check_positive_int(options.batch_size, "batch_size")
    named = {"knn": classifiers} if isinstance(classifiers, Classifier) else dict(classifiers)
    if not named:
        raise InputError("there is no classifier to evaluate; pass at least one.")
    samples = data if isinstance(data, Split) else _split(data)
    job = _Evaluation(named, samples, _named_attacks(attacks), threat, options, exclude or {}, progress or Silent())
    job.check()
    radii = sorted({float(threat.with_eps(float(e)).eps) for e in eps} | {float(threat.eps)})
    plan = {
        **job.plan(radii),
        "class_names": [str(n) for n in class_names] if class_names else None,
        "describe": dict(describe or {}),
    }
    run = RunDirectory(out)
    extractor = next(iter(named.values())).extractor
    device = "cpu" if extractor is None else str(extractor.device)
    run.open(job.identity(plan), plan, environment(command, device))
    job.work(run)
    return run


def _split(data: tuple[Any, Any]) -> Split:
    x = check_inputs(data[0])
    return Split(x.detach().cpu(), check_labels(data[1], len(x), None), "test")


def _named_attacks(attacks: Sequence[str | Attack] | Mapping[str, Attack]) -> dict[str, Attack]:
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    else:
        named = {}
        for attack in [attacks] if isinstance(attacks, str) else attacks:
            name = attack if isinstance(attack, str) else str(to_config(attack, registry.attacks)["name"])
            if name in named:
                raise InputError(f"two attacks are named {name!r}; pass them by name: {{'a': …, 'b': …}}.")
            named[name] = registry.attacks.create(attack) if isinstance(attack, str) else attack
    for name, attack in named.items():
        if check_name(name, "attack") == CLEAN or not isinstance(attack, Attack):
            raise InputError(f"attack {name!r} must be an Attack under another name than 'clean'.")
    return named


class _Evaluation:
    def __init__(
        self,
        classifiers: dict[str, Classifier],
        samples: Split,
        attacks: dict[str, Attack],
        threat: ThreatModel,
        options: Options,
        exclude: Mapping[str, Tensor],
        progress: Progress,
    ) -> None:
        self.classifiers, self.samples, self.attacks = classifiers, samples, attacks
        self.threat, self.options, self.exclude, self.progress = threat, options, exclude, progress
        every = [v.references for c in classifiers.values() for v in _voters(c)]
        self.banks = list(dict.fromkeys(every))  # the distinct reference sets, in order of use

    def check(self) -> None:
        """Refuse at the entrance what would fail later: every attack is bound to every classifier once."""
        for names in (self.classifiers, self.attacks):
            if len({name.lower() for name in names}) < len(names):
                raise InputError(f"the names {', '.join(names)} differ in case alone; folders may not, rename one.")
        if isinstance(self.threat.eps, Tensor):
            raise InputError("evaluate takes one eps for all samples; call the attack itself for one a sample.")
        for name, classifier in self.classifiers.items():
            check_name(name, "classifier")
            check_labels(self.samples.labels, None, classifier.n_classes, f"the labels (classifier {name!r})")
            if not len(self.positions(name)):
                raise InputError(f"every sample is excluded for classifier {name!r}; pass more samples.")
            for attack in self.attacks.values():
                if isinstance(attack, GradientAttack):
                    attack.objective.bind(classifier)

    def positions(self, classifier: str, cell: Cell | None = None) -> Tensor:
        """The samples a classifier is scored on, (n,) positions."""
        every = torch.ones(len(self.samples), dtype=torch.bool)
        if classifier in self.exclude:
            every[self.exclude[classifier]] = False
        chosen = every.nonzero()[:, 0]
        return chosen[: self.options.controls] if cell is not None and cell.control else chosen

    # -------------------------------------------------------------------------------------- header

    def plan(self, radii: list[float]) -> dict[str, Any]:
        """All cells and settings, as JSON."""
        return {
            "cells": [c.to_config() for c in self._cells(radii)],
            # JSON objects are written in order of name; these keep the order given.
            "classifier_names": list(self.classifiers),
            "attack_names": list(self.attacks),
            "classifiers": {name: _describe(c, self.banks) for name, c in self.classifiers.items()},
            "attacks": {
                name: {**to_config(a, registry.attacks), "transfer": is_transfer(a)} for name, a in self.attacks.items()
            },
            "threat": self.threat.to_config(),
            "eps": radii,
            "samples": len(self.samples),
            "scored": {name: len(self.positions(name)) for name in self.classifiers},
            "seed": self.options.seed,
            "examples": self.options.examples,
            "controls": self.options.controls,
        }

    def _cells(self, radii: list[float]) -> list[Cell]:
        main = float(self.threat.eps)
        cells = []
        for name in self.classifiers:
            cells.append(Cell(name, CLEAN))
            for attack in self.attacks:
                cells.append(Cell(name, attack, main))
                cells += [Cell(name, attack, e) for e in radii if e != main]
            for attack, config in self.attacks.items():
                white_box = isinstance(config, GradientAttack) and not is_transfer(config)
                if not white_box or not self.options.controls:
                    continue
                if config.steps > 1:  # type: ignore[attr-defined]
                    cells.append(Cell(name, attack, main, ONE_STEP))
                if self.threat.bounds is not None:
                    widest = self.threat.diameter(torch.empty(1, *self.samples.shape))
                    cells.append(Cell(name, attack, widest, UNBOUNDED))
        return cells

    def identity(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """Hashes of everything that decides, by name."""
        models = [c.extractor.fingerprint() for c in self.classifiers.values() if c.extractor is not None]
        told = {k: v for k, v in plan.items() if k not in ("describe", "class_names")}
        return {
            "code version": code_fingerprint(),
            "config": store.fingerprint_config(told),
            "data": self._data_fingerprint(),
            "model": store.fingerprint_config({"models": models}),
            "references": store.fingerprint_config({n: c.fingerprint() for n, c in self.classifiers.items()}),
        }

    def _data_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for positions in torch.arange(len(self.samples)).split(1000):
            batch = check_inputs(self.samples.batch(positions), self.threat.bounds, "the data")
            store.update_with_tensor(digest, batch)
        store.update_with_tensor(digest, self.samples.labels)
        store.update_with_tensor(digest, self.samples.ids)
        return digest.hexdigest()

    # ---------------------------------------------------------------------------------------- work

    def work(self, run: RunDirectory) -> None:
        """Do what has no row yet, batch by batch, then write the references that the report shows."""
        todo = []
        for cell in run.cells:
            wanted, done = self.positions(cell.classifier, cell), set(run.done(cell))
            left = wanted[[int(p) not in done for p in wanted]]
            todo += [(cell, rows) for rows in left.split(self.options.batch_size)] if len(left) else []
        self.progress.start("evaluating", sum(len(rows) for _, rows in todo))
        try:
            for cell, rows in todo:
                began = time.perf_counter()
                columns, tensors = self.batch(cell, rows)
                run.write(cell, rows, columns, tensors, time.perf_counter() - began)
                self.progress.advance(len(rows))
        finally:
            self.progress.stop()
        self._write_gallery(run)

    def batch(self, cell: Cell, rows: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The rows of one batch, and the tensors of its samples that are shown."""
        classifier, x = self.classifiers[cell.classifier], self.samples.batch(rows)
        y, ids = self.samples.labels[rows], self.samples.ids[rows]
        columns: dict[str, Any] = {"sample_id": ids, "label": y}
        if cell.attack == CLEAN:
            x_shown = classifier.place(x)
        else:
            result = self._attack(cell, classifier, x, y, ids)
            x_shown = result.x_adv
            columns |= _attack_columns(result, y)
        scores, look = _look(classifier, x_shown, ids)
        columns |= _decision_columns(classifier, scores, look, y)
        if cell.attack != CLEAN and not torch.equal(columns["prediction"], result.labels.cpu()):
            raise RobustKNNError(
                f"attack {cell.attack!r} reported decisions that the classifier does not repeat on the same examples; "
                "it, or the classifier, depends on something else than its inputs."
            )
        shown = torch.isin(rows, self.positions(cell.classifier)[: self.options.examples])
        if cell.control or not bool(shown.any()):
            return columns, {}
        return columns, _shown(rows[shown], shown, x_shown, look)

    def _attack(self, cell: Cell, classifier: Classifier, x: Tensor, y: Tensor, ids: Tensor) -> AttackResult:
        attack = self.attacks[cell.attack]
        if cell.control == ONE_STEP:
            assert isinstance(attack, GradientAttack)
            attack = replace(
                attack,
                steps=1,
                step=1.0,
                absolute_step=None,
                schedule="constant",
                momentum=0.0,
                start="clean",
                restarts=1,
            )
        threat = self.threat.with_eps(cell.eps)
        result = attack(
            classifier, x, y, threat, sample_ids=ids, seed=self.options.seed, batch_size=self.options.batch_size
        )
        far = float(threat.distance(result.x_adv, result.x).max())
        inside = threat.bounds is None or bool(
            ((result.x_adv >= threat.bounds[0]) & (result.x_adv <= threat.bounds[1])).all()
        )
        if far > cell.eps * (1 + 1e-5) + 1e-6 or not inside:
            raise RobustKNNError(
                f"attack {cell.attack!r} returned an example outside the threat model ({threat.norm} distance {far:g}, "
                f"eps {cell.eps:g}, inside the bounds: {inside}); its result is not counted."
            )
        return result

    def _write_gallery(self, run: RunDirectory) -> None:
        """Images of the references that any shown sample has among its nearest, once all rows are there."""
        shown: dict[int, list[Tensor]] = {}
        for cell in run.cells:
            tensors = {} if cell.control else run.tensors(cell)
            for place, voter in enumerate(_voters(self.classifiers[cell.classifier])):
                if f"ids {place}" in tensors:
                    shown.setdefault(self.banks.index(voter.references), []).append(tensors[f"ids {place}"].flatten())
        gallery = {}
        for bank, ids in sorted(shown.items()):
            references = self.banks[bank]
            if references.images is not None:
                unique = torch.cat(ids).unique()
                unique = unique[unique >= 0]
                gallery[f"ids {bank}"] = unique
                gallery[f"labels {bank}"] = references.labels.cpu()[unique]
                gallery[f"images {bank}"] = references.image(unique).cpu()
        if gallery:
            run.write_gallery(gallery)


# ------------------------------------------------------------------------------------------- helpers


def _look(classifier: Classifier, x: Tensor, ids: Tensor) -> tuple[Tensor, Look | None]:
    if isinstance(classifier, VoterClassifier):
        look = classifier.look(x)
        return look.scores, look
    return classifier.scores(x, ids.to(x.device)), None


def _decision_columns(classifier: Classifier, scores: Tensor, look: Look | None, y: Tensor) -> dict[str, Any]:
    prediction = decide(scores).cpu()
    columns: dict[str, Any] = {"prediction": prediction, "correct": prediction == y}
    columns["margin"] = margin(scores, y.to(scores.device)).cpu().double()
    if look is not None and isinstance(classifier, VoterClassifier):
        columns |= {name: value.cpu().double() for name, value in classifier.details(look).items()}
    return columns


def _attack_columns(result: AttackResult, y: Tensor) -> dict[str, Any]:
    clean_correct = result.clean_labels.cpu() == y
    success = result.success.cpu()
    return {
        "clean_correct": clean_correct,
        "success": success,
        "robust": clean_correct & ~success,
        "l2": result.l2.cpu().double(),
        "linf": result.linf.cpu().double(),
        "gradient_passes": result.gradient_passes.cpu(),
        "forward_passes": result.forward_passes.cpu(),
        "zero_gradient": result.zero_gradient.cpu(),
    }


def _shown(positions: Tensor, shown: Tensor, x: Tensor, look: Look | None) -> dict[str, Tensor]:
    """Example and nearest neighbors of the samples that the report shows."""
    mask = shown.to(x.device)
    tensors = {"position": positions, "x": x[mask].cpu()}
    for place, (voter, found) in enumerate((look.nearest if look is not None else {}).items()):
        near = found.first(min(voter.n_neighbors, SHOWN_NEIGHBORS))
        tensors[f"ids {place}"] = near.ids[mask].cpu()
        tensors[f"distances {place}"] = near.distances[mask].cpu()
        tensors[f"labels {place}"] = voter.labels_of(near.ids[mask]).cpu()
    return tensors


def _voters(classifier: Classifier) -> tuple[Voter, ...]:
    return classifier.voters if isinstance(classifier, VoterClassifier) else ()


def _describe(classifier: Classifier, banks: list[ReferenceSet]) -> dict[str, Any]:
    """What the report says of a classifier, as JSON; `bank` is the place of a voter's references in the gallery."""
    said: dict[str, Any] = {"type": type(classifier).__name__, "n_classes": classifier.n_classes}
    if classifier.extractor is not None:
        said["model"] = type(classifier.extractor.model).__name__
    said["voters"] = [
        {
            "layer": v.layer,
            "n_neighbors": v.n_neighbors,
            "metric": v.metric,
            "references": len(v.references),
            "dim": v.index.dim,
            "index": type(v.index).__name__,
            "exact": v.index.exact,
            "bank": banks.index(v.references),
        }
        for v in _voters(classifier)
    ]
    return said
