"""robustknn: attack, defend and evaluate classifiers that decide by nearest neighbors in a network's feature space.

Names are imported when they are first used, so that `import robustknn` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robustknn._version import __version__

if TYPE_CHECKING:
    from robustknn.attacks import BIM, FGSM, PGD, Attack, AttackResult
    from robustknn.classifiers import KNN, DkNN, load_classifier
    from robustknn.datasets import DataSource, Split
    from robustknn.errors import (
        InputError,
        IntegrityError,
        MissingExtraError,
        NotReadyError,
        ResumeError,
        RobustKNNError,
    )
    from robustknn.evaluation import Options, RunDirectory, evaluate, finish
    from robustknn.features import FeatureExtractor, Tap
    from robustknn.models import load_model
    from robustknn.neighbors import ExactIndex, FaissIndex, NeighborIndex
    from robustknn.objectives import ASK, CrossEntropy, Objective
    from robustknn.reference import ReferenceSet
    from robustknn.reports import write_report
    from robustknn.threat import ThreatModel
    from robustknn.training import TrainConfig, train

_HOMES = {
    "robustknn.attacks": (
        "BIM",
        "FGSM",
        "PGD",
        "Attack",
        "AttackResult",
    ),
    "robustknn.classifiers": (
        "KNN",
        "DkNN",
        "load_classifier",
    ),
    "robustknn.datasets": (
        "DataSource",
        "Split",
    ),
    "robustknn.errors": (
        "InputError",
        "IntegrityError",
        "MissingExtraError",
        "NotReadyError",
        "ResumeError",
        "RobustKNNError",
    ),
    "robustknn.evaluation": (
        "Options",
        "RunDirectory",
        "evaluate",
        "finish",
    ),
    "robustknn.features": (
        "FeatureExtractor",
        "Tap",
    ),
    "robustknn.models": ("load_model",),
    "robustknn.neighbors": (
        "ExactIndex",
        "FaissIndex",
        "NeighborIndex",
    ),
    "robustknn.objectives": (
        "ASK",
        "CrossEntropy",
        "Objective",
    ),
    "robustknn.reference": ("ReferenceSet",),
    "robustknn.reports": ("write_report",),
    "robustknn.threat": ("ThreatModel",),
    "robustknn.training": (
        "TrainConfig",
        "train",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ASK",
    "BIM",
    "FGSM",
    "KNN",
    "PGD",
    "Attack",
    "AttackResult",
    "CrossEntropy",
    "DataSource",
    "DkNN",
    "ExactIndex",
    "FaissIndex",
    "FeatureExtractor",
    "InputError",
    "IntegrityError",
    "MissingExtraError",
    "NeighborIndex",
    "NotReadyError",
    "Objective",
    "Options",
    "ReferenceSet",
    "ResumeError",
    "RobustKNNError",
    "RunDirectory",
    "Split",
    "Tap",
    "ThreatModel",
    "TrainConfig",
    "__version__",
    "evaluate",
    "finish",
    "load_classifier",
    "load_model",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
