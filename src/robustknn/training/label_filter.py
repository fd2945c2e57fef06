"""Deep kNN label filtering: training samples whose label their neighbors contradict are left out.

Bahri, Jiang & Gupta, "Deep k-NN for Noisy Labels", arXiv 2004.12289 (ICML 2020): a network trained on the noisy labels
puts samples of one true class near each other in its logits, so most neighbors of a wrong label disagree with it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustknn import rng
from robustknn.batching import Samples, batches
from robustknn.checks import check_choice, check_finite, check_labels, check_number, check_positive_int, check_whole
from robustknn.datasets import Split
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor
from robustknn.neighbors import ExactIndex
from robustknn.neighbors.base import METRICS


@dataclass(frozen=True)
class FilteredLabels:
    """Which samples a filter keeps, and why.

    Attributes:
        split: the samples kept, in their order.
        kept: (n,) bool, of all samples.
        labels: (n,) int64, the labels that were judged.
        votes: (n, C) float64, the share of each sample's neighbors that have each label.
        spared: the classes that would have lost every sample and were kept whole.
    """

    split: Split
    kept: Tensor
    labels: Tensor
    votes: Tensor
    spared: tuple[int, ...] = ()

    @property
    def agreement(self) -> Tensor:
        """The share of each sample's neighbors that have its label, (n,)."""
        return self.votes.gather(1, self.labels[:, None])[:, 0]

    @property
    def disagreement(self) -> float:
        """The share of all samples whose label is outvoted by another, those of spared classes too."""
        return float((self.agreement < self.votes.amax(1)).double().mean())

    @property
    def per_class(self) -> tuple[tuple[int, int], ...]:
        """(kept, all) samples with each label, class by class."""
        n_classes = self.votes.shape[1]
        counts = (torch.bincount(y, minlength=n_classes).tolist() for y in (self.labels[self.kept], self.labels))
        return tuple(zip(*counts, strict=True))

    def to_markdown(self) -> str:
        """A table: class, samples kept, all samples, the share kept in per cent."""
        lines = ["| label | kept | of | % |", "|---:|---:|---:|---:|"]
        for label, (kept, every) in enumerate(self.per_class):
            lines.append(f"| {label} | {kept} | {every} | {100 * kept / max(every, 1):.1f} |")
        return "\n".join(lines)


@torch.no_grad()
def filter_labels(
    model: nn.Module | FeatureExtractor,
    split: Split,
    n_neighbors: int = 20,
    *,
    trusted: Samples | None = None,
    metric: str = "l2",
    leave_out_itself: bool = True,
    batch_size: int = 256,
) -> FilteredLabels:
    """Keep the samples whose label no other one outvotes among the k nearest in the network's logits.

    A tie speaks for the label. Train on `result.split` what is to be used; a network trained on the noisy labels, with
    its own loss and epochs, serves as the preliminary one.

    Args:
        model: the preliminary network (B, …) → (B, C), or an extractor of one layer to compare instead of the logits.
        split: the samples to judge.
        n_neighbors: k; well below the samples of a class, and above what a cluster of equal wrong labels may hold.
        trusted: samples whose labels are known to be right: they vote, and are not judged.
        metric: "l2", "cosine" or "ip".
        leave_out_itself: a sample is no neighbor of itself; otherwise it votes for its own label.
        batch_size: samples a forward pass.

    Raises:
        InputError: k above the number of neighbors there are, no network, features that are not finite.
    """
    features = model if isinstance(model, FeatureExtractor) else FeatureExtractor(model)
    if len(features.layers) != 1:
        raise InputError(f"the extractor reads {len(features.layers)} layers; compare in one of them.")
    if not isinstance(split, Split):
        raise InputError(f"split must be a Split, whose samples can be chosen, not {brief(split)}; see from_arrays.")
    if trusted is not None and not isinstance(trusted, Samples):
        raise InputError(f"trusted must be a Split as well, not {brief(trusted)}; see from_arrays.")
    if not isinstance(leave_out_itself, bool):
        raise InputError(f"leave_out_itself must be True or False, not {brief(leave_out_itself)}.")
    k, n = check_positive_int(n_neighbors, "n_neighbors"), len(split)
    check_choice(metric, METRICS, "metric")
    check_positive_int(batch_size, "batch_size")
    parts: list[Samples] = [split] if trusted is None else [split, trusted]
    others = sum(map(len, parts)) - int(leave_out_itself)
    if k > others:
        raise InputError(f"n_neighbors = {k} exceeds the {others} samples that can be neighbors; lower it.")
    vectors = torch.cat([_read(features, part, batch_size) for part in parts])
    labels = torch.cat([part.labels for part in parts])
    index = ExactIndex(metric).build(vectors)
    n_classes = int(labels.max()) + 1
    votes = torch.zeros(n, n_classes, dtype=torch.float64)
    for places in torch.arange(n).split(batch_size):
        ids = index.search(vectors[places], k + int(leave_out_itself)).ids.cpu()
        if leave_out_itself:
            ids = _without(ids, places)
        votes[places] = nn.functional.one_hot(labels[ids], n_classes).double().mean(1)
    return _filtered(split, votes)


def _read(features: FeatureExtractor, part: Samples, batch_size: int) -> Tensor:
    layer = features.layers[0]
    found = torch.cat([features(features.place(x))[layer] for x, _ in batches(part, batch_size)])
    check_finite(found, f"layer {layer!r}")
    return found


def _without(ids: Tensor, own: Tensor) -> Tensor:
    """Neighbors (B, k + 1) without the sample itself (B,); where it is not among them, without the farthest."""
    itself = ids == own[:, None]
    itself[:, -1] |= ~itself.any(1)
    return ids[~itself].view(len(ids), -1)


def _filtered(split: Split, votes: Tensor) -> FilteredLabels:
    labels = split.labels
    kept = votes.gather(1, labels[:, None])[:, 0] >= votes.amax(1)
    n_classes = votes.shape[1]
    left, before = (torch.bincount(y, minlength=n_classes) for y in (labels[kept], labels))
    spared = ((left == 0) & (before > 0)).nonzero()[:, 0]
    if len(spared):
        names = ", ".join(map(str, spared.tolist()))
        warnings.warn(
            f"the neighbors contradict every sample with label {names}, which is kept whole; lower n_neighbors or look "
            "at these samples.",
            stacklevel=4,  # of them one is that of no_grad
        )
        kept = kept | torch.isin(labels, spared)
    return FilteredLabels(split.subset(kept), kept, labels, votes, tuple(spared.tolist()))


def with_symmetric_noise(split: Split, share: float, n_classes: int, seed: int = 0) -> Split:
    """The split with wrong labels: round(share · n) samples get one of the other classes, each equally likely.

    Args:
        share: of the samples, in [0, 1].
        n_classes: C, at least two.
        seed: of the choice, counted by place in the split.
    """
    check_number(share, "share", "in [0, 1]", lambda v: 0 <= v <= 1)
    check_whole(n_classes, "n_classes", 2)
    check_whole(seed, "seed")
    labels = check_labels(split.labels, len(split), n_classes, "labels").clone()
    chosen = rng.permutation(len(split), seed, "noisy labels")[: round(share * len(split))]
    step = rng.bits(chosen, 1, seed, "wrong label")[:, 0].remainder(n_classes - 1) + 1
    labels[chosen] = (labels[chosen] + step) % n_classes
    noisy = copy.copy(split)
    noisy.labels = labels
    return noisy
