"""One way to name the images a database is made of: a folder, archives, a Hugging Face data set, one's own function."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustknn.checks import check_positive_int
from robustknn.datasets.folder import ImageItems, images_of_folder
from robustknn.datasets.hugging_face import hugging_face
from robustknn.datasets.pixels import header_shape
from robustknn.datasets.shards import shards
from robustknn.datasets.sources import Source, as_source
from robustknn.errors import InputError, RobustKNNError, reason, unknown_name
from robustknn.registry import load_object

_HUGGING_FACE = "hf:"


def open_source(spec: str | Path, **options: Any) -> Any:
    """The samples that a line of text names: something with `len`, `labels` ((n,) or None) and `batch(positions)`.

    Args:
        spec: a folder of images, one folder a class or images alone; archives (see `shard_files`); `hf:FOLDER`, which
            `save_to_disk` wrote; or `module:function`, which returns what `as_source` takes.
        options: what the reader takes: `size` and `channels` of images, `labels`, `image` and `label` of archives,
            `split`, `image` and `label` of a Hugging Face data set, arguments of the function.

    Raises:
        InputError: nothing is there by this name, an unknown option, and what the reader refuses.
        IntegrityError: a file is not whole.
    """
    text = str(spec)
    path = Path(text).expanduser()
    if text.startswith(_HUGGING_FACE):
        return _call(hugging_face, text.removeprefix(_HUGGING_FACE), options)
    if path.is_dir():
        return _call(shards if any(path.glob("*.tar")) else folder_source, path, options)
    if path.suffix == ".tar":
        return _call(shards, path, options)
    if path.exists():
        raise InputError(f"{text!r} is neither a folder of images nor a .tar archive; unpack or convert it first.")
    if ":" not in text:
        raise InputError(f"{text!r} does not exist; name a folder, archives, hf:FOLDER or module:function.")
    function = load_object(text, "data")
    if not callable(function):
        return as_source(function)
    try:
        return as_source(function(**options))
    except RobustKNNError:
        raise
    except Exception as error:
        raise InputError(f"{text!r} failed: {type(error).__name__}: {reason(error)}.") from error


def folder_source(path: str | Path, *, size: int | None = None, channels: int = 3) -> Source:
    """The images of `path/<class>/*`, classes numbered in the order of their names, or those of `path/*` without any.

    Raises:
        InputError: no image, an empty class, images of different shapes without `size`.
        IntegrityError: an image cannot be read.
    """
    folder = Path(path)
    size = None if size is None else check_positive_int(size, "size")
    images, class_names = images_of_folder(folder)
    files = [file for file, _ in images]
    expected = None if size is not None else header_shape(files[0], channels)
    digest = hashlib.sha256("\n".join(str(file.relative_to(folder)) for file in files).encode(errors="surrogateescape"))
    described = {
        "name": "folder",
        "path": str(folder),
        "files": digest.hexdigest(),
        "size": size,
        "channels": channels,
        "classes": class_names,
    }
    labels = [label for _, label in images] if class_names else None
    return Source(ImageItems(files, size, expected, channels), labels, described)


def _call(reader: Callable[..., Source], where: str | Path, options: dict[str, Any]) -> Source:
    known = [name for name, p in inspect.signature(reader).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of images in {str(where)!r}:", option, known)
    return reader(where, **options)
