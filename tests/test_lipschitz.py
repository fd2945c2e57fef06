"""Lipschitz constants against dense matrices and gradients; certificates over such networks against attacks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustknn import KNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import PGD
from robustknn.certification import FeatureBisector, FeatureExact, Lipschitz
from robustknn.datasets import load
from robustknn.models import LipschitzCNN, Normalize, ResNet, create, lipschitz_bound
from robustknn.models.lipschitz import AlmostOrthogonalConv2d, AlmostOrthogonalLinear, MaxMin
from robustknn.models.lipschitz_bounds import rounding
from robustknn.training import LipschitzMargin, TrainConfig, initialise, train


def small(seed: int = 0) -> LipschitzCNN:
    """For images of 8 × 8, with weights off their first values."""
    model = initialise(lambda: LipschitzCNN(image_size=8, width=8, embedding=16), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def dense(f: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear map, column by column."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return (f(basis) - f(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1).T


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (6,)),
    (AlmostOrthogonalLinear(6, 4), (6,)),
    (AlmostOrthogonalLinear(4, 6), (4,)),
    (nn.Conv2d(2, 5, 3, padding=1), (2, 7, 7)),
    (nn.Conv2d(5, 2, 4, stride=2, padding=1), (5, 6, 6)),
    (nn.Conv2d(2, 2, (3, 1)), (2, 5, 5)),
    (AlmostOrthogonalConv2d(2, 6, 3, padding=1), (2, 6, 6)),
    (AlmostOrthogonalConv2d(6, 2, 3, padding=1), (6, 6, 6)),
    (nn.AvgPool2d(2), (3, 6, 6)),
    (nn.PixelUnshuffle(2), (2, 4, 4)),
    (Normalize((0.5, 0.4), (0.3, 0.2)), (2, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_a_layer_is_bounded_by_its_matrix(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The bound is no less than the norm on one image, and not much more."""
    model = nn.Sequential(layer).double()
    norm = float(torch.linalg.matrix_norm(dense(model, shape).detach(), ord=2))
    bound = lipschitz_bound(model)
    stride = layer.stride[0] if isinstance(layer, nn.Conv2d) else 1  # the bound is that of a stride of 1
    assert norm <= bound <= 1.35 * norm * stride


@pytest.mark.parametrize("size", [16, 40])
def test_a_convolution_on_a_large_image_comes_near_its_bound(size: int) -> None:
    """A kernel that alternates is amplified most at a frequency between those measured."""
    kernel = torch.cos(0.9 * torch.arange(5.0))[None, None, None].double()
    layer = nn.Conv2d(1, 1, (1, 5), padding=(0, 2), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(kernel)
    norm = float(torch.linalg.matrix_norm(dense(layer, (1, 1, size)).detach(), ord=2))
    assert norm <= lipschitz_bound(nn.Sequential(layer)) <= norm * (1 + 20 / size**2 + 0.01)


def test_almost_orthogonal_layers_are_1_lipschitz() -> None:
    for seed in range(3):
        model = small(seed).double()
        for layer in FeatureExtractor(model).model.feature_layers:  # type: ignore[union-attr]
            assert lipschitz_bound(model, layer) <= 1 + 1e-6


def test_features_move_no_farther_than_the_bound() -> None:
    model = small(1).double()
    bound = lipschitz_bound(model)
    x = torch.rand(20, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    for scores in model(x).unbind(1):
        (gradient,) = torch.autograd.grad(scores.sum(), x, retain_graph=True)
        assert float(gradient.flatten(1).norm(dim=1).max()) <= bound
    other = x.detach() + 0.1 * torch.randn(20, 1, 8, 8, dtype=torch.float64)
    moved, asked = (model(x) - model(other)).norm(dim=1), (x - other).flatten(1).norm(dim=1)
    assert bool((moved <= bound * asked).all())


def test_sorting_keeps_norms_and_values() -> None:
    x = torch.randn(3, 6, 2, 2)
    out = MaxMin()(x)
    torch.testing.assert_close(out.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    assert bool((out[:, ::2] >= out[:, 1::2]).all())
    with pytest.raises(InputError, match="sorts pairs of channels and there are 3"):
        MaxMin()(torch.rand(1, 3))


def test_rounding_covers_what_float32_loses() -> None:
    model = small(2)
    x = torch.rand(50, 1, 8, 8)
    off = (model(x).double() - small(2).double()(x.double())).norm(dim=1)
    bound = rounding(model, "fc", x, 1.0)
    assert bool((off <= bound).all())
    assert bool((off > 0).any())
    assert float(bound.max()) < 1e-3


@pytest.mark.parametrize(
    ("model", "layer", "said"),
    [
        (nn.Linear(2, 2), "(output)", "the Lipschitz constant of a Linear is not known; use an nn.Sequential"),
        (nn.Sequential(nn.Sigmoid()), "(output)", "of layer '0', a Sigmoid, is not known"),
        (nn.Sequential(nn.Linear(2, 2)), "1", "layer '1' is none of the model's own"),
        (nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), "(output)", "grouped or otherwise padded"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), "(output)", "otherwise padded"),
        (nn.Sequential(nn.AvgPool2d(3, stride=1)), "(output)", "without overlap"),
    ],
)
def test_an_unknown_constant_is_refused(model: nn.Module, layer: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        lipschitz_bound(model, layer)


@pytest.mark.parametrize("option", [{"width": 3}, {"image_size": 10}, {"embedding": 5}, {"n_classes": 0}])
def test_sizes_that_do_not_work_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(option))):
        create("lipschitz-cnn", **option)


