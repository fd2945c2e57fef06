"""One perturbation that fools several classifiers, and examples made on one scored on others."""

from __future__ import annotations

import pytest
import torch
from small import random_classifier, random_net

from robustknn import KNN, PGD, InputError, ThreatModel
from robustknn.attacks import FGSM
from robustknn.classifiers import Joint, Network, Rejecting, margin
from robustknn.evaluation import transferability
from robustknn.objectives import CrossEntropy


def _members(seed: int = 0):  # type: ignore[no-untyped-def]
    dknn, x, y = random_classifier(k=5, seed=seed)
    knn = KNN(dknn.references_, 7, layer="3", metric="cosine")
    return {"knn": knn, "dknn": dknn}, x, y


def test_success_is_that_all_members_are_fooled() -> None:
    members, x, y = _members()
    joint = Joint(members)
    threat = ThreatModel("l2", 0.25)
    result = PGD(steps=20)(joint, x, y, threat)
    fooled = [margin(m.scores(result.x_adv), y) < -1e-6 for m in members.values()]
    assert torch.equal(result.success, fooled[0] & fooled[1])
    assert 0 < int(result.success.sum()) < len(x)
    target = (y + 1) % 4
    aimed = PGD(steps=20)(joint, x, y, threat, targets=target)
    reached = [margin(m.scores(aimed.x_adv), target) > 1e-6 for m in members.values()]
    assert torch.equal(aimed.success, reached[0] & reached[1])


def test_scores_are_the_widest_margins_of_the_members() -> None:
    members, x, _ = _members(1)
    scores = Joint(members).scores(x)
    for i in range(len(x)):
        for c in range(4):
            each = [m.scores(x)[i] for m in members.values()]
            widest = max(float(s[c] - torch.cat([s[:c], s[c + 1 :]]).max()) for s in each)
            assert float(scores[i, c]) == pytest.approx(widest, abs=1e-12)


def test_joint_needs_members_over_one_reference_set() -> None:
    members, _, _ = _members()
    other, _, _ = random_classifier(seed=3)
    with pytest.raises(InputError, match="two"):
        Joint({"knn": members["knn"]})
    with pytest.raises(InputError, match="one reference set"):
        Joint({"knn": members["knn"], "other": other})
    rejecting = Rejecting(members["dknn"].calibrate(torch.rand(9, 6, dtype=torch.float64), torch.arange(9) % 4), 0.5)
    for odd in (rejecting, Joint(members)):  # a decision of its own, which the votes do not tell
        with pytest.raises(InputError, match="inside it"):
            Joint({"knn": members["knn"], "odd": odd})
    with pytest.raises(InputError, match="voters"):
        Joint({"knn": members["knn"], "net": Network(random_net(), 4)})  # type: ignore[dict-item]


def test_the_network_itself_is_a_classifier() -> None:
    net = random_net()
    network = Network(net, 4)
    x = torch.rand(20, 6, dtype=torch.float64)
    y = net(x).argmax(1)
    assert torch.equal(network.labels(x), y)
    assert torch.allclose(network.scores(x), torch.softmax(net(x).double(), 1))
    result = PGD(objective=CrossEntropy())(network, x, y, ThreatModel("l2", 1.0))
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != y)
    assert bool(result.success.any())
    with pytest.raises(InputError, match="match them"):
        Network(net, 5).scores(x)


def test_the_transfer_matrix_by_hand() -> None:
    members, x, y = _members()
    threat = ThreatModel("linf", 0.1)
    scored = {**members, "net": Network(random_net(), 4)}
    attacks = {"knn": PGD(steps=5), "dknn": FGSM()}
    matrix = transferability(members, x, y, attacks, threat, targets=scored, batch_size=5, seed=3)
    assert matrix.sources == ("clean", "knn", "dknn")
    assert matrix.targets == ("knn", "dknn", "net")
    made = [x, *(attacks[n](m, x, y, threat, seed=3).x_adv for n, m in members.items())]
    for row, examples in zip(matrix.accuracy, made, strict=True):
        assert row == pytest.approx([float((c.labels(examples) == y).double().mean()) for c in scored.values()])
    assert matrix.to_markdown().splitlines()[2].startswith("| clean | ")
    assert matrix.to_config()["n"] == len(x)


def test_a_transfer_matrix_says_what_is_missing() -> None:
    members, x, y = _members()
    threat = ThreatModel("linf", 0.1)
    with pytest.raises(InputError, match="by name"):
        transferability({}, x, y, PGD(), threat)
    with pytest.raises(InputError, match="attack on 'dknn'"):
        transferability(members, x, y, {"knn": PGD()}, threat)
    with pytest.raises(InputError, match="classifier 'n'"):
        transferability(members, x, y, PGD(), threat, targets={"n": object()})  # type: ignore[dict-item]
