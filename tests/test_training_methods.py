"""Training methods against bare loops and losses written here."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import Pixels
from torch import Tensor, nn

from robustknn import KNN, FeatureExtractor, ReferenceSet, registry, rng
from robustknn.attacks import PGD
from robustknn.datasets import load
from robustknn.errors import InputError, ResumeError
from robustknn.models import DigitsCNN
from robustknn.objectives import ASK
from robustknn.progress import Silent
from robustknn.threat import ThreatModel
from robustknn.training import (
    TRADES,
    Adversarial,
    ASKDef,
    Batch,
    Gaussian,
    Method,
    PerturbedMethod,
    ReferenceStream,
    RobustCheck,
    TrainConfig,
    crop_and_flip,
    fast,
    initialise,
    train,
)
from robustknn.training.adversarial import divergence, log_softmax
from robustknn.training.ask_def import ask_loss, similarity

CLASSES = 3


def pixels(n: int, seed: int = 0) -> Pixels:
    """Random images of 6×6 whose class shows in their brightness."""
    ids = torch.arange(n)
    labels = rng.bits(ids, 1, seed, "labels")[:, 0] % CLASSES
    return Pixels(0.6 * rng.uniform(ids, (1, 6, 6), seed) + 0.2 * labels.view(n, 1, 1, 1), labels)


DATA: Any = SimpleNamespace(train=pixels(60), validation=pixels(30, 1))
CONFIG = TrainConfig(epochs=2, batch_size=20, optimizer="sgd", lr=0.05, seed=3)


class Net(nn.Module):
    """Batch normalisation, dropout, and a layer that a later one overwrites in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.act(self.bn(self.conv(x)))).flatten(1))


def fresh() -> nn.Module:
    return initialise(Net, 0)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def near(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-6) for x, y in pairs)


def bare_loop(model: nn.Module, loss: Any, epochs: int = 2, data: Any = DATA) -> None:
    """SGD over the trainer's order; `loss(model, x, y, ids, step)` is written by each test."""
    rule, state = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), torch.get_rng_state()
    for epoch in range(epochs):
        model.train()
        torch.manual_seed(rng.derive(3, "epoch", epoch))
        for i, places in enumerate(rng.permutation(60, 3, "epoch", epoch).split(20)):
            rule.zero_grad()
            loss(model, data.train.data[places], data.train.labels[places], places, 3 * epoch + i).backward()
            rule.step()
    torch.set_rng_state(state)
    model.eval()


def climb(model: nn.Module, loss: Any, x: Tensor, start: Tensor, eps: float, size: float, steps: int) -> Tensor:
    """Linf steps written plainly, the model in eval mode meanwhile."""
    model.eval()
    moved = start
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(moved), moved)
        moved = (moved + size * gradient.sign()).detach()
        moved = torch.maximum(torch.minimum(moved, x + eps), x - eps).clamp(0, 1)
    model.train()
    return moved.detach()


# ------------------------------------------------------------------------------------- methods by hand


@pytest.mark.parametrize(
    ("method", "steps", "size"),
    [
        (Adversarial(eps=0.1, steps=3), 3, 2.5 * 0.1 / 3),
        (Adversarial(eps=0.1, steps=2, step=0.04, start="clean"), 2, 0.04),
        (fast(eps=0.1), 1, 0.125),
    ],
    ids=["random", "clean", "fast"],
)
def test_adversarial_training_is_the_plain_loop(method: Adversarial, steps: int, size: float) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, step: int) -> Tensor:
        start = x
        if method.start == "random":
            start = ThreatModel("linf", 0.1).random_start(x, ids, 3, "inner", step)
        moved = climb(model, lambda v: nn.functional.cross_entropy(model(v), y), x, start, 0.1, size, steps)
        return nn.functional.cross_entropy(model(moved), y)

    ours, bare = fresh(), fresh()
    result = train(ours, DATA, CONFIG, method=method)
    bare_loop(bare, loss)
    assert near(ours, bare)
    assert not equal(ours, fresh())
    assert [set(r.parts) for r in result.history] == [{"adversarial"}] * 2


