"""A run directory: what is on disk while and after an evaluation, and how it is read.

    run.json                     sealed: what the run is (hashes of everything that decides), what it will do
    environment.json             sealed: versions, machine, command; no part of the run's identity
    cells/CLASSIFIER/CELL/       one folder for every (classifier, attack, eps)
        00000000-00000099.json   sealed: the rows of one finished batch, and the sha256 of its tensors
        00000000-00000099.safetensors   examples and neighbors of the samples that are shown
        00000000-00000099.time   sealed: seconds that batch took
    gallery.safetensors          images and labels of the references that are shown
    gallery.json                 sealed: the run they belong to, and the sha256 of that file
    rows.parquet, summary.json, report.html, figures/      made from the above when all cells are whole

A batch is one file that appears whole or not at all. A stopped run goes on with the samples that have no row.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustknn import store
from robustknn._version import __version__
from robustknn.errors import InputError, IntegrityError, ResumeError, brief

SCHEMA = 1
CLEAN = "clean"
_UNTOLD = {"cells", "class_names", "describe", "fingerprints"}
"""What of a plan follows from the rest of it, or decides nothing."""
_TOLD = 3
"""How many settings a refusal names."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class Cell:
    """One classifier under one attack at one eps; `attack` is "clean" for the unattacked inputs.

    Attributes:
        control: "" for a cell that is reported, else what it controls ("one-step", "unbounded").
    """

    classifier: str
    attack: str
    eps: float = 0.0
    control: str = ""

    @property
    def folder(self) -> str:
        """Its folder under `cells/`."""
        if self.attack == CLEAN:
            return f"{self.classifier}/{CLEAN}"
        control = f"~{self.control}" if self.control else ""
        return f"{self.classifier}/{self.attack}@{float(self.eps)!r}{control}"  # the shortest text that is this eps

    def to_config(self) -> dict[str, Any]:
        """As JSON."""
        return {"classifier": self.classifier, "attack": self.attack, "eps": self.eps, "control": self.control}


class Place(Protocol):
    """A part of a run with rows of its own: a `Cell`, or what another kind of run has in its place."""

    @property
    def folder(self) -> str:
        """Its folder under `cells/`."""
        ...

    def to_config(self) -> dict[str, Any]:
        """As JSON."""
        ...

    def __hash__(self) -> int: ...


