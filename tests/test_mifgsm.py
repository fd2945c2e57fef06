"""MI-FGSM against a loop written out by hand."""

from __future__ import annotations

import pytest
import torch
from small import random_classifier
from torch import Tensor, nn

from robustknn import InputError, ThreatModel
from robustknn.attacks import BIM, MIFGSM, PGD
from robustknn.objectives import CrossEntropy

EPS = {"linf": 0.2, "l2": 0.6, "l1": 3.0}


def by_hand(x: Tensor, y: Tensor, network: nn.Module, norm: str, eps: float, steps: int, decay: float) -> Tensor:
    """Dong et al., algorithm 1 (eqs. 6, 7, 9), without a box; L1 moves the one largest coordinate."""
    found = []
    for start, label in zip(x, y, strict=True):
        z, g = start.clone(), torch.zeros_like(start)
        for _ in range(steps):
            leaf = z.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(network(leaf[None]), label[None]), leaf)
            g = decay * g + gradient / gradient.abs().sum()
            if norm == "linf":
                z = start + (z + eps / steps * g.sign() - start).clamp(-eps, eps)
            elif norm == "l2":
                delta = z + eps / steps * g / g.norm() - start
                z = start + delta * min(1.0, eps / float(delta.norm()))
            else:
                z = z.clone()
                z[g.abs().argmax()] += eps / steps * g[g.abs().argmax()].sign()  # steps · eps/steps: never outside
        found.append(z)
    return torch.stack(found)


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("norm", EPS)
def test_it_equals_its_equations(norm: str, decay: float) -> None:
    classifier, x, y = random_classifier()
    assert classifier.extractor is not None
    attack = MIFGSM(CrossEntropy(), steps=6, accumulate=decay)
    found = attack(classifier, x, y, ThreatModel(norm, EPS[norm], bounds=None)).x_adv
    expected = by_hand(x, y, classifier.extractor.model, norm, EPS[norm], 6, decay)
    assert torch.allclose(found, expected, atol=1e-9)
    if norm != "l1":  # where the same coordinate may stay the largest in every step
        without = BIM(CrossEntropy(), steps=6, step=1 / 6)(classifier, x, y, ThreatModel(norm, EPS[norm], bounds=None))
        assert not torch.allclose(found, without.x_adv, atol=1e-6)


def test_without_accumulation_it_is_bim() -> None:
    classifier, x, y = random_classifier()
    threat = ThreatModel("l2", 0.2)
    bim = BIM(steps=5, step=0.2)(classifier, x, y, threat)
    assert torch.equal(MIFGSM(steps=5, accumulate=0.0)(classifier, x, y, threat).x_adv, bim.x_adv)


@pytest.mark.parametrize("norm", EPS)
def test_promises(norm: str) -> None:
    classifier, x, y = random_classifier()
    attack = MIFGSM(steps=6, keep="best", check_every=2)
    eps = torch.linspace(0, EPS[norm], len(x))
    threat = ThreatModel(norm, eps)
    whole = attack(classifier, x, y, threat)
    assert bool((threat.distance(whole.x_adv, x) <= eps * (1 + 1e-6)).all())
    assert torch.equal(whole.x_adv[0], x[0])
    assert torch.equal(whole.x_adv, attack(classifier, x, y, threat, seed=5).x_adv)  # no randomness
    for size in (1, 7):
        assert torch.equal(attack(classifier, x, y, threat, batch_size=size).x_adv, whole.x_adv)
    assert bool((whole.gradient_passes[~whole.success] == 6).all())


def test_targets_are_approached() -> None:
    classifier, x, y = random_classifier(k=1)
    target = (y + 1) % 4
    result = MIFGSM(steps=20, keep="best")(classifier, x, y, ThreatModel("linf", 0.5), targets=target)
    assert float(result.success.double().mean()) > 0.5
    assert bool((result.labels[result.success] == target[result.success]).all())


def test_bad_settings_are_refused() -> None:
    for value in (-1.0, float("inf"), "a", True):
        with pytest.raises(InputError, match="accumulate must be a number of at least 0 and finite"):
            PGD(accumulate=value)  # type: ignore[arg-type]
