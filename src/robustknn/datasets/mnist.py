"""MNIST (LeCun, Cortes & Burges) and Fashion-MNIST (Xiao, Rasul & Vollgraf, 2017): 28 × 28 grey images, 10 classes."""

from __future__ import annotations

from pathlib import Path

from robustknn.datasets.base import Split
from robustknn.datasets.files import Form, find_files
from robustknn.datasets.idx import read_idx
from robustknn.datasets.protocols import Official
from robustknn.errors import InputError, IntegrityError
from robustknn.progress import Progress
from robustknn.registry import datasets

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Both sets have files of the same names; these labels, the first of the training set, tell them apart.
_FIRST_LABELS = {"mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "fashion-mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}


@datasets.register("mnist")
def mnist(root: Path | None = None, download: bool = False, progress: Progress | None = None) -> Official:
    """Handwritten digits, 60,000 / 10,000 grey images of 28 × 28."""
    return _load("mnist", ("MNIST/raw", "mnist", ""), DIGITS, root, download, progress)


@datasets.register("fashion-mnist")
def fashion_mnist(root: Path | None = None, download: bool = False, progress: Progress | None = None) -> Official:
    """Articles of clothing, 60,000 / 10,000 grey images of 28 × 28."""
    return _load("fashion-mnist", ("FashionMNIST/raw", "fashion-mnist", ""), CLOTHES, root, download, progress)


def _load(
    name: str,
    folders: tuple[str, ...],
    class_names: tuple[str, ...],
    root: Path | None,
    download: bool,
    progress: Progress | None,
) -> Official:
    _, paths = find_files(name, root, [Form(folders, FILES, ("", ".gz"))], download, progress)
    train, test = _split(paths[0], paths[1], "train"), _split(paths[2], paths[3], "test")
    for other, labels in _FIRST_LABELS.items():
        if other != name and train.labels[: len(labels)].tolist() == labels:
            raise InputError(f"the files in {str(paths[0].parent)!r} are {other!r}, not {name!r}; ask for {other!r}.")
    return Official(name, train, test, class_names)


def _split(images_path: Path, labels_path: Path, part: str) -> Split:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise IntegrityError(
            f"{str(images_path)!r} has {len(images)} images, {str(labels_path)!r} {len(labels)} labels; get both again."
        )
    if int(labels.max()) > 9:
        raise IntegrityError(f"{str(labels_path)!r} holds the label {int(labels.max())}, outside 0..9; get it again.")
    return Split(images[:, None], labels, part)
