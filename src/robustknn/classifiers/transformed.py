"""A network that sees its inputs through a transformation: the defenses that retrieval is compared with."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn

from robustknn import registry, rng, store
from robustknn.checks import check_positive_int, check_whole
from robustknn.classifiers.input_transforms import InputTransform
from robustknn.classifiers.randomized import Randomized, numbered
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor


@registry.classifiers.register("transformed")
class Transformed(Randomized):
    """The softmax of a network on transformed inputs; for a random transformation the mean over draws.

    Random numbers are counted from (seed, sample id), so a sample gets the same draws in every batch. Attacks on the
    network's own scores (`CrossEntropy` and its kin) know the network and not the transformation: gray-box. The
    objective `through-transform`, also in `worst-case`, attacks what is decided.

    Args:
        model: a module that returns class scores (N, C), or an extractor over one.
        n_classes: C.
        transform: `JPEG()`, `BitDepth()`, `TotalVariation()`, `RandomCrop()`.
        draws: of a random transformation, for each decision.
        seed: of these.

    Raises:
        InputError: no transformation, or several draws of one that is not random.
    """

    attackable = "use worst-case-fast, pgd with the objective through-transform, or square"

    def __init__(
        self,
        model: nn.Module | FeatureExtractor,
        n_classes: int,
        transform: InputTransform,
        *,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        self._extractor = model if isinstance(model, FeatureExtractor) else FeatureExtractor(model)
        self.n_classes = check_positive_int(n_classes, "n_classes")
        if not isinstance(transform, InputTransform):
            raise InputError(f"transform must be an InputTransform such as JPEG(), not {brief(transform)}.")
        self.transform, self.draws = transform, check_positive_int(draws, "draws")
        if self.draws > 1 and not transform.random:
            raise InputError(f"{transform} is the same in every draw; leave draws at 1.")
        self.seed = check_whole(seed, "seed")

    @property
    def extractor(self) -> FeatureExtractor:
        return self._extractor

    @property
    def random(self) -> bool:
        return self.transform.random

    def log_probabilities(self, x: Tensor, ids: Tensor, draws: int | None = None) -> Tensor:
        """log of the mean probabilities over draws, (N, C), differentiable when gradients are on.

        Args:
            x: (N, C, H, W), placed.
            ids: (N,) what random numbers are counted from.
            draws: how many; the classifier's own number by default.
        """
        count = (draws or self.draws) if self.transform.random else 1
        drawn = [self.transform(x, ids, rng.derive(self.seed, "draw", draw)) for draw in range(count)]
        logs = torch.stack([self._extractor.logits(part).log_softmax(1) for part in drawn])
        if logs.shape[2] != self.n_classes:
            raise InputError(f"the network returns {logs.shape[2]} scores for {self.n_classes} classes; match them.")
        return logs.logsumexp(0) - logs.new_tensor(float(count)).log()

    @torch.no_grad()
    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        x = self.place(x)
        ids = numbered(x, sample_ids)
        return self.log_probabilities(x, ids).double().exp()

    def fingerprint(self) -> str:
        made = {"transform": type(self.transform).__name__, **asdict(self.transform)}  # type: ignore[call-overload]
        said = {"type": "transformed", **made, "draws": self.draws, "seed": self.seed, "n_classes": self.n_classes}
        return store.fingerprint_config({**said, "network": self._extractor.fingerprint()})

    def __repr__(self) -> str:
        return f"Transformed({self.transform}, draws={self.draws})"
