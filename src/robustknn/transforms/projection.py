"""Principal components as a linear step of the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from robustknn.checks import as_tensor, check_finite, check_positive_int
from robustknn.errors import InputError
from robustknn.transforms.base import Transform


@dataclass(frozen=True, eq=False)
class Projection(Transform):
    """z → A (z − μ), the coordinates along the principal components of a sample; whitened, each divided by its spread.

    Values are flattened first.

    Attributes:
        mean: (D,), μ.
        components: (m, D), A: orthonormal rows, the one of most variance first, the largest entry of each positive.
        scale: (m,) the standard deviations (of n − 1) that whitening divides by; None without.
    """

    kind: ClassVar[str] = "projection"
    mean: Tensor
    components: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        m, shape = len(self.components), tuple(self.components.shape)
        if self.mean.shape != shape[1:] or (self.scale is not None and self.scale.shape != (m,)):
            raise InputError(f"a projection needs components (m, D), a mean (D,) and a scale (m,); got {shape}.")

    @classmethod
    @torch.no_grad()
    def fit(cls, vectors: Any, n_components: int, *, whiten: bool = False) -> Projection:
        """The principal components of vectors (n, D), by a singular value decomposition in float64.

        Raises:
            InputError: not (n, D), NaN or infinite values, fewer vectors or numbers in a vector than components, or,
                to whiten, a component without variance.
        """
        x = as_tensor(vectors, "the sample")
        check_positive_int(n_components, "n_components")
        if x.ndim != 2 or not x.is_floating_point():
            raise InputError(f"a projection is fitted on floating point vectors (n, D), not {tuple(x.shape)}.")
        check_finite(x, "the sample")
        n, dim = x.shape
        if n < n_components or n < 2:
            raise InputError(f"{n_components} components need as many samples and at least 2, not {n}; pass more.")
        if dim < n_components:
            raise InputError(f"vectors of length {dim} have no {n_components} components; lower n_components.")
        mean = x.double().mean(0)
        _, values, rows = torch.linalg.svd(x.double() - mean, full_matrices=False)
        components, values = rows[:n_components], values[:n_components]
        # The decomposition leaves each row's sign open.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        # Contiguous, as it is when loaded again: a product sums in an order that depends on the layout.
        components = (components * torch.where(largest < 0, -1.0, 1.0)).contiguous()
        if not whiten:
            return cls(mean, components)
        known = int((values > values[0] * max(n, dim) * torch.finfo(torch.float64).eps).sum())
        if known < n_components:
            raise InputError(f"the sample varies along {known} components only; lower n_components or do not whiten.")
        return cls(mean, components, values / (n - 1) ** 0.5)

    def __call__(self, value: Tensor) -> Tensor:
        value = value.flatten(1)
        if value.shape[1] != len(self.mean):
            raise InputError(
                f"a projection of vectors of length {len(self.mean)} was given length {value.shape[1]}; use the layer, "
                "the pooling and the input size it was fitted with."
            )
        found = (value - self.mean.to(value)) @ self.components.to(value).T
        return found if self.scale is None else found / self.scale.to(value)

    def tensors(self) -> dict[str, Tensor]:
        held = {"mean": self.mean, "components": self.components}
        return held if self.scale is None else {**held, "scale": self.scale}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(tensors["mean"], tensors["components"], tensors.get("scale"))

    def __repr__(self) -> str:
        m, dim = self.components.shape
        return f"Projection({dim} → {m}{'' if self.scale is None else ', whitened'})"
