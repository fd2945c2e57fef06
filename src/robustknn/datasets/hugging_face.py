"""Images of a Hugging Face data set: in memory, or a folder that `save_to_disk` wrote. Nothing is fetched."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn.checks import check_positive_int
from robustknn.datasets.pixels import decoded, mode_of
from robustknn.datasets.sources import Source
from robustknn.errors import InputError, IntegrityError, needs, reason, unknown_name


def hugging_face(
    data: Any,
    *,
    split: str | None = None,
    image: str = "image",
    label: str | None = "label",
    size: int | None = None,
    channels: int = 3,
) -> Source:
    """The images of a `datasets.Dataset`, in its order.

    Args:
        data: the data set, or the folder that its `save_to_disk` wrote.
        split: which part, of several.
        image: the column of images (feature type `Image`).
        label: the column of class numbers; None, or no column "label", reads no classes.
        size: side of a square; the shorter side of every image is resized to it and the middle is cut out. Without it
            all images must have one shape.
        channels: 3 for color, 1 for gray.

    Raises:
        MissingExtraError: datasets is not installed.
        InputError: no such folder, part or column; a column that holds no images, or no class numbers.
        IntegrityError: the folder is not whole; an image cannot be read.
    """
    library = _library()
    path = str(data) if isinstance(data, (str, Path)) else None
    where = "the data set" if path is None else repr(path)
    if path is not None:
        data = _loaded(library, Path(path))
    if isinstance(data, library.DatasetDict):
        if split is None:
            raise InputError(f"{where} has the parts {', '.join(data)}; choose one: split=.")
        if split not in data:
            raise unknown_name(f"part of {where} (split=):", split, data)
        data = data[split]
    if not isinstance(data, library.Dataset):
        raise InputError(f"a datasets.Dataset has length and order; {type(data).__name__} is none, save it first.")
    if not len(data):
        raise InputError(f"{where} holds no sample.")
    if image not in data.features:
        raise unknown_name(f"column of {where} (image=):", image, data.features)
    if not isinstance(data.features[image], library.Image):
        raise InputError(f"column {image!r} of {where} has no images; cast it: data.cast_column({image!r}, Image()).")
    items = HuggingFaceItems(data.cast_column(image, library.Image(decode=False)), image, size, channels, where)
    described = {"name": "hugging face", "size": size, "channels": channels, "columns": [image, label]}
    if path is not None:
        described["path"] = path
    return Source(items, _labels(data, label, where), described)


class HuggingFaceItems:
    """Images by place, decoded when they are read: (B, channels, H, W) of 8 bits."""

    def __init__(self, data: Any, image: str, size: int | None, channels: int, where: str) -> None:
        mode_of(channels)
        self._data, self._column, self._where = data.with_format(None).select_columns([image]), image, where
        self._size, self._channels = size, channels
        self.shape: tuple[int, ...] = ()
        self.shape = self._image(0).shape if size is None else (channels, check_positive_int(size, "size"), size)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, places: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(self._image(place)) for place in places.tolist()])

    def _image(self, place: int) -> np.ndarray[Any, Any]:
        held = self._data[place][self._column] or {}
        name = f"sample {place} of {self._where}"
        if held.get("bytes") is None and held.get("path") is None:
            raise IntegrityError(f"{name} has no image; remove it.")
        file = Path(held["path"]) if held.get("bytes") is None else io.BytesIO(held["bytes"])
        pixels = decoded(file, name, self._size, self._channels)
        if self.shape and pixels.shape != self.shape:
            raise InputError(
                f"{name} has {pixels.shape[2]} × {pixels.shape[1]} pixels where the first has {self.shape[2]} × "
                f"{self.shape[1]}; pass size= to bring all to one shape."
            )
        return pixels


def _labels(data: Any, label: str | None, where: str) -> Tensor | None:
    if label is None or (label == "label" and label not in data.features):
        return None
    if label not in data.features:
        raise unknown_name(f"column of {where} (label=):", label, data.features)
    try:
        return torch.tensor(data.with_format(None)[label][:], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"column {label!r} of {where} has no class numbers; make them: data.class_encode_column({label!r})."
        ) from error


def _loaded(library: Any, path: Path) -> Any:
    if not path.is_dir():
        raise InputError(f"{str(path)!r} is no folder; fetch the data set yourself and write it with save_to_disk.")
    try:
        return library.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{str(path)!r} holds no data set; write one there with save_to_disk.") from error
    except Exception as error:  # arrow, json and the library itself each have errors of their own
        raise IntegrityError(f"the data set in {str(path)!r} cannot be read: {reason(error)}.") from error


def _library() -> Any:
    with needs("datasets", "hf"):
        import datasets
    return datasets
