"""Features of the web-scale nearest-neighbor defense, by the names of its paper (arXiv 1903.01612)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from robustknn.checks import check_choice
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor
from robustknn.fitting import with_projection, with_rmac, with_signs

BLOCKS = ("conv_2_3", "conv_3_4", "conv_4_6", "conv_5_1")
"""Blocks of a ResNet-50: stage and place in it, from one."""
RECIPES = ("average", "rmac", "rmac-bits")


def block_tap(model: nn.Module, block: str) -> str:
    """The tap on the pre-ReLU activations of a residual block, named as in the paper: conv_5_1 is layer4.0.

    It is what enters the last ReLU of the block, the sum of its convolutions and its shortcut, in a network that names
    its parts as torchvision's and our ResNets do.

    Raises:
        InputError: no such block.
    """
    match = re.fullmatch(r"conv_(\d+)_(\d+)", block)
    known = dict(model.named_modules())
    name = f"layer{int(match[1]) - 1}.{int(match[2]) - 1}" if match else ""
    if f"{name}.relu" not in known:
        raise InputError(
            f"{type(model).__name__} has no block {brief(block)}; name its layer as in model.named_modules()."
        )
    # One ReLU module serves the whole block: two calls in a basic block, three in a bottleneck.
    return f"{name}.relu:input@{2 if f'{name}.conv3' in known else 1}"


def web_scale_features(
    model: nn.Module,
    layer: str = "conv_5_1",
    data: Any = None,
    *,
    n_components: int | None = None,
    recipe: str = "average",
    whiten: bool = False,
    **sampling: Any,
) -> FeatureExtractor:
    """The paper's features: "average" pools over places, then PCA; "rmac-bits" is R-MAC, then PCA, then signs.

    The paper has 256 components, of ResNet-50's conv_5_1 averaged, and R-MAC for its largest database.

    Args:
        model: the network, e.g. `load_model("resnet50", …)`.
        layer: a block by the paper's name, or any layer by its own.
        data: where PCA and signs are fitted, on a sample of it: unlabelled images will do.
        n_components: of the PCA; None leaves it out.
        recipe: "average", "rmac" (without signs) or "rmac-bits".
        whiten: whiten the components.
        sampling: see `robustknn.fitting.sample_features`.

    Raises:
        InputError: no such layer, an unknown recipe, no data where something is fitted.
    """
    check_choice(recipe, RECIPES, "recipe")
    if not isinstance(layer, str):
        raise InputError(f"layer must be a block by the paper's name, or a layer by its own, not {brief(layer)}.")
    if whiten and n_components is None:
        raise InputError("whiten whitens the components of a PCA; say how many with n_components=.")
    tap = block_tap(model, layer) if layer.startswith("conv_") else layer
    if data is None and (n_components is not None or recipe == "rmac-bits"):
        raise InputError("what is learned (PCA, the centers of signs) needs data; pass a sample as data=.")
    if recipe == "average":
        features = FeatureExtractor(model, tap, pool="avg")
    else:
        features = with_rmac(FeatureExtractor(model, tap))
    if n_components is not None:
        features = with_projection(features, data, n_components, whiten=whiten, **sampling)
    return with_signs(features, data, **sampling) if recipe == "rmac-bits" else features
