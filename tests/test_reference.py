"""ReferenceSet: what is built, saved and loaded is what the network gives, and nothing else is accepted."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutate import damaged, replaced
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from robustknn import FeatureExtractor, InputError, IntegrityError, NotReadyError, ReferenceSet, RobustKNNError
from robustknn.datasets import Split

LAYERS = ["0", "3"]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 4))


def pixels(n: int = 40) -> Tensor:
    """8-bit images as floats, as ToTensor makes them."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (n, 1, 6, 6), generator=generator).float() / 255


def classes(n: int = 40) -> Tensor:
    return torch.arange(n) % 4


def expected(x: Tensor, net: nn.Sequential | None = None) -> dict[str, Tensor]:
    net = model() if net is None else net
    with torch.no_grad():
        conv = nn.functional.conv2d(x, net[0].weight, net[0].bias)
        return {"0": conv.flatten(1), "3": nn.functional.linear(conv.relu().flatten(1), net[3].weight, net[3].bias)}


def built(**settings: Any) -> ReferenceSet:
    return ReferenceSet.build(FeatureExtractor(model(), LAYERS), (pixels(), classes()), **settings)


# ---------------------------------------------------------------------------------------------------- building


class Plain(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return pixels()[place], place % 4


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (pixels(), classes()),
    "arrays": lambda: (pixels().numpy(), classes().numpy()),
    "lists": lambda: (pixels().tolist(), classes().tolist()),
    "dataset": Plain,
    "loader": lambda: DataLoader(Plain(), batch_size=7),
    "tensor loader": lambda: DataLoader(TensorDataset(pixels(), classes()), batch_size=40),
    "split": lambda: Split(pixels(), classes(), "train"),
    "8-bit split": lambda: Split((pixels() * 255).round().to(torch.uint8), classes(), "train"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch_size", [11, 256])
def test_references_are_the_features_in_the_order_of_the_data(source: str, batch_size: int) -> None:
    data = SOURCES[source]()
    if source == "lists":
        data = (np.asarray(data[0], np.float32), data[1])
    references = ReferenceSet.build(FeatureExtractor(model(), LAYERS), data, batch_size=batch_size)
    assert len(references) == 40
    assert references.layers == ("0", "3")
    assert references.n_classes == 4
    assert torch.equal(references.labels, classes())
    assert references.labels.dtype == torch.int64
    for layer, value in expected(pixels()).items():
        found, lengths = references.vectors(layer)
        assert lengths is None
        assert references.dim(layer) == value.shape[1]
        assert torch.allclose(found, value, rtol=1e-5, atol=1e-6)
        ids = torch.tensor([[3, 0], [39, 3]])
        assert torch.equal(references.rows(layer, ids), found[ids])


def test_a_shuffled_loader_numbers_references_as_it_reads_them() -> None:
    torch.manual_seed(4)
    loader = DataLoader(TensorDataset(pixels(), classes()), batch_size=9, shuffle=True)
    references = ReferenceSet.build(FeatureExtractor(model(), LAYERS), loader, keep_images=True)
    assert not torch.equal(references.labels, classes())
    for place in (0, 17, 39):
        image = references.image(torch.tensor([place]))
        origin = int((pixels() == image).flatten(1).all(1).nonzero()[0, 0])
        assert int(references.labels[place]) == origin % 4
        assert torch.allclose(references.vectors("0")[0][place], expected(image)["0"][0], atol=1e-6)


def test_payload_softmax_and_callable() -> None:
    logits = expected(pixels())["3"]
    softmax = built(payload="softmax", batch_size=7).stored_payload
    assert softmax is not None
    assert torch.allclose(softmax, logits.exp() / logits.exp().sum(1, keepdim=True), atol=1e-6)
    two = built(payload=lambda output: output[:, :2] * 2, batch_size=7).stored_payload
    assert two is not None
    assert torch.allclose(two, logits[:, :2] * 2, atol=1e-5)
    assert built().stored_payload is None


def test_kept_images_are_eight_bits_only_where_that_loses_nothing() -> None:
    kept = built(keep_images=True)
    assert kept.images is not None
    assert kept.images.dtype == torch.uint8
    assert torch.equal(kept.image(torch.arange(40)), pixels())
    net = FeatureExtractor(model(), LAYERS)
    for x in (
        pixels() + torch.where(torch.arange(40) == 33, 1e-4, 0.0)[:, None, None, None],  # one image between levels
        pixels() * 2,
        pixels() - 0.5,
        pixels().double(),
        pixels().half(),
    ):
        images = ReferenceSet.build(net, (x, classes()), keep_images=True).image(torch.arange(40))
        assert images.dtype == x.dtype
        assert torch.equal(images, x)
    with pytest.raises(NotReadyError, match="keep_images=True"):
        built().image(torch.tensor([0]))


def test_building_follows_the_centers_and_the_pooling_of_the_extractor() -> None:
    center = {"0": torch.tensor([0.5, 0.0, -0.25])}
    extractor = FeatureExtractor(model(), "0", pool="avg", normalize=True, center=center)
    references = ReferenceSet.build(extractor, (pixels(), classes()))
    mean = expected(pixels())["0"].view(40, 3, 16).mean(2)
    assert torch.allclose(references.vectors("0")[0], mean / mean.norm(dim=1, keepdim=True) - center["0"], atol=1e-6)


def test_references_built_in_inference_mode_can_be_normalised_and_attacked() -> None:
    extractor = FeatureExtractor(model(), LAYERS)
    with torch.inference_mode():
        references = ReferenceSet.build(extractor, (pixels(), classes()))
    references.vectors("0", unit=True)
    x = pixels(3).requires_grad_()
    features = references.extractor()(x)["3"]
    (gradient,) = torch.autograd.grad((features - references.rows("3", torch.arange(3))).square().sum(), x)
    assert bool(gradient.isfinite().all())
    with torch.inference_mode():
        raw = references.vectors("0", unit=False)[0]
    assert not raw.is_inference()


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Any:
        yield from Plain()


class Liar(Plain):
    """Holds another number of samples than it says."""

    def __init__(self, says: int) -> None:
        self.says = says

    def __len__(self) -> int:
        return self.says


class LyingLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        yield pixels(30), classes(30)


class Growing(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 6 + place, 6), place % 4


def poisoned() -> nn.Sequential:
    net = model()
    net[3].bias.data[1] = float("nan")
    return net


BAD: list[tuple[str, Callable[[], Any], dict[str, Any], str]] = [
    ("a class without reference", lambda: (pixels(), classes() * 2), {}, "class 1, 3, 5 of 7 has no reference"),
    ("fewer classes than stated", lambda: (pixels(), classes()), {"n_classes": 6}, "class 4, 5 of 6 has no reference"),
    ("more classes than stated", lambda: (pixels(), classes()), {"n_classes": 3}, "label 3, outside 0..2"),
    ("a negative label", lambda: (pixels(), classes() - 1), {}, "label -1"),
    ("labels that are no numbers", lambda: (pixels(), ["a"] * 40), {}, "must be a tensor or an array of numbers"),
    ("labels with fractions", lambda: (pixels(), classes() + 0.5), {}, "class labels are integers"),
    ("too few labels", lambda: (pixels(), classes(39)), {}, "39 labels for 40 samples"),
    (
        "NaN in an input",
        lambda: (pixels().index_fill_(0, torch.tensor([12]), np.nan), classes()),
        {},
        "at sample 8 has NaN .* in sample 4",
    ),
    ("8-bit inputs", lambda: ((pixels() * 255).to(torch.uint8), classes()), {}, "convert it to floating point"),
    ("no sample", lambda: (pixels(0), classes(0)), {}, "no reference in the data"),
    ("a stream", Stream, {}, "does not know its length"),
    ("a loader over a stream", lambda: DataLoader(Stream(), 4), {}, "does not know its length"),
    ("a loader that drops", lambda: DataLoader(Plain(), 7, drop_last=True), {}, "drops its last batch"),
    ("fewer samples than announced", lambda: LyingLoader(Plain(), 4), {}, "gave 30 samples where it announced 40"),
    ("more samples than announced", lambda: LyingLoader(Liar(20), 4), {}, "gave more than the 20 samples"),
    ("another input size", lambda: (torch.zeros(40, 1, 5, 5), classes()), {}, "cannot run on inputs of shape"),
    ("one array", pixels, {}, "cannot take batches from Tensor"),
    ("a bad batch size", lambda: (pixels(), classes()), {"batch_size": 0}, "batch_size must be a whole number"),
    ("an unknown payload", lambda: (pixels(), classes()), {"payload": "logits"}, "payload must be 'softmax'"),
    ("a payload of another length", lambda: (pixels(), classes()), {"payload": lambda o: o[:3]}, "payload must be a"),
    ("a payload of no tensor", lambda: (pixels(), classes()), {"payload": lambda o: 1}, "payload must be a tensor"),
]


def test_a_model_is_no_extractor() -> None:
    model = nn.Linear(4, 3)
    for make in (
        lambda f: ReferenceSet.build(f, (torch.zeros(6, 4), torch.arange(6) % 3)),
        lambda f: ReferenceSet.from_vectors(torch.zeros(6, 3), torch.arange(6) % 3, features=f),
    ):
        with pytest.raises(InputError, match=r"not Linear; wrap the model: FeatureExtractor\(model\)\.$"):
            make(model)
        with pytest.raises(InputError, match=r"features must be a FeatureExtractor, not str\.$"):
            make("model")


@pytest.mark.parametrize(("data", "settings", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_data_that_cannot_work_is_refused_in_one_sentence(
    data: Callable[[], Any], settings: dict[str, Any], message: str
) -> None:
    settings = {"batch_size": 8, **settings}
    with pytest.raises(InputError, match=message) as caught:
        ReferenceSet.build(FeatureExtractor(model(), LAYERS), data(), **settings)
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="layer '3' of the batch that starts at sample 0 has NaN or infinite values"):
        ReferenceSet.build(FeatureExtractor(poisoned(), LAYERS), (pixels(), classes()))


def test_images_of_several_sizes_can_be_references_but_not_be_kept() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3))
    extractor = FeatureExtractor(net, "0", pool="avg")
    assert len(ReferenceSet.build(extractor, DataLoader(Growing(), 1))) == 8
    with pytest.raises(InputError, match=r"features of layer '0' have shape \(60,\) .* \(48,\) in another; give all"):
        ReferenceSet.build(FeatureExtractor(net, "0"), DataLoader(Growing(), 1))
    with pytest.raises(InputError, match="images have shape"):
        ReferenceSet.build(extractor, DataLoader(Growing(), 1), keep_images=True)


def test_softmax_of_an_encoder_is_refused() -> None:
    with pytest.raises(InputError, match="payload='softmax' needs a model that returns class scores"):
        ReferenceSet.build(FeatureExtractor(nn.Conv2d(1, 3, 3)), (pixels(), classes()), payload="softmax")


# --------------------------------------------------------------------------------------------- vectors that exist


def embeddings(n: int = 30, dim: int = 5) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(9))


