"""Training: one trainer, to which methods lend their loss."""

from robustknn.training.adversarial import TRADES, Adversarial, fast
from robustknn.training.ask_def import ASKDef
from robustknn.training.augment import crop_and_flip
from robustknn.training.checkpoints import EpochRecord
from robustknn.training.config import TrainConfig
from robustknn.training.gaussian import Gaussian
from robustknn.training.inner import PerturbedMethod
from robustknn.training.label_filter import FilteredLabels, filter_labels, with_symmetric_noise
from robustknn.training.margin import LipschitzMargin
from robustknn.training.methods import Batch, Method, Standard
from robustknn.training.randomness import initialise
from robustknn.training.robust import RobustCheck
from robustknn.training.stream import ReferenceStream
from robustknn.training.trainer import TrainingData, TrainResult, accuracy, train

__all__ = [
    "TRADES",
    "ASKDef",
    "Adversarial",
    "Batch",
    "EpochRecord",
    "FilteredLabels",
    "Gaussian",
    "LipschitzMargin",
    "Method",
    "PerturbedMethod",
    "ReferenceStream",
    "RobustCheck",
    "Standard",
    "TrainConfig",
    "TrainResult",
    "TrainingData",
    "accuracy",
    "crop_and_flip",
    "fast",
    "filter_labels",
    "initialise",
    "train",
    "with_symmetric_noise",
]
