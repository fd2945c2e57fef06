"""The 8 × 8 digits that come with scikit-learn: nothing to download, for demonstrations and quick tests."""

from __future__ import annotations

import torch

from robustknn.datasets.base import Split
from robustknn.datasets.protocols import Official
from robustknn.registry import datasets


def digits_split(random_state: int) -> tuple[Split, Split]:
    """1,297 / 500 of scikit-learn's digits by its `train_test_split(test_size=500, stratify=y)`, in its order."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images / 16).float()[:, None]
    labels = torch.from_numpy(data.target)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=500, random_state=random_state, stratify=data.target
    )
    return Split(x_train, y_train, "train"), Split(x_test, y_test, "test")


@datasets.register("digits")
def digits() -> Official:
    """Handwritten digits, 1,297 / 500 grey images of 8 × 8, part of scikit-learn.

    The official split is scikit-learn's `train_test_split(test_size=500, random_state=0, stratify=y)`, in the
    order it returns; pixels are values / 16. The published protocol calibrates on 10 samples a class.
    """
    train, test = digits_split(random_state=0)
    return Official("digits", train, test, tuple("0123456789"), published_calibration=10)
