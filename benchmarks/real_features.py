"""Features of augmented CIFAR-10 images by a ResNet-20, as many as asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from robustknn import datasets, models
from robustknn.features import evaluating
from robustknn.models.normalize import IMAGENET_MEAN, IMAGENET_STD
from robustknn.training.augment import crop_and_flip

NAME = "features of CIFAR-10's training images, cropped and mirrored anew for each, by a ResNet-20 (last stage, pooled)"
_BATCH = 500


class Pooled(nn.Module):
    """The last stage's 64 maps of 8 × 8 averaged over `side` × `side` fields: 64 · side² numbers."""

    def __init__(self, side: int, weights: Path) -> None:
        super().__init__()
        self.net, self.normalize, self.side = models.resnet20(), models.Normalize(IMAGENET_MEAN, IMAGENET_STD), side
        models.load_weights(self.net, weights)
        self._kept: list[Tensor] = []
        self.net.layer3.register_forward_hook(lambda _, __, out: self._kept.append(out))

    def forward(self, x: Tensor) -> Tensor:
        self.net(self.normalize(x))
        return nn.functional.adaptive_avg_pool2d(self._kept.pop(), self.side).flatten(1)


def features(data: Path, weights: Path, dim: int, n: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """References (n, dim), their labels (n,) and queries (queries, dim), which are test images as they are.

    Args:
        data: the folder that holds CIFAR-10.
        weights: those of a ResNet-20.
        dim: 64, 256 or 1024.
    """
    side = {64: 1, 256: 2, 1024: 4}.get(dim)
    if side is None:
        raise SystemExit(f"real features have 64, 256 or 1024 numbers, not {dim}.")
    net = Pooled(side, weights)
    source = datasets.load("cifar10", root=data, protocol="published")
    vectors, labels = torch.empty(n, dim), torch.empty(n, dtype=torch.int64)
    with evaluating(net), torch.no_grad():
        for start in range(0, n, _BATCH):
            places = torch.arange(start, min(start + _BATCH, n))
            ids = places % len(source.train)
            x = crop_and_flip(source.train.batch(ids), places, 0, 0)
            vectors[places], labels[places] = net(x), source.train.labels[ids]
        asked = [net(source.test.batch(part)) for part in torch.arange(queries).split(_BATCH)]
    return vectors, labels, torch.cat(asked)
