"""Finding the files of a data set under the data root, or fetching them when asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustknn.datasets.download import download_dataset
from robustknn.errors import InputError
from robustknn.progress import Progress

ENVIRONMENT = "ROBUSTKNN_DATA"
_HELP = f"set the folder that holds the data with {ENVIRONMENT} or --data-root"


@dataclass(frozen=True)
class Form:
    """One form in which a data set may lie on the disk: files that are found together in one of some folders.

    Attributes:
        folders: where to look, relative to the data root, in order; "" is the root itself.
        names: the files.
        endings: what may follow each name, in order of preference.
    """

    folders: tuple[str, ...]
    names: tuple[str, ...]
    endings: tuple[str, ...] = ("",)

    def find(self, root: Path) -> list[Path]:
        """The files in the first folder that holds them all; the ones found in the fullest folder otherwise."""
        best: list[Path] = []
        for folder in self.folders:
            found = [path for name in self.names for path in self._present(root / folder, name)[:1]]
            if len(found) > len(best):
                best = found
        return best

    def _present(self, folder: Path, name: str) -> list[Path]:
        return [path for ending in self.endings if (path := folder / (name + ending)).is_file()]

    def missing(self, root: Path) -> str:
        """Which file is looked for where, as a part of a sentence."""
        found = [path.name for path in self.find(root)]
        name = next(n for n in self.names if not any(n + ending in found for ending in self.endings))
        spelled = " or ".join(repr(name + ending) for ending in self.endings)
        return f"{spelled} is not in {' or '.join(repr(str(root / folder)) for folder in self.folders)}"


def data_root(root: str | os.PathLike[str] | None) -> Path | None:
    """The folder that holds data sets: the one given, else what ROBUSTKNN_DATA names, else None."""
    chosen = root or os.environ.get(ENVIRONMENT)
    return Path(chosen).expanduser() if chosen else None


def find_files(
    dataset: str, root: Path | None, forms: Sequence[Form], download: bool, progress: Progress | None
) -> tuple[Form, list[Path]]:
    """The first form of a data set that is there whole, and its files.

    Raises:
        InputError: no data root is known, or a file is missing and may not be downloaded.
        DownloadError, IntegrityError, StorageError: the download failed.
    """
    if root is None:
        raise InputError(f"data set {dataset!r} is read from files, and no folder is known; {_HELP}.")
    for _ in range(2):
        for form in forms:
            found = form.find(root)
            if len(found) == len(form.names):
                return form, found
        if not download:
            break
        download_dataset(dataset, root, progress)
    where = "; ".join(form.missing(root) for form in forms)
    raise InputError(
        f"data set {dataset!r} was not found: {where}; {_HELP}, or fetch it with download=True (--download)."
    )
