"""A small data set in CIFAR-10's real files: ten easy classes of 32 × 32 colour images."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

COLORS = ((200, 60, 60), (60, 200, 60))


def write_cifar(root: Path, train: int = 200, test: int = 40) -> Path:
    """Write the seven files below `root`: class c is a bar at its own place in one of two colors, in noise."""
    folder, noise = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    sizes = {**{f"data_batch_{i}": train // 5 for i in range(1, 6)}, "test_batch": test}
    for name, n in sizes.items():
        labels = np.arange(n) % 10
        images = noise.integers(40, 110, (n, 3, 32, 32)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 6 * (label // 2) + 1 : 6 * (label // 2) + 6, 4:28] = np.array(COLORS[label % 2])[:, None, None]
        content = {"data": images.reshape(n, -1), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=4))
    return root
