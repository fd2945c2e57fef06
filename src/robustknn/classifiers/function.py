"""A classifier of which nothing is known but its answers: any function of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustknn import store
from robustknn.checks import (
    as_tensor,
    check_choice,
    check_finite,
    check_inputs,
    check_labels,
    check_positive_int,
    class_numbers,
)
from robustknn.classifiers.base import Classifier
from robustknn.errors import InputError, brief


class FunctionClassifier(Classifier):
    """What a function answers, as a classifier: a service, a pipeline, a model of another library.

    Attacks that need gradients or references refuse it; square, hop-skip-jump and boundary do not need them.

    Args:
        f: maps a batch (n, …) to its labels (n,) or scores (n, C), as a tensor, an array or a list. It gets a copy of
            the inputs, and must answer each of them alike in every batch and at any time.
        n_classes: the number of classes, 0..C − 1; or their names, in order, where f answers with names.
        kind: "labels": f decides, and a label counts as a score of 1; "scores": larger for more likely classes.
        inputs: what f takes, "torch" tensors or "numpy" arrays.
        batch_size: samples that f takes at once.
        device, dtype: where and as what f gets its tensors; None leaves them as they come.
        name: identifies f in an evaluation that is to be continued: change it when f changes.
        probe: inputs whose answers identify f instead.

    Attributes:
        classes_: (C,) the labels, in the order of the score columns.

    Raises:
        InputError: f is no function, fewer than one class, a wrong kind.
    """

    def __init__(
        self,
        f: Callable[[Any], Any],
        n_classes: int | Sequence[Any],
        *,
        kind: str = "labels",
        inputs: str = "torch",
        batch_size: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        probe: Any = None,
    ) -> None:
        if not callable(f):
            raise InputError(f"f must be a function of a batch of inputs, not {brief(f)}.")
        if isinstance(n_classes, (int, np.integer)):
            self.classes_ = np.arange(check_positive_int(n_classes, "n_classes"))
        else:
            self.classes_ = np.asarray(list(n_classes))
        if self.classes_.ndim != 1 or not len(self.classes_) or len(np.unique(self.classes_)) < len(self.classes_):
            raise InputError(f"n_classes must be a number or the classes' distinct names, not {brief(n_classes)}.")
        self.n_classes = len(self.classes_)
        self.f, self.device, self.dtype, self.name, self.probe = f, device, dtype, name, probe
        self.kind = check_choice(kind, ("labels", "scores"), "kind")
        self.inputs = check_choice(inputs, ("torch", "numpy"), "inputs")
        self.batch_size = check_positive_int(batch_size, "batch_size")

    def place(self, x: Any) -> Tensor:
        return check_inputs(x).to(self.device, self.dtype)

    @torch.no_grad()
    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        x = self.place(x)
        asked = x[: _distinct(x)]
        answers = torch.cat([self._ask(part) for part in asked.split(self.batch_size)]).to(x.device)
        return torch.cat([answers, answers[:1].expand(len(x) - len(asked), -1)])

    def _ask(self, x: Tensor) -> Tensor:
        """What f says of one batch, as scores (n, C) float64."""
        # torch.Tensor.numpy shares its memory, and f may write into what it gets.
        given = x.detach().clone()
        answer = self.f(given if self.inputs == "torch" else given.cpu().numpy())
        return self._from_labels(answer, len(x)) if self.kind == "labels" else self._from_scores(answer, len(x))

    def _from_labels(self, answer: Any, n: int) -> Tensor:
        what = "what f returned"
        answer = answer.detach() if isinstance(answer, Tensor) else np.asarray(answer)
        if tuple(answer.shape) != (n,):
            hint = "; if these are scores, pass kind='scores'" if answer.ndim == 2 else ""
            raise InputError(f"{what} has shape {tuple(answer.shape)} for {n} inputs; labels have shape ({n},){hint}.")
        if not np.array_equal(self.classes_, np.arange(self.n_classes)):
            answer = class_numbers(answer, self.classes_, what)
        return nn.functional.one_hot(check_labels(answer, n, self.n_classes, what), self.n_classes).double()

    def _from_scores(self, answer: Any, n: int) -> Tensor:
        what = "what f returned"
        scores = as_tensor(answer.detach() if isinstance(answer, Tensor) else answer, what)
        if tuple(scores.shape) != (n, self.n_classes):
            hint = "; if these are labels, pass kind='labels'" if scores.ndim == 1 else ""
            raise InputError(
                f"{what} has shape {tuple(scores.shape)} for {n} inputs; scores of {self.n_classes} classes have shape "
                f"({n}, {self.n_classes}){hint}."
            )
        if scores.is_complex():
            raise InputError(f"{what} is complex; scores are real numbers.")
        check_finite(scores, what)
        return scores.double()

    def fingerprint(self) -> str:
        """A sha256 of the function's name, or of its answers on the probe.

        Raises:
            InputError: neither was given.
        """
        if self.name is None and self.probe is None:
            raise InputError(
                "one function cannot be told from another, which an evaluation must; pass name= (and change it when "
                "the function changes), or probe=, inputs whose answers identify it."
            )
        said = {"type": "function", "name": self.name, "kind": self.kind, "classes": [str(c) for c in self.classes_]}
        answers = {} if self.probe is None else {"answers": self.scores(self.probe)}
        return store.fingerprint_tensors(answers, store.fingerprint_config(said))

    def __repr__(self) -> str:
        name = self.name or getattr(self.f, "__qualname__", type(self.f).__name__)
        return f"FunctionClassifier({name}, {self.n_classes} classes, kind={self.kind!r})"


def _distinct(x: Tensor) -> int:
    """How many rows are left when the copies of the first at the end, which fill up small batches, are taken away."""
    other = (x != x[:1]).flatten(1).any(1).nonzero()[:, 0]
    return int(other[-1]) + 1 if len(other) else 1
