"""The trainer against a bare loop written here, torch's own schedules, and hand-made cases."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustknn import models, rng
from robustknn.errors import InputError
from robustknn.progress import Silent
from robustknn.training import Batch, Method, Standard, TrainConfig, accuracy, crop_and_flip, initialise, train


class Pixels:
    """A labelled set in memory: 8-bit images, divided by 255 batch by batch."""

    def __init__(self, data: Tensor, labels: Tensor) -> None:
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, positions: Tensor) -> Tensor:
        x = self.data[positions]
        return x.float() / 255 if x.dtype == torch.uint8 else x


def pixels(n: int, seed: int = 0, shape: tuple[int, ...] = (1, 4, 4), n_classes: int = 3) -> Pixels:
    """Random images whose class shows in their brightness."""
    labels = rng.bits(torch.arange(n), 1, seed, "labels")[:, 0] % n_classes
    noise = rng.bits(torch.arange(n), math.prod(shape), seed, "pixels").view(n, *shape) % 100
    return Pixels((noise + 70 * labels.view(n, *(1,) * len(shape))).to(torch.uint8), labels)


def source(n: int = 50, n_validation: int | None = 20) -> Any:
    validation = None if n_validation is None else pixels(n_validation, seed=1)
    return SimpleNamespace(train=pixels(n), validation=validation)


def network() -> nn.Module:
    """A network with dropout and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3)
    )


