"""The papers' networks, and weights into them. Every model takes pixels in [0, 1] and normalises inside.

A model names the layers that the papers' methods tap: `feature_layers`, in order, for DkNN and its kin, and
`embedding_layer` for a kNN on a single one.
"""

from robustknn.models.lipschitz import LipschitzCNN
from robustknn.models.lipschitz_bounds import lipschitz_bound
from robustknn.models.loading import Architecture, architecture, create, load_model
from robustknn.models.normalize import Normalize
from robustknn.models.resnet import CifarResNet, ResNet, resnet18, resnet20, resnet32, resnet44, resnet50
from robustknn.models.small import DigitsCNN, LeNet5, MnistCNN
from robustknn.models.vgg import VGG16BN
from robustknn.models.weights import load_weights

__all__ = [
    "VGG16BN",
    "Architecture",
    "CifarResNet",
    "DigitsCNN",
    "LeNet5",
    "LipschitzCNN",
    "MnistCNN",
    "Normalize",
    "ResNet",
    "architecture",
    "create",
    "lipschitz_bound",
    "load_model",
    "load_weights",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet50",
]