def test_vectors_of_the_caller_are_neither_copied_nor_changed() -> None:
    vectors = embeddings()
    references = ReferenceSet.from_vectors(vectors, classes(30))
    assert references.layers == ("vectors",)
    assert references.vectors("vectors")[0].data_ptr() == vectors.data_ptr()
    unit, lengths = references.vectors("vectors", unit=True)
    assert unit.data_ptr() != vectors.data_ptr()
    assert torch.equal(vectors, embeddings())
    assert lengths is not None
    assert torch.allclose(unit * lengths[:, None], vectors, atol=1e-6)
    assert references.vectors("vectors", unit=True)[0].data_ptr() == unit.data_ptr()  # one copy for all


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_may_be_arrays_by_layer(dtype: Any) -> None:
    vectors = {"a": embeddings().numpy().astype(dtype), "b": embeddings(dim=2).numpy().astype(dtype)}
    references = ReferenceSet.from_vectors(vectors, classes(30).tolist())
    assert references.layers == ("a", "b")
    assert references.dim("b") == 2
    assert np.array_equal(references.vectors("a")[0].numpy(), vectors["a"])


@pytest.mark.parametrize(
    ("vectors", "labels", "message"),
    [
        (embeddings()[0], classes(5), "must be floating point"),
        (embeddings().long(), classes(30), "must be floating point"),
        (embeddings(), classes(29), "29 labels for 30 samples"),
        (embeddings().index_fill(0, torch.tensor([4]), float("inf")), classes(30), "NaN or infinite .* sample 4"),
        ({"a": embeddings(), "b": embeddings(29)}, classes(30), r"different numbers of references: \[29, 30\]"),
        ({}, classes(30), "at least one layer"),
        (embeddings(0), classes(0), "no reference"),
        ("text", classes(30), "must be a tensor or an array"),
    ],
)
def test_vectors_that_cannot_work_are_refused(vectors: Any, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReferenceSet.from_vectors(vectors, labels)


def test_vectors_know_the_layers_of_their_extractor() -> None:
    one, two = FeatureExtractor(model(), "3"), FeatureExtractor(model(), LAYERS)
    assert ReferenceSet.from_vectors(embeddings(dim=4), classes(30), features=one).layers == ("3",)
    with pytest.raises(InputError, match="reads 2 layers; pass the vectors by layer"):
        ReferenceSet.from_vectors(embeddings(dim=4), classes(30), features=two)
    with pytest.raises(InputError, match="unknown layer of the vectors: '4'"):
        ReferenceSet.from_vectors({"4": embeddings(dim=4)}, classes(30), features=two)
    for what in ({"payload": torch.zeros(29, 2)}, {"images": torch.zeros(29, 1, 2, 2)}):
        with pytest.raises(InputError, match=r"there are 29 .* for 30 references"):
            ReferenceSet.from_vectors(embeddings(), classes(30), **what)
    with pytest.raises(NotReadyError, match="knows no model"):
        ReferenceSet.from_vectors(embeddings(), classes(30)).extractor()


# ------------------------------------------------------------------------------------------------ unit length


def test_unit_length_is_made_in_place_when_nobody_relies_on_the_raw_vectors() -> None:
    references = built()
    place = references._layers["0"].vectors.data_ptr()
    raw = expected(pixels())["0"].double()
    unit, lengths = references.vectors("0", unit=True)
    assert lengths is not None
    assert unit.data_ptr() == place
    assert torch.allclose(lengths.double(), raw.norm(dim=1), rtol=1e-5)
    assert torch.allclose(unit.double(), raw / raw.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(references.rows("0", torch.arange(40)).double(), raw, rtol=1e-5, atol=1e-5)
    again, same = references.vectors("0", unit=True)
    assert again.data_ptr() == place
    assert same is lengths


def test_a_vector_of_length_zero_stays_zero() -> None:
    references = ReferenceSet.from_vectors(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), [0, 1])
    unit, lengths = references.vectors("vectors", unit=True)
    assert unit.tolist() == [[0, 0], [0, 1]]
    assert lengths is not None
    assert lengths.tolist() == [0, 2]
    assert references.rows("vectors", torch.tensor([1, 0])).tolist() == [[0, 2], [0, 0]]


@pytest.mark.parametrize("first", [False, True])
def test_both_forms_are_one_copy_and_neither_disturbs_the_other(first: bool) -> None:
    references = built()
    one, _ = references.vectors("0", unit=first)
    before = one.clone()
    other, _ = references.vectors("0", unit=not first)
    assert other.data_ptr() != one.data_ptr()
    assert torch.equal(one, before)
    raw = expected(pixels())["0"]
    held = {first: one, not first: other}
    assert torch.allclose(held[False], raw, rtol=1e-5, atol=1e-6)
    assert torch.allclose(held[True], nn.functional.normalize(raw, dim=1), atol=1e-6)
    for unit in (True, False):
        assert references.vectors("0", unit=unit)[0].data_ptr() == held[unit].data_ptr()


def test_a_large_copy_is_announced() -> None:
    large = torch.zeros(70_000, 1024)  # 0.27 GiB that no page of is touched before the copy
    large[:, 0] = 1
    references = ReferenceSet({"a": large}, torch.arange(70_000) % 2)
    references.vectors("a")
    with pytest.warns(
        UserWarning, match="layer 'a' is needed both with its raw .* a copy of 0.3 GiB is made"
    ) as caught:
        references.vectors("a", unit=True)
    assert caught[0].filename == __file__  # it points at who asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built().vectors("0")


# -------------------------------------------------------------------------------------------------- transport


def same_set(a: ReferenceSet, b: ReferenceSet) -> None:
    """Equal to the last bit, in the form the vectors have."""
    assert a.layers == b.layers
    assert a.n_classes == b.n_classes
    for layer in a.layers:
        ours, theirs = a._layers[layer], b._layers[layer]
        for x, y in ((ours.vectors, theirs.vectors), (ours.lengths, theirs.lengths)):
            assert (x is None) == (y is None)
            assert x is None or (x.dtype == y.dtype and torch.equal(x, y))
    for name in ("labels", "stored_payload", "images"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))
    assert a.fingerprint() == b.fingerprint()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("settings", [{}, {"payload": "softmax", "keep_images": True}])
