"""A network whose features move no farther than its input: almost-orthogonal layers and pairwise sorting.

Prach & Lampert, "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks", arXiv 2208.03160: with
d_i = (Σ_j |AᵀA|_ij)^(−1/2) the matrix A·diag(d) has spectral norm at most 1. Anil, Lucas & Grosse, "Sorting out
Lipschitz function approximation", arXiv 1811.05381: sorting pairs keeps norms.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import check_positive_int
from robustknn.errors import InputError

_LEAST = 1e-12


def gram_rows(kernel: Tensor) -> Tensor:
    """|KᵀK| of a convolution on an unbounded image, summed over shifts: (c, c) for a kernel (o, c, h, w).

    No image makes the convolution's own Gram matrix larger: with padding its outputs are some of all, its inputs too.
    """
    h, w = kernel.shape[2:]
    shifted = nn.functional.conv2d(kernel.transpose(0, 1), kernel.transpose(0, 1), padding=(h - 1, w - 1))
    return shifted.abs().sum((2, 3))


class AlmostOrthogonalLinear(nn.Linear):
    """A linear layer whose matrix is rescaled on its smaller side to spectral norm at most 1."""

    def kernel(self) -> Tensor:
        """The matrix (out, in) that multiplies."""
        matrix = self.weight
        wide = matrix.shape[0] < matrix.shape[1]
        gram = matrix @ matrix.T if wide else matrix.T @ matrix
        scale = gram.abs().sum(1).clamp_min(_LEAST).rsqrt()
        return matrix * (scale[:, None] if wide else scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kernel(), self.bias)


class AlmostOrthogonalConv2d(nn.Conv2d):
    """A convolution with stride 1 and zero padding, rescaled likewise over the channels of its smaller side."""

    def kernel(self) -> Tensor:
        """The kernel (out, in, h, w) that is convolved with."""
        wide = self.weight.shape[0] < self.weight.shape[1]
        side = self.weight.transpose(0, 1) if wide else self.weight
        scale = gram_rows(side).sum(1).clamp_min(_LEAST).rsqrt()
        return self.weight * (scale[:, None, None, None] if wide else scale[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel(), self.bias, padding=self.padding)


class MaxMin(nn.Module):
    """Neighboring channels (N, C, …) in order, the larger first: no norm changes, and no distance grows."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise InputError(f"MaxMin sorts pairs of channels and there are {x.shape[1]}; use an even number.")
        pairs = x.unflatten(1, (-1, 2))
        return torch.stack([pairs.amax(2), pairs.amin(2)], 2).flatten(1, 2)


@registry.models.register("lipschitz-cnn")
class LipschitzCNN(nn.Sequential):
    """A small 1-Lipschitz convolutional network: features move in L2 no farther than pixels do.

    Three almost-orthogonal 3×3 convolutions, the image folded 2×2 into channels before the first and the third, then
    two linear layers, sorted in pairs between. Pixels in [0, 1] come in as they are: no normalisation stretches them.
    `robustknn.models.lipschitz_bound` computes the constant from the weights. Train it by "lipschitz-margin".

    Args:
        n_classes: the number of classes.
        in_channels: channels of the input.
        image_size: height and width of the input, a multiple of 4.
        width: channels of the convolutions, an even number; the third has twice as many.
        embedding: numbers of the embedding, an even number.

    Raises:
        InputError: a value out of range, or an odd one.
    """

    feature_layers = ("sort1", "sort2", "sort3", "embed", "fc")
    embedding_layer = "embed"

    def __init__(
        self, n_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: int = 32, embedding: int = 256
    ) -> None:
        for name, value in (("n_classes", n_classes), ("in_channels", in_channels)):
            check_positive_int(value, name)
        for name, value, factor in (("image_size", image_size, 4), ("width", width, 2), ("embedding", embedding, 2)):
            if check_positive_int(value, name) % factor:
                raise InputError(f"{name} must be a multiple of {factor} for lipschitz-cnn, not {value}.")
        flat = 2 * width * (image_size // 4) ** 2
        super().__init__(
            OrderedDict(
                fold1=nn.PixelUnshuffle(2),
                conv1=AlmostOrthogonalConv2d(4 * in_channels, width, 3, padding=1),
                sort1=MaxMin(),
                conv2=AlmostOrthogonalConv2d(width, width, 3, padding=1),
                sort2=MaxMin(),
                fold2=nn.PixelUnshuffle(2),
                conv3=AlmostOrthogonalConv2d(4 * width, 2 * width, 3, padding=1),
                sort3=MaxMin(),
                flatten=nn.Flatten(),
                fc1=AlmostOrthogonalLinear(flat, embedding),
                embed=MaxMin(),
                fc=AlmostOrthogonalLinear(embedding, n_classes),
            )
        )
        for module in self:
            if isinstance(module, AlmostOrthogonalLinear):
                nn.init.orthogonal_(module.weight)
            elif isinstance(module, AlmostOrthogonalConv2d):
                nn.init.zeros_(module.weight)  # the middle alone at first: norms are kept, where rescaling would shrink
                nn.init.orthogonal_(module.weight[:, :, 1, 1])
            if isinstance(module, (AlmostOrthogonalConv2d, AlmostOrthogonalLinear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
