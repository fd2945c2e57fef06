"""Weights from files: what loads, what is refused, and the published accuracy of the CIFAR networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustknn import models, store
from robustknn.errors import InputError, IntegrityError


class Net(nn.Module):
    """A convolution, batch normalisation and a linear layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 2)


def net(fill: float, width: int = 4) -> Net:
    made = Net(width)
    with torch.no_grad():
        for i, tensor in enumerate(made.state_dict().values()):
            tensor.fill_(fill + i)
    return made


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def _old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


FORMS: list[tuple[str, Any]] = [
    ("plain", lambda s: s),
    ("state_dict", lambda s: {"state_dict": s, "best_prec1": 91.73}),
    ("model", lambda s: {"model": s, "epoch": 3}),
    ("model_state_dict", lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}}),
    ("prefixed", _prefixed),
    ("nested and prefixed", lambda s: {"state_dict": _prefixed(s)}),
    ("compiled", lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}),
]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize(("what", "form"), FORMS, ids=[name for name, _ in FORMS])
def test_pytorch_files_load(tmp_path: Path, what: str, form: Any, suffix: str) -> None:
    source, target = net(1.0), net(50.0)
    path = tmp_path / f"weights{suffix}"
    torch.save(form(dict(source.state_dict())), path)
    models.load_weights(target, path)
    assert same(source, target)


def test_safetensors_load(tmp_path: Path) -> None:
    source, target = net(1.0), net(50.0)
    store.save_tensors(tmp_path / "w.safetensors", _prefixed(dict(source.state_dict())))
    models.load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)


def test_old_files_without_batch_counters_load(tmp_path: Path) -> None:
    source, target = net(1.0), net(50.0)
    torch.save(_old(dict(source.state_dict())), tmp_path / "w.pt")
    models.load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target.conv.weight, source.conv.weight)
    assert torch.equal(target.bn.running_var, source.bn.running_var)


def test_a_model_whose_own_names_carry_the_prefix_loads(tmp_path: Path) -> None:
    source, target = nn.DataParallel(net(1.0)), nn.DataParallel(net(50.0))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    models.load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