def test_saved_and_loaded_to_the_last_bit(tmp_path: Path, settings: dict[str, Any], unit: bool, mapped: bool) -> None:
    references = built(**settings)
    if unit:
        references.vectors("0", unit=True)
    references.save(tmp_path / "set")
    assert not [p for p in tmp_path.rglob("*") if p.suffix not in (".npy", ".json", "")]
    for features in (None, model(), FeatureExtractor(model(), LAYERS)):
        same_set(references, ReferenceSet.load(tmp_path / "set", features, mapped))
    loaded = ReferenceSet.load(tmp_path / "set", model(), mapped)
    assert loaded.extractor().preprocessing() == references.extractor().preprocessing()
    # What is done with a mapped set stays in memory.
    loaded.vectors("3", unit=True)
    same_set(references, ReferenceSet.load(tmp_path / "set", model()))
    with pytest.raises(InputError, match="exists; choose another path"):
        references.save(tmp_path / "set")
    references.save(tmp_path / "set", overwrite=True)
    loaded.save(tmp_path / "again")
    assert ReferenceSet.load(tmp_path / "again").fingerprint() == references.fingerprint()


def test_settings_of_the_extractor_come_back_with_the_model_alone(tmp_path: Path) -> None:
    center = {"0": torch.tensor([0.5, 0.0, -0.25])}
    extractor = FeatureExtractor(model(), LAYERS, pool={"0": "avg"}, normalize=True, center=center)
    ReferenceSet.build(extractor, (pixels(), classes())).save(tmp_path / "set")
    loaded = ReferenceSet.load(tmp_path / "set", model()).extractor()
    assert loaded.preprocessing() == extractor.preprocessing()
    assert all(torch.equal(v, extractor(pixels(5))[k]) for k, v in loaded(pixels(5)).items())


