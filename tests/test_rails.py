"""RAILS: each of its steps against a plain loop, what its draws depend on, and attacks that know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import random_net
from torch import Tensor, nn

from robustknn import (
    PGD,
    DkNN,
    FeatureExtractor,
    InputError,
    IntegrityError,
    Options,
    ReferenceSet,
    ResumeError,
    ThreatModel,
    evaluate,
    finish,
    registry,
    rng,
)
from robustknn.attacks import Attack
from robustknn.classifiers import KNN, RAILS, TIE
from robustknn.classifiers.rails import Population
from robustknn.evaluation import transferability
from robustknn.objectives import ASK, Evolved, KNNStage

SMALL: dict[str, Any] = {"population": 40, "generations": 2, "n_neighbors": 3, "plasma": 0.2}


def references(n: int = 60, layers: tuple[str, ...] = ("1", "3"), n_classes: int = 4, images: bool = True) -> Any:
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = FeatureExtractor(random_net(), layers)
    return ReferenceSet.build(features, (x, torch.arange(n) % n_classes), keep_images=images)


def inputs(n: int = 10) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return x, torch.arange(n) % 4


@pytest.fixture(scope="module")
def rails() -> RAILS:
    return RAILS(references(), **SMALL)


# ----------------------------------------------------------------------------------------- its steps


def evolved(rails: RAILS, x: Tensor, ids: Tensor, draws: int | None = None) -> list[list[Population]]:
    """The last generation of every input by itself, layer by layer, the draws of each in order."""
    found: list[list[Population]] = [[] for _ in range(len(x))]
    for p in rails.evolve(x, ids, draws):
        for at, row in enumerate(p.rows.tolist()):
            assert p.draw == len(found[row]) % (rails.draws if draws is None else draws)
            found[row].append(Population(p.rows[at], p.layer, p.draw, p.images[at], p.features[at], p.distances[at]))
    return found


def feature(x: Tensor, layer: str) -> Tensor:
    net = random_net()
    return net[: int(layer) + 1](x)


@torch.no_grad()
def plain(rails: RAILS, x: Tensor, sample_id: int, place: int, draw: int = 0) -> tuple[Tensor, Tensor]:
    """Candidates (C, P, 6) and distances (C, P) by the paper's steps, one gene and one candidate at a time."""
    layer, each, n_classes = rails.layers[place], rails.per_class, rails.n_classes
    images, labels = rails.references.image(torch.arange(len(rails.references))), rails.references.labels
    z = feature(x, layer)
    all_distances = (feature(images, layer) - z).norm(dim=1)
    low = rails.mutation_range[0]
    size, chance = rails.mutation_range[1], rails.mutation_probability[1]

    def genes(generation: int) -> Tensor:
        ids, tags = torch.tensor([sample_id]), ("rails", place, draw, generation, "genes")
        return rng.bits(ids, n_classes * each * 6, rails.seed, *tags)[0].view(n_classes, each, 6)

    def part(bits: int, shift: int, width: int) -> float:
        return ((bits >> shift) % 2**width) / 2**width

    def mutate(value: float, bits: int) -> float:
        if part(bits, 20, 20) >= chance:
            return value
        u = part(bits, 40, 24)
        change = low + (size - low) * (2 * u - 1) if u >= 0.5 else -(low + (size - low) * 2 * u)
        return min(max(value + change, 0.0), 1.0)

    flock = [
        sorted((i for i in range(len(labels)) if labels[i] == c), key=lambda i: float(all_distances[i]))
        for c in range(n_classes)
    ]
    flock = [ids[: rails.n_neighbors] for ids in flock]
    mean = sum(float(all_distances[i]) for ids in flock for i in ids) / sum(map(len, flock))
    temperature = mean / 20 if rails.temperature is None else rails.temperature[place]
    bits = genes(0)
    now = torch.stack(
        [
            torch.stack(
                [
                    torch.tensor(
                        [mutate(float(images[flock[c][p % len(flock[c])]][g]), int(bits[c, p, g])) for g in range(6)],
                        dtype=torch.float64,
                    )
                    for p in range(each)
                ]
            )
            for c in range(n_classes)
        ]
    )
    distances = (feature(now, layer) - z).norm(dim=2)
    best = -float("inf")
    for generation in range(1, rails.generations[place] + 1):
        tags = ("rails", place, draw, generation, "parents")
        u = rng.uniform(torch.tensor([sample_id]), (n_classes, 2 * each), rails.seed, *tags, dtype=torch.float64)[0]
        bits, children = genes(generation), torch.empty_like(now)
        for c in range(n_classes):
            odds = torch.exp(-(distances[c] - distances[c].min()) / temperature)
            odds = (odds / odds.sum()).cumsum(0)
            for p in range(each):
                first, second = (int((odds <= float(u[c, q]) * float(odds[-1])).sum()) for q in (p, each + p))
                d1, d2 = float(distances[c, first]), float(distances[c, second])
                for g in range(6):
                    raw = int(bits[c, p, g])
                    parent = first if part(raw, 0, 20) < d2 / (d1 + d2) else second
                    children[c, p, g] = mutate(float(now[c, parent, g]), raw)
        now = children
        distances = (feature(now, layer) - z).norm(dim=2)
        affinity = -float(distances.sum())
        if affinity < best:
            size = max(rails.mutation_range[0], size * rails.decay)
            chance = max(rails.mutation_probability[0], chance * rails.decay)
        best = max(best, affinity)
    return now, distances


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"generations": 6, "mutation_range": (0.01, 0.4), "mutation_probability": (0.2, 0.9), "temperature": 0.3},
        {"generations": (0, 3), "n_neighbors": 20},
    ],
    ids=["default", "plateaus", "by layer"],
)
def test_evolution_is_that_of_a_plain_loop(options: dict[str, Any]) -> None:
    rails = RAILS(references(), **{**SMALL, **options}, seed=3)
    x, _ = inputs(2)
    found = evolved(rails, x, torch.tensor([7, 9]), draws=2)
    for row, sample_id in ((0, 7), (1, 9)):
        for place in range(2):
            for draw in range(2):
                images, distances = plain(rails, x[row], sample_id, place, draw)
                population = found[row][2 * place + draw]
                assert torch.allclose(population.images, images, rtol=0, atol=1e-12)
                assert torch.allclose(population.distances, distances)
                assert torch.allclose(population.features, feature(images, rails.layers[place]))