class Hostile:
    """A pickle that would make a folder when it is run."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.where),)


def _without(*keys: str) -> Any:
    return lambda folder: torch.save({k: v for k, v in net(1.0).state_dict().items() if k not in keys}, folder / "w.pt")


def _safetensors_cut(folder: Path) -> None:
    path = folder / "w.safetensors"
    store.save_tensors(path, dict(net(1.0).state_dict()))
    path.write_bytes(path.read_bytes()[:-7])


def _pytorch_cut(folder: Path) -> None:
    torch.save(net(1.0).state_dict(), folder / "w.pt")
    (folder / "w.pt").write_bytes((folder / "w.pt").read_bytes()[:600])


BAD: list[tuple[str, Any, str, type[Exception], tuple[str, ...]]] = [
    (
        "lacks",
        _without("conv.weight", "fc.bias"),
        "w.pt",
        IntegrityError,
        ("another architecture than this Net", "it lacks conv.weight, fc.bias"),
    ),
    (
        "lacks many",
        _without("conv.weight", "conv.bias", "bn.weight", "bn.bias", "fc.bias"),
        "w.pt",
        IntegrityError,
        ("conv.weight, conv.bias, bn.weight and 2 more",),
    ),
    (
        "has more",
        lambda f: torch.save({**net(1.0).state_dict(), "head.weight": torch.ones(2)}, f / "w.pt"),
        "w.pt",
        IntegrityError,
        ("it has head.weight that the model does not",),
    ),
    (
        "other shapes",
        lambda f: torch.save(net(1.0, width=6).state_dict(), f / "w.pt"),
        "w.pt",
        IntegrityError,
        ("conv.weight is (6, 1, 3, 3) where the model's is (4, 1, 3, 3)", "and 4 more"),
    ),
    ("a whole module", lambda f: torch.save(net(1.0), f / "w.pt"), "w.pt", IntegrityError, ("state_dict()",)),
    (
        "hostile",
        lambda f: torch.save({"state_dict": Hostile(f / "made")}, f / "w.pt"),
        "w.pt",
        IntegrityError,
        ("weights alone",),
    ),
    ("cut", _pytorch_cut, "w.pt", IntegrityError, ("weights alone",)),
    ("garbage", lambda f: (f / "w.pth").write_bytes(b"garbage"), "w.pth", IntegrityError, ("weights alone",)),
    ("empty", lambda f: (f / "w.th").write_bytes(b""), "w.th", IntegrityError, ("weights alone",)),
    ("a number", lambda f: torch.save(3, f / "w.pt"), "w.pt", IntegrityError, ("no state dict",)),
    ("no tensors", lambda f: torch.save({"lr": 0.1}, f / "w.pt"), "w.pt", IntegrityError, ("no state dict",)),
    ("nothing in it", lambda f: torch.save({}, f / "w.pt"), "w.pt", IntegrityError, ("no state dict",)),
    ("safetensors cut", _safetensors_cut, "w.safetensors", IntegrityError, ("not a whole safetensors",)),
    ("missing", lambda f: None, "w.pt", InputError, ("does not exist",)),
    ("other suffix", lambda f: (f / "w.bin").write_bytes(b"x"), "w.bin", InputError, ("no weights file",)),
    ("empty folder", lambda f: (f / "run").mkdir(), "run", InputError, ("holds no checkpoint",)),
    ("no folder", lambda f: None, "run/best", InputError, ("holds no checkpoint",)),
]


@pytest.mark.parametrize(("what", "write", "name", "kind", "parts"), BAD, ids=[row[0] for row in BAD])
def test_bad_weights_are_refused_in_one_sentence(
    tmp_path: Path, what: str, write: Any, name: str, kind: type[Exception], parts: tuple[str, ...]
) -> None:
    write(tmp_path)
    target, untouched = net(50.0), net(50.0)
    with pytest.raises(kind) as caught:
        models.load_weights(target, tmp_path / name)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert same(target, untouched)
    assert not (tmp_path / "made").exists()


def test_load_model_takes_a_checkpoint(tmp_path: Path) -> None:
    source = models.create("digits-cnn", n_classes=3)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    assert same(models.load_model("digits-cnn", tmp_path / "w.pt", n_classes=3), source)
    with pytest.raises(IntegrityError, match="another architecture than this LeNet5"):
        models.load_model("lenet5", tmp_path / "w.pt")


# ------------------------------------------------------------------------------- published networks


def _right(model: nn.Module, split: Any, n: int) -> int:
    model.eval()
    right = 0
    with torch.no_grad():
        for positions in torch.arange(n).split(500):
            right += int((model(split.batch(positions)).argmax(1) == split.labels[positions]).sum())
    return right


def _cifar(root: Path) -> Any:
    from robustknn import datasets

    return datasets.load("cifar10", root=root)


@pytest.mark.data
def test_resnet20_reads_its_published_weights(data_root: Path, cifar_root: Path) -> None:
    model = models.load_model("resnet20", data_root / "models" / "resnet20-12fca82f.th")
    assert abs(_right(model, _cifar(cifar_root).test, 2000) - 1833) <= 2


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "published"),
    [
        ("resnet20", "resnet20-12fca82f.th", 91.73),
        ("resnet32", "resnet32-d509ac18.th", 92.63),
        ("resnet44", "resnet44-014dd654.th", 93.10),
    ],
)
def test_published_accuracy_on_all_of_cifar10(
    data_root: Path, cifar_root: Path, name: str, file: str, published: float
) -> None:
    model = models.load_model(name, data_root / "models" / file)
    assert _right(model, _cifar(cifar_root).test, 10_000) / 100 == pytest.approx(published, abs=0.1)
