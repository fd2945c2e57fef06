"""Data sets: loaders by name, a user's own data, and the protocols that divide them."""

from robustknn.datasets import cifar, digits, mnist, svhn  # registers the data sets that ship  # noqa: F401
from robustknn.datasets.arrays import from_arrays, from_datasets
from robustknn.datasets.base import DataSource, Items, Split
from robustknn.datasets.download import DownloadError, download_dataset
from robustknn.datasets.folder import image_folder
from robustknn.datasets.loading import load
from robustknn.datasets.protocols import PROTOCOLS, Official

__all__ = [
    "PROTOCOLS",
    "DataSource",
    "DownloadError",
    "Items",
    "Official",
    "Split",
    "download_dataset",
    "from_arrays",
    "from_datasets",
    "image_folder",
    "load",
]