def test_the_nearest_candidates_of_all_layers_and_draws_vote() -> None:
    rails = RAILS(references(), **SMALL, draws=3, seed=1)
    assert (rails.per_class, rails.voting) == (10, 8)
    x, _ = inputs(3)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row, populations in enumerate(evolved(rails, x, torch.arange(3))):
        assert len(populations) == 6
        for population in populations:
            pairs = sorted((float(population.distances[c, p]), c) for c in range(4) for p in range(10))
            for _, label in pairs[:8]:
                expected[row, label] += 1 / (8 * 6)
    scores = rails.scores(x)
    assert torch.allclose(scores, expected)
    assert torch.allclose(scores.sum(1), torch.ones(3, dtype=torch.float64))


def test_mutations_are_as_often_and_as_large_as_they_should_be() -> None:
    x = torch.full((8, 6), 0.5, dtype=torch.float64)
    made = ReferenceSet.build(FeatureExtractor(random_net(), ["3"]), (x, torch.arange(8) % 4), keep_images=True)
    options = {"population": 4000, "generations": 0, "n_neighbors": 1, "mutation_probability": (0.1, 0.3)}
    rails = RAILS(made, **options, mutation_range=(0.1, 0.2))
    (population,) = evolved(rails, x[:1], torch.tensor([0]))[0]
    change = (population.images - 0.5).flatten()
    changed = change[change != 0]
    n = change.numel()
    assert abs(len(changed) / n - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
    assert float(changed.abs().min()) >= 0.1 - 1e-12
    assert float(changed.abs().max()) <= 0.2 + 1e-12
    assert abs(float(changed.abs().mean()) - 0.15) < 4 * 0.1 / (12 * len(changed)) ** 0.5
    assert abs(float((changed > 0).double().mean()) - 0.5) < 4 * 0.5 / len(changed) ** 0.5


def test_nothing_mutates_without_probability_and_clones_stay_clones() -> None:
    rails = RAILS(references(), **{**SMALL, "generations": 0}, mutation_probability=0.0)
    x, _ = inputs(1)
    (first, second) = evolved(rails, x, torch.tensor([0]))[0]
    near = rails.stage.voters[0].index.search_classes(feature(x, "1"), 3).ids[0]
    for c in range(4):
        for p in range(10):
            assert torch.equal(first.images[c, p], rails.references.image(near[c, p % 3]))
    assert first.images.shape == second.images.shape == (4, 10, 6)


def test_a_class_with_few_references_breeds_as_many_candidates() -> None:
    x = torch.rand(22, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.tensor([0] * 10 + [1] * 11 + [2])
    made = ReferenceSet.build(FeatureExtractor(random_net(), ["3"]), (x, labels), keep_images=True)
    rails = RAILS(made, population=30, n_neighbors=5, generations=0, mutation_probability=0.0)
    (population,) = evolved(rails, x[:1], torch.tensor([0]))[0]
    assert population.images.shape == (3, 10, 6)
    assert torch.equal(population.images[2], x[21].expand(10, 6))


def test_evolution_comes_nearer() -> None:
    made = references(layers=("3",))
    x, _ = inputs()
    before, after = (
        torch.stack(
            [p[0].distances.mean() for p in evolved(RAILS(made, population=200, generations=g), x, torch.arange(10))]
        )
        for g in (0, 8)
    )
    assert bool((after < before).all())


def test_bounds_hold_and_may_be_missing() -> None:
    x, _ = inputs(2)
    for bounds, inside in (((0.2, 0.7), True), (None, False)):
        wild = RAILS(references(), **SMALL, bounds=bounds, mutation_range=(0.5, 0.9))
        images = torch.stack([p.images for each in evolved(wild, x, torch.arange(2)) for p in each])
        assert (float(images.min()) >= 0.2 and float(images.max()) <= 0.7) is inside


# --------------------------------------------------------------------------------------- randomness


def test_a_sample_gets_its_draw_in_every_batch(rails: RAILS) -> None:
    x, _ = inputs()
    ids = torch.tensor([5, 3, 3, 11, 0, 1, 2, 40, 41, 42])
    scores = rails.scores(x, ids)
    order = torch.tensor([9, 0, 4, 1, 2, 3, 5, 8, 7, 6])
    assert torch.equal(rails.scores(x[order], ids[order]), scores[order])
    assert torch.equal(torch.cat([rails.scores(x[i : i + 1], ids[i : i + 1]) for i in range(10)]), scores)
    assert torch.equal(rails.scores(x), rails.scores(x, torch.arange(10)))
    torch.manual_seed(1)
    assert torch.equal(rails.scores(x, ids), scores)
    assert not torch.equal(rails.scores(x, ids + 100), scores)
    assert not torch.equal(rails.with_seed(1).scores(x, ids), scores)
    assert rails.seed == 0


def test_copies_that_fill_a_batch_cost_nothing(rails: RAILS, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = inputs(3)
    ids = torch.tensor([4, 5, 6])
    expected = rails.scores(x, ids)
    seen = []
    evolve = RAILS.evolve

    def counting(self: RAILS, x: Tensor, ids: Tensor, draws: int | None = None) -> Any:
        seen.append(len(x))
        return evolve(self, x, ids, draws)

    monkeypatch.setattr(RAILS, "evolve", counting)
    rows = torch.tensor([0, 1, 2] + [0] * 13)
    assert torch.equal(rails.scores(x[rows], ids[rows]), expected[rows])
    assert seen == [3]
    rails.scores(x[[0, 0, 0]], ids)  # the same input under another id is another draw
    assert seen == [3, 3]


def test_scores_over_many_draws_are_their_mean(rails: RAILS) -> None:
    x, _ = inputs(2)
    many = RAILS(references(), **SMALL, draws=4)
    populations = evolved(many, x, torch.arange(2))
    first = [[p for i, p in enumerate(each) if i % 4 == 0] for each in populations]
    alone = evolved(rails, x, torch.arange(2))
    for mine, single in zip(first, alone, strict=True):
        assert all(torch.equal(a.images, b.images) for a, b in zip(mine, single, strict=True))
    assert not torch.equal(many.scores(x), rails.scores(x))


def test_the_share_of_fresh_draws_that_are_fooled(rails: RAILS) -> None:
    x, _ = inputs(4)
    y = rails.labels(x)
    expected = torch.zeros(4, dtype=torch.float64)
    seeds = [rng.derive(0, "fresh", 1, draw) for draw in range(5)]
    assert rails.seed not in seeds
    for seed in seeds:
        scores = rails.with_seed(seed).scores(x)
        for i in range(4):
            others = torch.cat([scores[i, : y[i]], scores[i, y[i] + 1 :]])
            expected[i] += float(scores[i, y[i]] - others.max()) < -TIE
    found = rails.fooled(x, y, draws=5)
    assert torch.allclose(found, expected / 5)
    assert not torch.equal(rails.fooled(x, (y + 1) % 4, draws=2), found)


# ------------------------------------------------------------------------------------------- attacks


def test_the_knn_stage_is_the_vote_of_the_unevolved_flock() -> None:
    made = references(layers=("3",))
    rails = RAILS(made, population=80, n_neighbors=10, plasma=0.125, generations=0, mutation_probability=0.0)
    stage = rails.knn_stage()
    assert isinstance(stage, DkNN)
    assert stage.n_neighbors == 5
    x, _ = inputs()
    # two clones of each of the 40 flocked references; ten of these vote: the five nearest references, twice
    assert torch.allclose(rails.scores(x), stage.scores(x))
    assert torch.equal(rails.labels(x), KNN(made, 5, layer="3").labels(x))


def test_attacks_without_a_gradient_and_transfer_work(rails: RAILS) -> None:
    x, _ = inputs()
    y = rails.labels(x)
    threat = ThreatModel("linf", 0.2)
    square: Attack = registry.attacks.create("square", queries=15)
    found = square(rails, x, y, threat)
    assert torch.equal(found.labels, rails.labels(found.x_adv))
    assert bool(found.success.any())
    matrix = transferability({"stage": rails.knn_stage()}, x, y, PGD(steps=4), threat, targets={"rails": rails})
    assert matrix.accuracy[0][0] == 1
    assert matrix.accuracy[1][0] < 1
    with pytest.raises(InputError, match="knn-stage or evolved"):
        PGD(objective=ASK())(rails, x, y, threat)


@pytest.mark.parametrize("flock", [0.0, 0.3, 1.0])
def test_the_evolved_objective_is_its_formula_with_its_gradient(rails: RAILS, flock: float) -> None:
    x, y = inputs(4)
    config = Evolved(draws=2, flock=flock, seed=6)
    count = rails.voting // 2 + 1
    own_draws = rails.with_seed(rng.derive(6, "evolved", 0))
    populations = evolved(own_draws, x, torch.zeros(4, dtype=torch.int64), 2)
    images, labels = rails.references.image(torch.arange(60)), rails.references.labels
    moved = x + 0.01

    def rms(z: Tensor, rows: Tensor) -> Tensor:
        return (z - rows).square().sum(1).mean().sqrt()

    def by_hand(at: Tensor, row: int) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)
        for place, layer in enumerate(rails.layers):
            z, means = feature(at, layer), []
            for p in populations[row][2 * place : 2 * place + 2]:
                near = [p.features[c][p.distances[c].argsort()[:count]] for c in range(4)]
                means.append(torch.stack([rms(z, rows.detach()) for rows in near]))
            mean = torch.stack(means).mean(0)
            rows = feature(images, layer).detach()
            far = (rows - feature(x[row], layer)).norm(dim=1)
            near = [rows[labels == c][far[labels == c].argsort()[:3]] for c in range(4)]
            before = torch.stack([rms(z, each) for each in near])
            total = total + (1 - flock) * mean / mean.detach().mean() + flock * before / before.detach().mean()
        others = torch.cat([total[: y[row]], total[y[row] + 1 :]])
        return total[y[row]] + 0.05 * torch.logsumexp(-others / 0.05, 0)

    batch = config.bind(rails).start(x, y, None, None)
    batch.loss(x)  # evolves for x, then holds the candidates
    leaf = moved.clone().requires_grad_(True)
    loss = batch.loss(leaf)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    for row in range(4):
        own = moved[row].clone().requires_grad_(True)
        expected = by_hand(own, row)
        (slope,) = torch.autograd.grad(expected, own)
        assert torch.allclose(loss[row], expected)
        assert torch.allclose(gradient[row], slope)
    aimed = config.bind(rails).start(x, y, (y + 1) % 4, None)
    toward = config.bind(rails).start(x, (y + 1) % 4, None, None)
    assert torch.allclose(aimed.loss(x), -toward.loss(x))


def test_the_candidates_evolve_anew_at_every_check(rails: RAILS) -> None:
    x, y = inputs(4)
    batch = Evolved().bind(rails).start(x, y, None, None)
    first = batch.loss(x)
    assert torch.equal(batch.loss(x), first)
    kept = torch.tensor([2, 0])
    batch.update(kept, None)
    again = batch.loss(x[kept])
    assert again.shape == (2,)
    assert not torch.allclose(again, first[kept])


def test_the_evolved_attack_beats_chance_and_keeps_the_draws_of_its_own(rails: RAILS) -> None:
    x, _ = inputs()
    y = rails.labels(x)
    threat = ThreatModel("linf", 0.1)
    found = PGD(objective=Evolved(), steps=6, check_every=3)(rails, x, y, threat)
    assert torch.equal(found.labels, rails.labels(found.x_adv))
    corner = x + 0.1 * rng.uniform(torch.arange(10), (6,), 0, "signs", dtype=torch.float64).sub(0.5).sign()
    assert float(rails.fooled(found.x_adv, y, draws=4).mean()) > float(
        rails.fooled(corner.clamp(0, 1), y, draws=4).mean()
    )
    assert float(threat.distance(found.x_adv, x).max()) <= 0.1 * (1 + 1e-6)


def test_the_objective_on_the_knn_stage_is_that_on_its_neighbors_looked_up_anew(rails: RAILS) -> None:
    x, y = inputs(4)
    stage, moved = rails.knn_stage(), (x + 0.2).clamp(0, 1)

    def plain(at: Tensor, looks: list[Tensor]) -> Tensor:
        bound = ASK().bind(stage)
        batch = bound.start(x, y, None, stage.look(looks[0], bound.requests))
        for place in looks[1:]:
            batch.update(None, stage.look(place, bound.requests))
        return batch.loss(at)

    batch = KNNStage(look_every=2).bind(rails).start(x, y, None, None)
    assert torch.equal(batch.loss(x), plain(x, [x]))
    assert torch.equal(batch.loss(moved), plain(moved, [x]))
    assert torch.equal(batch.loss(moved), plain(moved, [x, moved]))  # the third gradient begins with a look
    batch.update(torch.tensor([3, 1]), None)
    assert torch.equal(batch.loss(x[[3, 1]]), plain(x, [x, moved])[[3, 1]])


def test_rails_judges_what_is_found_on_its_stage(rails: RAILS) -> None:
    x, _ = inputs()
    y = rails.labels(x)
    found = PGD(objective=KNNStage(), steps=10)(rails, x, y, ThreatModel("linf", 0.3))
    assert torch.equal(found.success, rails.lead(rails.scores(found.x_adv), y) < -TIE)
    assert found.success.any()
    parts = registry.attacks.create("worst-case").usable(rails, x)
    assert [p for p in parts if "stage" in p or "evolved" in p] == [
        "knn-stage",
        "evolved",
        "knn-stage-restarts",
        "evolved-restarts",
    ]
    with pytest.raises(InputError, match="knn-stage objective attacks RAILS"):
        PGD(objective=KNNStage())(rails.knn_stage(), x, y, ThreatModel())
    with pytest.raises(InputError, match="objective must be an Objective"):
        KNNStage("ask")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- the rest


def test_an_evaluation_draws_by_sample_and_resumes(rails: RAILS, tmp_path: Path) -> None:
    x, _ = inputs()
    y = rails.labels(x)
    threat, attacks = ThreatModel("linf", 0.1), {"evolved": PGD(objective=Evolved(), steps=2, check_every=1)}
    options = Options(batch_size=4, examples=2, controls=0)
    run = evaluate({"rails": rails}, (x, y), attacks=attacks, threat=threat, out=tmp_path / "r", options=options)
    direct = attacks["evolved"](rails, x, y, threat)
    summary = finish(run).classifiers[0]
    assert summary.clean_accuracy == 1
    assert summary.attacks[0].robust_accuracy == pytest.approx(float(direct.robust.double().mean()))
    again = evaluate({"rails": rails}, (x, y), attacks=attacks, threat=threat, out=tmp_path / "r", options=options)
    assert finish(again).classifiers[0] == summary
    with pytest.raises(ResumeError):
        evaluate(
            {"rails": rails.with_seed(1)}, (x, y), attacks=attacks, threat=threat, out=tmp_path / "r", options=options
        )


def test_what_decides_is_in_the_fingerprint(rails: RAILS) -> None:
    assert rails.fingerprint() == RAILS(references(), **SMALL).fingerprint()
    others = [rails.with_seed(2), RAILS(references(), **{**SMALL, "generations": 3}), RAILS(references(61), **SMALL)]
    altered = references()
    altered.images = altered.images.flip(0)
    others.append(RAILS(altered, **SMALL))
    assert len({rails.fingerprint(), *(o.fingerprint() for o in others)}) == 5


def test_it_is_made_by_name_and_shown(rails: RAILS) -> None:
    made = registry.classifiers.create("rails", references=references(), layers=["3"], **SMALL)
    assert isinstance(made, RAILS)
    assert made.layers == ("3",)
    assert "population=40" in repr(made)
    assert made.extractor is not None
    assert rails.n_classes == 4
    assert torch.equal(made.to("cpu").labels(inputs()[0]), made.labels(inputs()[0]))


def test_images_of_eight_bits_are_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 6), generator=generator, dtype=torch.uint8)
    net = random_net(dtype=torch.float32)
    made = ReferenceSet.build(
        FeatureExtractor(net, ["3"]), (pixels.float() / 255, torch.arange(30) % 4), keep_images=True
    )
    assert made.images is not None
    assert made.images.dtype == torch.uint8
    rails = RAILS(made, population=40, generations=0, mutation_probability=0.0)
    (population,) = evolved(rails, pixels[:1].float() / 255, torch.tensor([0]))[0]
    assert float(population.distances.min()) < 1e-6
    assert population.images.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"population": 3}, "population"),
        ({"n_neighbors": 0}, "n_neighbors"),
        ({"generations": -1}, "generations"),
        ({"generations": (1, 2, 3)}, "3 entries for 2 layers"),
        ({"temperature": 0}, "temperature"),
        ({"mutation_range": (0.3, 0.1)}, "least, greatest"),
        ({"mutation_range": (0.1, 0.2, 0.3)}, "least, greatest"),
        ({"mutation_probability": (0.1, 1.5)}, "mutation_probability"),
        ({"plasma": 0}, "plasma"),
        ({"decay": 1.2}, "decay"),
        ({"draws": 0}, "draws"),
        ({"seed": 0.5}, "seed"),
        ({"layers": []}, "layers must be names of layers"),
        ({"layers": ["9"]}, "9"),
    ],
)
def test_bad_parameters_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        RAILS(references(), **{**SMALL, **options})


