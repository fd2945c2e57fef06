"""Adversarial training (Madry et al.), its one-step form (Wong et al.) and TRADES (Zhang et al.)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import check_choice, check_number, check_positive
from robustknn.features import evaluating
from robustknn.training.inner import PerturbedMethod
from robustknn.training.methods import Batch

cross_entropy = nn.functional.cross_entropy


@registry.methods.register("adversarial")
@dataclass(frozen=True)
class Adversarial(PerturbedMethod):
    """Cross-entropy on examples of PGD (Madry et al., arXiv 1706.06083, equation 2.1).

    Args:
        norm, eps, bounds, steps, step, start, warmup: see `PerturbedMethod`.
        clean: the weight of the cross-entropy of the samples as they are; the examples have one minus it.
    """

    name: ClassVar[str] = "adversarial"

    clean: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.clean, "clean", "in [0, 1)", lambda w: 0 <= w < 1)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        moved = self.fooling(model, batch)
        if not self.clean:
            return {"adversarial": cross_entropy(model(moved), batch.y)}
        # In one pass, so that batch normalisation sees both.
        clean, adversarial = model(torch.cat([batch.x, moved])).chunk(2)
        return {
            "clean": self.clean * cross_entropy(clean, batch.y),
            "adversarial": (1 - self.clean) * cross_entropy(adversarial, batch.y),
        }


@registry.methods.register("fast")
def fast(norm: str = "linf", eps: float = 8 / 255, **further: Any) -> Adversarial:
    """Adversarial training with one step of 1.25 eps from a random start (Wong et al., arXiv 2001.03994).

    Watch the robust validation accuracy: the one-step form can collapse within an epoch, to 0 against many steps.
    """
    return Adversarial(**{"steps": 1, "step": 1.25 * eps, "start": "random", **further, "norm": norm, "eps": eps})


@registry.methods.register("trades")
@dataclass(frozen=True)
class TRADES(PerturbedMethod):
    """CE(f(x), y) + β max_x' KL(f(x) ‖ f(x')) (Zhang et al., arXiv 1901.08573, equation 5).

    Args:
        norm, eps, bounds, steps, step, start, warmup: see `PerturbedMethod`; the start is not "clean", where the
            divergence has no gradient.
        beta: β, the paper's 1/λ.
    """

    name: ClassVar[str] = "trades"

    start: str = "noise"
    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.start, ("random", "noise"), "start")
        check_positive(self.beta, "beta")

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        with torch.no_grad(), evaluating(model):
            held = log_softmax(model(batch.x))
        moved = self.perturb(model, lambda x: divergence(held, model(x)).sum(), batch)
        clean, adversarial = model(torch.cat([batch.x, moved])).chunk(2)
        return {
            "clean": cross_entropy(clean, batch.y),
            "divergence": self.beta * divergence(log_softmax(clean), adversarial).mean(),
        }


def divergence(log_p: Tensor, scores: Tensor) -> Tensor:
    """KL(p ‖ softmax(scores)) of each row, (B,), from log p (B, C)."""
    found = nn.functional.kl_div(log_softmax(scores), log_p, reduction="none", log_target=True)
    return found.sum(1)


def log_softmax(scores: Tensor) -> Tensor:
    """In float32 or wider: in half precision the divergence of near-equal predictions is mere rounding."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(1)