def check_name(name: str, what: str) -> str:
    """A name that can be a folder on every system; InputError otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or "@" in name or "~" in name:
        raise InputError(f"{what} name {name!r} cannot be used; take letters, digits, '.', '_', '+' and '-'.")
    return name


class RunDirectory:
    """Reading and writing one run."""

    kind: ClassVar[str] = "run"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read: dict[Place, list[tuple[Path, dict[str, Any]]]] = {}

    @classmethod
    def of(cls, run: Self | str | Path) -> Self:
        """The run itself, or that in a folder."""
        return cls(run) if isinstance(run, str | Path) else run

    # -------------------------------------------------------------------------------------- header

    @cached_property
    def header(self) -> dict[str, Any]:
        """What `run.json` says: `identity` (hashes by name) and `plan` (cells, settings, names)."""
        content = store.read_sealed(self.path / "run.json")
        if (content.get("format"), content.get("kind"), content.get("schema")) != (store.FORMAT, self.kind, SCHEMA):
            raise IntegrityError(f"{str(self.path)!r} holds no run of schema {SCHEMA}; evaluate again.")
        return content

    @cached_property
    def key(self) -> str:
        """A hash of the identity; every batch carries it, so batches of other runs are not mistaken for ours."""
        return store.fingerprint_config(self.header["identity"])

    def open(self, identity: Mapping[str, str], plan: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Start the run, or go on with it.

        Raises:
            ResumeError: the directory holds a run with another identity; the sentence names what differs.
        """
        if (self.path / "run.json").exists():
            held = self.header["identity"]
            differing = sorted(k for k in {*held, *identity} if held.get(k) != identity.get(k))
            if differing:
                told = "; ".join(islice(_differences(self.header["plan"], plan), _TOLD))
                raise ResumeError(
                    f"the run in {str(self.path)!r} was made with another {' and another '.join(differing)}"
                    f"{f' ({told})' if told else ''}; choose another folder, or continue it with what it was made with."
                )
            store.remove_partials(self.path)
        else:
            self._refuse_foreign()
            header = {"format": store.FORMAT, "kind": self.kind, "schema": SCHEMA}
            store.write_sealed(self.path / "run.json", {**header, "identity": dict(identity), "plan": dict(plan)})
        if not (self.path / "environment.json").exists():  # new, or killed before it was written
            store.write_sealed(self.path / "environment.json", environment)

    def _refuse_foreign(self) -> None:
        """InputError unless the folder is new or empty; a `run.json` that a kill left half written does not count."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{str(self.path)!r} is a file; choose a folder for the run.")
        if any(not (p.name.startswith(".run.json.") and p.suffix == ".partial") for p in self.path.iterdir()):
            raise InputError(f"{str(self.path)!r} is not empty and holds no run; choose another folder.")
        store.remove_partials(self.path)

    @property
    def cells(self) -> list[Cell]:
        """The cells of the plan, in order."""
        return [Cell(**c) for c in self.header["plan"]["cells"]]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and command of the session that started the run."""
        content = store.read_sealed(self.path / "environment.json")
        if not isinstance(content.get("versions"), dict):
            raise IntegrityError(f"{str(self.path / 'environment.json')!r} is another kind of file; restore it.")
        return content

    # ------------------------------------------------------------------------------------- batches

    def write(
        self,
        cell: Place,
        positions: Tensor,
        columns: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        seconds: float,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the rows of a finished batch. The tensors go first: the rows make them count.

        Args:
            about: what is to be said of all rows at once, as JSON.
        """
        self._read.pop(cell, None)
        folder = self.path / "cells" / cell.folder
        name = f"{int(positions[0]):08d}-{int(positions[-1]):08d}"
        digest = None
        if tensors:
            store.save_tensors(folder / f"{name}.safetensors", tensors)
            digest = store.sha256_file(folder / f"{name}.safetensors")
        store.write_sealed(folder / f"{name}.time", {"seconds": seconds})
        content = {
            "run": self.key,
            "cell": cell.to_config(),
            "positions": positions.tolist(),
            "columns": {k: _plain_list(v) for k, v in columns.items()},
            "tensors": digest,
            **({} if about is None else {"about": dict(about)}),
        }
        store.write_sealed(folder / f"{name}.json", content, pretty=False)

    def batches(self, cell: Place) -> list[tuple[Path, dict[str, Any]]]:
        """The finished batches of a cell, by position; read and checked once.

        Raises:
            IntegrityError: a file is truncated or altered, belongs to another run or cell, or repeats a sample.
        """
        if cell not in self._read:
            self._read[cell] = list(self._check(cell))
        return self._read[cell]

    def _check(self, cell: Place) -> Iterator[tuple[Path, dict[str, Any]]]:
        seen: set[int] = set()
        for path in sorted((self.path / "cells" / cell.folder).glob("*.json")):
            content = store.read_sealed(path)
            if content.get("run") != self.key or content.get("cell") != cell.to_config():
                raise IntegrityError(f"{str(path)!r} belongs to another run or another cell; remove it.")
            if not seen.isdisjoint(content["positions"]):
                raise IntegrityError(f"{str(path)!r} repeats samples that another file holds; remove one of them.")
            seen.update(content["positions"])
            yield path, content

    def done(self, cell: Place) -> list[int]:
        """The positions of the samples that have a row."""
        return [p for _, content in self.batches(cell) for p in content["positions"]]

    def rows(self, cell: Place) -> dict[str, NDArray[Any]]:
        """All rows of a cell as columns, in order of position."""
        parts = [content for _, content in self.batches(cell)]
        if not parts:
            return {}
        positions = np.concatenate([np.asarray(p["positions"], dtype=np.int64) for p in parts])
        order = np.argsort(positions)
        columns = {
            name: np.concatenate([_array(p["columns"][name]) for p in parts])[order] for name in parts[0]["columns"]
        }
        return {"position": positions[order], **columns}

    def tensors(self, cell: Cell) -> dict[str, Tensor]:
        """What is kept of the samples that are shown, in order of position (under "position").

        Raises:
            IntegrityError: a tensor file is missing or is not the one its rows were written with.
        """
        parts: list[dict[str, Tensor]] = []
        for path, content in self.batches(cell):
            if content["tensors"] is None:
                continue
            file = path.with_suffix(".safetensors")
            if not file.is_file() or store.sha256_file(file) != content["tensors"]:
                raise IntegrityError(f"{str(file)!r} is missing or altered; remove it and its rows to make it again.")
            parts.append(store.load_tensors(file))
        if not parts:
            return {}
        joined = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        order = joined["position"].argsort()
        return {name: value[order] for name, value in joined.items()}

    def seconds(self, cell: Place) -> float:
        """The time spent on the finished batches of a cell."""
        times = [path.with_suffix(".time") for path, _ in self.batches(cell)]
        return sum(_seconds(t) for t in times if t.is_file())

    # ------------------------------------------------------------------------------------- gallery

    def write_gallery(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the references shown. The tensors go first: the seal makes them count."""
        path = self.path / "gallery.safetensors"
        store.save_tensors(path, tensors)
        store.write_sealed(path.with_suffix(".json"), {"run": self.key, "tensors": store.sha256_file(path)})

    def gallery(self) -> dict[str, Tensor]:
        """The references shown, for each bank b: "ids b" (n,), "labels b" (n,), "images b" (n, …); {} when none.

        Raises:
            IntegrityError: the file is altered, of another run, or without its seal (or the seal without the file).
        """
        path = self.path / "gallery.safetensors"
        seal = path.with_suffix(".json")
        if not path.exists() and not seal.exists():
            return {}
        if not seal.exists():  # a kill fell between the two
            raise IntegrityError(f"{str(path)!r} has no seal; run the same evaluation again to write it again.")
        content = store.read_sealed(seal)
        if content.get("run") != self.key:
            raise IntegrityError(f"{str(seal)!r} belongs to another run; run the same evaluation again to write it.")
        if not path.is_file() or store.sha256_file(path) != content.get("tensors"):
            raise IntegrityError(
                f"{str(path)!r} is missing or altered; run the same evaluation again to write it again."
            )
        return store.load_tensors(path)


def environment(command: str | None, device: str) -> dict[str, Any]:
    """Versions, machine and command, for the record."""
    return {
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
        "versions": {
            "robustknn": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    }


def _seconds(path: Path) -> float:
    seconds = store.read_sealed(path).get("seconds")
    if not isinstance(seconds, (int, float)):
        raise IntegrityError(f"{str(path)!r} is no file of a batch's time; remove it.")
    return float(seconds)


def _differences(held: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What two plans say otherwise, setting by setting: "threat.eps: 0.1, now 0.11"."""
    before, after = (dict(_leaves({k: v for k, v in plan.items() if k not in _UNTOLD})) for plan in (held, now))
    for name in sorted(before | after):
        old, new = (brief(leaves[name]) if name in leaves else "nothing" for leaves in (before, after))
        if name not in before or name not in after or json.dumps(before[name]) != json.dumps(after[name]):
            yield f"{name}: {old}, now {new}" if old != new else f"{name} is another"


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a plan by their places, "classifiers.knn.voters.0.metric"."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in inner:
        yield from _leaves(part, f"{place}.{name}" if place else str(name))
    if not isinstance(value, Mapping | list | tuple):
        yield place, value


def _plain_list(values: Any) -> list[Any]:
    values = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    # JSON has no NaN: a figure that does not exist is null.
    return [None if isinstance(v, float) and not np.isfinite(v) else v for v in values]


def _array(values: list[Any]) -> NDArray[Any]:
    if any(v is None for v in values):
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return np.asarray(values)