def extractor_with(net: nn.Module | None = None, layers: Any = ("0", "3"), **settings: Any) -> FeatureExtractor:
    center = settings.pop("center", {"0": torch.ones(3), "3": torch.zeros(4)})
    settings = {"pool": {"0": "avg"}, "normalize": True, **settings}
    settings["pool"] = {k: v for k, v in settings["pool"].items() if k in layers}
    center = {k: v for k, v in center.items() if k in layers}
    return FeatureExtractor(model() if net is None else net, list(layers), center=center, **settings)


def other_weight() -> nn.Sequential:
    net = model()
    net[3].weight.data[0, 0] += 1e-6
    return net


def other_structure() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (lambda: model(1), "made with another model"),
        (other_weight, "made with another model"),
        (other_structure, "made with another model"),
        (lambda: extractor_with(other_weight()), "made with another model"),
        (lambda: extractor_with(layers=("0", "2", "3")), "hold the layers 0, 3, not 2;"),
        (lambda: extractor_with(layers=["(output)"]), r"hold the layers 0, 3, not \(output\);"),
        (lambda: extractor_with(pool={"0": "max"}), "other pooling of '0' .'avg', the extractor has 'max'.;"),
        (lambda: extractor_with(normalize=False), "other normalisation .normalize=True, the extractor has False.;"),
        (lambda: extractor_with(center={"0": torch.ones(3)}), "other centering of '3';"),
        (lambda: extractor_with(center={"0": torch.ones(3) * 2, "3": torch.zeros(4)}), "other centering of '0';"),
        (
            lambda: extractor_with(pool={"3": "max"}, normalize=False, center={}),
            "other normalisation .*, pooling of '0' .*, centering of '0', pooling of '3' .*, centering of '3';",
        ),
        (lambda: extractor_with(layers=["3"], center={}), "other centering of '3';"),
    ],
)
def test_another_model_or_preprocessing_is_refused_by_name(
    tmp_path: Path, extractor: Callable[[], Any], message: str
) -> None:
    ReferenceSet.build(extractor_with(), (pixels(), classes())).save(tmp_path / "set")
    ReferenceSet.load(tmp_path / "set", extractor_with())
    with pytest.raises(IntegrityError, match=message) as caught:
        ReferenceSet.load(tmp_path / "set", extractor())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [["0"], ["3"], ["3", "0"]])
