"""The networks against published counts, shapes and names; models by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from robustknn import models, registry
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor

# Parameters: torchvision's published counts; akamaster's 0.27, 0.46, 0.66 M; LeNet-5 by hand (156 + 2,416 + 48,120 +
# 10,164 + 850); the MNIST network 4,160 + 295,040 + 409,728 and 1152 or 128 inputs to the last layer.
COUNTS = [
    ("resnet18", {}, 11_689_512),
    ("resnet50", {}, 25_557_032),
    ("resnet20", {}, 269_722),
    ("resnet32", {}, 464_154),
    ("resnet44", {}, 658_586),
    ("vgg16-bn", {}, 15_253_578),
    ("lenet5", {}, 61_706),
    ("lenet5", {"in_channels": 3, "image_size": 32}, 62_006),
    ("mnist-cnn", {}, 4_160 + 295_040 + 409_728 + 11_530),
    ("mnist-cnn", {"form": "unpadded"}, 4_160 + 295_040 + 409_728 + 1_290),
    ("digits-cnn", {}, 320 + 18_496 + 36_928 + 2_570),
]

INPUTS = {
    "resnet18": (3, 64, 64),
    "resnet50": (3, 64, 64),
    "resnet20": (3, 32, 32),
    "resnet32": (3, 32, 32),
    "resnet44": (3, 32, 32),
    "vgg16-bn": (3, 32, 32),
    "lenet5": (1, 28, 28),
    "mnist-cnn": (1, 28, 28),
    "digits-cnn": (1, 8, 8),
    "lipschitz-cnn": (1, 28, 28),
}


def images(shape: tuple[int, ...], n: int = 2) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "options", "count"), COUNTS)
def test_parameter_counts(name: str, options: dict[str, object], count: int) -> None:
    assert sum(p.numel() for p in models.create(name, **options).parameters()) == count


def test_every_registered_model_is_in_the_table() -> None:
    ours = {e.name for e in registry.models if e.build.__module__.startswith("robustknn.models")}
    assert ours == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_every_model_classifies_and_names_taps_it_reaches(name: str) -> None:
    model = models.create(name, n_classes=7)
    layers = [*model.feature_layers, model.embedding_layer]
    found, output = FeatureExtractor(model, dict.fromkeys(layers), pool="avg").with_output(images(INPUTS[name]))
    assert output.shape == (2, 7)
    assert torch.equal(found[model.feature_layers[-1]], output)  # the last tap is the logits
    assert all(feature.shape[0] == 2 for feature in found.values())
    assert registry.models.entry(name).summary


SIZES = [
    ("mnist-cnn", {"form": "padded"}, (12544, 6272, 1152, 10)),  # AdvKNN
    ("mnist-cnn", {"form": "unpadded", "dropout": 0.5}, (12544, 3200, 128, 10)),  # DAEkNN
    ("digits-cnn", {}, (2048, 1024, 256, 10)),
    ("lenet5", {}, (6 * 28 * 28, 16 * 10 * 10, 120, 84, 10)),
    ("vgg16-bn", {}, (64 * 256, 128 * 64, 256 * 16, 2048, 512, 10)),  # ASK: the fourth block gives 2048
    ("resnet20", {}, (16 * 1024, 32 * 256, 64 * 64, 10)),
]


@pytest.mark.parametrize(("name", "options", "sizes"), SIZES)
def test_feature_sizes(name: str, options: dict[str, object], sizes: tuple[int, ...]) -> None:
    model = models.create(name, **options)
    found = FeatureExtractor(model, model.feature_layers)(images(INPUTS[name]))
    assert tuple(found[layer].shape[1] for layer in model.feature_layers) == sizes


@pytest.mark.parametrize(("form", "padding"), [("padded", 2), ("unpadded", 0)])
def test_mnist_cnn_computes_what_the_papers_describe(form: str, padding: int) -> None:
    model = models.create("mnist-cnn", form=form).double().eval()
    w = model.state_dict()
    x = images(INPUTS["mnist-cnn"]).double()
    h1 = F.conv2d(x, w["conv1.weight"], w["conv1.bias"], stride=2, padding=3)
    h2 = F.conv2d(h1.clamp_min(0), w["conv2.weight"], w["conv2.bias"], stride=2, padding=padding)
    h3 = F.conv2d(h2.clamp_min(0), w["conv3.weight"], w["conv3.bias"])
    logits = h3.clamp_min(0).flatten(1) @ w["fc.weight"].T + w["fc.bias"]
    found, output = FeatureExtractor(model, ["conv2", "relu2:input", "relu2"]).with_output(x)
    torch.testing.assert_close(output, logits)
    torch.testing.assert_close(found["conv2"], h2.flatten(1))
    torch.testing.assert_close(found["relu2:input"], h2.flatten(1))
    torch.testing.assert_close(found["relu2"], h2.clamp_min(0).flatten(1))


def test_dropout_acts_in_training_alone() -> None:
    model = models.create("mnist-cnn", dropout=0.5)
    x = images(INPUTS["mnist-cnn"])
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_padded_shortcut_takes_every_second_pixel_and_adds_empty_channels() -> None:
    from robustknn.models.resnet import PaddedShortcut

    x = images((16, 4, 6))
    expected = torch.zeros(2, 32, 2, 3)
    for row in range(2):
        for column in range(3):
            expected[:, 8:24, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(PaddedShortcut(16)(x), expected)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_normalisation_is_inside_and_not_in_the_state(name: str) -> None:
    model = models.create(name)
    seen = FeatureExtractor(model, "conv1:input")(images(INPUTS[name]))["conv1:input"]
    x = images(INPUTS[name]).double().numpy()
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = torch.from_numpy((x[:, channel] - mean) / std).float()
        torch.testing.assert_close(seen.view(2, *INPUTS[name])[:, channel], expected)
    assert not [key for key in model.state_dict() if key.startswith("normalize")]
    assert "normalize.mean" in dict(model.named_buffers())


# Names and shapes as in torchvision's files resnet18-f37072fd.pth and resnet50-11ad3fa6.pth, and in akamaster's
# resnet20-12fca82f.th, which lacks the counters of batch normalisation.
PUBLISHED = [
    (
        "resnet18",
        122,
        {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.running_mean": (64,),
            "layer1.0.conv1.weight": (64, 64, 3, 3),
            "layer1.1.bn2.num_batches_tracked": (),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer2.0.downsample.1.running_var": (128,),
            "layer4.1.conv2.weight": (512, 512, 3, 3),
            "fc.weight": (1000, 512),
            "fc.bias": (1000,),
        },
    ),
    (
        "resnet50",
        320,
        {
            "conv1.weight": (64, 3, 7, 7),
            "layer1.0.conv1.weight": (64, 64, 1, 1),
            "layer1.0.conv2.weight": (64, 64, 3, 3),
            "layer1.0.conv3.weight": (256, 64, 1, 1),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer3.5.bn3.weight": (1024,),
            "layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
            "layer4.2.conv1.weight": (512, 2048, 1, 1),
            "fc.weight": (1000, 2048),
        },
    ),
    (
        "resnet20",
        116,
        {
            "conv1.weight": (16, 3, 3, 3),
            "layer2.0.conv1.weight": (32, 16, 3, 3),
            "layer3.2.bn2.running_var": (64,),
            "linear.weight": (10, 64),
            "linear.bias": (10,),
        },
    ),
]


@pytest.mark.parametrize(("name", "count", "known"), PUBLISHED)
def test_names_and_shapes_of_published_weights(name: str, count: int, known: dict[str, tuple[int, ...]]) -> None:
    state = models.create(name).state_dict()
    assert len(state) == count
    assert {key: tuple(state[key].shape) for key in known} == known
    assert not [key for key in state if key.startswith("layer1.0.downsample")] or name == "resnet50"


def test_resnet50_has_its_stride_in_the_3x3() -> None:
    model = models.create("resnet50")
    for stage in (model.layer2, model.layer3, model.layer4):
        assert (stage[0].conv1.stride, stage[0].conv2.stride) == ((1, 1), (2, 2))


# ------------------------------------------------------------------------------------------- by name


REFUSED = [
    ("mnist-cnn", {"form": "paded"}, "form must be one of"),
    ("mnist-cnn", {"dropout": 1.0}, "dropout must be"),
    ("mnist-cnn", {"dropout": "half"}, "dropout must be"),
    ("mnist-cnn", {"form": "unpadded", "image_size": 12}, "too small"),
    ("mnist-cnn", {"classes": 10}, "n_classes"),
    ("mnist-cnn", {"n_classes": 0}, "n_classes must be"),
    ("lenet5", {"image_size": 30}, "28 × 28 or 32 × 32"),
    ("resnet2", {}, "resnet20"),
    ("vgg16-bn", {"in_channels": 2.5}, "in_channels must be"),
]


@pytest.mark.parametrize(("name", "options", "part"), REFUSED)
def test_what_cannot_be_made_is_one_sentence(name: str, options: dict[str, object], part: str) -> None:
    with pytest.raises(InputError) as caught:
        models.create(name, **options)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_remembers_what_it_was_made_as() -> None:
    made = models.architecture(models.create("digits-cnn", n_classes=4))
    assert made == models.Architecture("digits-cnn", {"n_classes": 4, "in_channels": 1})
    assert models.architecture(nn.Linear(2, 2)) == models.Architecture("Linear")


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's, with good and bad factories."""
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def small(width=3):\n    return nn.Linear(2, width)\n"
        "def broken():\n    return 1 / 0\n"
        "def text():\n    return 'model'\n"
        "ready = nn.Linear(2, 5)\n"
        "number = 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return "own_nets"


def test_a_users_own_model_by_reference(own_module: str) -> None:
    made = models.load_model(f"{own_module}:small", width=4)
    assert isinstance(made, nn.Linear)
    assert made.out_features == 4
    assert models.architecture(made) == models.Architecture("own_nets:small", {"width": 4})
    assert models.load_model(f"{own_module}:ready").out_features == 5


@pytest.mark.parametrize(
    ("attribute", "options", "part"),
    [
        ("broken", {}, "ZeroDivisionError"),
        ("text", {}, "gave a str"),
        ("number", {}, "is a int"),
        ("ready", {"width": 3}, "takes no options"),
        ("small", {"wide": 3}, "wide"),
        ("smal", {}, "did you mean 'small'"),
        ("", {}, "module:function"),
    ],
)
def test_bad_references_are_one_sentence(
    own_module: str, attribute: str, options: dict[str, object], part: str
) -> None:
    with pytest.raises(InputError) as caught:
        models.load_model(f"{own_module}:{attribute}", **options)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
