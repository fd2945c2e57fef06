"""You have a function that tells the labels of images, and nothing else: attack it.

python examples/attack_a_function.py
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import robustknn as rk
from robustknn.attacks import Square
from robustknn.classifiers import FunctionClassifier

# What you have: a function from a batch of images to their labels (a service, a pipeline, another library's model).
images, digits = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
model = KNeighborsClassifier(5).fit(images[200:].reshape(-1, 64), digits[200:])


def ask(batch: np.ndarray) -> np.ndarray:
    """Labels (n,) of images (n, 1, 8, 8)."""
    return model.predict(batch.reshape(-1, 64))


def shares(batch: np.ndarray) -> np.ndarray:
    """Scores (n, 10), where the service tells them."""
    return model.predict_proba(batch.reshape(-1, 64))


# Ten lines.
x, y, threat = images[:50], digits[:50], rk.ThreatModel("linf", 0.2)
labels_only = FunctionClassifier(ask, 10, inputs="numpy")
scores_too = FunctionClassifier(shares, 10, kind="scores", inputs="numpy")
for what, classifier in (("labels", labels_only), ("scores", scores_too)):
    result = Square(queries=300)(classifier, x, y, threat)
    asked = float(result.forward_passes.double().mean())
    print(f"{what}: {float(result.robust.double().mean()):.2f} of the images stay right after {asked:.0f} queries each")