def test_an_extractor_of_some_layers_or_in_another_order_is_accepted(tmp_path: Path, layers: list[str]) -> None:
    ReferenceSet.build(extractor_with(), (pixels(), classes())).save(tmp_path / "set")
    loaded = ReferenceSet.load(tmp_path / "set", extractor_with(layers=layers))
    found = loaded.extractor()(pixels())
    assert list(found) == layers
    for layer, value in found.items():
        assert torch.allclose(value, loaded.vectors(layer)[0], atol=1e-6)


def test_bare_vectors_meet_their_extractor_when_loaded(tmp_path: Path) -> None:
    vectors = expected(pixels())["3"]
    references = ReferenceSet.from_vectors(vectors, classes())
    references.save(tmp_path / "set")
    same_set(references, ReferenceSet.load(tmp_path / "set"))
    for features, layer in ((FeatureExtractor(model(), "3"), "3"), (model(), "(output)")):
        loaded = ReferenceSet.load(tmp_path / "set", features)
        assert loaded.layers == (layer,)
        assert loaded.fingerprint() == references.fingerprint()
        assert torch.allclose(loaded.extractor()(pixels())[layer], loaded.vectors(layer)[0], atol=1e-6)
    with pytest.raises(IntegrityError, match="hold the layers vectors, not 0, 3"):
        ReferenceSet.load(tmp_path / "set", FeatureExtractor(model(), LAYERS))


