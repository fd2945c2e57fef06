"""Options of defenses that cannot mean anything: one sentence each, at the entrance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refuse
from small import random_net
from torch import nn

from robustknn import FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.attacks.hardening import adversarial_references
from robustknn.classifiers import RAILS, BitDepth, Transformed
from robustknn.datasets import Split, from_arrays
from robustknn.recipes.daeknn import daeknn
from robustknn.recipes.retrieval import web_scale_features
from robustknn.training import ASKDef, filter_labels

DATA = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(20) % 4)


def features() -> FeatureExtractor:
    return FeatureExtractor(random_net(), ["1"])


def split() -> Split:
    return from_arrays(*DATA, *DATA).train


def rails(**options: Any) -> RAILS:
    return RAILS(ReferenceSet.build(features(), DATA, keep_images=True), n_neighbors=2, population=16, **options)


def hardened(eps: Any) -> ReferenceSet:
    return adversarial_references(features(), DATA, ThreatModel("linf", eps))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: hardened(8.0), "for pixels of 0..255 write 8/255"),
        (lambda: hardened(torch.full((5,), 0.1)), "eps has 5 radii, fewer than there are inputs"),
        (lambda: BitDepth(0), "bits must be a whole number of at least 1, not 0"),
        (lambda: BitDepth(9), "bits must be a whole number from 1 to 8, not 9"),
        (lambda: filter_labels(random_net(), split(), 3, trusted=DATA), "trusted must be a Split as well"),  # type: ignore[arg-type]
        (lambda: filter_labels(random_net(), split(), 3, leave_out_itself="no"), "leave_out_itself must be True"),  # type: ignore[arg-type]
        (lambda: rails(layers=3), "layers must be names of layers"),
        (lambda: rails().scores(DATA[0], torch.arange(3)), "3 sample_ids for 20 inputs"),
        (lambda: Transformed(random_net(), 4, BitDepth()).scores(DATA[0], torch.arange(3)), "3 sample_ids for 20"),
        (lambda: ASKDef(layers=None), "name their layers"),  # type: ignore[arg-type]
        (lambda: ASKDef(layers=3), "layers must be names of layers"),  # type: ignore[arg-type]
        (lambda: web_scale_features(nn.Linear(3, 3), 3), "layer must be a block by the paper's name"),  # type: ignore[arg-type]
        (lambda: web_scale_features(nn.Linear(3, 3), "x", whiten=True), "say how many with n_components"),
        (lambda: ReferenceSet.build(features(), DATA, payload=5), "payload must be 'softmax', a callable or None"),  # type: ignore[arg-type]
        (
            lambda: daeknn(features(), DATA, ThreatModel("linf", 0.1), variant="daeknn-wad", weighting="released"),
            "daeknn-wad is a DkNN, which has no weighting",
        ),
    ],
)
def test_one_sentence_says_what_is_wrong(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError) as refused:
        make()
    assert said in str(refused.value)


def test_flags_that_belong_to_another_are_refused_without_it(tmp_path: Path) -> None:
    assert "--filter-k is of --filter-labels" in refuse("train", "--filter-k", 5, "--out", tmp_path / "a")
    assert "--robust-norm is of --robust-eps" in refuse("train", "--robust-norm", "l2", "--out", tmp_path / "b")


def test_the_variant_without_adversarial_references_takes_what_a_dknn_takes() -> None:
    made = daeknn(features(), DATA, ThreatModel("linf", 0.1), variant="daeknn-wad", metric="cosine")
    assert made.metric == "cosine"