def test_references_that_cannot_evolve_are_refused() -> None:
    with pytest.raises(InputError, match="keep_images"):
        RAILS(references(images=False))
    bare = ReferenceSet.from_vectors(torch.rand(8, 3), torch.arange(8) % 4, images=torch.rand(8, 6))
    with pytest.raises(InputError, match="network"):
        RAILS(bare)
    with pytest.raises(InputError, match="ReferenceSet"):
        RAILS(nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="draws"):
        Evolved(draws=0)
    with pytest.raises(InputError, match="flock"):
        Evolved(flock=1.5)


# ----------------------------------------------------------------------------------------- kept


def test_saved_and_loaded_it_draws_the_same(tmp_path: Path) -> None:
    made = RAILS(
        references(),
        **{**SMALL, "generations": (1, 2)},
        temperature=(0.5, 1.0),
        mutation_range=(0.01, 0.1),
        bounds=None,
        draws=2,
        seed=5,
    )
    made.save(tmp_path / "rails")
    loaded = RAILS.load(tmp_path / "rails", random_net())
    x, _ = inputs()
    assert torch.equal(loaded.scores(x), made.scores(x))
    assert loaded.settings() == made.settings()
    assert loaded.fingerprint() == made.fingerprint()
    assert bool((loaded.scores(x) != RAILS(references(), **SMALL).scores(x)).any())  # the settings do decide
    with pytest.raises(InputError, match="overwriting"):
        made.save(tmp_path / "rails")


def test_without_its_images_or_with_another_network_it_is_not_loaded(tmp_path: Path) -> None:
    RAILS(references(), **SMALL).save(tmp_path / "rails")
    with pytest.raises(IntegrityError, match="another model"):
        RAILS.load(tmp_path / "rails", random_net(seed=1))
    with pytest.raises(InputError, match="needs the network"):
        RAILS.load(tmp_path / "rails")
