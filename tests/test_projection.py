"""Transforms of features: PCA against NumPy and scikit-learn, R-MAC in plain loops, bits and their gradient."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from robustknn import (
    KNN,
    PGD,
    Adaptive,
    FeatureExtractor,
    InputError,
    IntegrityError,
    ReferenceSet,
    RetrievalClassifier,
    ThreatModel,
    load_classifier,
)
from robustknn.fitting import sample_features, with_projection, with_rmac, with_signs
from robustknn.models import resnet18, resnet50
from robustknn.recipes.retrieval import BLOCKS, block_tap, web_scale_features
from robustknn.transforms import (
    Chain,
    Projection,
    RegionalMax,
    Signs,
    load_transform,
    regional_maxima,
    regions,
)

Array = np.ndarray[Any, Any]


def sample(n: int = 50, dim: int = 8, seed: int = 0) -> Array:
    """Correlated numbers with a mean."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + 5 * rng.normal(size=dim)


# --------------------------------------------------------------------------------------------------- PCA


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("n", "dim", "m"), [(50, 8, 3), (50, 8, 8), (6, 20, 5), (9, 9, 1)])
def test_principal_components_are_those_of_numpy_and_scikit_learn(n: int, dim: int, m: int, whiten: bool) -> None:
    x, other = sample(n, dim), sample(7, dim, 3)
    ours = Projection.fit(torch.from_numpy(x), m, whiten=whiten)
    theirs = PCA(m, whiten=whiten, svd_solver="full").fit(x)
    signs = np.sign((ours.components.numpy() * theirs.components_).sum(1))
    assert ours.components.numpy() == pytest.approx(theirs.components_ * signs[:, None], abs=1e-9)
    assert ours(torch.from_numpy(other)).numpy() == pytest.approx(theirs.transform(other) * signs, abs=1e-8)
    _, values, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for row, by_numpy in zip(ours.components.numpy(), rows, strict=False):
        assert row[np.abs(row).argmax()] > 0
        assert np.abs(row @ by_numpy) == pytest.approx(1)
    if whiten:
        assert ours.scale is not None
        assert ours.scale.numpy() == pytest.approx(values[:m] / math.sqrt(n - 1))
        assert ours(torch.from_numpy(x)).std(0).numpy() == pytest.approx(np.ones(m))


def test_the_sign_does_not_depend_on_the_sample_s_order_or_sign() -> None:
    x = torch.from_numpy(sample())
    first = Projection.fit(x, 4)
    again = Projection.fit(x.flip(0), 4)
    mirrored = Projection.fit(-x, 4)
    for other in (again, mirrored):
        assert torch.allclose(first.components, other.components, atol=1e-9)
    assert torch.equal(Projection.fit(x, 4).components, first.components)


def test_gradients_flow_through_the_projection() -> None:
    fitted = Projection.fit(torch.from_numpy(sample()), 3, whiten=True)
    assert torch.autograd.gradcheck(fitted, torch.from_numpy(sample(4, 8, 5)).requires_grad_())
    single = fitted(torch.from_numpy(sample(4, 8, 5)).float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), fitted(torch.from_numpy(sample(4, 8, 5))), atol=1e-4)


@pytest.mark.parametrize(
    ("vectors", "m", "whiten", "message"),
    [
        (sample(5, 8), 6, False, "6 components need as many samples and at least 2, not 5"),
        (sample(1, 8), 1, False, "at least 2, not 1"),
        (sample(50, 4), 5, False, "vectors of length 4 have no 5 components"),
        (np.full((5, 3), np.nan), 2, False, "the sample has NaN or infinite values, first in sample 0"),
        (np.ones((5, 3), dtype=np.int64), 2, False, "fitted on floating point vectors"),
        (np.ones(5), 1, False, r"fitted on floating point vectors \(n, D\), not \(5,\)"),
        (sample(5, 8), 5, True, "the sample varies along 4 components only"),
        (np.ones((5, 8)), 1, True, "the sample varies along 0 components only"),
        (sample(), 0, False, "n_components must be a whole number of at least 1"),
    ],
)
def test_bad_samples_are_refused(vectors: Array, m: int, whiten: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Projection.fit(vectors, m, whiten=whiten)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="a projection of vectors of length 8 was given length 9"):
        Projection.fit(sample(), 2)(torch.zeros(3, 9))
    with pytest.raises(InputError, match=r"needs components \(m, D\)"):
        Projection(torch.zeros(3), torch.zeros(2, 4))