def test_fingerprint_covers_what_decides_and_not_the_form() -> None:
    reference = built(payload="softmax")
    before = reference.fingerprint()
    assert before == built(payload="softmax", keep_images=True, batch_size=7).fingerprint()
    reference.vectors("0", unit=True)
    assert reference.fingerprint() == before
    fresh = built(payload="softmax")
    fresh.vectors("0", unit=True)
    fresh.vectors("0", unit=False)
    assert fresh.fingerprint() == before
    x = pixels()
    x[7, 0, 2, 2] += 1e-3
    others = [
        built(),
        ReferenceSet.build(FeatureExtractor(model(), LAYERS), (x, classes()), payload="softmax"),
        ReferenceSet.build(FeatureExtractor(model(), LAYERS), (pixels(), 3 - classes()), payload="softmax"),
        ReferenceSet.build(FeatureExtractor(model(), ["0"]), (pixels(), classes()), payload="softmax"),
        ReferenceSet.build(FeatureExtractor(model(1), LAYERS), (pixels(), classes()), payload="softmax"),
        ReferenceSet.build(
            FeatureExtractor(model(), LAYERS, pool={"0": "max"}), (pixels(), classes()), payload="softmax"
        ),
        built(payload=lambda o: o),
    ]
    assert len({before, *(one.fingerprint() for one in others)}) == len(others) + 1


# ----------------------------------------------------------------------------------------------------- damage


def test_no_damaged_file_is_loaded(tmp_path: Path) -> None:
    references = built(payload="softmax", keep_images=True)
    references.vectors("0", unit=True)
    references.save(tmp_path / "set")
    refused = 0
    for path in damaged(tmp_path / "set", 10_000, seed=3):
        with pytest.raises(IntegrityError) as caught:
            ReferenceSet.load(tmp_path / "set", mapped=refused % 2 == 0)
        assert "\n" not in str(caught.value), path
        refused += 1
    assert refused == 10_000
    same_set(references, ReferenceSet.load(tmp_path / "set"))


