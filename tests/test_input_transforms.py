"""Transformations of inputs against closed forms, Pillow and a plain solver; networks behind them, and their attack."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustknn import PGD, CrossEntropy, ThreatModel, WorstCase
from robustknn.attacks import FGSM
from robustknn.classifiers import JPEG, BitDepth, InputTransform, Network, RandomCrop, TotalVariation, Transformed
from robustknn.classifiers.input_transforms import differences, divergence, steps_near
from robustknn.classifiers.soft_jpeg import soft_jpeg
from robustknn.errors import InputError
from robustknn.objectives import ThroughTransform

TRANSFORMS: tuple[InputTransform, ...] = (JPEG(), BitDepth(), TotalVariation(), RandomCrop(13))


def images(n: int = 5, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth random images, (n, channels, size, size)."""
    coarse = torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def apply(transform: InputTransform, x: Tensor, seed: int = 0, ids: Tensor | None = None) -> Tensor:
    return transform(x, torch.arange(len(x)) if ids is None else ids, seed)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4)).eval()


# -------------------------------------------------------------------------------- the transformations


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_fewer_bits_are_the_nearest_levels(bits: int) -> None:
    x = images()
    levels = np.arange(2**bits) / (2**bits - 1)
    nearest = levels[np.abs(x.double().numpy()[..., None] - levels).argmin(-1)]
    assert np.allclose(apply(BitDepth(bits), x).numpy(), nearest, atol=1e-7)


def test_eight_bits_change_no_pixel() -> None:
    x = torch.arange(256).float().view(1, 1, 16, 16) / 255
    assert torch.equal(apply(BitDepth(8), x), x)


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("quality", [10, 75])
def test_jpeg_is_pillows(channels: int, mode: str, quality: int) -> None:
    x = images(channels=channels)
    made = apply(JPEG(quality), x)
    for image, found in zip(x, made, strict=True):
        pixels = np.rint(image.numpy().astype(np.float64) * 255).astype(np.uint8).transpose(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels if mode == "RGB" else pixels[..., 0]).save(file, format="jpeg", quality=quality)
        decoded = np.asarray(Image.open(file).convert(mode), dtype=np.float32).reshape(pixels.shape) / 255
        assert np.array_equal(found.numpy().transpose(1, 2, 0), decoded)
    assert not torch.equal(made, x)


def test_variation_of_a_step_has_a_closed_form() -> None:
    """Both sides of an edge move toward each other by weight / width, whatever the height."""
    x = torch.full((1, 1, 5, 16), 0.2, dtype=torch.float64)
    x[..., 10:] = 0.9
    expected = torch.full_like(x, 0.2 + 0.05 / 10)
    expected[..., 10:] = 0.9 - 0.05 / 6
    assert torch.allclose(TotalVariation(0.05, steps=2000).solve(x), expected, atol=1e-5)


def chambolle(x: np.ndarray[Any, Any], weight: float, steps: int) -> np.ndarray[Any, Any]:
    """The same minimum by another algorithm (Chambolle, J. Math. Imaging Vis. 20, 2004, eq. 9), one channel."""
    p = np.zeros((2, *x.shape))

    def div() -> np.ndarray[Any, Any]:
        found = np.zeros_like(x)
        found[0] += p[0, 0]
        found[1:-1] += p[0, 1:-1] - p[0, :-2]
        found[-1] -= p[0, -2]
        found[:, 0] += p[1, :, 0]
        found[:, 1:-1] += p[1, :, 1:-1] - p[1, :, :-2]
        found[:, -1] -= p[1, :, -2]
        return found

    for _ in range(steps):
        inner = div() - x / weight
        slope = np.zeros_like(p)
        slope[0, :-1], slope[1, :, :-1] = np.diff(inner, axis=0), np.diff(inner, axis=1)
        p = (p + slope / 8) / (1 + np.sqrt((slope**2).sum(0)) / 8)
    return x - weight * div()


def test_variation_is_that_of_a_plain_solver_in_float64() -> None:
    transform, x = TotalVariation(0.03), images(2, size=12)
    made = apply(transform, x)
    for image, found in zip(x.double().numpy(), made, strict=True):
        for channel, smoothed in zip(image, found.numpy(), strict=True):
            assert np.abs(smoothed - chambolle(channel, 0.03, 3000)).max() < 2e-3
    assert bool((transform.objective(made, x) < transform.objective(x, x)).all())


