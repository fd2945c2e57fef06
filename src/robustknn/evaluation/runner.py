"""evaluate(): classifiers × attacks × eps, one row a sample, in whole batches that survive a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks import Attack, AttackResult, GradientAttack, ObjectiveAttack, Suite
from robustknn.attacks.base import check_several_classes
from robustknn.checks import (
    as_tensor,
    check_inputs,
    check_labels,
    check_positive_int,
    check_whole,
)
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.errors import InputError, RobustKNNError, brief
from robustknn.evaluation.approximation import Pair
from robustknn.evaluation.diagnostics import ONE_STEP, UNBOUNDED
from robustknn.evaluation.given import (
    class_labels,
    classifiers_by_name,
    describe_classifier,
    excluded_positions,
    fingerprints,
    identity_of,
    parts_by_name,
    refuse_stale,
    samples_of,
    voters_of,
)
from robustknn.evaluation.plan import PUBLISHED
from robustknn.evaluation.rows import (
    attack_columns,
    decision_columns,
    fresh_columns,
    look_at,
    path_tensors,
    shown_tensors,
    succeeds_rounded,
)
from robustknn.evaluation.rundir import CLEAN, Cell, RunDirectory, check_name, environment
from robustknn.progress import Progress, Silent
from robustknn.recipes.published import Published, attack_of
from robustknn.threat import ThreatModel, check_reach, check_threat


@dataclass(frozen=True)
class Options:
    """What an evaluation does beside attacking.

    Args:
        seed: of all randomness.
        batch_size: samples worked on at once, and rows in a file; it changes memory and time, not results.
        examples: how many samples (the first) keep their adversarial example, their neighbors and the decision on
            the way from the one to the other, for the report.
        controls: on how many samples (the first) the controls for gradient masking run; 0 leaves them out.
        approximation: on how many samples (the first) a classifier whose index is not exact is compared with its exact
            twin: recall of the neighbors, agreement of the decisions.
        fresh_draws: in how many draws that no attack has seen the examples of a randomized classifier are decided once
            more; 0 leaves it out.
    """

    seed: int = 0
    batch_size: int = 100
    examples: int = 24
    controls: int = 100
    approximation: int = 1000
    fresh_draws: int = 10


class Finished(NamedTuple):
    """The rows of one batch, as `RunDirectory.write` takes them."""

    cell: Cell
    rows: Tensor
    columns: dict[str, Any]
    tensors: dict[str, Tensor]
    seconds: float


Batch = tuple[Cell, Tensor]
"""A cell, and the positions of the samples that a batch of it is made of, (B,)."""
Executor = Callable[["Evaluation", Mapping[str, str], Sequence[Batch]], Generator[Finished]]
"""Works on batches, in any order: (evaluation, its identity, todo) → finished batches. It writes nothing."""


def evaluate(
    classifiers: Classifier | Mapping[str, Classifier],
    data: Split | tuple[Any, Any],
    *,
    attacks: str | Sequence[str | Attack] | Mapping[str, Attack] | None = None,
    threat: ThreatModel | None = None,
    eps: float | Sequence[float] = (),
    out: str | Path,
    optional: Sequence[str] = (),
    options: Options | None = None,
    exclude: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    describe: Mapping[str, Any] | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> RunDirectory:
    """Attack classifiers and write one row for every sample.

    A run that was stopped at any moment goes on when it is called again with the same arguments, and ends with
    the same files. `robustknn.evaluation.finish` then writes the summary.

    Args:
        classifiers: one, or several by name.
        data: the samples to score: a split or (x, y), with labels as in `classifier.score`. In the rows they are
            class numbers: places in `classes_` where the classifiers were fitted on other labels.
        attacks: names (`robustknn list attacks`), attacks, or attacks by name; by default "worst-case-fast" and, where
            the network has class scores to attack, "published": the report's two columns.
        threat: norm, bounds and the radius that the tables show; L∞ 8/255 by default.
        eps: further radii (or one), for the curve of accuracy against eps.
        out: the run's folder, new or to be continued.
        optional: names of attacks that are left out, not refused, for a classifier on which they cannot work.
        options: seed, batch size and what is kept.
        exclude: for a classifier, positions of samples not to score it on (those it was calibrated with).
        class_names: for the report; by default what the classifiers were fitted on, or the numbers.
        describe: what else the report should say of the run (data set, model), as JSON.
        command: the command that makes this run, for the record.
        progress: where to report.
        executor: who works on the batches; this process by default. Over a Ray cluster, an experiment is evaluated from
            its configuration (see `Experiment.run`).

    Returns:
        The run's directory, whole.

    Raises:
        InputError: bad data or names, references older than their model's weights, or an attack that cannot work
            on a classifier, before anything is written.
        ResumeError: the folder holds a run made with something else, named in the sentence.
    """
    if executor is not None and not callable(executor):
        raise InputError(
            "evaluate() works on objects of this process, which other machines do not have; over Ray, evaluate from a "
            "configuration: robustknn evaluate --executor ray, or prepare(config).run(out, executor='ray')."
        )
    job, plan = planned(
        classifiers,
        data,
        attacks=attacks,
        threat=threat,
        eps=eps,
        optional=optional,
        options=options,
        exclude=exclude,
        class_names=class_names,
        describe=describe,
        progress=progress,
    )
    run = RunDirectory(out)
    run.open(job.identity(plan), plan, environment(command, job.device))
    job.work(run, executor or _one_by_one)
    return run


def planned(
    classifiers: Classifier | Mapping[str, Classifier],
    data: Split | tuple[Any, Any],
    *,
    attacks: str | Sequence[str | Attack] | Mapping[str, Attack] | None = None,
    threat: ThreatModel | None = None,
    eps: float | Sequence[float] = (),
    optional: Sequence[str] = (),
    options: Options | None = None,
    exclude: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    describe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, dict[str, Any]]:
    """What `evaluate` checks and makes before anything is written: the evaluation, and its plan as JSON."""
    options = _checked(Options() if options is None else options)
    threat = ThreatModel() if threat is None else check_threat(threat)
    named = classifiers_by_name(classifiers)
    classes = class_labels(named)
    samples = samples_of(data, classes)
    excluded = excluded_positions(exclude or {}, named, len(samples))
    wanted = parts_by_name((PUBLISHED, "worst-case-fast") if attacks is None else attacks, Attack, registry.attacks)
    if CLEAN in wanted:
        raise InputError(f"no attack may be named {CLEAN!r}, which stands for none; give it another name.")
    job = Evaluation(named, samples, wanted, threat, options, excluded, progress or Silent())
    job.check([PUBLISHED] if attacks is None else optional)
    radii = sorted({*_radii(eps, threat), float(threat.eps)})
    job.check_reach(radii[-1])
    if class_names is None and classes is not None:
        class_names = classes.tolist()
    plan = {
        **job.plan(radii),
        "class_names": [str(n) for n in class_names] if class_names else None,
        "describe": dict(describe or {}),
        "fingerprints": fingerprints(named),
    }
    return job, plan


# ------------------------------------------------------------------------------------ what is given


def _checked(options: Options) -> Options:
    if not isinstance(options, Options):
        raise InputError(f"options must be Options(seed=…, batch_size=…), not {brief(options)}.")
    check_whole(options.seed, "seed")
    check_positive_int(options.batch_size, "batch_size")
    check_whole(options.examples, "examples", 0)
    check_whole(options.controls, "controls", 0)
    check_positive_int(options.approximation, "approximation")
    check_whole(options.fresh_draws, "fresh_draws", 0)
    return options


def _radii(eps: Any, threat: ThreatModel) -> list[float]:
    given = as_tensor(eps, "eps")
    return [float(threat.with_eps(e).eps) for e in given.reshape(-1).tolist()]


class Evaluation:
    """Classifiers, samples and attacks, checked: what makes the rows of any batch."""

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
        every = [held for c in classifiers.values() for held in c.reference_sets]
        self.banks = list(dict.fromkeys(every))  # the distinct reference sets, in order of use
        self.not_run: set[tuple[str, str]] = set()  # (classifier, attack) that are not run
        self.pairs = {name: Pair.of(c) for name, c in classifiers.items()}  # those that do not search exactly
        self.seats: dict[tuple[str, str], str] = {}  # (classifier, attack): where it searches

    def check(self, optional: Sequence[str] = ()) -> None:
        """Refuse at the entrance what would fail later: every attack checks every classifier once.

        Args:
            optional: attacks that are left out, instead of refused, for a classifier on which they cannot work.
        """
        for names in (self.classifiers, self.attacks):
            if len({name.lower() for name in names}) < len(names):
                raise InputError(f"the names {', '.join(names)} differ in case alone; folders may not, rename one.")
        if isinstance(self.threat.eps, Tensor):
            raise InputError("evaluate takes one eps for all samples; call the attack itself for one a sample.")
        for name in self.classifiers:
            check_name(name, "classifier")
        for bank in self.banks:
            refuse_stale(bank)
        for name, classifier in self.classifiers.items():
            check_labels(self.samples.labels, None, classifier.n_classes, f"the labels (classifier {name!r})")
            if not len(self.positions(name)):
                raise InputError(f"every sample is excluded for classifier {name!r}; pass more samples.")
            first = self.positions(name)[:1]
            x = classifier.place(check_inputs(self.samples.batch(first), self.threat.bounds, "the data"))
            if not isinstance(classifier, VoterClassifier):
                # What its inputs pass through says here, and not after the folder is made, that it cannot take them.
                classifier.scores(x, self.samples.ids[first].to(x.device))
            if self.attacks:
                check_several_classes(classifier)
                self._check_attacks(name, classifier, x, optional)
        for attack_name in list(self.attacks):
            if all((name, attack_name) in self.not_run for name in self.classifiers):
                del self.attacks[attack_name]

    def _check_attacks(self, name: str, classifier: Classifier, x: Tensor, optional: Sequence[str]) -> None:
        for attack_name, attack in self.attacks.items():
            if isinstance(attack, Published):
                attack_of(classifier)  # a name that does not exist is no attack that cannot work
            pair = self.pairs[name]
            try:
                if pair is None:
                    attack.check(classifier, x)
                else:
                    self._seat(pair, name, attack_name, x)
            except InputError:
                if attack_name not in optional:
                    raise
                self.not_run.add((name, attack_name))

    def check_reach(self, eps: float) -> None:
        """Refuse a radius beyond what there is: most likely a pixel value in 0..255."""
        check_reach(self.threat.with_eps(eps), self.samples.batch(torch.arange(1)))

    @property
    def device(self) -> str:
        """Where the network runs."""
        extractor = next(iter(self.classifiers.values())).extractor
        return "cpu" if extractor is None else str(extractor.device)

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
            "classifiers": {
                name: {
                    **describe_classifier(c, self.banks),
                    "left_out": self._left_out(name, c),
                    "searches": self._searches(name),
                    "published_attack": dict(c.published_attack),
                    "published_transfer": attack_of(c).transfer,
                }
                for name, c in self.classifiers.items()
            },
            "attacks": {
                name: {**to_config(a, registry.attacks), "transfer": a.transfer, "parts": list(a.parts), "role": a.role}
                for name, a in self.attacks.items()
            },
            "threat": self.threat.to_config(),
            "eps": radii,
            "samples": len(self.samples),
            "scored": {name: len(self.positions(name)) for name in self.classifiers},
            "seed": self.options.seed,
            "examples": self.options.examples,
            "controls": self.options.controls,
            "approximation": self.options.approximation,
            "fresh_draws": self.options.fresh_draws,
        }

    def _left_out(self, name: str, classifier: Classifier) -> dict[str, list[str]]:
        """By attack: which of its parts cannot work on a classifier and do not run."""
        suites = {a: s for a, s in self.attacks.items() if isinstance(s, Suite)}
        if not suites:
            return {}
        x = classifier.place(self.samples.batch(self.positions(name)[:1]))
        pair = self.pairs[name]
        usable = {a: s.usable(classifier, x) if pair is None else pair.usable(s, x) for a, s in suites.items()}
        return {a: [part for part in s.parts if part not in usable[a]] for a, s in suites.items()}

    def _searches(self, name: str) -> dict[str, str]:
        """By attack: where it searches for neighbors, for a classifier that does not search exactly."""
        pair = self.pairs[name]
        if pair is None:
            return {}
        x = pair.deployed.place(self.samples.batch(self.positions(name)[:1]))
        return {a: self._seat(pair, name, a, x) for a in self.attacks if (name, a) not in self.not_run}

    def _seat(self, pair: Pair, name: str, attack: str, x: Tensor) -> str:
        if (name, attack) not in self.seats:
            self.seats[name, attack] = pair.seat(self.attacks[attack], x)
        return self.seats[name, attack]

    def _cells(self, radii: list[float]) -> list[Cell]:
        main = float(self.threat.eps)
        cells = []
        for name in self.classifiers:
            cells.append(Cell(name, CLEAN))
            for attack in self.attacks:
                if (name, attack) in self.not_run:
                    continue
                cells.append(Cell(name, attack, main))
                cells += [Cell(name, attack, e) for e in radii if e != main]
            for attack, config in self.attacks.items():
                climbs = isinstance(config, (ObjectiveAttack, Suite)) and not config.transfer
                if not climbs or not self.options.controls or (name, attack) in self.not_run:
                    continue
                if isinstance(config, GradientAttack) and config.steps > 1:
                    cells.append(Cell(name, attack, main, ONE_STEP))
                if self.threat.bounds is not None:
                    widest = self.threat.diameter(torch.empty(1, *self.samples.shape))
                    cells.append(Cell(name, attack, widest, UNBOUNDED))
        return cells

    def identity(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """Hashes of everything that decides, by name."""
        return identity_of(self.classifiers, self.samples, self.threat.bounds, plan)

    # ---------------------------------------------------------------------------------------- work

    def work(self, run: RunDirectory, executor: Executor) -> None:
        """Do what has no row yet, batch by batch, then write the references that the report shows.

        Only this process writes, whoever makes the rows: a batch is there once or not at all.
        """
        todo = []
        for cell in run.cells:
            wanted, done = self.positions(cell.classifier, cell), set(run.done(cell))
            left = wanted[[int(p) not in done for p in wanted]]
            todo += [(cell, rows) for rows in left.split(self.options.batch_size)] if len(left) else []
        self.progress.start("evaluating", sum(len(rows) for _, rows in todo))
        try:
            if todo:
                with closing(executor(self, run.header["identity"], todo)) as finished:
                    for batch in finished:
                        run.write(*batch)
                        self.progress.advance(len(batch.rows))
        finally:
            self.progress.stop()
        self._write_gallery(run)

    def batch(self, cell: Cell, rows: Tensor) -> Finished:
        """The rows of one batch, and the tensors of its samples that are shown."""
        began = time.perf_counter()
        columns, tensors = self._rows(cell, rows)
        return Finished(cell, rows, columns, tensors, time.perf_counter() - began)

    def _rows(self, cell: Cell, rows: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        classifier, x = self.classifiers[cell.classifier], self.samples.batch(rows)
        y, ids = self.samples.labels[rows], self.samples.ids[rows]
        columns: dict[str, Any] = {"sample_id": ids, "label": y}
        if cell.attack == CLEAN:
            x_shown = classifier.place(x)
        else:
            result, beside = self._attack(cell, classifier, x, y, ids)
            x_shown = result.x_adv
            columns |= attack_columns(result) | beside
            if self.attacks[cell.attack].parts:
                columns["winner"] = result.winner.cpu()
            if self.threat.bounds == (0.0, 1.0):
                judge = self.attacks[cell.attack].judge(classifier)
                columns["success_8bit"] = succeeds_rounded(judge, result, ids).cpu()
        scores, look = look_at(classifier, x_shown, ids)
        columns |= decision_columns(classifier, scores, look, y)
        if not cell.control:
            placed, made = (x_shown, None) if cell.attack == CLEAN else (result.x, x_shown)
            columns |= fresh_columns(classifier, placed, made, y, ids, self.options.fresh_draws)
        pair = self.pairs[cell.classifier]
        if cell.attack == CLEAN and pair is not None and look is not None:
            measured = torch.isin(rows, self.positions(cell.classifier)[: self.options.approximation])
            columns |= pair.compared(x_shown, look, measured)
        if cell.attack != CLEAN and not torch.equal(columns["prediction"], result.labels.cpu()):
            raise RobustKNNError(
                f"attack {cell.attack!r} reported decisions that the classifier does not repeat on the same examples; "
                "it, or the classifier, depends on something else than its inputs."
            )
        shown = torch.isin(rows, self.positions(cell.classifier)[: self.options.examples])
        if cell.control or not bool(shown.any()):
            return columns, {}
        tensors = shown_tensors(rows[shown], shown, x_shown, look)
        if cell.attack != CLEAN:
            kept = shown.to(x_shown.device)
            tensors |= path_tensors(classifier, result.x[kept], x_shown[kept], y[shown], ids[shown])
        return columns, tensors

    def _attack(
        self, cell: Cell, classifier: Classifier, x: Tensor, y: Tensor, ids: Tensor
    ) -> tuple[AttackResult, dict[str, Any]]:
        """What the attack found, as the classifier decides; and further columns."""
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
        x = check_inputs(classifier.place(x), threat.bounds)
        y, ids = y.to(x.device), ids.to(x.device)
        seed, size = self.options.seed, self.options.batch_size

        def apply(to: Classifier, at: Tensor) -> AttackResult:
            at = at.to(x.device)
            return attack.apply(to, x[at], y[at], threat, None, ids[at], seed, size)

        pair, beside = self.pairs[cell.classifier], dict[str, Any]()
        if pair is None:
            result = apply(classifier, torch.arange(len(x)))
        else:
            result, beside = pair.attacked(attack, self._seat(pair, cell.classifier, cell.attack, x[:1]), apply, len(x))
        far = float(threat.distance(result.x_adv.double(), result.x.double()).max())
        inside = threat.bounds is None or bool(
            ((result.x_adv >= threat.bounds[0]) & (result.x_adv <= threat.bounds[1])).all()
        )
        if far > cell.eps * (1 + 1e-5) + 1e-6 or not inside:
            raise RobustKNNError(
                f"attack {cell.attack!r} returned an example outside the threat model ({threat.norm} distance {far:g}, "
                f"eps {cell.eps:g}, inside the bounds: {inside}); its result is not counted."
            )
        return result, beside

    def _write_gallery(self, run: RunDirectory) -> None:
        """Images of the references that any shown sample has among its nearest, once all rows are there."""
        shown: dict[int, list[Tensor]] = {}
        for cell in run.cells:
            tensors = {} if cell.control else run.tensors(cell)
            for place, voter in enumerate(voters_of(self.classifiers[cell.classifier])):
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


def _one_by_one(job: Evaluation, identity: Mapping[str, str], todo: Sequence[Batch]) -> Generator[Finished]:
    """Every batch in this process, in order."""
    for cell, rows in todo:
        yield job.batch(cell, rows)