def test_trades_is_the_plain_loop() -> None:
    method = TRADES(eps=0.1, steps=3, beta=2.0)

    def loss(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, step: int) -> Tensor:
        noise = rng.normal(ids, (1, 6, 6), 3, "noise", "inner", step, dtype=x.dtype)
        start = (x + 1e-3 * noise).clamp(0, 1)
        model.eval()
        with torch.no_grad():
            p = model(x).softmax(1)

        def apart(v: Tensor) -> Tensor:
            return (p * (p.log() - model(v).log_softmax(1))).sum()

        moved = climb(model, apart, x, start, 0.1, 2.5 * 0.1 / 3, 3)
        clean, adversarial = model(torch.cat([x, moved])).chunk(2)
        held = clean.softmax(1)
        kl = (held * (held.log() - adversarial.log_softmax(1))).sum(1).mean()
        return nn.functional.cross_entropy(clean, y) + 2 * kl

    # In float64: the divergence is all but 0 where it starts, and rounding would decide some signs of its gradient.
    wide = Pixels(DATA.train.data.double(), DATA.train.labels)
    data = SimpleNamespace(train=wide, validation=DATA.validation)
    ours, bare = fresh().double(), fresh().double()
    train(ours, data, CONFIG, method=method)
    bare_loop(bare, loss, data=data)
    assert near(ours, bare)


def test_gaussian_noise_is_drawn_anew_for_every_sample_and_step_and_never_clipped() -> None:
    seen = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, step: int) -> Tensor:
        noise = rng.normal(ids, (1, 6, 6), 3, "gaussian", step)
        seen.append(noise)
        return nn.functional.cross_entropy(model(x + 0.5 * noise), y)

    ours, bare = fresh(), fresh()
    train(ours, DATA, CONFIG, method=Gaussian(sigma=0.5))
    bare_loop(bare, loss)
    assert near(ours, bare)
    drawn = torch.stack(seen)
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)
    assert len({tuple(v.tolist()) for v in drawn.flatten(2).flatten(0, 1)}) == 120


def test_clean_weight_mixes_both_in_one_pass() -> None:
    seen = []

    class Counted(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(len(x))
            return super().forward(x)

    result = train(initialise(Counted, 0), DATA, CONFIG, method=Adversarial(eps=0.1, steps=1, clean=0.25))
    assert set(seen) == {40}
    last = result.history[-1]
    assert last.loss == pytest.approx(last.parts["clean"] + last.parts["adversarial"])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("start", ["random", "clean", "noise"])
def test_perturbed_samples_stay_in_the_ball_and_their_loss_grows(norm: str, start: str) -> None:
    model, x, y = fresh(), DATA.train.data[:20], DATA.train.labels[:20]
    eps = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
    method = Adversarial(norm=norm, eps=eps, steps=10, start=start)
    moved = method.perturb(model, lambda v: nn.functional.cross_entropy(model(v), y, reduction="sum"), batch(x, y))
    assert float(ThreatModel(norm, eps).distance(moved.double(), x.double()).max()) <= eps * (1 + 1e-6)
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    model.eval()
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(moved), y) > nn.functional.cross_entropy(model(x), y) + 0.01


def batch(x: Tensor, y: Tensor, share: float = 0.5, step: int = 0) -> Batch:
    return Batch(x, y, torch.arange(len(x)), step, share, 3, stream())


def stream(split: Pixels = DATA.train, augment: bool = False) -> ReferenceStream:
    def same(x: Tensor, ids: Tensor, step: int) -> Tensor:
        return crop_and_flip(x, ids, 3, step) if augment else x

    return ReferenceStream(split, torch.arange(len(split)), 3, torch.zeros(1), same)


def test_the_radius_grows_over_the_warmup() -> None:
    model, x, y = fresh(), DATA.train.data[:20], DATA.train.labels[:20]
    method = Adversarial(eps=0.1, steps=5, warmup=0.5)

    def moved(share: float) -> float:
        def loss(v: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(v), y, reduction="sum")

        return float((method.perturb(model, loss, batch(x, y, share)) - x).abs().max())

    assert moved(0.0) == 0
    assert moved(0.25) == pytest.approx(0.05, rel=1e-4)
    assert moved(0.5) == moved(0.9) == pytest.approx(0.1, rel=1e-4)


def test_divergence_is_that_of_two_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    want = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert float(divergence(p.log(), q.log() + 3)) == pytest.approx(want, rel=1e-6)


# --------------------------------------------------------------------------------------------- ASK-Def


def ask_by_hand(z: Any, refs: Any, y: Any, labels: Any, kind: str, metric: str, t: float) -> list[float]:
    """Sections 1.1 of the formulas, in float64 and plain loops."""
    out = []
    for zi, yi in zip(z, y, strict=True):
        if metric == "cosine":
            s = [float(zi @ r / np.linalg.norm(zi) / np.linalg.norm(r)) / t for r in refs]
        else:
            s = [-float(np.linalg.norm(zi - r)) / t for r in refs]
        if kind == "instance-wise":
            e = np.exp(np.array(s) - max(s))
            out.append(-np.log(e[labels == yi].sum() / e.sum() + 1e-6))
        else:
            means = {c: np.mean([v for v, label in zip(s, labels, strict=True) if label == c]) for c in set(labels)}
            out.append(np.log(sum(np.exp(m) for m in means.values())) - means[yi])
    return out


@pytest.mark.parametrize("kind", ["instance-wise", "class-wise"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_ask_loss_is_that_of_the_paper(kind: str, metric: str) -> None:
    made = np.random.default_rng(0)
    z, refs = made.normal(size=(6, 5)), made.normal(size=(12, 5))
    y, labels = np.array([0, 1, 2, 5, 1, 0]), np.array([0, 0, 1, 1, 1, 2, 2, 5, 5, 5, 5, 0])
    want = ask_by_hand(z, refs, y, labels, kind, metric, 0.3)
    scaled = similarity(torch.tensor(z), torch.tensor(refs), metric) / 0.3
    got = ask_loss(scaled, torch.tensor(y), torch.tensor(labels), kind)
    assert got.tolist() == pytest.approx(want, rel=1e-4)


def test_a_sample_whose_class_has_no_reference_is_one_sentence() -> None:
    with pytest.raises(InputError, match="no reference was drawn"):
        ask_loss(torch.zeros(1, 2), torch.tensor([4]), torch.tensor([0, 1]), "instance-wise")


def test_references_and_their_copies_have_the_labels_of_their_samples() -> None:
    """The released code mislabels nine of ten; here each copy is within eps of a sample of its label."""
    model, method = fresh(), ASKDef(layers=("conv",), eps=0.05, steps=2, n_references=4)
    x, y = DATA.train.data[:20], DATA.train.labels[:20]
    references, labels = method._references(model, batch(x, y))
    assert references.shape == (24, 1, 6, 6)
    assert torch.bincount(labels).tolist() == [8, 8, 8]
    for image, label in zip(references, labels, strict=True):
        gap = (DATA.train.data - image).abs().flatten(1).amax(1)
        assert int(DATA.train.labels[gap.argmin()]) == int(label)
        assert float(gap.min()) <= 0.05 + 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "class-wise", "metric": "l2"},
        {"adversarial_references": False},
        {"clean_references": False},
        {"temperature": [0.5, 0.2], "weight": (1, 3)},
        {"include_self": True},
        {"include_self": True, "metric": "l2", "temperature": (0.5, 0.9), "adversarial_references": False},
    ],
)
def test_ask_def_is_the_plain_loop(settings: dict[str, Any]) -> None:
    given = {"temperature": 0.5, **settings}
    method = ASKDef(layers=("conv", "fc"), eps=0.05, steps=2, n_references=2, beta=0.7, **given)
    kind, metric = method.kind, method.metric
    heat, weights = given["temperature"], given.get("weight", (1, 1))
    temperatures = heat if isinstance(heat, (list, tuple)) else (heat, heat)

    def features(model: Any, x: Tensor) -> dict[str, Tensor]:
        conv = model.conv(x)
        fc = model.fc(model.dropout(model.act(model.bn(conv) + 0)).flatten(1))
        return {"conv": conv.flatten(1), "fc": fc}

    def ask(
        z: dict[str, Tensor], refs: dict[str, Tensor], y: Tensor, labels: Tensor, selves: dict[str, Tensor]
    ) -> Tensor:
        parts = []
        for layer, t in zip(("conv", "fc"), temperatures, strict=True):
            a, b = z[layer], refs[layer]
            near = [torch.cat([b, selves[layer][i : i + 1]]) if method.include_self else b for i in range(len(a))]
            if metric == "cosine":
                s = torch.stack([nn.functional.cosine_similarity(v[None], b) for v, b in zip(a, near, strict=True)]) / t
            else:
                s = -torch.stack([(v - b).norm(dim=1) for v, b in zip(a, near, strict=True)]) / t
            if kind == "instance-wise":
                mine = torch.stack([torch.cat([labels, c[None]]) if method.include_self else labels for c in y])
                own = s.softmax(1) * (y[:, None] == mine)
                parts.append(-torch.log(own.sum(1) + 1e-6))
            else:
                means = torch.stack([s[:, labels == c].mean(1) for c in range(CLASSES)], 1)
                parts.append(nn.functional.cross_entropy(means, y, reduction="none"))
        return weights[0] * parts[0] + weights[1] * parts[1]

    def loss(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, step: int) -> Tensor:
        refs, labels, names = stream().draw(2, step)
        threat, wide = ThreatModel("linf", 0.05), ThreatModel("linf", 0.1)
        ce = nn.functional.cross_entropy
        if method.adversarial_references:
            start = threat.random_start(refs, names, 3, "references", step)
            copies = climb(model, lambda v: ce(model(v), labels), refs, start, 0.05, 0.0625, 2)
            refs, labels = torch.cat([refs, copies]), torch.cat([labels, labels])
            if not method.clean_references:
                refs, labels = copies, labels[: len(copies)]
        model.eval()
        with torch.no_grad():
            held, still = features(model, refs), features(model, x)
        start = wide.random_start(x, ids, 3, "ask", step)
        far = climb(model, lambda v: ask(features(model, v), held, y, labels, still).sum(), x, start, 0.1, 0.125, 2)
        start = threat.random_start(x, ids, 3, "inner", step)
        moved = climb(model, lambda v: ce(model(v), y), x, start, 0.05, 0.0625, 2)
        every = [moved, far, x, refs] if method.include_self else [moved, far, refs]
        both = features(model, torch.cat(every))
        n, last = len(x), len(refs)
        here, selves, there = (
            {k: v[a:b] for k, v in both.items()} for a, b in ((n, 2 * n), (2 * n, 3 * n), (-last, None))
        )
        return ce(both["fc"][:n], y) + 0.7 * ask(here, there, y, labels, selves).mean()

    ours, bare = fresh(), fresh()
    result = train(ours, DATA, CONFIG, method=method)
    bare_loop(bare, loss)
    assert near(ours, bare)
    assert set(result.history[0].parts) == {"adversarial", "ask"}


def test_the_stream_serves_every_sample_of_a_class_equally_often() -> None:
    made, counts = stream(), torch.zeros(60, dtype=torch.int64)
    sizes = torch.bincount(DATA.train.labels)
    for step in range(int(sizes.prod())):
        x, y, ids = made.draw(1, step)
        assert torch.equal(x, DATA.train.data[ids])
        assert y.tolist() == list(range(CLASSES)) == DATA.train.labels[ids].tolist()
        counts[ids] += 1
    for c in range(CLASSES):
        assert set(counts[DATA.train.labels == c].tolist()) == {int(sizes.prod() // sizes[c])}


def test_what_the_stream_gives_depends_on_the_step_alone() -> None:
    made, again = stream(), stream()
    wanted = [made.draw(3, step)[2] for step in range(30)]
    for step in (29, 7, 0, 18):
        assert torch.equal(again.draw(3, step)[2], wanted[step])


def test_many_classes_need_no_reference_of_each_in_every_step() -> None:
    labels = torch.arange(400) % 100
    split = Pixels(rng.uniform(torch.arange(400), (1, 6, 6), 0), labels)
    method = ASKDef(layers=("conv",), n_references=2, max_classes=30, adversarial_references=False)
    others = set()
    for step in range(20):
        held = replace(batch(split.data[:8], labels[:8], step=step), stream=stream(split))
        _, drawn = method._references(nn.Identity(), held)
        assert set(labels[:8].tolist()) <= set(drawn.tolist())
        assert len(set(drawn.tolist())) == 30
        others |= set(drawn.tolist())
    assert others == set(range(100))


def test_a_class_without_a_training_sample_is_one_sentence() -> None:
    split = Pixels(torch.rand(4, 1, 6, 6), torch.tensor([0, 2, 2, 0]))
    with pytest.raises(InputError, match="class 1 has no training sample"):
        stream(split).draw(1, 0)


@pytest.mark.parametrize("method", [Adversarial(eps=0.1, steps=5), ASKDef(layers=("relu3",), eps=0.1, steps=3)])
def test_hardened_digits_hold_where_others_fall(method: Method) -> None:
    """Standard training leaves .26 of these (seed 0), adversarial .55, ASK-Def .59."""
    source = load("digits", protocol="published")
    model = initialise(DigitsCNN, 0)
    train(model, source, TrainConfig(epochs=5, batch_size=64, lr=2e-3), method=method)
    references = ReferenceSet.build(FeatureExtractor(model, ["relu3"]), source.train)
    places = torch.arange(100)
    x, y = source.test.batch(places), source.test.labels[places]
    result = PGD(objective=ASK(), steps=20)(KNN(references, 15), x, y, ThreatModel("linf", 0.15))
    assert float(result.robust.double().mean()) > 0.4
    assert float((result.clean_labels == y).double().mean()) > 0.95


# ---------------------------------------------------------------------- validation, formats, resumption


def test_robust_validation_is_the_accuracy_under_pgd(tmp_path: Path) -> None:
    model = fresh()
    result = train(model, DATA, CONFIG, tmp_path / "run", method=Adversarial(eps=0.05, steps=2))
    last = result.history[-1]
    assert last.robust_accuracy is not None
    assert last.validation_accuracy is not None
    assert last.robust_accuracy == RobustCheck(eps=0.05).accuracy(model, DATA.validation)
    assert last.robust_accuracy <= last.validation_accuracy
    rows = list(csv.DictReader((tmp_path / "run" / "epochs.csv").open()))
    assert float(rows[-1]["robust_accuracy"]) == last.robust_accuracy
    assert float(rows[-1]["loss/adversarial"]) == last.loss


def test_the_most_robust_epoch_is_selected(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=6, lr=0.3, select="robust")
    model = fresh()
    result = train(model, DATA, config, tmp_path / "run", method=Adversarial(eps=0.05, steps=1))
    values = [r.robust_accuracy for r in result.history]
    assert result.epoch == result.best_epoch == 1 + values.index(max(values))  # type: ignore[type-var]
    assert RobustCheck(eps=0.05).accuracy(model, DATA.validation) == max(values)  # type: ignore[type-var]


METHODS = {
    "gaussian": Gaussian(sigma=0.25),
    "adversarial": Adversarial(eps=0.05, steps=2, warmup=0.5),
    "trades": TRADES(eps=0.05, steps=2),
    "ask-def": ASKDef(layers=("conv",), eps=0.05, steps=2),
}


class Stop(Silent):
    """Interrupts after a number of steps."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, 0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.done = done

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if self.done == self.at:
            raise KeyboardInterrupt

    def stop(self) -> None: ...


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "channels_last": True, "augment": True}])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    config, method = replace(CONFIG, epochs=3, **settings), METHODS[name]
    whole, parts = fresh(), fresh()
    train(whole, DATA, config, tmp_path / "whole", method=method)
    with pytest.raises(KeyboardInterrupt):
        train(parts, DATA, config, tmp_path / "parts", method=method, progress=Stop(5))
    parts = fresh()
    train(parts, DATA, config, tmp_path / "parts", method=method)
    assert equal(whole, parts)


def test_another_setting_of_the_method_is_named(tmp_path: Path) -> None:
    train(fresh(), DATA, replace(CONFIG, epochs=1), tmp_path / "run", method=Adversarial(eps=0.05, steps=1))
    with pytest.raises(ResumeError, match="method setting eps"):
        train(fresh(), DATA, replace(CONFIG, epochs=1), tmp_path / "run", method=Adversarial(eps=0.06, steps=1))


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_and_channels_last_learn_the_same_within_rounding(name: str) -> None:
    begun, usual, other = fresh(), fresh(), fresh()
    near = 0.2 if name == "trades" else 0.1  # its examples start where the divergence is zero: rounding decides signs
    train(usual, DATA, CONFIG, method=METHODS[name])
    train(other, DATA, replace(CONFIG, precision="bf16", channels_last=True), method=METHODS[name])
    assert not equal(usual, other)
    assert all(p.dtype == torch.float32 for p in other.parameters())
    for start, a, b in zip(begun.parameters(), usual.parameters(), other.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) < near
        assert not torch.equal(start, b)  # every parameter has a gradient in half precision too


def test_ask_def_validates_at_the_larger_of_its_radii() -> None:
    assert ASKDef(layers=("1",), eps=0.5).check == RobustCheck("linf", 1.0)  # all of the room
    assert ASKDef(layers=("1",), eps=0.05, bounds=(0.2, 0.3)).check == RobustCheck("linf", 0.1, bounds=(0.2, 0.3))
    assert ASKDef(layers=("1",), eps=0.1).check == RobustCheck("linf", 0.2)
    assert ASKDef(layers=("1",), eps=0.1, ask_eps=0.05).check == RobustCheck("linf", 0.1)
    assert ASKDef(layers=("1",), norm="l2", eps=0.1, ask_eps=0.3).check == RobustCheck("l2", 0.3)


def test_tensorboard_holds_every_epoch_once_after_an_interruption(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config, run = replace(CONFIG, epochs=4), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), DATA, config, run, tensorboard=True, progress=Stop(7))
    result = train(fresh(), DATA, config, run, tensorboard=True)
    read = accumulator.EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    events = read.Scalars("validation_accuracy")
    assert [e.step for e in events] == [1, 2, 3, 4]
    assert [e.value for e in events] == pytest.approx([r.validation_accuracy for r in result.history])


def test_epochs_are_told_when_their_checkpoint_is_written(tmp_path: Path) -> None:
    told = []

    def tell(record: Any) -> None:
        assert (tmp_path / "run" / f"epoch-{record.epoch:05d}").is_dir()
        told.append(record.epoch)

    train(fresh(), DATA, CONFIG, tmp_path / "run", on_epoch=tell)
    assert told == [1, 2]


# --------------------------------------------------------------------------------------------- refusals

BAD: list[tuple[str, Any, str]] = [
    ("norm", lambda: Adversarial(norm="l3"), "norm"),
    ("sigma", lambda: Gaussian(sigma=0), "sigma"),
    ("eps", lambda: Adversarial(eps=-1), "eps"),
    ("steps", lambda: Adversarial(steps=0), "steps"),
    ("step", lambda: Adversarial(step=0), "step"),
    ("start", lambda: Adversarial(start="anywhere"), "start"),
    ("warmup", lambda: TRADES(warmup=2), "warmup"),
    ("bounds", lambda: Adversarial(bounds=(1, 0)), "bounds"),
    ("clean", lambda: Adversarial(clean=1), "clean"),
    ("beta", lambda: TRADES(beta=0), "beta"),
    ("ask-def", lambda: ASKDef(layers=("1",), eps=0.7), "twice eps, 1.4, beyond all that there is, 1; set ask_eps"),
    ("no layer", ASKDef, "name their layers"),
    ("kind", lambda: ASKDef(layers=("conv",), kind="none"), "kind"),
    ("metric", lambda: ASKDef(layers=("conv",), metric="ip"), "metric"),
    ("temperature", lambda: ASKDef(layers=("conv",), temperature=0), "temperature"),
    ("flag", lambda: ASKDef(layers=("conv",), adversarial_references="False"), "true or false"),  # type: ignore[arg-type]
    ("none", lambda: ASKDef(layers=("a",), adversarial_references=False, clean_references=False), "needs references"),
    ("self", lambda: ASKDef(layers=("conv",), kind="class-wise", include_self=True), "belongs to kind"),
    ("one each", lambda: ASKDef(layers=("conv",), temperature=(0.1, 0.2)), "2 values for 1 layers"),
    ("weight", lambda: ASKDef(layers=("conv",), weight=(-1.0,)), "weight must be a number above 0"),
    ("clean start", lambda: TRADES(start="clean"), "start"),
    ("max_classes", lambda: ASKDef(layers=("conv",), max_classes=1), "at least 2"),
    ("unknown", lambda: registry.methods.create("ask-deff"), "ask-def"),
    ("option", lambda: registry.methods.create("trades", betta=1), "beta"),
    ("precision", lambda: replace(CONFIG, precision="fp16"), "precision"),
    ("robust", lambda: replace(CONFIG, robust=0.1), "RobustCheck"),
    ("no check", lambda: train(fresh(), DATA, replace(CONFIG, select="robust")), "needs an attack to validate under"),
    ("no method", lambda: train(fresh(), DATA, CONFIG, method="trades"), "must be a Method"),  # type: ignore[arg-type]
    ("no folder", lambda: train(fresh(), DATA, CONFIG, tensorboard=True), "needs out="),
    ("layer", lambda: train(fresh(), DATA, CONFIG, method=ASKDef(layers=("convv",))), "conv"),
]


@pytest.mark.parametrize(("what", "call", "part"), BAD, ids=[row[0] for row in BAD])
def test_what_cannot_be_is_one_sentence(what: str, call: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_must_name_the_parts_of_its_loss() -> None:
    class Bare(Method):
        name = "bare"

        def losses(self, model: nn.Module, batch: Batch) -> Any:
            return model(batch.x).sum()

    with pytest.raises(InputError, match=r"Bare.losses must return the loss's parts by name, not Tensor"):
        train(fresh(), DATA, CONFIG, method=Bare())


def test_methods_are_registered() -> None:
    assert {e.name for e in registry.methods} >= {"standard", "adversarial", "fast", "trades", "ask-def"}
    assert registry.methods.create("fast", eps=0.2) == Adversarial(eps=0.2, steps=1, step=0.25)
    made = registry.methods.create("ask-def", layers=["conv"], bounds=[0, 1])
    assert made == ASKDef(layers=("conv",))
    assert isinstance(made, PerturbedMethod)


# ------------------------------------------------------------------------------- precision and ranges


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_similarities_are_not_taken_in_half_precision(metric: str) -> None:
    """Features far from the origin, near each other: half precision would leave nothing of their distances."""
    made = torch.Generator().manual_seed(0)
    z = 2 + 0.05 * torch.randn(20, 2048, generator=made)
    references = 2 + 0.05 * torch.randn(30, 2048, generator=made)
    want = similarity(z.double(), references.double(), metric)
    with torch.autocast("cpu", torch.bfloat16):
        got = similarity(z, references, metric)
    assert got.dtype == torch.float32
    assert want.dtype == torch.float64
    assert float((got - want).abs().max()) < 1e-4


def test_the_divergence_of_near_equal_predictions_is_not_negative_in_half_precision() -> None:
    scores = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    near = (scores.float() + 1e-2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = divergence(log_softmax(scores), near)
    assert float(found.min()) > -1e-6


def test_samples_outside_the_bounds_and_radii_beyond_them_are_refused_before_training(tmp_path: Path) -> None:
    wide: Any = SimpleNamespace(train=Pixels(DATA.train.data * 255, DATA.train.labels), validation=None)
    with pytest.raises(InputError, match="training samples"):
        train(fresh(), wide, CONFIG, tmp_path / "run", method=Adversarial(eps=0.1))
    with pytest.raises(InputError, match="write 80/255"):
        train(fresh(), DATA, CONFIG, tmp_path / "run", method=Adversarial(eps=80))
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_from_the_same_checkpoint_alone(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    train(fresh(), DATA, config, tmp_path / "run", started_from="a")
    train(fresh(), DATA, config, tmp_path / "run", started_from="a")
    with pytest.raises(ResumeError, match="starting checkpoint"):
        train(fresh(), DATA, config, tmp_path / "run")
