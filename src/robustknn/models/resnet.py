"""Residual networks (He et al., arXiv 1512.03385): ResNet-20/32/44 for CIFAR, ResNet-18/50 for ImageNet.

Parameter names and shapes are those of the published weights: akamaster's pytorch_resnet_cifar10 for the first
family, torchvision's for the second. Inputs are pixels in [0, 1]; both normalise inside.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import check_positive_int
from robustknn.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        summed: Tensor = self.relu(self.bn2(self.conv2(out)) + shortcut)
        return summed


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut. The stride is in the 3×3 ("v1.5"), as in published weights."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        summed: Tensor = self.relu(self.bn3(self.conv3(out)) + shortcut)
        return summed


class PaddedShortcut(nn.Module):
    """Shortcut option A of the paper: every second pixel, new channels filled with zeros; no parameters."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.extra - before))

    def extra_repr(self) -> str:
        return f"extra={self.extra}"


def _initialise(model: nn.Module) -> None:
    """He et al.'s normal initialisation of every convolution, arXiv 1502.01852."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarResNet(nn.Module):
    """A residual network of 6n + 2 layers for images (N, 3, 32, 32).

    Args:
        blocks: n, the blocks in each of the three stages.
        n_classes: the number of classes.
    """

    feature_layers = ("layer1", "layer2", "layer3", "linear")
    embedding_layer = "avgpool"

    def __init__(self, blocks: int, n_classes: int = 10) -> None:
        super().__init__()
        check_positive_int(n_classes, "n_classes")
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, n_classes)
        _initialise(self)

    @staticmethod
    def _stage(inputs: int, width: int, blocks: int) -> nn.Sequential:
        grows = inputs != width
        first = BasicBlock(inputs, width, 2 if grows else 1, PaddedShortcut(width - inputs) if grows else None)
        return nn.Sequential(first, *(BasicBlock(width, width, 1, None) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits


class ResNet(nn.Module):
    """A residual network with a 7×7 stem for images (N, 3, H, W), usually of 224×224.

    Args:
        block: the kind of block.
        blocks: how many in each of the four stages.
        n_classes: the number of classes.
    """

    feature_layers = ("layer1", "layer2", "layer3", "layer4", "fc")
    embedding_layer = "avgpool"

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, int, int, int], n_classes: int = 1000
    ) -> None:
        super().__init__()
        check_positive_int(n_classes, "n_classes")
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = self._stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = self._stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = self._stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, n_classes)
        _initialise(self)

    @staticmethod
    def _stage(
        block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, blocks: int, stride: int
    ) -> nn.Sequential:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or inputs != outputs:
            downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        first = block(inputs, width, stride, downsample)
        return nn.Sequential(first, *(block(outputs, width, 1, None) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


@registry.models.register("resnet20")
def resnet20(n_classes: int = 10) -> CifarResNet:
    """ResNet-20 for CIFAR, 0.27 million parameters."""
    return CifarResNet(3, n_classes)


@registry.models.register("resnet32")
def resnet32(n_classes: int = 10) -> CifarResNet:
    """ResNet-32 for CIFAR, 0.46 million parameters."""
    return CifarResNet(5, n_classes)


@registry.models.register("resnet44")
def resnet44(n_classes: int = 10) -> CifarResNet:
    """ResNet-44 for CIFAR, 0.66 million parameters."""
    return CifarResNet(7, n_classes)


@registry.models.register("resnet18")
def resnet18(n_classes: int = 1000) -> ResNet:
    """ResNet-18 for ImageNet, 11.7 million parameters; torchvision's weights load."""
    return ResNet(BasicBlock, (2, 2, 2, 2), n_classes)


@registry.models.register("resnet50")
def resnet50(n_classes: int = 1000) -> ResNet:
    """ResNet-50 for ImageNet, 25.6 million parameters; torchvision's weights load."""
    return ResNet(Bottleneck, (3, 4, 6, 3), n_classes)