def test_more_steps_of_the_solver_close_the_gap() -> None:
    """The gap between the minimum and what is reached is bounded by ‖z_1000 − z‖, and falls."""
    x = images(2, size=12).double()
    best = TotalVariation(0.03, steps=5000).solve(x)
    gaps = [float((TotalVariation(0.03, steps=steps).solve(x) - best).abs().max()) for steps in (10, 50, 200)]
    assert gaps[0] > gaps[1] > gaps[2]


def test_divergence_is_the_negative_adjoint() -> None:
    generator = torch.Generator().manual_seed(0)
    z, p = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5, 7), (2, 2, 3, 5, 7)))
    assert torch.isclose((differences(z) * p).sum(), -(z * divergence(p)).sum())


def test_a_crop_is_a_resized_square_of_the_image() -> None:
    x, seen = images(40), set()
    made = apply(RandomCrop(13), x)
    for image, found in zip(x, made, strict=True):
        corners = [
            (top, left)
            for top in range(4)
            for left in range(4)
            if torch.allclose(
                nn.functional.interpolate(image[None, :, top : top + 13, left : left + 13], (16, 16), mode="bilinear")[
                    0
                ],
                found,
                atol=1e-6,
            )
        ]
        assert len(corners) == 1
        seen.update(corners)
    assert len(seen) > 10
    assert not torch.equal(made, apply(RandomCrop(13), x, seed=1))
    assert torch.equal(made[7:9], apply(RandomCrop(13), x[7:9], ids=torch.tensor([7, 8])))
    assert torch.equal(apply(RandomCrop(16), x), x)


def test_the_gradient_of_rounding_is_large_where_a_value_turns() -> None:
    x = torch.tensor([[0.1, 0.45, 0.55, 0.95]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply(BitDepth(1), x).sum(), x)
    u = 2 * x.detach() - 1
    assert torch.allclose(gradient, 2 * (1 / 16) / (1 / 16 + u.abs()) ** 2)


def test_soft_jpeg_with_hard_rounding_is_nearly_pillows() -> None:
    """What differs is the rounding of pixels inside, and libjpeg's arithmetic in whole numbers."""
    for x in (images(size=32), images(channels=1, size=32), images(size=21)):
        for quality in (30, 75):
            made, real = soft_jpeg(x, quality, torch.round).clamp(0, 1), apply(JPEG(quality), x)
            assert float((made - real).abs().mean()) < 2 / 255
            assert float((made - real).abs().mean()) < 0.7 * float((x - real).abs().mean())


def test_soft_jpeg_without_rounding_keeps_gray_images() -> None:
    x = images(channels=1, size=21).double()
    assert torch.allclose(soft_jpeg(x, 50, lambda v: v), x, atol=1e-9)
    color = x.expand(-1, 3, -1, -1)
    assert torch.allclose(soft_jpeg(color, 50, lambda v: v), color, atol=1e-5)


def test_the_gradient_of_jpeg_is_that_of_the_soft_one() -> None:
    x, weights = images().requires_grad_(True), images(seed=1)
    (gradient,) = torch.autograd.grad((apply(JPEG(), x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((soft_jpeg(x, 75, steps_near) * weights).sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-5)
    assert float(gradient.abs().max()) > 0


def test_the_solver_of_variation_has_its_own_gradient() -> None:
    x = images(1, channels=1, size=6).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: apply(TotalVariation(0.03, steps=7), v), x)


def test_the_solver_of_variation_has_a_gradient_on_flat_images_too() -> None:
    """A root of a sum of squares has none at zero, and most of a digit's image is flat: an attack would stand still."""
    x = images(1, channels=1, size=6).double()
    x[:, :, :4, :4], x[:, :, 4:] = 1.0, 0.0
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: apply(TotalVariation(0.03, steps=7), v), x)


def test_a_crop_has_its_own_gradient() -> None:
    x = images(2).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: apply(RandomCrop(13), v), x)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: JPEG(0), "quality"),
        (lambda: JPEG(96), "1 to 95"),
        (lambda: BitDepth(9), "1 to 8"),
        (lambda: TotalVariation(0.0), "weight"),
        (lambda: RandomCrop(0), "size"),
        (lambda: apply(RandomCrop(17), images()), "does not fit"),
        (lambda: apply(JPEG(), images(channels=2)), "1 or 3 channels"),
        (lambda: apply(TotalVariation(), torch.rand(3, 8)), "images"),
        (lambda: Transformed(nn.Linear(2, 2), 2, "jpeg"), "InputTransform"),  # type: ignore[arg-type]
        (lambda: Transformed(nn.Linear(2, 2), 2, JPEG(), draws=2), "same in every draw"),
        (lambda: ThroughTransform(draws=0), "draws"),
    ],
)
def test_mistakes_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


