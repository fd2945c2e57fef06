"""Attacks that see nothing but decisions, by foolbox or ART: HopSkipJump and the boundary attack.

Chen, Jordan & Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", arXiv 1904.02144;
Brendel, Rauber & Bethge, "Decision-Based Adversarial Attacks", arXiv 1712.04248.

They look for the nearest wrong input of one sample at a time, from a wrong one that is given to them. All they ask
passes by here: it is counted and bounded, and the nearest wrong input ever asked about is what counts.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustknn import registry, rng
from robustknn.attacks.base import Attack, Job, padded_rows
from robustknn.attacks.foreign import load_art, load_foolbox, seeded
from robustknn.checks import check_choice, check_positive_int, check_whole
from robustknn.classifiers.base import Classifier, VoterClassifier
from robustknn.classifiers.rules import TIE
from robustknn.errors import InputError
from robustknn.reference import ReferenceSet
from robustknn.threat import per_sample

BACKENDS = ("art", "foolbox")
_SCALES = (1, 2, 4, 0)
"""Cells a side of the noise that attacks start from; 0 is one a pixel."""


@dataclass(frozen=True)
class DecisionAttack(Attack):
    """The nearest wrong input that another library's decision-based attack finds.

    Args:
        queries: looks at the classifier a sample, in all; four at least.
        starts: how many inputs are tried as the first wrong one, of which the nearest is taken: images of other classes
            (for a target: of it) where the classifier keeps those of its references, random patterns otherwise.
        minimize: go on after an example inside the threat model was found, towards the nearest one.
        backend: "art" or "foolbox" (the extras of these names). ART's forms ask many inputs at once; foolbox's ask one
            at a time when they work on one sample, which takes several times as long.
    """

    queries: int = 2000
    starts: int = 16
    minimize: bool = False
    backend: str = "art"

    def __post_init__(self) -> None:
        check_whole(self.queries, "queries", 4)
        check_positive_int(self.starts, "starts")
        check_choice(self.backend, BACKENDS, "backend")
        if not isinstance(self.minimize, bool):
            raise InputError(f"minimize must be True or False, not {self.minimize!r}.")

    def check(self, classifier: Classifier, x: Tensor) -> None:
        (load_art if self.backend == "art" else load_foolbox)()

    @abstractmethod
    def foreign(self, library: Any, norm: str) -> tuple[type[Any], dict[str, Any]]:
        """The library's class for a threat model's norm, and its settings."""

    def run(self, job: Job) -> None:
        if job.threat.bounds is None:
            raise InputError(
                "this attack starts far from its input and needs to know where inputs live; give the threat model "
                "bounds, or use the attack 'square'."
            )
        rows = torch.arange(len(job.x), device=job.x.device)
        job.begin(job.look(job.x, rows)[0])
        found = job.x.clone()
        standing = job.standing().tolist()
        for place, row in enumerate(standing):
            twin = next((r for r in standing[:place] if _same(job, r, row)), None)
            if twin is None:
                found[row] = self._search(_Oracle(job, row, self.queries - 2, self.minimize))
            else:  # small batches are padded with copies of their first sample
                found[row], job.forward_passes[row] = found[twin], job.forward_passes[twin]
        rows = padded_rows((found != job.x).flatten(1).any(1).nonzero()[:, 0])
        if len(rows):
            threat, x = job.threat.select(rows), job.x[rows]
            outside = threat.distance(found[rows].double(), x.double()) > threat.radii(x.double()).reshape(-1)
            near = torch.where(per_sample(outside, x), threat.project(found[rows], x), found[rows])
            job.offer_nearest(near, rows, job.look(near, rows)[0])

    def _search(self, oracle: _Oracle) -> Tensor:
        """The nearest wrong input of a sample; the sample itself where none was met."""
        try:
            oracle.begin(self.starts)
            if oracle.found:
                with seeded(rng.derive(oracle.job.seed, "decisions", int(oracle.job.ids[oracle.row]))):
                    (self._by_art if self.backend == "art" else self._by_foolbox)(oracle)
        except _Done:
            pass
        except AssertionError:  # foolbox asserts that points it moved by rounding are still wrong
            pass
        return oracle.nearest

    def _by_art(self, oracle: _Oracle) -> None:
        art = load_art()
        kind, settings = self.foreign(art.attacks.evasion, oracle.job.threat.norm)
        clean, start = (oracle.scaled(p)[None].cpu().float().numpy() for p in (oracle.x, oracle.nearest))

        def decisions(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            wrong = oracle.ask(torch.from_numpy(np.asarray(z)))
            return nn.functional.one_hot(wrong.long(), 2).float().cpu().numpy()

        estimator = art.estimators.classification.BlackBoxClassifier(
            decisions, input_shape=clean.shape[1:], nb_classes=2, clip_values=(0.0, 1.0)
        )
        attack = kind(estimator, targeted=False, batch_size=256, verbose=False, **settings)
        attack.generate(clean, y=np.array([[1.0, 0.0]]), x_adv_init=start)

    def _by_foolbox(self, oracle: _Oracle) -> None:
        foolbox = load_foolbox()
        kind, settings = self.foreign(foolbox.attacks, oracle.job.threat.norm)
        clean, start = (oracle.scaled(p)[None] for p in (oracle.x, oracle.nearest))
        model = foolbox.PyTorchModel(_Decisions(oracle).eval(), bounds=(0, 1), device=clean.device)
        label = foolbox.criteria.Misclassification(torch.zeros(1, dtype=torch.long, device=clean.device))
        kind(**settings).run(model, clean, label, starting_points=start)


@registry.attacks.register("hop-skip-jump")
@dataclass(frozen=True)
class HopSkipJump(DecisionAttack):
    """HopSkipJump follows gradients of the decision's boundary that it estimates from decisions alone.

    Its geometry is that of L∞ in an L∞ threat model and of L2 in the others. See `DecisionAttack` for the other
    parameters.

    Args:
        evaluations: decisions for the first estimate of the gradient; the t-th takes √t times as many.
    """

    evaluations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int(self.evaluations, "evaluations")

    def foreign(self, library: Any, norm: str) -> tuple[type[Any], dict[str, Any]]:
        if self.backend == "art":
            order = np.inf if norm == "linf" else 2
            return library.HopSkipJump, {"norm": order, "max_iter": self.queries, "init_eval": self.evaluations}
        constraint = "linf" if norm == "linf" else "l2"
        settings = {"steps": self.queries, "initial_gradient_eval_steps": self.evaluations, "constraint": constraint}
        return library.HopSkipJumpAttack, settings


@registry.attacks.register("boundary")
@dataclass(frozen=True)
class Boundary(DecisionAttack):
    """The boundary attack walks at random along the decision's boundary, towards the input.

    It makes the L2 distance small, in every threat model: for L∞ use HopSkipJump. See `DecisionAttack` for the
    parameters.
    """

    def foreign(self, library: Any, norm: str) -> tuple[type[Any], dict[str, Any]]:
        if self.backend == "art":
            return library.BoundaryAttack, {"max_iter": self.queries}
        return library.BoundaryAttack, {"steps": self.queries}


def _same(job: Job, a: int, b: int) -> bool:
    """Whether two rows of a job are one sample."""
    parts = [job.ids, job.y, job.x, job.threat.radii(job.x).reshape(-1).expand(len(job.x))]
    return all(torch.equal(t[a], t[b]) for t in (parts if job.target is None else [*parts, job.target]))


class _Done(Exception):  # noqa: N818 - it ends a search, and is no error
    """The queries are spent, or an example was found."""


class _Decisions(nn.Module):
    """An oracle as a classifier of two classes, right and wrong."""

    def __init__(self, oracle: _Oracle) -> None:
        super().__init__()
        self.oracle = oracle

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.one_hot(self.oracle.ask(z).long(), 2).to(z.dtype)


class _Oracle:
    """Whether inputs are wrong, for one sample: beyond a tie, as everywhere. It knows the nearest that was.

    The other libraries see inputs scaled to [0, 1]: foolbox's HopSkipJump clips there whatever the bounds are.
    """

    def __init__(self, job: Job, row: int, queries: int, minimize: bool) -> None:
        assert job.threat.bounds is not None
        self.job, self.row, self.left, self.minimize = job, row, queries, minimize
        self.rows = torch.tensor([row], device=job.x.device)
        self.threat = job.threat.select(self.rows)
        self.low, high = job.threat.bounds
        self.extent = high - self.low
        self.x = self.nearest = job.x[row]
        self.distance, self.radius = float("inf"), float(self.threat.radii(self.x[None].double()).reshape(-1)[0])

    @property
    def found(self) -> bool:
        """Whether any input was wrong."""
        return self.distance < float("inf")

    def scaled(self, x: Tensor) -> Tensor:
        """An input as the other library sees it."""
        return (x - self.low) / self.extent

    def ask(self, z: Tensor) -> Tensor:
        """Whether the classifier is wrong about these, (n,) bool."""
        x = (self.low + self.extent * z.to(self.x)).clamp(self.low, self.low + self.extent)
        return self.wrong(x.view(len(z), *self.x.shape))

    def wrong(self, x: Tensor) -> Tensor:
        """Whether the classifier is wrong about these inputs, (n,) bool; raises _Done when they were too many."""
        asked = x[: self.left]
        self.left -= len(asked)
        self.job.forward_passes[self.row] += len(asked)
        rows = self.rows.expand(len(asked))
        wrong = self.job.lead(self._scores(asked), rows) < -TIE if len(asked) else torch.zeros(0, dtype=torch.bool)
        if bool(wrong.any()):
            distances = self.threat.distance(asked[wrong].double(), self.x.double())
            best = int(distances.argmin())
            if float(distances[best]) < self.distance:
                self.nearest, self.distance = asked[wrong][best].clone(), float(distances[best])
        inside = self.distance <= self.radius
        if len(asked) < len(x) or (inside and not self.minimize):
            raise _Done
        return wrong

    def _scores(self, x: Tensor) -> Tensor:
        padded = x[padded_rows(torch.arange(len(x), device=x.device))]
        ids = self.job.ids[self.rows].expand(len(padded))
        classifier = self.job.classifier
        if isinstance(classifier, VoterClassifier):
            return classifier.look(padded).scores[: len(x)]
        return classifier.scores(padded, ids)[: len(x)]

    def begin(self, count: int) -> None:
        """Look for a first wrong input among images of other classes, or random patterns."""
        bank = self._bank()
        self.wrong(self._patterns(count) if bank is None else self._images(bank, count))

    def _bank(self) -> ReferenceSet | None:
        """The classifier's references, where they keep images like the input that lie in the bounds."""
        voters = self.job.classifier.voters if isinstance(self.job.classifier, VoterClassifier) else ()
        bank = voters[0].references if voters else None
        return bank if bank is not None and bank.images is not None else None

    def _images(self, bank: ReferenceSet, count: int) -> Tensor:
        target = self.job.target
        label = self.job.y[self.row] if target is None else target[self.row]
        labels = bank.labels.to(label.device)
        others = ((labels != label) if target is None else (labels == label)).nonzero()[:, 0]
        keys = rng.uniform(self.job.ids[self.rows], (count,), self.job.seed, "starts", dtype=torch.float64)[0]
        chosen = others[(keys * len(others)).long()] if len(others) else others
        return bank.image(chosen).to(self.x).clamp(self.low, self.low + self.extent).view(-1, *self.x.shape)

    def _patterns(self, count: int) -> Tensor:
        """Uniform noise in the bounds, from one color to one number a pixel."""
        x = self.x if self.x.ndim == 3 else self.x.reshape(1, 1, -1)
        patterns = []
        for i in range(count):
            cells = [min(_SCALES[i % len(_SCALES)] or side, side) for side in x.shape[1:]]
            shape = (x.shape[0], *cells)
            noise = rng.uniform(self.job.ids[self.rows], shape, self.job.seed, "pattern", i, dtype=torch.float64)
            patterns.append(nn.functional.interpolate(noise, x.shape[1:])[0])
        return (self.low + self.extent * torch.stack(patterns)).to(self.x).view(-1, *self.x.shape)