def test_missing_swapped_and_foreign_files_are_refused(tmp_path: Path) -> None:
    built().save(tmp_path / "set")
    built(payload="softmax").save(tmp_path / "other")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    assert set(whole) == {"manifest.json", "labels.npy", "layer-0.npy", "layer-1.npy"}
    for name, content in whole.items():
        (tmp_path / "set" / name).unlink()
        with pytest.raises(IntegrityError):
            ReferenceSet.load(tmp_path / "set")
        (tmp_path / "set" / name).write_bytes(content)
        for source, other in whole.items():
            if source != name:
                with replaced(tmp_path / "set" / name, other), pytest.raises(IntegrityError):
                    ReferenceSet.load(tmp_path / "set")
    other = (tmp_path / "other" / "manifest.json").read_bytes()
    with replaced(tmp_path / "set" / "manifest.json", other), pytest.raises(IntegrityError):
        ReferenceSet.load(tmp_path / "set")
    (tmp_path / "set" / "labels.npy").unlink()
    (tmp_path / "set" / "labels.npy").symlink_to(tmp_path / "other" / "labels.npy")
    with pytest.raises(IntegrityError, match="link"):
        ReferenceSet.load(tmp_path / "set")
    for path in (tmp_path / "nowhere", tmp_path / "other" / "labels.npy"):
        with pytest.raises(IntegrityError, match="is not a directory"):
            ReferenceSet.load(path)
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    assert manifest["kind"] == "references"
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    with pytest.raises(RobustKNNError):
        ReferenceSet.load(tmp_path / "other")


# ------------------------------------------------------------------------------------------- copies and devices


def test_a_deep_copy_shares_and_a_pickle_is_the_same_set() -> None:
    references = built(payload="softmax", keep_images=True)
    assert copy.deepcopy(references) is references
    twin = pickle.loads(pickle.dumps(references))  # noqa: S301 - our own bytes
    same_set(references, twin)
    assert twin.extractor().fingerprint() == references.extractor().fingerprint()


def test_moving_to_the_device_it_is_on_changes_nothing() -> None:
    references = built(payload="softmax", keep_images=True)
    references.vectors("0", unit=True)
    before = references.fingerprint()
    assert references.to("cpu") is references
    assert references.device == torch.device("cpu")
    assert references.fingerprint() == before
    assert references.vectors("0", unit=True)[1] is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="left out: there is no CUDA device")
def test_moving_to_a_gpu_and_back_changes_nothing() -> None:
    references = built(payload="softmax", keep_images=True)
    before = references.fingerprint()
    moved = references.to("cuda")
    assert moved.device.type == "cuda"
    assert moved.fingerprint() == before
    assert moved.to("cpu").fingerprint() == before


def test_layers_are_found_by_any_spelling_and_unknown_ones_named() -> None:
    references = built()
    assert references.layer("0@0") == "0"
    for call in (references.dim, references.vectors, references.layer):
        with pytest.raises(InputError, match="unknown reference layer '33'; did you mean '3'"):
            call("33")
    assert repr(references) == "ReferenceSet(40 references, 4 classes, {0: 48, 3: 4})"


# ----------------------------------------------------------------------------------------------------- memory

PEAK = """
from pathlib import Path
import torch
from torch import nn
from robustknn import FeatureExtractor, ReferenceSet

def peak():  # of this process alone; getrusage counts the parent's as well
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, d) for d in {dims})
    def forward(self, x):
        return [layer(x) for layer in self.layers][-1]

torch.set_num_threads(1)
n = {n}
x, y = torch.randn(n, 8), torch.arange(n) % 10
features = FeatureExtractor(Net(), [f"layers.{{i}}" for i in range({count})])
ReferenceSet.build(features, (x[:300], y[:300]))
before = peak()
references = ReferenceSet.build(features, (x, y))
for layer in references.layers:
    references.vectors(layer, unit=True)
size = sum(references.vectors(layer, unit=True)[0].numel() * 4 for layer in references.layers)
print(before, peak(), size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="left out: reads peak memory where Linux says it")
def test_peak_memory_is_the_references_and_one_batch() -> None:
    dims = (4000, 2000, 1000, 10)
    script = PEAK.format(dims=dims, n=20_000, count=len(dims))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    match = re.fullmatch(r"(\d+) (\d+) (\d+)\n", done.stdout)
    assert match is not None
    before, peak, size = map(int, match.groups())
    assert size == 20_000 * 7010 * 4
    assert peak <= 1.3 * size + 300 * 2**20
    assert peak - before <= 1.1 * size  # beside what Python and torch take
