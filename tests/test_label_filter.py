"""Deep kNN label filtering, against counts by hand, a plain search and training on noisy labels."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustknn import FeatureExtractor, InputError
from robustknn.datasets import Split, load
from robustknn.models import DigitsCNN
from robustknn.training import TrainConfig, filter_labels, initialise, train, with_symmetric_noise


def line(values: list[float], labels: list[int]) -> Split:
    """Samples on a line, whose logits are themselves."""
    return Split(torch.tensor(values)[:, None], labels, "train")


def plain_votes(x: Tensor, y: Tensor, k: int, n_classes: int, itself: bool) -> Tensor:
    """The share of each label among the k nearest, by float64 brute force; x and y of all, judged or not."""
    d = (x.double()[:, None] - x.double()[None]).norm(dim=2)
    if not itself:
        d.fill_diagonal_(float("inf"))
    near = y[torch.argsort(d, dim=1, stable=True)[:, :k]]
    return torch.stack([(near == c).double().mean(1) for c in range(n_classes)], 1)


def test_a_line_of_seven_by_hand() -> None:
    # The third sample lies among zeros with label 1; nearest two of each, without itself:
    # 0: {1, 2} → 0, 1; 1: {0, 2} → 0, 1; 2.1: {1, 0} → 0, 0; 10: {11, 12}; …
    split = line([0.0, 1.0, 2.1, 10.0, 11.0, 12.0, 13.0], [0, 0, 1, 1, 1, 1, 1])
    found = filter_labels(nn.Identity(), split, 2)
    assert found.kept.tolist() == [True, True, False, True, True, True, True]
    assert found.agreement.tolist() == [0.5, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert found.per_class == ((2, 2), (4, 5))
    assert found.disagreement == pytest.approx(1 / 7)
    assert found.split.ids.tolist() == [0, 1, 3, 4, 5, 6]
    assert found.split.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert found.spared == ()
    assert "| 1 | 4 | 5 | 80.0 |" in found.to_markdown()


def test_a_sample_that_votes_for_itself_ties_and_stays() -> None:
    split = line([0.0, 1.0, 2.1, 10.0, 11.0, 12.0, 13.0], [0, 0, 1, 1, 1, 1, 1])
    found = filter_labels(nn.Identity(), split, 2, leave_out_itself=False)
    assert found.agreement.tolist()[2] == 0.5
    assert bool(found.kept.all())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("itself", [True, False])
def test_votes_are_those_of_a_plain_search(itself: bool, metric: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    logits = net(x).detach()
    found = filter_labels(net, Split(x, y, "train"), 7, metric=metric, leave_out_itself=not itself, batch_size=16)
    compared = nn.functional.normalize(logits.double(), dim=1) if metric == "cosine" else logits
    expected = plain_votes(compared, y, 7, 3, itself)
    assert torch.equal(found.votes, expected)
    assert found.spared == ()
    own = expected.gather(1, y[:, None])[:, 0]
    assert torch.equal(found.kept, own >= expected.amax(1))


def test_many_copies_of_a_sample_lose_one_neighbor_each() -> None:
    """Equal samples: a sample may not be among its own k + 1 nearest, and then k of those are taken."""
    split = line([0.0] * 6 + [5.0], [0, 0, 0, 0, 0, 1, 1])
    with pytest.warns(UserWarning, match="kept whole"):
        found = filter_labels(nn.Identity(), split, 2)
    assert found.votes.tolist() == [[1.0, 0.0]] * 7
    assert found.spared == (1,)
    assert bool(found.kept.all())


def test_a_class_that_would_be_emptied_is_kept_whole() -> None:
    split = line([0.0, 1.0, 2.0, 1.5, 3.0], [0, 0, 0, 1, 0])
    with pytest.warns(UserWarning, match="every sample with label 1, which is kept whole"):
        found = filter_labels(nn.Identity(), split, 2)
    assert found.spared == (1,)
    assert bool(found.kept[3])
    assert found.per_class[1] == (1, 1)
    assert found.agreement[3] == 0


def test_trusted_samples_vote_and_are_not_judged() -> None:
    split = line([0.0, 1.0, 2.0, 3.0], [1, 1, 0, 0])
    trusted = line([0.1, 0.2, 0.9, 1.1], [0, 0, 0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = filter_labels(nn.Identity(), split, 1)
    assert alone.kept.tolist() == [True, True, False, True]  # 2 has 1 and 3 at one distance, the first is taken
    with pytest.warns(UserWarning, match="kept whole"):
        helped = filter_labels(nn.Identity(), split, 2, trusted=trusted)
    assert helped.agreement[:2].tolist() == [0.0, 0.0]
    assert len(helped.kept) == 4


def test_what_cannot_be_filtered_is_refused() -> None:
    split = line([0.0, 1.0, 2.0], [0, 1, 0])
    with pytest.raises(InputError, match="exceeds the 2 samples"):
        filter_labels(nn.Identity(), split, 3)
    with pytest.raises(InputError, match="exceeds the 3 samples"):
        filter_labels(nn.Identity(), split, 4, leave_out_itself=False)
    with pytest.raises(InputError, match="n_neighbors"):
        filter_labels(nn.Identity(), split, 0)
    with pytest.raises(InputError, match="one of them"):
        filter_labels(FeatureExtractor(nn.Sequential(nn.Identity(), nn.Identity()), ["0", "1"]), split, 1)
    with pytest.raises(InputError, match="Split"):
        filter_labels(nn.Identity(), (torch.zeros(3, 1), [0, 1, 0]), 1)  # type: ignore[arg-type]


def test_symmetric_noise_is_counted() -> None:
    source = load("digits")
    noisy = with_symmetric_noise(source.train, 0.3, 10, seed=4)
    wrong = noisy.labels != source.train.labels
    assert int(wrong.sum()) == round(0.3 * len(source.train))
    assert torch.equal(noisy.labels, with_symmetric_noise(source.train, 0.3, 10, seed=4).labels)
    assert not torch.equal(noisy.labels, with_symmetric_noise(source.train, 0.3, 10, seed=5).labels)
    step = (noisy.labels - source.train.labels)[wrong].remainder(10)
    counts = np.bincount(step.numpy(), minlength=10)
    assert counts[0] == 0
    mean = int(wrong.sum()) / 9
    assert float(((counts[1:] - mean) ** 2 / mean).sum()) < 26.1  # χ² of 8 degrees of freedom, 0.1 %
    assert torch.equal(noisy.batch(torch.arange(3)), source.train.batch(torch.arange(3)))
    with pytest.raises(InputError, match="share"):
        with_symmetric_noise(source.train, 1.2, 10)


def test_most_wrong_labels_of_digits_are_found() -> None:
    source = replace(load("digits"), validation=None)
    noisy = with_symmetric_noise(source.train, 0.3, 10, seed=0)
    wrong = noisy.labels != source.train.labels
    model = initialise(DigitsCNN, 0)
    train(model, replace(source, train=noisy), TrainConfig(epochs=6, batch_size=64, lr=2e-3))
    found = filter_labels(model, noisy)
    assert float(found.kept[wrong].double().mean()) < 0.1
    assert float(found.kept[~wrong].double().mean()) > 0.95
    # a network so trained reads it too: a random one finds less
    blind = filter_labels(initialise(DigitsCNN, 0), noisy)
    assert int((blind.kept == ~wrong).sum()) < int((found.kept == ~wrong).sum())
