"""Data sets: loaders by name, a user's own data, and the protocols that divide them."""

from robustknn.datasets import cifar, digits, imagenette, mnist, svhn  # registers the data sets that ship  # noqa: F401
from robustknn.datasets.arrays import from_arrays, from_datasets
from robustknn.datasets.base import DataSource, Items, Split
from robustknn.datasets.download import DownloadError, download_dataset
from robustknn.datasets.folder import image_folder
from robustknn.datasets.hugging_face import hugging_face
from robustknn.datasets.loading import load
from robustknn.datasets.opening import open_source
from robustknn.datasets.protocols import PROTOCOLS, Official
from robustknn.datasets.shards import shards, write_shards
from robustknn.datasets.sources import Source

__all__ = [
    "PROTOCOLS",
    "DataSource",
    "DownloadError",
    "Items",
    "Official",
    "Source",
    "Split",
    "download_dataset",
    "from_arrays",
    "from_datasets",
    "hugging_face",
    "image_folder",
    "load",
    "open_source",
    "shards",
    "write_shards",
]
