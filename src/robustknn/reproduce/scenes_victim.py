"""The settings of the tables on DAEkNN, by data set and preset: networks, how they are trained, radii, layers.

MNIST is arXiv 2108.06797 with its notebooks: attack at 80/255, adversarial training and hardening at 60/255, steps of
20/255. The preset "paper" trains 100 epochs in batches of 1,024, "cpu" 20 of 128. CIFAR-10 is VGG16 in the preset
"paper" (attack and hardening at 8/255, steps of 2/255; the radius of its adversarial training is not printed, 4/255
fits its accuracies), and a fine-tuned ResNet-20 in "cpu".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from robustknn.errors import InputError
from robustknn.recipes.worst_case import WorstCase
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import experiments
from robustknn.reproduce.fine_tuning import FineTuned, Published, published_weights
from robustknn.reproduce.networks import Recipe
from robustknn.training import TrainConfig

AUTO = "auto"
COMMON: dict[str, Any] = {
    "epochs": None,
    "standard_epochs": None,
    "images": None,
    "per_class": 2000,
    "k": 5,
    "n": None,
    "worst_n": 1000,
    "strength": AUTO,
}
"""Options that the tables share. None: epochs and images as the preset has them, `n` all test images. `strength` is of
the worst case, or "auto" for that of the data set and preset."""


@dataclass(frozen=True)
class Scene:
    """A data set with its networks.

    Attributes:
        model, options: the network.
        layers: those that can vote, in order; `voting` the places of those that do in the tables.
        attacked, hardened, step: radius of the attack and of the adversarial references, and a step at both.
        weakened: radius of the adversarial references of a network that was not trained adversarially.
        strengths: radii that hardening is tried at.
        standard: how the standard network is trained; None for published weights.
        adversarial, radius, inner: how the other is trained: settings, radius and step.
        images: the first training images that the adversarially trained one sees; None for all.
        protocol: how the data set is divided.
        tests: how many test images there are by default.
        cuda: whether it takes an accelerator.
        passes: seconds of a gradient pass over an image on two cores.
        strength: of the worst case.
    """

    model: str
    layers: tuple[str, ...]
    voting: tuple[int, ...]
    attacked: float
    hardened: float
    step: float
    weakened: float
    strengths: tuple[float, ...]
    standard: TrainConfig | None
    adversarial: TrainConfig
    radius: float
    inner: float
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    images: int | None = None
    protocol: str = "published"
    tests: int = 10_000
    cuda: bool = False
    passes: float = 0.0003
    strength: str = "standard"


_FAST = {"precision": "bf16", "channels_last": True}
_MNIST = Scene(
    model="mnist-cnn",
    layers=("relu1", "relu2", "relu3"),
    voting=(1, 2),
    attacked=80 / 255,
    hardened=60 / 255,
    step=20 / 255,
    weakened=15 / 255,
    strengths=(20 / 255, 40 / 255, 60 / 255, 80 / 255),
    standard=TrainConfig(epochs=6, **_FAST),  # type: ignore[arg-type]
    adversarial=TrainConfig(epochs=20, **_FAST),  # type: ignore[arg-type]
    radius=60 / 255,
    inner=20 / 255,
    options={"form": "unpadded", "dropout": 0.5},
    warmup=0.2,
    protocol="standard",
)
SGD = TrainConfig(
    epochs=200,
    optimizer="sgd",
    lr=0.1,
    weight_decay=5e-4,
    nesterov=True,
    schedule="step",
    milestones=(100,),
    augment=True,
    channels_last=True,
)
_CIFAR = Scene(
    model="vgg16-bn",
    layers=("layer1", "layer2", "layer3", "layer4", "layer5"),
    voting=(2, 3),
    attacked=8 / 255,
    hardened=8 / 255,
    step=2 / 255,
    weakened=2 / 255,
    strengths=(2 / 255, 4 / 255, 6 / 255, 8 / 255, 12 / 255),
    standard=SGD,
    adversarial=SGD,
    radius=4 / 255,
    inner=2 / 255,
    cuda=True,
    passes=0.02,
)
TUNED = TrainConfig(
    epochs=4,
    optimizer="sgd",
    lr=0.02,
    weight_decay=5e-4,
    schedule="one-cycle",
    augment=True,
    **_FAST,  # type: ignore[arg-type]
)
"""Fine-tuning of the published ResNet-20."""
SCENES = {
    ("mnist", "cpu"): _MNIST,
    ("mnist", "paper"): replace(
        _MNIST,
        standard=TrainConfig(epochs=100, batch_size=1024),
        adversarial=TrainConfig(epochs=100, batch_size=1024),
        warmup=0.0,
        protocol="published",
    ),
    ("cifar10", "cpu"): replace(
        _CIFAR,
        model="resnet20",
        layers=("layer1", "layer2", "layer3"),
        voting=(1, 2),
        strengths=(2 / 255, 4 / 255, 8 / 255),
        standard=None,
        adversarial=TUNED,
        images=8_000,
        tests=5_000,
        cuda=False,
        passes=0.0015,
        strength="fast",
    ),
    ("cifar10", "paper"): _CIFAR,
}


def scene_of(bench: Bench) -> Scene:
    """The scene of a bench's data set and preset.

    Raises:
        InputError: it takes an accelerator, and there is none.
    """
    settings = bench.settings
    scene = SCENES[settings.data, settings.preset]
    if scene.cuda:
        refuse_without_cuda(bench)
    return scene


def worst_case(bench: Bench, scene: Scene) -> WorstCase:
    """The worst case of a scene."""
    return WorstCase(scene.strength if bench["strength"] == AUTO else bench["strength"])


def suite_of(record: Mapping[str, Any]) -> str:
    """The name of the worst case that a record's figures are of."""
    strength = record["options"]["strength"]
    if strength == AUTO:
        strength = SCENES[record["data"], record["preset"]].strength
    suite: str = experiments.entry(record["experiment"]).build.suite  # type: ignore[attr-defined]
    return suite if strength == "standard" else f"{suite}-{strength}"


