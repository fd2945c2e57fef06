"""One way to name any data set: registered, a user's function, or a folder of images."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robustknn.checks import check_choice
from robustknn.datasets.arrays import from_arrays, from_datasets
from robustknn.datasets.base import DataSource
from robustknn.datasets.files import data_root
from robustknn.datasets.folder import image_folder
from robustknn.datasets.protocols import PROTOCOLS, Official, divide
from robustknn.errors import InputError, RobustKNNError, unknown_name
from robustknn.progress import Progress
from robustknn.registry import datasets, load_object


def load(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    protocol: str = "standard",
    download: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> DataSource:
    """Load a data set.

    Args:
        name: a registered name ("mnist"); a folder of images (see `image_folder`); or `module:function`, where
            the function returns a DataSource, (x_train, y_train, x_test, y_test) arrays (see `from_arrays`), or
            (train, test) torch Datasets (see `from_datasets`). A registered function may return any of these too.
        root: the folder that holds the files; by default the environment variable ROBUSTKNN_DATA.
        protocol: how it is divided, "standard" or "published" (see `robustknn.datasets.protocols`).
        download: fetch missing official files into the root.
        progress: where to report a download.
        **options: what the named function takes, e.g. `size` of a folder of images. Functions that take `root`,
            `protocol`, `download` or `progress` are given them.

    Raises:
        InputError: an unknown name, protocol or option, a missing file, data that cannot work.
        IntegrityError: a file is truncated, altered or another than its name says.
        DownloadError, StorageError: the network or the disk refused.
    """
    text = os.fspath(name)
    check_choice(protocol, PROTOCOLS, "protocol")
    settings = {"root": data_root(root), "protocol": protocol, "download": download, "progress": progress}
    path = Path(text).expanduser()
    function: Callable[..., Any]
    if text in datasets:
        function = datasets.entry(text).build
    elif text and path.is_dir():
        function, settings = image_folder, {"path": path}
    elif ":" in text:
        function = load_object(text, "data set")
        if not callable(function):
            raise InputError(f"data set {text!r} is a {type(function).__name__}; name a function that returns one.")
    elif path.name != text:
        raise InputError(f"folder {text!r} does not exist.")
    else:
        raise unknown_name("data set", text, [entry.name for entry in datasets])
    return _as_source(_call(function, text, settings, options), text, protocol)


def _call(function: Callable[..., Any], name: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The function's result, given the options and those of the settings that it takes."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not takes_any:
            raise unknown_name(f"option of data set {name!r}:", option, set(parameters) - set(settings))
    given = {key: value for key, value in settings.items() if key in parameters}
    try:
        return function(**given, **options)
    except RobustKNNError:
        raise
    except Exception as error:
        raise InputError(f"data set {name!r} failed to load: {type(error).__name__}: {error}") from error


def _as_source(value: Any, name: str, protocol: str) -> DataSource:
    if isinstance(value, Official):
        return divide(value, protocol)
    if isinstance(value, DataSource):
        if value.protocol in PROTOCOLS and value.protocol != protocol:
            raise InputError(
                f"data set {name!r} came divided by the protocol {value.protocol!r}, not {protocol!r}; let its "
                "function take protocol= and pass it on, or return arrays."
            )
        return value
    if isinstance(value, (tuple, list)) and len(value) == 4:
        return from_arrays(*value, name=name, protocol=protocol)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return from_datasets(*value, name=name, protocol=protocol)
    raise InputError(
        f"data set {name!r} gave a {type(value).__name__}; return a DataSource, (x_train, y_train, x_test, y_test) or "
        "(train_dataset, test_dataset)."
    )