# ---------------------------------------------------------------------------------------- certificate


def victim(k: int, metric: str = "l2", layer: str = "embed") -> tuple[KNN, Tensor, Tensor]:
    """A kNN on a network trained for a moment on the digits, and test images."""
    source = load("digits", protocol="published")
    model = initialise(lambda: LipschitzCNN(image_size=8, width=8, embedding=32), 0)
    train(model, source, TrainConfig(epochs=3, batch_size=64, lr=1e-2), method=LipschitzMargin(0.5))
    references = ReferenceSet.build(FeatureExtractor(model, [layer]), source.train)
    x, y = source.test.batch(torch.arange(60)), source.test.labels[:60]
    return KNN(references, k, metric=metric), x, y


@pytest.mark.parametrize(("k", "metric"), [(1, "l2"), (5, "l2"), (5, "cosine")])
def test_no_attack_inside_a_radius_succeeds(k: int, metric: str) -> None:
    knn, x, y = victim(k, metric)
    found = Lipschitz()(knn, x)
    within = (FeatureExact() if k == 1 else FeatureBisector())(knn, x)
    assert found.unit == "L2 of the input"
    assert float((found.labels == y).double().mean()) > 0.8  # it classifies
    sure = found.radius > 0
    assert float(sure.double().mean()) > 0.8
    L = lipschitz_bound(knn.extractor.model, "embed")  # type: ignore[union-attr]
    torch.testing.assert_close(found.radius[sure], within.radius[sure] / L, rtol=0.02, atol=1e-3)
    assert bool((found.radius[sure] < within.radius[sure] / L).all())
    threat = ThreatModel("l2", found.radius[sure])
    attacked = PGD(steps=30)(knn, x[sure], found.labels[sure], threat)
    assert not bool(attacked.success.any())
    wide = PGD(steps=30)(knn, x[sure], found.labels[sure], threat.with_eps(6 * found.radius[sure]))
    assert bool(wide.success.any())


def test_networks_without_a_known_constant_are_refused() -> None:
    x, y = torch.rand(12, 3, 32, 32), torch.arange(12) % 2
    model = registry.models.create("resnet20")
    assert not isinstance(model, ResNet)
    knn = KNN(ReferenceSet.build(FeatureExtractor(model), (x, y)), 1)
    with pytest.raises(InputError, match="'lipschitz' does not hold for KNN: the Lipschitz constant of a CifarResNet"):
        Lipschitz()(knn, x[:2])


def test_features_that_are_changed_after_the_layer_are_refused() -> None:
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 2
    for features in (
        FeatureExtractor(small(), ["embed"], normalize=True),
        FeatureExtractor(small(), ["sort3"], pool="max"),
    ):
        with pytest.raises(InputError, match="tap the layer as it is"):
            Lipschitz()(KNN(ReferenceSet.build(features, (x, y)), 1), x[:2])


def test_the_margin_loss() -> None:
    """Cross-entropy by hand for one sample."""
    scores = torch.tensor([[2.0, 1.0]])

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scores

    class Given:
        x, y = torch.zeros(1, 1), torch.tensor([0])

    found = LipschitzMargin(margin=0.5, temperature=0.25).losses(Fixed(), Given())["margin"]  # type: ignore[arg-type]
    shifted = 2.0 - math.sqrt(2) * 0.5
    expected = 0.25 * math.log(1 + math.exp((1.0 - shifted) / 0.25))
    assert float(found) == pytest.approx(expected, rel=1e-6)
    for option in ({"margin": 0.0}, {"temperature": -1.0}):
        with pytest.raises(InputError, match=next(iter(option))):
            LipschitzMargin(**option)
