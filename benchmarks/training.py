"""What training costs beside a bare torch loop that makes the same forward and backward passes."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import Figure, Result
from benchmarks.timing import against
from robustknn.models import MnistCNN
from robustknn.training import Adversarial, ASKDef, TrainConfig, initialise, train

EPS, STEPS, PER_CLASS = 0.1, 10, 5
LAYER = MnistCNN.feature_layers[2]
ADVERSARIAL, ASK_DEF = 1.1, 1.15
WHAT = (
    "An epoch of the MNIST CNN on random images (batches of 128, ten inner steps, Adam), in units of a bare torch loop "
    "over the same batches that makes the same passes: its losses are cross-entropies alone."
)


@dataclass
class Images:
    """Random images in ten classes, as a split."""

    data: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, positions: Tensor) -> Tensor:
        return self.data[positions]


def climb(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Inner steps as one writes them."""
    net.eval()
    moved = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        moved = moved.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(moved), y), moved)
        moved = moved.detach() + 2.5 * EPS / STEPS * gradient.sign()
        moved = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    net.train()
    return moved


def bare(split: Images, ask: bool) -> None:
    """Adversarial training; with `ask` also the passes of ASK-Def."""
    net = initialise(MnistCNN, 0).train()
    rule = torch.optim.Adam(net.parameters(), 1e-3)
    for positions in torch.randperm(len(split)).split(128):
        x, y = split.data[positions], split.labels[positions]
        seen, labels = [climb(net, x, y)], [y]
        if ask:
            rows = torch.cat([(split.labels == c).nonzero()[:PER_CLASS, 0] for c in range(10)])
            references, theirs = split.data[rows], split.labels[rows]
            copies = climb(net, references, theirs)
            with torch.no_grad():
                net(torch.cat([references, copies]))
            seen += [climb(net, x, y), references, copies]
            labels += [y, theirs, theirs]
        rule.zero_grad()
        nn.functional.cross_entropy(net(torch.cat(seen)), torch.cat(labels)).backward()
        rule.step()


def run(quick: bool) -> Result:
    """Time one epoch of each."""
    n, repeats = (128, 1) if quick else (1024, 5)
    generator = torch.Generator().manual_seed(0)
    split = Images(torch.rand(n, 1, 28, 28, generator=generator), torch.arange(n) % 10)
    data: Any = SimpleNamespace(train=split, validation=None)
    config = TrainConfig(epochs=1, batch_size=128)

    def ours(method: Adversarial | ASKDef) -> None:
        train(initialise(MnistCNN, 0), data, config, method=method)

    plain = Adversarial(eps=EPS, steps=STEPS)
    ask = ASKDef(eps=EPS, steps=STEPS, ask_eps=EPS, layers=(LAYER,), n_references=PER_CLASS)
    first = against(lambda: bare(split, ask=False), {"a": lambda: ours(plain)}, repeats)["a"]
    second = against(lambda: bare(split, ask=True), {"a": lambda: ours(ask)}, repeats)["a"]
    third = against(lambda: ours(plain), {"a": lambda: ours(ask)}, max(1, repeats // 2))["a"]
    figures = [
        Figure.of("adversarial training", first, ADVERSARIAL),
        Figure.of("ASK-Def", second, ASK_DEF),
        Figure.of("ASK-Def beside adversarial training", third),
    ]
    return Result(WHAT, repeats, figures, {"samples": n, "inner steps": STEPS})