def fresh(seed: int = 0) -> nn.Module:
    return initialise(network, seed)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Steps(Silent):
    """Records what is reported; `at` maps a number of finished steps to something to do then."""

    def __init__(self, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.total = self.first = self.done = self.stopped = 0
        self._at = at or {}
        self.names: list[str] = []

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.total, self.first, self.done = total, done, done

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        self._at.get(self.done, lambda: None)()

    def rename(self, what: str) -> None:
        self.names.append(what)

    def stop(self) -> None:
        self.stopped += 1


def interrupt() -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------- the loop

OPTIMIZERS: list[tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = [
    (
        {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    ),
    ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.0}, lambda p: torch.optim.SGD(p, lr=0.1)),
    ({"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1}, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    (
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize(("settings", "optimizer"), OPTIMIZERS)
def test_standard_training_is_the_plain_loop(
    settings: dict[str, Any], optimizer: Callable[[Any], torch.optim.Optimizer]
) -> None:
    data = source(n_validation=None)
    ours, bare = fresh(), fresh()
    result = train(ours, data, TrainConfig(epochs=3, batch_size=16, seed=5, **settings))

    x, y, losses = data.train.data.float() / 255, data.train.labels, []
    rule, state = optimizer(bare.parameters()), torch.get_rng_state()
    for epoch in range(3):
        torch.manual_seed(rng.derive(5, "epoch", epoch))
        total = 0.0
        for places in rng.permutation(50, 5, "epoch", epoch).split(16):
            rule.zero_grad()
            loss = nn.functional.cross_entropy(bare(x[places]), y[places])
            loss.backward()
            rule.step()
            total += float(loss.detach()) * len(places)
        losses.append(total / 50)
    torch.set_rng_state(state)

    assert equal(ours, bare)
    assert [r.loss for r in result.history] == pytest.approx(losses, rel=1e-5)
    assert [r.epoch for r in result.history] == [1, 2, 3]
    assert (result.epoch, result.best_epoch, result.checkpoint) == (3, None, None)
    assert not ours.training


def test_global_randomness_is_neither_used_nor_touched() -> None:
    trained = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = fresh()
        train(model, source(), TrainConfig(epochs=2, batch_size=16, augment=True))
        assert torch.equal(torch.get_rng_state(), before)
        trained.append(model)
    assert equal(*trained)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    assert equal(fresh(3), fresh(3))
    assert not equal(fresh(3), fresh(4))


def test_another_seed_gives_other_weights() -> None:
    a, b = fresh(), fresh()
    train(a, source(), TrainConfig(epochs=1, seed=1))
    train(b, source(), TrainConfig(epochs=1, seed=2))
    assert not equal(a, b)


def test_the_network_learns() -> None:
    model = fresh()
    result = train(model, source(200, 60), TrainConfig(epochs=15, batch_size=20, lr=0.02, select="best"))
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert max(r.validation_accuracy or 0 for r in result.history) > 0.9
    assert accuracy(model, source(200, 60).validation) == result.history[result.epoch - 1].validation_accuracy


def test_the_digits_are_learnt_as_well_as_they_can_be() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.from_numpy(digits.images / 16).float()[:, None], torch.from_numpy(digits.target)
    order = rng.permutation(len(x), 0, "digits")
    data = SimpleNamespace(train=Pixels(x[order[:1297]], y[order[:1297]]), validation=None)
    model = initialise(lambda: models.create("digits-cnn"), 0)
    train(model, data, TrainConfig(epochs=8, batch_size=64, lr=5e-3, schedule="one-cycle"))
    assert accuracy(model, Pixels(x[order[1297:]], y[order[1297:]])) >= 0.97


def test_a_last_batch_of_one_sample_joins_the_one_before() -> None:
    sizes = []

    @dataclass(frozen=True)
    class Count(Standard):
        def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            sizes.append((batch.step, len(batch.x), len(batch.y), len(batch.ids)))
            return super().losses(model, batch)

    steps = Steps()
    train(fresh(), source(33), TrainConfig(epochs=2, batch_size=16), method=Count(), progress=steps)
    assert sizes == [(0, 16, 16, 16), (1, 17, 17, 17), (2, 16, 16, 16), (3, 17, 17, 17)]
    assert (steps.total, steps.first, steps.done, steps.stopped) == (4, 0, 4, 1)


def test_the_progress_tells_epoch_losses_and_validation() -> None:
    steps = Steps()
    result = train(fresh(), source(33, 12), TrainConfig(epochs=2, batch_size=16), progress=steps)
    held = result.history[0]
    assert held.validation_accuracy is not None
    first, second = steps.names
    assert re.fullmatch(r"training, epoch 1 of 2, cross-entropy \d\.\d{3}", first)
    shown = re.escape(f"{100 * held.validation_accuracy:.1f} %")
    assert re.fullmatch(rf"training, epoch 2 of 2, cross-entropy \d\.\d{{3}}, validation {shown}", second)


def test_methods_see_the_identity_of_samples() -> None:
    data = source(20, None)
    data.train.ids = torch.arange(100, 120)
    seen = []

    @dataclass(frozen=True)
    class Look(Standard):
        def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            assert model.training
            seen.append((batch.ids - 100, batch.y))
            return super().losses(model, batch)

    train(fresh(), data, TrainConfig(epochs=1, batch_size=7), method=Look())
    places = torch.cat([ids for ids, _ in seen])
    assert sorted(places.tolist()) == list(range(20))
    assert torch.equal(data.train.labels[places], torch.cat([y for _, y in seen]))


def test_frozen_parameters_stay() -> None:
    model = fresh()
    model[0].requires_grad_(False)
    before, head = model[0].weight.clone(), model[5].weight.clone()
    train(model, source(), TrainConfig(epochs=1))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[5].weight, head)


# ---------------------------------------------------------------------------------------- selection


class Climber(nn.Module):
    """Class 0 where x > w; every SGD step of `Climb` at lr 1 raises w by one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x - self.w, self.w - x], 1)


@dataclass(frozen=True)
class Climb(Method):
    """Raises w."""

    name: ClassVar[str] = "climb"

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"climb": -model.w}


CLIMBING = TrainConfig(epochs=5, optimizer="sgd", lr=1.0, momentum=0.0, select="best")
# After epochs 1 … 5 w is 1 … 5: right on none of 4, 2, 4, 4, 2 of these four samples.
VALIDATION = Pixels(torch.tensor([[1.5], [1.6], [4.5], [4.6]]), torch.tensor([1, 1, 0, 0]))
CLIMBED = SimpleNamespace(train=Pixels(torch.zeros(4, 1), torch.zeros(4).long()), validation=VALIDATION)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("select", "w"), [("best", 2.0), ("last", 5.0)])
def test_the_selected_weights_are_those_of_the_earliest_best_epoch_or_of_the_last(
    tmp_path: Path, on_disk: bool, select: str, w: float
) -> None:
    from dataclasses import replace

    model = Climber()
    out = tmp_path / "run" if on_disk else None
    result = train(model, CLIMBED, replace(CLIMBING, select=select), out, method=Climb())
    assert [r.validation_accuracy for r in result.history] == [0.5, 1.0, 1.0, 1.0, 0.5]
    assert (result.best_epoch, result.epoch, model.w.item()) == (2, int(w), w)


@pytest.mark.parametrize("training", [False, True])
def test_accuracy_counts_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    model = Climber().train(training)
    with torch.no_grad():
        model.w.fill_(1.55)
    assert [accuracy(model, VALIDATION, batch_size) for batch_size in (1, 3, 4, 100)] == [0.75] * 4
    assert model.training is training


def test_accuracy_does_not_depend_on_dropout_or_batches() -> None:
    model, split = fresh(), pixels(40)
    assert len({accuracy(model, split, batch_size) for batch_size in (1, 7, 40)}) == 1


# ----------------------------------------------------------------------------------------- schedules

PARTS = 7


def _reference(build: Callable[[torch.optim.Optimizer], Any], per_epoch: bool, epochs: int) -> list[float]:
    """The learning rates that one of torch's schedulers gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler, rates = build(optimizer), []
    for step in range(epochs * PARTS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (not per_epoch or step % PARTS == PARTS - 1) and step < epochs * PARTS - 1:
            scheduler.step()
    return rates


SCHEDULES: list[tuple[dict[str, Any], bool, Callable[[Any], Any]]] = [
    ({"schedule": "constant"}, False, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0)),
    (
        {"schedule": "step", "milestones": [2, 5], "gamma": 0.3},
        True,
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    ),
    ({"schedule": "cosine"}, False, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6 * PARTS)),
    (
        {"schedule": "one-cycle"},
        False,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.4, 6 * PARTS, cycle_momentum=False),
    ),
    (
        {"schedule": "one-cycle", "warmup": 0.5},
        False,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.4, 6 * PARTS, pct_start=0.5, cycle_momentum=False),
    ),
]


