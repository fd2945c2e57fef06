"""Training: one trainer, to which methods lend their loss."""

from robustknn.training.augment import crop_and_flip
from robustknn.training.checkpoints import EpochRecord
from robustknn.training.config import TrainConfig
from robustknn.training.label_filter import FilteredLabels, filter_labels, with_symmetric_noise
from robustknn.training.methods import Method, Standard
from robustknn.training.randomness import initialise
from robustknn.training.trainer import TrainingData, TrainResult, accuracy, train

__all__ = [
    "EpochRecord",
    "FilteredLabels",
    "Method",
    "Standard",
    "TrainConfig",
    "TrainResult",
    "TrainingData",
    "accuracy",
    "crop_and_flip",
    "filter_labels",
    "initialise",
    "train",
    "with_symmetric_noise",
]
