"""The small convolutional networks: MNIST, the 8×8 digits, LeNet-5.

Every ReLU is a module of its own, so that what enters it (`relu1:input`) and what leaves it can both be tapped.
"""

from __future__ import annotations

from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import check_choice, check_positive_int
from robustknn.errors import InputError

FORMS = ("padded", "unpadded")


def _size(size: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """The width of a convolution's output."""
    return (size + 2 * padding - kernel) // stride + 1


@registry.models.register("mnist-cnn")
class MnistCNN(nn.Module):
    """Three convolutions and a linear layer: the MNIST network of DkNN and of the papers that followed it.

    conv 64 8×8 stride 2 padding 3, conv 128 6×6 stride 2, conv 128 5×5, each with ReLU (and dropout), linear.

    Args:
        n_classes: the number of classes.
        in_channels: channels of the input, pixels in [0, 1], not normalised.
        image_size: height and width of the input.
        form: "padded" pads the second convolution by 2, features 12544, 6272, 1152 and 10 on MNIST (AdvKNN,
            arXiv 1911.06591); "unpadded" does not, features 12544, 3200, 128 and 10 (DkNN, arXiv 1803.04765;
            DAEkNN, arXiv 2108.06797).
        dropout: probability after each ReLU (DAEkNN: 0.5).

    Raises:
        InputError: a value out of range, or an image too small for the convolutions.
    """

    feature_layers = ("relu1", "relu2", "relu3", "fc")
    embedding_layer = "relu3"

    def __init__(
        self,
        n_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        form: str = "padded",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive_int(n_classes, "n_classes")
        check_positive_int(in_channels, "in_channels")
        check_positive_int(image_size, "image_size")
        padding = 2 if check_choice(form, FORMS, "form") == "padded" else 0
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {dropout!r}.")
        size = _size(_size(_size(image_size, 8, 2, 3), 6, 2, padding), 5)
        if size < 1:
            raise InputError(
                f"images of {image_size} × {image_size} are too small for the {form} mnist-cnn; use larger ones."
            )
        self.conv1 = nn.Conv2d(in_channels, 64, 8, stride=2, padding=3)
        self.relu1 = nn.ReLU()
        self.dropout1 = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(64, 128, 6, stride=2, padding=padding)
        self.relu2 = nn.ReLU()
        self.dropout2 = nn.Dropout(dropout)
        self.conv3 = nn.Conv2d(128, 128, 5)
        self.relu3 = nn.ReLU()
        self.dropout3 = nn.Dropout(dropout)
        self.fc = nn.Linear(128 * size * size, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(self.relu1(self.conv1(x)))
        x = self.dropout2(self.relu2(self.conv2(x)))
        x = self.dropout3(self.relu3(self.conv3(x)))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


@registry.models.register("digits-cnn")
class DigitsCNN(nn.Module):
    """Three 3×3 convolutions (32, 64, 64 channels) and a linear layer for images of 8×8 pixels in [0, 1].

    Args:
        n_classes: the number of classes.
        in_channels: channels of the input.
    """

    feature_layers = ("relu1", "relu2", "relu3", "fc")
    embedding_layer = "relu3"

    def __init__(self, n_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        check_positive_int(n_classes, "n_classes")
        check_positive_int(in_channels, "in_channels")
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.relu3 = nn.ReLU()
        self.fc = nn.Linear(256, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        x = self.relu3(self.conv3(x))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


@registry.models.register("lenet5", "LeNet-5 with ReLU and max pooling, for images of 28×28 or 32×32 pixels.")
class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998) with ReLU and
    max pooling, for images of 28×28 or 32×32 pixels in [0, 1].

    Args:
        n_classes: the number of classes.
        in_channels: channels of the input.
        image_size: 28 (padded to 32 by the first convolution) or 32.

    Raises:
        InputError: another image size.
    """

    feature_layers = ("relu1", "relu2", "relu3", "relu4", "fc")
    embedding_layer = "relu4"

    def __init__(self, n_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        check_positive_int(n_classes, "n_classes")
        check_positive_int(in_channels, "in_channels")
        if image_size not in (28, 32):
            raise InputError(f"lenet5 takes images of 28 × 28 or 32 × 32, not image_size={image_size!r}.")
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(400, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc = nn.Linear(84, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc(self.relu4(self.fc2(x)))
        return logits
