"""A data set and a model of one's own, registered by name (or named as `module:function` without registering).

    robustknn train --plugin examples/own_data_and_model.py --data moons --model mlp --out runs/mlp
    robustknn evaluate --plugin examples/own_data_and_model.py --data moons --model mlp --checkpoint runs/mlp \
        --layer 1 --eps 0.1 --out runs/moons
"""

import numpy as np
from sklearn.datasets import make_moons
from torch import nn

from robustknn import registry


@registry.datasets.register("moons", "Two interleaving half circles, scaled into the unit square.")
def moons(n: int = 800, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x_train, y_train, x_test, y_test): arrays are enough."""
    x, y = make_moons(n, noise=noise, random_state=0)
    x = ((x - x.min(0)) / (x.max(0) - x.min(0))).astype(np.float32)
    return x[n // 4 :], y[n // 4 :], x[: n // 4], y[: n // 4]


@registry.models.register("mlp")
class MLP(nn.Sequential):
    """Two inputs, two hidden layers of 32."""

    embedding_layer = "3"
    feature_layers = ("1", "3", "4")

    def __init__(self, n_classes: int = 2) -> None:
        super().__init__(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, n_classes))