def refuse_without_cuda(bench: Bench) -> None:
    """InputError where a preset trains a large network and there is no accelerator."""
    settings = bench.settings
    if not settings.device.startswith("cuda"):
        raise InputError(
            f"preset {settings.preset!r} of {settings.experiment} on {settings.data} trains a large network and "
            "needs a CUDA device; use one, or --preset cpu, which takes a small one on cifar10 and mnist."
        )


def groups(scene: Scene) -> dict[str, tuple[int, ...]]:
    """The layers that vote, by what a row calls them: one after another, and those of the tables together."""
    single = {f"layer {place + 1}": (place,) for place in range(len(scene.layers))}
    return {**single, "layers " + " + ".join(str(place + 1) for place in scene.voting): scene.voting}


def standard_recipe(bench: Bench, scene: Scene) -> Recipe | Published:
    """The network that was trained on clean images."""
    if scene.standard is None:
        return published_weights(bench, "standard, published weights", scene.model)
    config = with_epochs(scene.standard, bench["standard_epochs"])
    return Recipe(f"{scene.model}-standard", scene.model, config, scene.options, protocol=scene.protocol)


def adversarial_recipe(bench: Bench, scene: Scene) -> Recipe:
    """The network that was trained adversarially."""
    config = with_epochs(scene.adversarial, bench["epochs"])
    inner = {"eps": scene.radius, "step": scene.inner, "steps": 10}
    if scene.warmup:
        inner["warmup"] = scene.warmup
    images = bench["images"] or scene.images
    title = f"{scene.model}-adversarial"
    if images is None and scene.standard is not None:
        return Recipe(title, scene.model, config, scene.options, "adversarial", inner, scene.protocol)
    start = published_weights(bench, "", scene.model) if scene.standard is None else None
    return FineTuned(title, scene.model, config, scene.options, "adversarial", inner, scene.protocol, start, images)


def with_epochs(config: TrainConfig, epochs: int | None) -> TrainConfig:
    """The settings with another number of epochs, a step schedule's milestones kept below it."""
    if epochs is None:
        return config
    kept = tuple(m for m in config.milestones if m < epochs)
    schedule = "constant" if config.milestones and not kept else config.schedule
    return replace(config, epochs=epochs, milestones=kept, schedule=schedule)