@pytest.mark.parametrize(("settings", "per_epoch", "build"), SCHEDULES)
def test_schedules_agree_with_torchs(settings: dict[str, Any], per_epoch: bool, build: Callable[[Any], Any]) -> None:
    config = TrainConfig(epochs=6, lr=0.4, **settings)
    ours = [config.learning_rate(step, PARTS) for step in range(6 * PARTS)]
    assert ours == pytest.approx(_reference(build, per_epoch, 6), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("warmup", [0.01, 0.3, 0.99])
def test_one_cycle_exists_for_a_single_step(warmup: float) -> None:
    assert 0 < TrainConfig(epochs=1, lr=0.4, schedule="one-cycle", warmup=warmup).learning_rate(0, 1) <= 0.4


def test_the_trainer_follows_the_schedule() -> None:
    model = Climber()
    config = TrainConfig(epochs=4, optimizer="sgd", lr=1.0, momentum=0.0, schedule="step", milestones=(1, 3), gamma=0.5)
    result = train(model, CLIMBED, config, method=Climb())
    assert [r.lr for r in result.history] == [1.0, 0.5, 0.5, 0.25]
    assert model.w.item() == 2.25


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "epochs"),
    ({"epochs": 1.5}, "epochs"),
    ({"batch_size": -1}, "batch_size"),
    ({"optimizer": "rmsprop"}, "'sgd', 'adam', 'adamw'"),
    ({"lr": 0}, "lr must be a number above 0"),
    ({"lr": math.nan}, "lr"),
    ({"lr": math.inf}, "lr"),
    ({"lr": "0.1"}, "lr"),
    ({"momentum": 1.0}, "momentum"),
    ({"weight_decay": -1e-4}, "weight_decay"),
    ({"schedule": "linear"}, "schedule"),
    ({"schedule": "step"}, "needs milestones"),
    ({"milestones": [3]}, "belong to schedule='step'"),
    ({"schedule": "step", "milestones": [5, 3]}, "ascend"),
    ({"schedule": "step", "milestones": 5}, "list of epochs"),
    ({"schedule": "step", "milestones": [0.5]}, "a milestone"),
    ({"schedule": "step", "milestones": [2, 4], "epochs": 4}, "milestone 4 is never reached in 4 epochs"),
    ({"schedule": "step", "milestones": [3], "gamma": 0}, "gamma"),
    ({"schedule": "one-cycle", "warmup": 1}, "warmup"),
    ({"nesterov": True}, "nesterov needs"),
    ({"optimizer": "sgd", "momentum": 0, "nesterov": True}, "nesterov needs"),
    ({"augment": 1}, "augment must be True or False"),
    ({"seed": 0.5}, "seed"),
    ({"select": "first"}, "select"),
]