# -------------------------------------------------------------------------------------- the classifier


def test_probabilities_are_the_mean_over_draws(net: nn.Module) -> None:
    x, classifier = images(), Transformed(net, 4, RandomCrop(13), draws=3)
    every = []
    for top in range(4):
        for left in range(4):
            part = nn.functional.interpolate(x[:, :, top : top + 13, left : left + 13], (16, 16), mode="bilinear")
            every.append(net(part).double().softmax(1))
    options, found = torch.stack(every), classifier.scores(x)
    triples = torch.cartesian_prod(*[torch.arange(16)] * 3)
    means = options[triples].mean(1)  # of all triples of places
    assert bool(((means - found).abs().amax(2).amin(0) < 1e-6).all())
    assert torch.allclose(found.sum(1), torch.ones(5, dtype=torch.float64))


def test_a_deterministic_one_is_the_network_on_what_was_transformed(net: nn.Module) -> None:
    x = images()
    expected = Network(net, 4).scores(apply(JPEG(), x))
    assert torch.allclose(Transformed(net, 4, JPEG()).scores(x), expected, atol=1e-7)


def test_draws_do_not_depend_on_the_batch(net: nn.Module) -> None:
    x, classifier = images(20), Transformed(net, 4, RandomCrop(13), draws=3)
    ids = torch.arange(100, 120)
    whole = classifier.scores(x, ids)
    assert torch.equal(classifier.scores(x[4:6], ids[4:6]), whole[4:6])
    assert not torch.equal(classifier.scores(x, ids + 1), whole)
    assert classifier.fingerprint() != classifier.with_seed(1).fingerprint()
    assert classifier.fingerprint() != Transformed(net, 4, RandomCrop(12), draws=3).fingerprint()


# --------------------------------------------------------------------------------------- the objective


def test_the_objective_is_the_margin_behind_the_transformation(net: nn.Module) -> None:
    x, y = images(), torch.tensor([0, 1, 2, 3, 0])
    batch = ThroughTransform().bind(Transformed(net, 4, BitDepth(2))).start(x, y, None, None)
    logits = net(apply(BitDepth(2), x))
    others = logits.masked_fill(nn.functional.one_hot(y, 4).bool(), float("-inf")).amax(1)
    assert torch.allclose(batch.loss(x), others - logits[torch.arange(5), y], atol=1e-5)


def test_draws_of_the_objective_are_new_at_every_step_and_its_own(net: nn.Module) -> None:
    x, y = images(), torch.zeros(5, dtype=torch.int64)
    bound = ThroughTransform(draws=1).bind(Transformed(net, 4, RandomCrop(10)))
    first = bound.start(x, y, None, None)
    one, two = first.loss(x), first.loss(x)
    assert not torch.equal(one, two)
    again = bound.start(x[2:3], y[2:3], None, None)
    assert torch.allclose(again.loss(x[2:3]), one[2:3], atol=1e-6)  # in any batch


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_an_attack_through_the_transformation_finds_more_than_one_on_the_network(
    transform: InputTransform, net: nn.Module
) -> None:
    x = images(40, seed=3)
    classifier = Transformed(net, 4, transform, draws=4 if transform.random else 1)
    y, threat = classifier.labels(x), ThreatModel("linf", 0.012)
    gray = FGSM(CrossEntropy())(classifier, x, y, threat)
    through = PGD(ThroughTransform())(classifier, x, y, threat)
    assert through.robust.sum() < gray.robust.sum()
    suite = WorstCase("fast")
    assert "through-transform" in suite.usable(classifier, x[:1])
    assert suite(classifier, x, y, threat).robust.sum() <= through.robust.sum()


def test_the_objective_refuses_what_has_no_transformation(net: nn.Module) -> None:
    with pytest.raises(InputError, match="attacks a Transformed network"):
        ThroughTransform().bind(Network(net, 4))