# ------------------------------------------------------------------------------------------------- R-MAC


def rmac_by_loops(maps: Array, levels: int, whitening: Any = None) -> Array:
    """One image, one region and one channel at a time."""
    vectors = []
    for image in maps:
        total = 0.0
        for top, left, side in regions(*image.shape[1:], levels):
            v = np.array([max(c[top + i, left + j] for i in range(side) for j in range(side)) for c in image])
            v = v / np.linalg.norm(v)
            if whitening is not None:
                v = (v - whitening.mean_) @ whitening.components_.T / np.sqrt(whitening.explained_variance_)
                v = v / np.linalg.norm(v)
            total = total + v
        vectors.append(total / np.linalg.norm(total))
    return np.array(vectors)


def maps(n: int = 5, channels: int = 6, height: int = 7, width: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(7, 7), (4, 4), (5, 9), (9, 5), (2, 2), (1, 1), (3, 20)])
def test_rmac_is_that_of_plain_loops(levels: int, size: tuple[int, int]) -> None:
    held = maps(4, 6, *size)
    assert RegionalMax(levels)(held).numpy() == pytest.approx(rmac_by_loops(held.numpy(), levels), abs=1e-12)


def test_regions_by_hand() -> None:
    assert regions(7, 7, 1) == ((0, 0, 7),)
    assert regions(7, 7, 2) == ((0, 0, 7), (0, 0, 4), (0, 3, 4), (3, 0, 4), (3, 3, 4))
    third = regions(7, 7, 3)[5:]
    assert third == tuple((t, l, 3) for t in (0, 2, 4) for l in (0, 2, 4))
    # 8 × 4: of 2 to 7 squares of 4 along the longer side, 3 at steps of 2 overlap by .5, 2 by 0; .5 is nearer to .4.
    assert regions(4, 8, 1) == ((0, 0, 4), (0, 2, 4), (0, 4, 4))
    assert regions(8, 4, 1) == ((0, 0, 4), (2, 0, 4), (4, 0, 4))
    assert len(regions(4, 8, 2)) == 3 + 2 * 4
    for height, width in ((7, 7), (5, 9), (20, 3), (1, 1), (2, 3)):
        for top, left, side in regions(height, width, 4):
            assert 0 <= top <= height - side
            assert 0 <= left <= width - side
            assert side >= 1


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return net.to(dtype)