@pytest.mark.parametrize(("settings", "part"), CONFIGS)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig(**settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- augmentation


def test_every_image_is_one_of_its_crops() -> None:
    x = rng.uniform(torch.arange(300), (2, 5, 6), 0)
    ids = torch.arange(1000, 1300)
    out = crop_and_flip(x, ids, seed=3, epoch=2)
    framed = torch.zeros(300, 2, 13, 14)
    framed[:, :, 4:9, 4:10] = x
    seen = set()
    for image, frame in zip(out, framed, strict=True):
        crops = {(t, l): frame[:, t : t + 5, l : l + 6] for t in range(9) for l in range(9)}
        matches = [(*place, False) for place, crop in crops.items() if torch.equal(image, crop)]
        matches += [(*place, True) for place, crop in crops.items() if torch.equal(image, crop.flip(2))]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {mirrored for *_, mirrored in seen} == {False, True}


def test_augmentation_is_counted() -> None:
    x, ids = rng.uniform(torch.arange(64), (1, 8, 8), 0), torch.arange(64)
    whole = crop_and_flip(x, ids, 0, 0)
    order = rng.permutation(64, 1)
    parts = torch.cat([crop_and_flip(x[p], ids[p], 0, 0) for p in order.split(5)])
    assert torch.equal(parts, whole[order])
    for other in (crop_and_flip(x, ids, 0, 1), crop_and_flip(x, ids, 1, 0), crop_and_flip(x, ids + 64, 0, 0)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_training_augments_when_asked() -> None:
    data, seen = source(30, None), []

    @dataclass(frozen=True)
    class Keep(Standard):
        def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            seen.append((batch.x.clone(), batch.ids, batch.step))
            return super().losses(model, batch)

    train(fresh(), data, TrainConfig(epochs=2, batch_size=30, augment=True, seed=4), method=Keep())
    for x, ids, step in seen:
        assert torch.equal(x, crop_and_flip(data.train.data[ids].float() / 255, ids, 4, step))


# ------------------------------------------------------------------------------------------ refusals


@dataclass(frozen=True)
class Spoil(Standard):
    """Cross-entropy that is spoilt at one step."""

    at: int = 0
    value: float = math.nan

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        factor = self.value if batch.step == self.at else 1.0
        return {name: value * factor for name, value in super().losses(model, batch).items()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_epoch_and_keeps_the_epochs_before(tmp_path: Path, value: float) -> None:
    # 50 samples in batches of 16 are 4 steps an epoch: step 9 is in the third epoch.
    with pytest.raises(InputError) as caught:
        train(fresh(), source(), TrainConfig(epochs=5, batch_size=16), tmp_path / "run", method=Spoil(9, value))
    assert "not finite in epoch 3; try a lower lr" in str(caught.value)
    assert [r["epoch"] for r in csv.DictReader((tmp_path / "run" / "epochs.csv").open())] == ["1", "2"]


def test_a_loss_that_is_not_finite_is_seen_before_a_long_epoch_ends() -> None:
    steps = Steps()
    with pytest.raises(InputError, match="epoch 1"):
        train(fresh(), source(1000, None), TrainConfig(epochs=1, batch_size=2), method=Spoil(3), progress=steps)
    assert steps.done < 100


@dataclass(frozen=True)
class Sour(Standard):
    """A finite loss whose gradient in the second step is not: the root of zero."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        losses = super().losses(model, batch)
        return {**losses, "sour": (model[5].weight * 0).sum().sqrt()} if batch.step == 1 else losses


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weight that is not finite in epoch 2"):
        train(fresh(), source(10), TrainConfig(epochs=2), tmp_path, method=Sour())
    assert (tmp_path / "epoch-00001").is_dir()
    assert not (tmp_path / "epoch-00002").exists()


def _frozen() -> nn.Module:
    return fresh().requires_grad_(False)


def _bad_label() -> Any:
    data = source()
    data.validation.labels[4] = 7
    return data


class TwoHeads(nn.Module):
    """Returns a second output in training mode alone, as networks with auxiliary heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        logits = self.fc(x.flatten(1))
        return (logits, logits) if self.training else logits


REFUSED: list[tuple[str, Callable[[], nn.Module], Callable[[], Any], dict[str, Any], str]] = [
    ("one sample", fresh, lambda: source(1), {}, "holds 1 samples"),
    ("no validation", fresh, lambda: source(50, None), {"select": "best"}, "needs a validation split"),
    ("empty validation", fresh, lambda: source(50, 0), {}, "validation split is empty"),
    ("wrong shape", lambda: nn.Linear(5, 3), source, {}, "cannot run on inputs of shape"),
    ("no scores", lambda: nn.Conv2d(1, 2, 3), source, {}, "returns no class scores"),
    ("too few outputs", lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), source, {}, "training labels holds"),
    ("validation label", fresh, _bad_label, {}, "validation labels holds the label 7"),
    ("frozen", _frozen, source, {}, "no parameter of the model requires a gradient"),
    ("no images", Climber, lambda: CLIMBED, {"augment": True}, "augment=True needs images"),
    ("no model", lambda: "mnist-cnn", source, {}, "must be a torch.nn.Module"),  # type: ignore[arg-type, return-value]
    ("two heads", TwoHeads, source, {}, "cannot be trained on a batch of shape (50, 1, 4, 4)"),
    (
        "batch normalisation of one",
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)),
        source,
        {"batch_size": 1},
        "cannot be trained on a batch of shape (1, 1, 4, 4): Expected more than 1 value",
    ),
]


@pytest.mark.parametrize(("what", "model", "data", "settings", "part"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_trained_is_one_sentence(
    what: str, model: Callable[[], nn.Module], data: Callable[[], Any], settings: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError) as caught:
        train(model(), data(), TrainConfig(epochs=1, **settings))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(device: str) -> None:
    with pytest.raises(InputError, match="cannot be moved to device") as caught:
        train(fresh(), source(), TrainConfig(epochs=1), device=device)
    assert "\n" not in str(caught.value)


def test_accuracy_of_an_empty_split_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        accuracy(fresh(), pixels(0))
