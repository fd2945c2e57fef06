"""What attacks left of the samples that are certified: certified ≤ true ≤ attacked, on one axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustknn import store
from robustknn.certification.base import INPUT_UNITS
from robustknn.errors import InputError, IntegrityError
from robustknn.evaluation.certificates import CertificateDirectory
from robustknn.evaluation.rundir import CLEAN, RunDirectory

FILE = "attacked.json"


@dataclass(frozen=True)
class Attacked:
    """One attack on one classifier at one radius.

    Attributes:
        positions: (n,) of the samples.
        robust: (n,) bool, right and not fooled.
    """

    classifier: str
    attack: str
    unit: str
    eps: float
    positions: NDArray[np.int64]
    robust: NDArray[np.bool_]


def attach(run: CertificateDirectory, attacked: RunDirectory | str | Path) -> None:
    """Keep in the certificates' directory what the attacks of an evaluation left.

    Raises:
        InputError: the evaluation is of other samples or other classifiers, or is not finished.
    """
    other = attacked if isinstance(attacked, RunDirectory) else RunDirectory(attacked)
    if not (other.path / "run.json").is_file():
        raise InputError(f"{str(other.path)!r} holds no run; pass the folder of a finished evaluation.")
    mine, theirs = run.header, other.header
    if mine["identity"]["data"] != theirs["identity"]["data"]:
        raise InputError(
            f"the evaluation in {str(other.path)!r} is of other samples than these certificates, so the two cannot be "
            "compared; evaluate with the same data, -n and seed."
        )
    kept = []
    for name, fingerprint in mine["plan"]["fingerprints"].items():
        if theirs["plan"].get("fingerprints", {}).get(name) != fingerprint:
            continue
        wanted = run.positions(name).tolist()
        for cell in other.cells:
            if cell.classifier != name or cell.control or cell.attack == CLEAN:
                continue
            rows = other.rows(cell)
            if not rows or rows["position"].tolist() != wanted:
                raise InputError(
                    f"the evaluation in {str(other.path)!r} has not scored the same samples of {name!r} under "
                    f"{cell.attack!r}; finish it with the same flags."
                )
            robust = [bool(r) for r in rows["robust"]]
            kept.append({"classifier": name, "attack": cell.attack, "eps": cell.eps, "robust": robust})
    if not kept:
        raise InputError(
            f"the evaluation in {str(other.path)!r} attacks none of the classifiers certified here "
            f"({', '.join(mine['plan']['classifiers'])}, with these references and parameters); evaluate with the same "
            "-c, -l, -k and --references-per-class."
        )
    unit = INPUT_UNITS.get(theirs["plan"]["threat"]["norm"], "")
    store.write_sealed(run.path / FILE, {"run": run.key, "attacked run": other.key, "unit": unit, "attacks": kept})


def attacks_on(run: CertificateDirectory) -> list[Attacked]:
    """What `attach` kept; [] when it was not called.

    Raises:
        IntegrityError: the file is altered or of another run.
    """
    file = run.path / FILE
    if not file.exists():
        return []
    content = store.read_sealed(file)
    if content.get("run") != run.key:
        raise IntegrityError(f"{str(file)!r} belongs to another run; remove it, or name the evaluation again.")
    return [_one(run, content["unit"], entry) for entry in content["attacks"]]


def _one(run: CertificateDirectory, unit: str, entry: Mapping[str, Any]) -> Attacked:
    positions = run.positions(entry["classifier"]).numpy()
    return Attacked(
        entry["classifier"], entry["attack"], unit, entry["eps"], positions, np.asarray(entry["robust"], bool)
    )
