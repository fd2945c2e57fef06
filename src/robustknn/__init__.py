"""robustknn: attack, defend and evaluate classifiers that decide by nearest neighbors in a network's feature space.

Names are imported when they are first used, so that `import robustknn` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robustknn._version import __version__

if TYPE_CHECKING:
    from robustknn.adapters import as_hard, surrogate, to_art, to_foolbox
    from robustknn.attacks import (
        APGD,
        BIM,
        FGSM,
        MIFGSM,
        PGD,
        Attack,
        AttackResult,
        Credible,
        EachTarget,
        MinimumNorm,
        Square,
        TanhBox,
    )
    from robustknn.classifiers import (
        KNN,
        DkNN,
        FunctionClassifier,
        Joint,
        Network,
        Rejecting,
        RetrievalClassifier,
        load_classifier,
    )
    from robustknn.datasets import DataSource, Split
    from robustknn.errors import (
        InputError,
        IntegrityError,
        MissingExtraError,
        NotReadyError,
        ResumeError,
        RobustKNNError,
    )
    from robustknn.evaluation import Options, RunDirectory, evaluate, finish, transferability
    from robustknn.features import FeatureExtractor, Tap
    from robustknn.models import load_model
    from robustknn.neighbors import ExactIndex, FaissIndex, NeighborIndex
    from robustknn.objectives import ASK, Adaptive, AdvKNN, CrossEntropy, NeighborHinge, Objective, RankPair, SoftCount
    from robustknn.recipes import WorstCase
    from robustknn.reference import ReferenceSet
    from robustknn.reports import write_report
    from robustknn.threat import ThreatModel
    from robustknn.training import TrainConfig, train

_HOMES = {
    "robustknn.adapters": (
        "as_hard",
        "surrogate",
        "to_art",
        "to_foolbox",
    ),
    "robustknn.attacks": (
        "APGD",
        "BIM",
        "FGSM",
        "MIFGSM",
        "PGD",
        "Attack",
        "AttackResult",
        "Credible",
        "EachTarget",
        "MinimumNorm",
        "Square",
        "TanhBox",
    ),
    "robustknn.classifiers": (
        "KNN",
        "DkNN",
        "FunctionClassifier",
        "Joint",
        "Network",
        "Rejecting",
        "RetrievalClassifier",
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
        "transferability",
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
        "Adaptive",
        "AdvKNN",
        "CrossEntropy",
        "NeighborHinge",
        "Objective",
        "RankPair",
        "SoftCount",
    ),
    "robustknn.recipes": ("WorstCase",),
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
    "APGD",
    "ASK",
    "BIM",
    "FGSM",
    "KNN",
    "MIFGSM",
    "PGD",
    "Adaptive",
    "AdvKNN",
    "Attack",
    "AttackResult",
    "Credible",
    "CrossEntropy",
    "DataSource",
    "DkNN",
    "EachTarget",
    "ExactIndex",
    "FaissIndex",
    "FeatureExtractor",
    "FunctionClassifier",
    "InputError",
    "IntegrityError",
    "Joint",
    "MinimumNorm",
    "MissingExtraError",
    "NeighborHinge",
    "NeighborIndex",
    "Network",
    "NotReadyError",
    "Objective",
    "Options",
    "RankPair",
    "ReferenceSet",
    "Rejecting",
    "ResumeError",
    "RetrievalClassifier",
    "RobustKNNError",
    "RunDirectory",
    "SoftCount",
    "Split",
    "Square",
    "TanhBox",
    "Tap",
    "ThreatModel",
    "TrainConfig",
    "WorstCase",
    "__version__",
    "as_hard",
    "evaluate",
    "finish",
    "load_classifier",
    "load_model",
    "surrogate",
    "to_art",
    "to_foolbox",
    "train",
    "transferability",
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
