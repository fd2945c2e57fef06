"""A classifier as foolbox and the Adversarial Robustness Toolbox (ART) want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from robustknn.adapters.modules import HardScores
from robustknn.adapters.soft import surrogate
from robustknn.attacks.foreign import load_art, load_foolbox
from robustknn.checks import Bounds, check_choice
from robustknn.classifiers import Classifier

VIEWS = ("surrogate", "hard")


def to_foolbox(classifier: Classifier, bounds: Bounds = (0.0, 1.0), view: str = "surrogate") -> Any:
    """A `foolbox.PyTorchModel`.

    Args:
        classifier: any classifier for view="hard", one of voters for view="surrogate".
        bounds: least and greatest value of an input.
        view: "surrogate" for attacks that take gradients, "hard" for those that do not.

    Raises:
        MissingExtraError: foolbox is not installed.
        InputError: a surrogate was asked of a classifier without voters.
    """
    foolbox = load_foolbox()
    module = _module(classifier, view)
    return foolbox.PyTorchModel(module, bounds=bounds, device=next(module.parameters()).device)


def to_art(
    classifier: Classifier, input_shape: Sequence[int], bounds: Bounds = (0.0, 1.0), view: str = "surrogate"
) -> Any:
    """An `art.estimators.classification.PyTorchClassifier`.

    Args:
        classifier: any classifier for view="hard", one of voters for view="surrogate".
        input_shape: of one input, e.g. (1, 28, 28).
        bounds: least and greatest value of an input.
        view: "surrogate" for attacks that take gradients, "hard" for those that do not.

    Raises:
        MissingExtraError: ART is not installed.
        InputError: a surrogate was asked of a classifier without voters.
    """
    art = load_art()
    module = _module(classifier, view)
    device = "cpu" if next(module.parameters()).device.type == "cpu" else "gpu"
    return art.estimators.classification.PyTorchClassifier(
        module,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(input_shape),
        nb_classes=classifier.n_classes,
        clip_values=bounds,
        device_type=device,
    )


def _module(classifier: Classifier, view: str) -> nn.Module:
    check_choice(view, VIEWS, "view")
    return surrogate(classifier) if view == "surrogate" else HardScores(classifier)
