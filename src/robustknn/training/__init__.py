"""Training: one trainer, to which methods lend their loss."""

from robustknn.training.augment import crop_and_flip
from robustknn.training.checkpoints import EpochRecord
from robustknn.training.config import TrainConfig
from robustknn.training.methods import Method, Standard
from robustknn.training.randomness import initialise
from robustknn.training.trainer import TrainingData, TrainResult, accuracy, train

__all__ = [
    "EpochRecord",
    "Method",
    "Standard",
    "TrainConfig",
    "TrainResult",
    "TrainingData",
    "accuracy",
    "crop_and_flip",
    "initialise",
    "train",
]
