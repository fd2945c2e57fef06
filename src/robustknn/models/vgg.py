"""VGG-16 with batch normalisation for images of 32×32, in five blocks that can be tapped."""

from __future__ import annotations

from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import check_positive_int

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _block(channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """3×3 convolutions with batch normalisation and ReLU, then 2×2 max pooling."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.MaxPool2d(2))


@registry.models.register("vgg16-bn", "VGG-16 with batch normalisation for 32×32 images, 512-512-512-C head.")
class VGG16BN(nn.Module):
    """VGG-16 with batch normalisation and a 512-512-512-C head with dropout, as ASK (arXiv 2106.14300) and
    DAEkNN (arXiv 2108.06797) use it on CIFAR-10: pixels in [0, 1], not normalised.

    `layer1` … `layer5` end in a pooling: 64×16×16, 128×8×8, 256×4×4, 512×2×2, 512×1×1. ASK attacks `layer4`;
    DAEkNN votes with `layer3` and `layer4`.

    Args:
        n_classes: the number of classes.
        in_channels: channels of the input.
    """

    feature_layers = ("layer1", "layer2", "layer3", "layer4", "layer5", "classifier")
    embedding_layer = "layer4"

    def __init__(self, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_positive_int(n_classes, "n_classes")
        check_positive_int(in_channels, "in_channels")
        inputs = (in_channels, *(widths[-1] for widths in BLOCKS[:-1]))
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = map(_block, inputs, BLOCKS)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.layer5(self.layer4(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits
