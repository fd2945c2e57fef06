"""FeatureExtractor: what a tap reads is what the model computes there, and nothing is left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from robustknn import FeatureExtractor, InputError, Tap
from robustknn.features import model_fingerprint

N = 16  # a batch that needs no padding, so that a forward written by hand meets the same kernels


def images(n: int = N, channels: int = 2, size: int = 6, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator, dtype=dtype)


def seeded(model: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return model()


# ------------------------------------------------------------------------------------------------ networks


class Reused(nn.Module):
    """One activation and one linear layer, called several times, the second by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(input=self.act(self.fc(x))))


class Recurrent(nn.Module):
    """(N, T, 3) → an LSTM, which returns a tuple of a tensor and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5, batch_first=True)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.conv(x) + shift[:, :1, 1:-1, 1:-1]


class Nested(nn.Module):
    """A module that takes two tensors, inside a block; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"inner": Inner()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.block["inner"](x, shift=x * 2)
        return {"map": y, "mean": y.mean((2, 3))}


def vectors(n: int = N, dim: int = 4, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def series(n: int = N) -> Tensor:
    return torch.randn(n, 7, 3, generator=torch.Generator().manual_seed(2))


def small_cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))


def reused_call(model: Any, call: int) -> Tensor:
    x = vectors()
    for _ in range(call):
        x = torch.tanh(F.linear(x, model.fc.weight, model.fc.bias))
    return F.linear(x, model.fc.weight, model.fc.bias)


def conv(model: Any) -> Tensor:
    return F.conv2d(images(), model.weight, model.bias)


TAPS: list[tuple[Callable[[], nn.Module], Callable[[], Tensor], str, Callable[[Any], Tensor]]] = [
    (small_cnn, images, "0", lambda m: conv(m[0])),
    (small_cnn, images, "0:input", lambda m: images()),
    (small_cnn, images, "1:input", lambda m: conv(m[0])),
    (small_cnn, images, "1", lambda m: conv(m[0]).clamp_min(0)),
    (small_cnn, images, "(output)", lambda m: F.linear(conv(m[0]).clamp_min(0).flatten(1), m[3].weight, m[3].bias)),
    (small_cnn, images, "(output):input", lambda m: images()),
    (Reused, vectors, "fc", lambda m: reused_call(m, 0)),
    (Reused, vectors, "fc@1", lambda m: reused_call(m, 1)),
    (Reused, vectors, "fc:input@1", lambda m: torch.tanh(reused_call(m, 0))),
    (Reused, vectors, "act", lambda m: torch.tanh(reused_call(m, 0))),
    (Reused, vectors, "act@1", lambda m: torch.tanh(reused_call(m, 1))),
    (Reused, vectors, "act:input@1", lambda m: reused_call(m, 1)),
    (Recurrent, series, "rnn[0]", lambda m: m.rnn(series())[0]),
    (Nested, images, "block.inner.conv", lambda m: conv(m.block["inner"].conv)),
    (Nested, images, "block.inner:input[1]", lambda m: images() * 2),
    (
        Nested,
        images,
        "(output)[1]",
        lambda m: (conv(m.block["inner"].conv) + images()[:, :1, 1:-1, 1:-1] * 2).mean((2, 3)),
    ),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize(("make", "data", "tap", "truth"), TAPS, ids=[f"{t[0].__name__}-{t[2]}" for t in TAPS])
def test_a_tap_reads_what_the_model_computes_there(
    make: Callable[[], nn.Module],
    data: Callable[[], Tensor],
    tap: str,
    truth: Callable[[Any], Tensor],
    mode: Callable[[], Any],
) -> None:
    model = seeded(make)
    expected = truth(model).detach().flatten(1)
    with mode():
        found, output = FeatureExtractor(model, tap).with_output(data())
        assert list(found) == [tap]
        assert torch.allclose(found[tap], expected, rtol=1e-5, atol=1e-6)
        plain = model(data())
    for name in plain if isinstance(plain, Mapping) else ["(output)"]:
        pair = (output[name], plain[name]) if isinstance(plain, Mapping) else (output, plain)
        assert torch.equal(*pair)


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("conv", Tap("conv")),
        ("layer1.0.bn:input", Tap("layer1.0.bn", at_input=True)),
        ("relu@3", Tap("relu", call=3)),
        ("relu:input@2", Tap("relu", at_input=True, call=2)),
        ("rnn[0]", Tap("rnn", item=0)),
        ("rnn:input@1[2]", Tap("rnn", at_input=True, call=1, item=2)),
        ("(output)", Tap("")),
        ("(output)[1]", Tap("", item=1)),
    ],
)
def test_tap_grammar_reads_and_writes(text: str, tap: Tap) -> None:
    assert Tap.parse(text) == tap
    assert str(tap) == text


def test_call_zero_is_the_plain_name() -> None:
    assert str(Tap.parse("relu@0")) == "relu"


# ------------------------------------------------------------------------------------------ in-place layers


class InplaceAdd(nn.Module):
    """A residual block that adds in place, as many do, and activates in place after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.bn = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y += x
        return self.relu(y)


class InplaceView(nn.Module):
    """Flattens, then works in place on the view and on a slice of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.flatten = nn.Flatten()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.flatten(self.conv(x))
        y[:, :5] *= 3
        return self.relu(y)


class InplaceInput(nn.Module):
    """Overwrites what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).sum((2, 3))


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(0.5)


class Triple(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3)


def several_in_a_row() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), Shift(), Triple(), nn.ReLU(inplace=True))


def bn(module: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)


first_five_tripled = torch.ones(48).index_fill_(0, torch.arange(5), 3.0)


INPLACE: list[tuple[Callable[[], nn.Module], dict[str, Callable[[Any, Tensor], Tensor]]]] = [
    (
        several_in_a_row,
        {
            "0": lambda m, x: F.conv2d(x, m[0].weight, m[0].bias),
            "1": lambda m, x: F.conv2d(x, m[0].weight, m[0].bias) + 0.5,
            "2": lambda m, x: (F.conv2d(x, m[0].weight, m[0].bias) + 0.5) * 3,
            "3:input": lambda m, x: (F.conv2d(x, m[0].weight, m[0].bias) + 0.5) * 3,
            "3": lambda m, x: ((F.conv2d(x, m[0].weight, m[0].bias) + 0.5) * 3).relu(),
        },
    ),
    (
        InplaceAdd,
        {
            "conv": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding=1),
            "bn": lambda m, x: bn(m.bn, F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)),
            "relu:input": lambda m, x: bn(m.bn, F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)) + x,
            "relu": lambda m, x: (bn(m.bn, F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)) + x).relu(),
        },
    ),
    (
        InplaceView,
        {
            "conv": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias),
            "flatten": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias).flatten(1),
            "relu:input": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias).flatten(1) * first_five_tripled,
            "relu": lambda m, x: (F.conv2d(x, m.conv.weight, m.conv.bias).flatten(1) * first_five_tripled).relu(),
        },
    ),
    (
        InplaceInput,
        {"first:input": lambda m, x: x, "(output):input": lambda m, x: x, "first": lambda m, x: x.relu()},
    ),
]


@pytest.mark.parametrize(("make", "truth"), INPLACE, ids=[case[0].__name__ for case in INPLACE])
def test_what_is_read_is_the_value_before_it_is_overwritten(
    make: Callable[[], nn.Module], truth: dict[str, Callable[[Any, Tensor], Tensor]]
) -> None:
    model, x = seeded(make).eval(), images()
    both = [FeatureExtractor(model, list(truth)), *(FeatureExtractor(model, name) for name in truth)]
    with torch.no_grad():
        expected = {name: f(model, x).flatten(1) for name, f in truth.items()}
    for extractor in both:
        for mode in (torch.no_grad, torch.inference_mode, nullcontext):
            for _ in range(2):  # the first call learns what must be copied, the second knows
                with mode():
                    given = x.clone()
                    found = extractor(given)
                    for name, value in found.items():
                        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
                    assert torch.equal(given, x)  # a model that works in place has its own copy


@pytest.mark.parametrize(("make", "truth"), INPLACE, ids=[case[0].__name__ for case in INPLACE])
def test_gradients_are_those_of_a_forward_written_by_hand(
    make: Callable[[], nn.Module], truth: dict[str, Callable[[Any, Tensor], Tensor]]
) -> None:
    model = seeded(make).eval()
    x = images().requires_grad_()
    extractor = FeatureExtractor(model, list(truth))
    for _ in range(2):
        weights = {name: torch.randn(f(model, x).flatten(1).shape) for name, f in truth.items()}
        found = extractor(x)
        (ours,) = torch.autograd.grad(sum((found[name] * weights[name]).sum() for name in truth), x)
        by_hand = sum((f(model, x).flatten(1) * weights[name]).sum() for name, f in truth.items())
        (expected,) = torch.autograd.grad(by_hand, x)
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_features_do_not_share_memory_with_the_input() -> None:
    x = vectors()
    found = FeatureExtractor(nn.Identity())(x)["(output)"]
    found += 1
    assert torch.equal(x, vectors())


# --------------------------------------------------------------------------- nothing is changed, nothing is left


def mixed_modes() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Flatten(), nn.Sequential(nn.Linear(48, 4), nn.ReLU())
    )
    model.train()
    model[1].eval()
    model[4].eval()
    model[4][1].train()
    return model


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Modes, hooks, weights and buffers are the same afterwards."""
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    keys = set(model.__dict__)
    try:
        yield
    finally:
        assert [m.training for m in model.modules()] == modes
        assert hooks_of(model) == 0
        assert set(model.__dict__) == keys
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_eval_mode_is_held_and_each_submodule_gets_its_own_mode_back() -> None:
    model = seeded(mixed_modes)
    with unchanged(model):  # running statistics and the counter of batches among it
        found = FeatureExtractor(model, ["1", "2"])(images())
        logits = FeatureExtractor(model).logits(images())
    # Dropout passed everything, and normalisation was by the running statistics (0 and 1, to eps).
    assert torch.equal(found["1"], found["2"])
    by_hand = F.conv2d(images(), model[0].weight, model[0].bias) / (1 + model[1].eps) ** 0.5
    assert torch.allclose(found["1"], by_hand.flatten(1).detach(), atol=1e-6)
    assert torch.allclose(logits, model[4](by_hand.flatten(1)), atol=1e-6)


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("broken")


@pytest.mark.parametrize(
    ("layer", "x", "error"),
    [("0", torch.zeros(3, 5, 5, 5), InputError), ("2", torch.zeros(3, 2, 6, 6), KeyError)],
)
def test_modes_and_hooks_are_restored_after_an_exception(layer: str, x: Tensor, error: type[Exception]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(), Breaks())
    model[0].eval()
    extractor = FeatureExtractor(model, layer)
    for call in (extractor, extractor.with_output, extractor.logits):
        with unchanged(model), pytest.raises(error):
            call(x)


def test_model_and_extractor_can_be_pickled_and_copied_after_use() -> None:
    model = seeded(several_in_a_row)
    extractor = FeatureExtractor(model, ["0", "2"], pool={"2": "avg"}, normalize=True)
    with unchanged(model):
        before = extractor(images())
    for twin in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):  # noqa: S301 - our own bytes
        assert twin.model is not model
        assert twin.fingerprint() == extractor.fingerprint()
        assert all(torch.equal(v, before[k]) for k, v in twin(images()).items())
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


def test_two_extractors_on_one_model_do_not_meet() -> None:
    model = seeded(several_in_a_row)
    first, second = FeatureExtractor(model, "0"), FeatureExtractor(model, ["0", "1"], pool="max")
    alone = first(images())["0"], second(images())["0"]
    assert torch.equal(first(images())["0"], alone[0])
    assert torch.equal(second(images())["0"], alone[1])
    assert alone[0].shape == (N, 48)
    assert alone[1].shape == (N, 3)
    assert hooks_of(model) == 0


def test_hooks_of_the_user_are_seen_and_kept() -> None:
    model = seeded(small_cnn)
    handle = model[0].register_forward_hook(lambda _, __, output: output + 1)
    found = FeatureExtractor(model, "0")(images())["0"]
    assert torch.allclose(found, (conv(model[0]) + 1).flatten(1))
    assert hooks_of(model) == 1
    handle.remove()


# -------------------------------------------------------------------------------- pooling, normalising, centering

GRID = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
POOLED: list[tuple[str, Tensor, list[list[float]]]] = [
    ("flatten", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [[1, 2], [3, 4]]),
    ("avg", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [[1, 2], [3, 4]]),
    ("max", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [[1, 2], [3, 4]]),
    ("flatten", GRID, [list(range(12)), list(range(12, 24))]),
    ("avg", GRID, [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]),
    ("max", GRID, [[3, 7, 11], [15, 19, 23]]),
    ("tokens", GRID, [[4, 5, 6, 7], [16, 17, 18, 19]]),
    ("first", GRID, [[0, 1, 2, 3], [12, 13, 14, 15]]),
    ("flatten", GRID.view(2, 3, 2, 2), [list(range(12)), list(range(12, 24))]),
    ("avg", GRID.view(2, 3, 2, 2), [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]),
    ("max", GRID.view(2, 3, 2, 2), [[3, 7, 11], [15, 19, 23]]),
    ("flatten", GRID.view(2, 3, 1, 2, 2), [list(range(12)), list(range(12, 24))]),
    ("avg", GRID.view(2, 3, 1, 2, 2), [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]),
    ("max", GRID.view(2, 3, 1, 2, 2), [[3, 7, 11], [15, 19, 23]]),
]


@pytest.mark.parametrize(("pool", "x", "expected"), POOLED, ids=[f"{p}-{x.ndim}d" for p, x, _ in POOLED])
def test_pooling(pool: str, x: Tensor, expected: list[list[float]]) -> None:
    found = FeatureExtractor(nn.Identity(), pool=pool)(x)["(output)"]
    assert found.tolist() == expected


def test_pooling_by_layer() -> None:
    model = seeded(small_cnn)
    found = FeatureExtractor(model, ["0", "1"], pool={"1": "max"})(images())
    assert torch.equal(found["1"], found["0"].view(N, 3, 16).amax(2).clamp_min(0))


def test_normalising_then_centering_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 0.0]])
    unit = [[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]]
    plain = FeatureExtractor(nn.Identity(), normalize=True)
    assert torch.allclose(plain(x)["(output)"], torch.tensor(unit))
    centered = plain.centered({"(output)": torch.tensor([0.5, -1.0])})
    assert torch.allclose(centered(x)["(output)"], torch.tensor([[0.1, 1.8], [-0.5, 1.0], [-1.5, 1.0]]))
    assert torch.allclose(plain(x)["(output)"], torch.tensor(unit))  # `centered` made another one
    # A zero vector has no direction; its gradient must be a number all the same.
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(plain(x)["(output)"].sum(), x)
    assert bool(gradient.isfinite().all())
    assert torch.allclose(gradient[0], torch.tensor([0.8 * 0.2 / 5, -0.6 * 0.2 / 5]), atol=1e-6)


def test_select_keeps_the_settings_of_each_layer() -> None:
    model = seeded(small_cnn)
    center = {"0": torch.full((3,), 2.0), "3": torch.ones(5)}
    whole = FeatureExtractor(model, ["0", "1", "3"], pool={"0": "avg"}, normalize=True, center=center)
    part = whole.select(["3", "0"])
    assert part.layers == ("3", "0")
    expected = whole(images())
    assert all(torch.equal(value, expected[name]) for name, value in part(images()).items())
    assert whole.select(["2"]).pool == {"2": "flatten"}


# -------------------------------------------------------------------------------------------------- fingerprint


class Buffered(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=stride)
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def test_fingerprint_changes_with_every_weight_buffer_and_setting() -> None:
    same = seeded(Buffered)
    prints = [model_fingerprint(same)]
    names = [*dict(same.named_parameters()), *dict(same.named_buffers())]
    assert "hidden" in names
    assert "hidden" not in same.state_dict()
    for name in names:
        model = seeded(Buffered)
        tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
        with torch.no_grad():  # the least change: one element by one unit, the flag the other way
            tensor.view(-1)[0] = ~tensor.view(-1)[0] if tensor.dtype == torch.bool else tensor.view(-1)[0] + 1
        prints.append(model_fingerprint(model))
    prints += [
        model_fingerprint(seeded(lambda: Buffered(stride=2))),
        model_fingerprint(seeded(Buffered).double()),
        model_fingerprint(nn.Sequential(seeded(Buffered))),
    ]
    assert len(set(prints)) == len(names) + 4


def test_fingerprint_is_the_same_for_what_does_not_decide() -> None:
    model = seeded(Buffered)
    extractor = FeatureExtractor(model, "bn")
    before = extractor.fingerprint()
    model.train()
    torch.set_num_threads(2)
    try:
        extractor(images())
        assert extractor.fingerprint() == before
    finally:
        torch.set_num_threads(1)
    assert FeatureExtractor(model, "conv", pool="avg", normalize=True).fingerprint() == before  # the model's alone
    assert FeatureExtractor(copy.deepcopy(model).eval().to("cpu"), "bn").fingerprint() == before
    assert model_fingerprint(model.to(memory_format=torch.channels_last)) == before  # type: ignore[call-overload]
    model.requires_grad_(False)
    assert model_fingerprint(model) == before


def test_fingerprint_does_not_depend_on_the_script_a_class_was_defined_in() -> None:
    twin = type("Reused", (Reused,), {"__module__": "__main__"})
    assert model_fingerprint(seeded(twin)) == model_fingerprint(seeded(Reused))


def test_preprocessing_names_every_setting() -> None:
    model = seeded(small_cnn)

    def said(**settings: Any) -> dict[str, Any]:
        return FeatureExtractor(model, ["0"], **settings).preprocessing()

    base = said()
    assert base == {"layers": ["0"], "pool": {"0": "flatten"}, "normalize": False, "center": {}}
    changed = [said(pool="avg"), said(normalize=True), said(center={"0": torch.zeros(48)})]
    changed.append(said(center={"0": torch.full((48,), 1e-30)}))
    for place, one in enumerate(changed):
        assert one not in [base, *changed[:place]]


# ------------------------------------------------------------------------------------------- batches are invisible


def odd_widths() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 10), nn.Tanh(), nn.Linear(10, 1)
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 36), nn.BatchNorm1d(36), nn.ReLU(inplace=True), nn.Linear(36, 8))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64, 12),
    )


def depthwise() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 8, 1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def wave() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 8, 5), nn.GELU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(112, 4))


ANY, FOURTH = (0, 1, 37), (0, 4, 36)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "shape", "places"),
    [
        (cnn, (2, 6, 6), ANY),
        (depthwise, (2, 6, 6), ANY),
        (wave, (2, 20), ANY),
        (mlp, (40,), ANY),
        (odd_widths, (3,), FOURTH),
    ],
    ids=["cnn", "depthwise", "wave", "mlp", "odd_widths"],
)
def test_features_and_gradients_do_not_depend_on_the_batch_to_the_last_bit(
    make: Callable[[], nn.Sequential], shape: tuple[int, ...], places: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    torch.manual_seed(3)
    model = make().to(dtype)
    for module in model:  # running statistics that do something
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(100, *shape, dtype=dtype)
    extractor = FeatureExtractor(model, [str(i) for i in range(len(model))])

    def measure(part: Tensor) -> list[Tensor]:
        part = part.clone().requires_grad_()
        found = extractor(part)
        # The objective is elementwise and made of exactly rounded operations, so that only the model is measured.
        (gradient,) = torch.autograd.grad(sum((v * v).sum() for v in found.values()), part)
        with torch.no_grad():
            plain = extractor(part)
        return [*(v.detach() for v in found.values()), *plain.values(), gradient]

    torch.set_num_threads(threads)
    try:
        whole = measure(x)
        for start in places:
            for n in range(1, 21) if start == 0 else (1, 3, 17, 33):
                alone = measure(x[start : start + n])
                for a, w in zip(alone, whole, strict=True):
                    assert torch.equal(a, w[start : start + n]), (n, start)
    finally:
        torch.set_num_threads(1)


def test_the_layout_of_a_batch_in_memory_makes_no_difference() -> None:
    extractor = FeatureExtractor(seeded(cnn), ["1", "6"])
    x = images(5)
    other = x.to(memory_format=torch.channels_last)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    for twin in (other, strided):
        assert all(torch.equal(a, b) for a, b in zip(extractor(x).values(), extractor(twin).values(), strict=True))


def test_padding_is_dropped_from_outputs_of_any_structure() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"a": x, "rest": (x * 2, [x.sum(1)]), "constant": torch.zeros(3), "text": "t"}

    found, output = FeatureExtractor(Many(), "(output)[0]").with_output(vectors(3))
    assert found["(output)[0]"].shape == (3, 4)
    assert output["a"].shape == output["rest"][0].shape == (3, 4)
    assert output["rest"][1][0].shape == (3,)
    assert output["constant"].shape == (3,)
    assert output["text"] == "t"


# -------------------------------------------------------------------------------------------- kinds of models


def test_float64_models_take_and_give_float64() -> None:
    model = seeded(small_cnn).double()
    extractor = FeatureExtractor(model, "0")
    placed = extractor.place(images())
    assert placed.dtype == torch.float64
    found = extractor(placed)["0"]
    assert found.dtype == torch.float64
    assert torch.equal(found, F.conv2d(images().double(), model[0].weight, model[0].bias).flatten(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    extractor = FeatureExtractor(model, normalize=True)
    found = extractor(extractor.place(vectors()))["(output)"]
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(N), atol=1e-6)  # normalised in float32, not before


def test_a_model_without_weights_leaves_inputs_as_they_are() -> None:
    extractor = FeatureExtractor(nn.Flatten())
    assert extractor.device == torch.device("cpu")
    assert extractor.place(images(dtype=torch.float64)).dtype == torch.float64


def test_token_features_of_a_transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(5, 7, 8)
    names = ["layers.0", "layers.1", "layers.1.norm1"]
    expected = copy.deepcopy(model).eval()
    tokens = {"layers.0": expected.layers[0](x), "layers.1": expected(x)}
    for mode in (torch.no_grad, nullcontext):  # without gradients torch takes a path that calls no submodule
        with mode():
            mean = FeatureExtractor(model, names, pool="tokens")(x)
            first = FeatureExtractor(model, names, pool="first")(x)
            for name, value in tokens.items():
                assert torch.allclose(mean[name], value.mean(1), atol=1e-5)
                assert torch.allclose(first[name], value[:, 0], atol=1e-5)
            assert mean["layers.1.norm1"].shape == (5, 8)


def test_a_compiled_model_is_read_inside() -> None:
    plain = seeded(small_cnn)
    compiled = torch.compile(plain, backend="eager")
    compiled(images())  # the compiled code, which knows no hooks, exists already
    extractor = FeatureExtractor(compiled, ["0", "1"])  # type: ignore[arg-type]
    expected = FeatureExtractor(plain, ["0", "1"])
    assert all(torch.equal(v, expected(images())[k]) for k, v in extractor(images()).items())
    assert extractor.fingerprint() == expected.fingerprint()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_gives_its_output_and_refuses_its_layers_in_one_sentence() -> None:
    plain = seeded(small_cnn).train()
    for scripted in (torch.jit.script(plain), torch.jit.trace(plain, images())):
        found = FeatureExtractor(scripted)(images(5))["(output)"]
        assert torch.allclose(found, plain(images(5)), atol=1e-6)
        assert scripted.training
        with pytest.raises(InputError, match="scripted"):
            FeatureExtractor(scripted, "0")


# ------------------------------------------------------------------------------------------------- one sentence


class Odd(nn.Module):
    """Modules that a forward pass does not call, or that give what cannot be a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.scalar = Scalar()
        self.whole = nn.Hardshrink()
        self.rnn = nn.GRU(4, 5)  # (T, N, 4): the samples come second
        self.text = Text()
        self.integer = Integer()
        self.again = self.whole

    def forward(self, x: Tensor) -> Tensor:
        self.scalar(x)
        self.text(x)
        self.integer(x)
        self.rnn(x[None].expand(3, *x.shape))
        return self.again(self.whole(x))


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


class Text(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "nothing"


class Integer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).long()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "unusd"}, "unknown layer 'unusd'; did you mean 'unused'"),
        ({"layers": "qqqqqqqq"}, "unknown layer .*known: .*integer, rnn, scalar"),
        ({"layers": "a::b"}, "cannot be read"),
        ({"layers": []}, "no layer was chosen"),
        ({"layers": 3}, "layers must be a layer's name or a list of names, not 3"),
        ({"layers": [3]}, "a layer is named by text, as in model.named_modules.*, not by 3"),
        ({"layers": ["rnn", "rnn@0"]}, "the same tap twice"),
        ({"layers": "again"}, "'again' is 'whole' under another name; its second call is 'whole@1'"),
        ({"layers": "unused"}, "'unused' was not reached"),
        ({"layers": "whole@2"}, "call 2 of 'whole' was not reached"),
        ({"layers": "scalar"}, r"gives shape \(16,\)"),
        ({"layers": "text"}, "'text' gives a str, not a tensor"),
        ({"layers": "rnn"}, r"gives a tuple, not a tensor; choose one of its items, e.g. 'rnn\[0\]'"),
        ({"layers": "rnn[0]"}, "samples first"),
        ({"layers": "rnn[5]"}, "a tuple with 2 items"),
        ({"layers": "whole[0]"}, "a Tensor without items"),
        ({"layers": "whole:input[1]"}, "receives 1 tensors"),
        ({"layers": "integer"}, "torch.int64"),
        ({"layers": "whole", "pool": "median"}, "pool must be one of"),
        ({"layers": "whole", "pool": {"hole": "avg"}}, "unknown layer in pool: 'hole'; did you mean 'whole'"),
        ({"layers": "whole", "pool": "tokens"}, r"needs \(N, T, D\)"),
        ({"layers": "whole", "pool": "first"}, r"needs \(N, T, D\)"),
        ({"layers": "whole", "center": {"hole": torch.zeros(4)}}, "unknown layer in center"),
        ({"layers": "whole", "center": {"whole": torch.zeros(4, 1)}}, "the center of 'whole' has shape"),
        ({"layers": "whole", "center": {"whole": torch.zeros(1)}}, "has 1 numbers for 4"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        FeatureExtractor(Odd(), **settings)(vectors(3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(4, 2), torch.zeros(3, 5)),
        (nn.Conv2d(3, 2, 3), torch.zeros(3, 1, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(3, 2, 3)),
        (nn.LSTM(3, 2), torch.zeros(3, 2, 2, 2)),
        (nn.Linear(4, 2), torch.zeros(3, 4, dtype=torch.float64)),
        (nn.Unflatten(1, (2, 2)), torch.zeros(3, 5)),
    ],
)
def test_inputs_that_a_model_refuses_are_named_by_shape(model: nn.Module, x: Tensor) -> None:
    for call in (FeatureExtractor(model), FeatureExtractor(model).logits):
        with pytest.raises(InputError, match="cannot run on inputs of shape") as caught:
            call(x)
        assert str(tuple(x.shape)) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module, not function"):
        FeatureExtractor(lambda x: x)  # type: ignore[arg-type]


def test_an_encoder_has_no_class_scores() -> None:
    with pytest.raises(InputError, match="no class scores"):
        FeatureExtractor(nn.Conv2d(2, 3, 3)).logits(images())


def test_statistics_of_the_batch_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(InputError, match="module '1' normalises by the statistics of each batch"):
        FeatureExtractor(model, "0")
    FeatureExtractor(nn.InstanceNorm2d(3))(torch.randn(4, 3, 5, 5))  # of each sample alone: fine