def images(n: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_whitened_regions_are_those_of_scikit_learn() -> None:
    features = FeatureExtractor(conv_net(), ["0"])
    x = images()
    fitted = with_rmac(features, x, levels=2, whiten=5)
    held = features.model[0](x).detach()
    rows = regional_maxima(held, 2).flatten(0, 1).numpy()
    assert rows.shape == (40 * 5, 8)
    pca = PCA(5, whiten=True, svd_solver="full").fit(rows)
    other = features.model[0](images(6, 2)).detach().numpy()
    ours, expected = fitted(images(6, 2))["0"].detach().numpy(), rmac_by_loops(other, 2, pca)
    assert ours @ ours.T == pytest.approx(expected @ expected.T, abs=1e-9)  # up to the signs of components
    few = with_rmac(features, (x, torch.arange(40)), levels=2, whiten=5, batch_size=7)  # padded batches count once
    assert torch.allclose(few(x)["0"], fitted(x)["0"], atol=1e-9)


def test_rmac_has_the_gradient_of_its_maxima() -> None:
    assert torch.autograd.gradcheck(RegionalMax(2), maps(2, 3, 4, 5).requires_grad_())
    zero = torch.zeros(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    value = RegionalMax()(zero)
    (gradient,) = torch.autograd.grad(value.sum(), zero)
    assert value.tolist() == [[0.0] * 3]
    assert bool(torch.isfinite(gradient).all())


def test_bad_rmac() -> None:
    with pytest.raises(InputError, match="need the maps of a convolution"):
        RegionalMax()(torch.zeros(3, 4))
    with pytest.raises(InputError, match="levels must be a whole number of at least 1"):
        RegionalMax(0)
    flat = FeatureExtractor(conv_net(), ["3"])
    with pytest.raises(InputError, match="need the maps of a convolution"):
        with_rmac(flat)(images())
    with pytest.raises(InputError, match="pool='flatten' and no more"):
        with_rmac(FeatureExtractor(conv_net(), ["0"], pool="avg"))
    with pytest.raises(InputError, match="whitening is learned from data"):
        with_rmac(FeatureExtractor(conv_net(), ["0"]), whiten=3)


# -------------------------------------------------------------------------------------------------- bits


def test_bits_are_signs_about_the_mean_and_even() -> None:
    x = sample(101)
    ours = Signs.fit(x)
    bits = ours(torch.from_numpy(x))
    assert torch.equal(bits, torch.from_numpy(np.where(x - x.mean(0) >= 0, 1.0, -1.0)))
    assert bits.mean(0).abs().max() < 0.5
    assert ours(ours.center[None]).tolist() == [[1.0] * 8]  # zero counts as +1
    constant = Signs.fit(np.ones((4, 2)))
    assert constant(torch.tensor([[0.5, 1.5]])).tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_exact_and_their_gradient_is_that_of_the_number_behind(dtype: torch.dtype) -> None:
    ours = Signs.fit(sample())
    x = torch.from_numpy(sample(2000, 8, 4)).to(dtype).requires_grad_()
    bits = ours(x)
    assert set(bits.unique().tolist()) == {-1.0, 1.0}
    (gradient,) = torch.autograd.grad(bits.sum(), x)
    spread = np.abs(sample() - sample().mean(0)).mean(0)
    u = (sample(2000, 8, 4) - sample().mean(0)) / spread
    assert gradient.numpy() == pytest.approx(0.25 / (0.25 + np.abs(u)) ** 2 / spread, rel=1e-3)


def test_bad_bits() -> None:
    with pytest.raises(InputError, match="signs of 8 numbers were asked of 9"):
        Signs.fit(sample())(torch.zeros(3, 9))
    for bad in (np.zeros((0, 3)), np.ones(3), np.full((2, 2), np.inf), np.ones((2, 2), dtype=np.int64)):
        with pytest.raises(InputError):
            Signs.fit(bad)
    with pytest.raises(InputError, match="scale"):
        Signs(torch.zeros(2), torch.zeros(2))


# ------------------------------------------------------------------------------------- in the extractor


def test_the_order_is_pooled_transformed_normalized_centered() -> None:
    net, x = conv_net(), images()
    means = net[0](x).detach().mean((2, 3))
    pca = Projection.fit(means, 3)
    features = FeatureExtractor(net, ["0", "1"], pool={"0": "avg"}, transform={"0": pca})
    expected = (means - means.mean(0)) @ pca.components.T
    assert torch.allclose(features(x)["0"], expected, atol=1e-10)
    assert features(x)["1"].shape == (40, 8 * 36)
    center = torch.full((3,), 0.25, dtype=torch.float64)
    both = FeatureExtractor(net, ["0"], pool="avg", transform=pca, normalize=True, center={"0": center})
    unit = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(both(x)["0"], unit - center, atol=1e-10)
    for small in (x[:1], x[:5]):  # a sample's features do not depend on its batch
        assert torch.equal(both(small)["0"], both(x)["0"][: len(small)])
    assert set(features.select(["0"]).transform) == {"0"}
    assert not features.select(["1"]).transform
    assert features.centered({"0": center}).transform["0"] is pca
    moved = features.to("cpu")
    assert torch.equal(moved(x)["0"], features(x)["0"])


def test_gradients_reach_the_input() -> None:
    features = with_projection(FeatureExtractor(conv_net(), ["1"], pool="avg"), images(), 3, whiten=True)
    assert torch.autograd.gradcheck(lambda x: features(x)["1"], images(17, 3).requires_grad_(), atol=1e-6)


def test_what_is_fitted_is_fitted_on_a_sample_before_normalizing() -> None:
    x = images(60)
    features = FeatureExtractor(conv_net(), ["0", "1"], pool="avg", normalize=True)
    fitted = with_projection(features, (x, torch.zeros(60, dtype=torch.int64)), 3)
    for layer in ("0", "1"):
        bare = FeatureExtractor(conv_net(), [layer], pool="avg")(x)[layer].detach()
        expected = Projection.fit(bare, 3)(bare)
        assert torch.allclose(fitted(x)[layer], nn.functional.normalize(expected, dim=1), atol=1e-8)
    twice = with_signs(fitted, x)
    assert [type(p) for p in twice.transform["0"].parts] == [Projection, Signs]
    assert set(twice(x)["0"].detach().mul(math.sqrt(3)).round(decimals=6).unique().tolist()) == {-1.0, 1.0}
    few = sample_features(FeatureExtractor(conv_net(), ["0"], pool="avg"), x, 20, seed=1, batch_size=7)["0"]
    other = sample_features(FeatureExtractor(conv_net(), ["0"], pool="avg"), x, 20, seed=2)["0"]
    all_of_them = FeatureExtractor(conv_net(), ["0"], pool="avg")(x)["0"]
    assert few.shape == (20, 8)
    assert not torch.equal(few, other)
    assert bool(((few[:, None] - all_of_them).abs().amax(2) < 1e-9).any(1).all())
    again = sample_features(FeatureExtractor(conv_net(), ["0"], pool="avg"), x, 20, seed=1)["0"]
    assert torch.allclose(few, again, atol=1e-12)
    with pytest.raises(InputError, match="9 components need as many samples"):
        with_projection(features, x[:8], 9)


def test_bad_transforms() -> None:
    with pytest.raises(InputError, match="unknown layer in transform: '9'"):
        FeatureExtractor(conv_net(), ["0"], transform={"9": Projection.fit(sample(), 2)})
    with pytest.raises(InputError, match="a transform is made of Projection, RegionalMax or Signs"):
        FeatureExtractor(conv_net(), ["0"], transform=PCA(2))


# ------------------------------------------------------------------------------------------- on the disk


def every_kind() -> list[Any]:
    pca = Projection.fit(sample(), 4, whiten=True)
    signs = Signs.fit(pca(torch.from_numpy(sample())))
    whitened = RegionalMax(2, Projection.fit(sample(50, 6), 3, whiten=True))
    return [pca, Projection.fit(sample(), 2), signs, RegionalMax(), whitened, pca.then(signs), Chain(())]


@pytest.mark.parametrize("place", range(7))
def test_what_was_fitted_is_saved_and_named_by_its_numbers(place: int, tmp_path: Path) -> None:
    ours = every_kind()[place]
    ours.save(tmp_path / "t")
    again = load_transform(tmp_path / "t")
    assert type(again) is type(ours)
    assert again.describe() == ours.describe()
    assert repr(again) == repr(ours)
    x = maps(3, 6) if "rmac" in ours.kind else torch.from_numpy(sample(3, len(getattr(ours, "center", range(8)))))
    assert torch.equal(again(x), ours(x))
    prints = {str(t.describe()) for t in every_kind()}
    assert len(prints) == 7
    assert {p.suffix for p in (tmp_path / "t").iterdir()} == {".safetensors", ".json"}


def test_altered_transforms_are_refused(tmp_path: Path) -> None:
    pca = every_kind()[0]
    pca.save(tmp_path / "t")
    file = tmp_path / "t" / "tensors.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="is altered"):
        load_transform(tmp_path / "t")
    with pytest.raises(InputError, match="exists"):
        pca.save(tmp_path / "t")


def test_references_carry_their_transforms(tmp_path: Path) -> None:
    net, x = conv_net(), images()
    features = with_projection(FeatureExtractor(net, ["0", "1"], pool="avg"), x, 3)
    held = ReferenceSet.build(features, (x, torch.arange(40) % 4), payload="softmax")
    victim = RetrievalClassifier(held, 5, layer="1")
    victim.save(tmp_path / "c")
    again = load_classifier(tmp_path / "c", net)
    assert again.fingerprint() == victim.fingerprint()
    assert torch.equal(again.scores(images(9, 5)), victim.scores(images(9, 5)))
    assert ReferenceSet.load(tmp_path / "c" / "references", features).fingerprint() == held.fingerprint()
    plain = FeatureExtractor(net, ["0", "1"], pool="avg")
    other = with_projection(plain, images(40, 9), 3)
    for wrong in (plain, other):
        with pytest.raises(IntegrityError, match="made with other transform of '0', transform of '1'"):
            ReferenceSet.load(tmp_path / "c" / "references", wrong)
    assert "transform" not in plain.preprocessing()  # what was saved without transforms keeps its fingerprint
    one = ReferenceSet.load(tmp_path / "c" / "references", features.select(["1"]))
    assert one.dim("1") == 3
    shutil.copy(tmp_path / "c" / "references" / "layer-0.npy", tmp_path / "x.npy")
    (tmp_path / "c" / "references" / "transform-0.safetensors").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        load_classifier(tmp_path / "c", net)


# ---------------------------------------------------------------------------------------- under attack


def sharp_conv_net(x: Tensor) -> nn.Sequential:
    """The network with scores about zero and far apart, so that it sees all classes in x and is sure of them."""
    net = conv_net()
    with torch.no_grad():
        net[3].weight *= 30
        net[3].bias -= net(x).mean(0)
    return net


@pytest.mark.parametrize("whitened", [False, True])
def test_the_decision_is_by_bits_and_the_attack_by_what_is_behind(whitened: bool) -> None:
    x, asked = images(200), images(40, 5)
    net = sharp_conv_net(x)
    maps_of = with_rmac(FeatureExtractor(net, ["1"]), x, whiten=6 if whitened else None)
    features = with_signs(with_projection(maps_of, x, 6), x)
    victim = RetrievalClassifier(ReferenceSet.build(features, x, payload="softmax", labels="payload"), 9)
    said = victim.labels(asked)
    assert len(said.unique()) > 1
    assert set(victim.look(asked).features["1"].unique().tolist()) == {-1.0, 1.0}
    threat = ThreatModel("linf", 0.1)
    result = PGD(Adaptive(), steps=20)(victim, asked, said, threat)
    assert torch.equal(victim.labels(result.x_adv) != said, result.success)
    noise = victim.labels(threat.random_start(asked, torch.arange(40), 0)) != said
    assert int(result.success.sum()) > 2 * int(noise.sum()) + 10


# ------------------------------------------------------------------------------------ the paper's layers


def test_the_papers_tap_is_what_enters_the_last_relu_of_the_block() -> None:
    torch.manual_seed(0)
    model = resnet50(n_classes=5)
    model.eval()
    seen: dict[str, Tensor] = {}
    block = model.layer4[0]
    handle = block.bn3.register_forward_hook(lambda m, i, o: seen.update(main=o))
    handle_2 = block.downsample.register_forward_hook(lambda m, i, o: seen.update(shortcut=o))
    x = torch.rand(16, 3, 32, 32)
    features = web_scale_features(model)
    with torch.no_grad():
        found = features(x)
    handle.remove()
    handle_2.remove()
    (layer,) = found
    assert layer == "layer4.0.relu:input@2"
    expected = (seen["main"] + seen["shortcut"]).mean((2, 3))
    assert expected.shape == (16, 2048)
    assert torch.allclose(found[layer], expected, atol=1e-5)
    assert float(found[layer].min()) < 0  # before the ReLU
    fitted = web_scale_features(model, data=x, n_components=8)
    with torch.no_grad():
        assert torch.allclose(fitted(x)[layer], Projection.fit(expected, 8)(expected), atol=1e-3)
        small = web_scale_features(model, data=x, n_components=8, recipe="rmac-bits")
        assert set(small(x)[layer].unique().tolist()) == {-1.0, 1.0}
        assert small(x)[layer].shape == (16, 8)


def test_other_layers_by_the_papers_names() -> None:
    assert {name: block_tap(resnet50(n_classes=2), name) for name in BLOCKS} == {
        "conv_2_3": "layer1.2.relu:input@2",
        "conv_3_4": "layer2.3.relu:input@2",
        "conv_4_6": "layer3.5.relu:input@2",
        "conv_5_1": "layer4.0.relu:input@2",
    }
    assert block_tap(resnet18(n_classes=2), "conv_5_1") == "layer4.0.relu:input@1"
    with pytest.raises(InputError, match="ResNet has no block 'conv_2_3'; name its layer"):
        block_tap(resnet18(n_classes=2), "conv_2_3")
    with pytest.raises(InputError, match="conv_6_1"):
        block_tap(resnet50(n_classes=2), "conv_6_1")
    with pytest.raises(InputError, match="name its layer"):
        web_scale_features(conv_net())
    named = web_scale_features(conv_net(), "0")
    assert named(images())["0"].shape == (40, 8)
    with pytest.raises(InputError, match="needs data"):
        web_scale_features(conv_net(), "0", n_components=3)
    with pytest.raises(InputError, match="recipe must be one of"):
        web_scale_features(conv_net(), "0", recipe="max")
    assert isinstance(KNN(n_neighbors=1), KNN)
