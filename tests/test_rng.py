"""Counted randomness: SplitMix64 by its published numbers, and what the numbers are good for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from robustknn import rng

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
PUBLISHED_SEED = 1234567
PUBLISHED = (
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
)
"""The first numbers of SplitMix64 from seed 1234567, as its test vectors give them."""


# -------------------------------------------------------------------- SplitMix64 in plain Python integers


def finalize(z: int) -> int:
    """Stafford's mix 13, the output function of SplitMix64."""
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & MASK
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def generator(seed: int, count: int) -> list[int]:
    """SplitMix64 as published: a counter of step gamma, finalized."""
    return [finalize((seed + i * GAMMA) & MASK) for i in range(1, count + 1)]


def unshift(z: int, by: int) -> int:
    """The x with x ^ (x >> by) = z."""
    x = z
    for _ in range(64 // by + 1):
        x = z ^ x >> by
    return x


def definalize(z: int) -> int:
    """The inverse of `finalize`: multiplication by an odd number is undone by its inverse modulo 2^64."""
    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return unshift(z, 30)


def signed(z: int) -> int:
    z &= MASK
    return z - (1 << 64) if z >> 63 else z


def unsigned(values: Tensor) -> list[int]:
    return [v & MASK for v in values.flatten().tolist()]


def key(seed: int, *tags: int | str) -> int:
    """The key as documented: seed, then each tag (a text byte by byte, ended by 256), hashed one after the other."""
    found = generator(seed & MASK, 1)[0]
    for tag in tags:
        for word in [tag] if isinstance(tag, int) else [*tag.encode("utf-8"), 256]:
            found = generator(found ^ word & MASK, 1)[0]
    return found


def reference_bits(sample_id: int, count: int, seed: int, *tags: int | str) -> list[int]:
    stream = generator((sample_id & MASK) ^ key(seed, *tags), 1)[0]
    return generator(stream, count)


def test_the_reference_is_the_published_generator() -> None:
    assert tuple(generator(PUBLISHED_SEED, 5)) == PUBLISHED
    assert definalize(finalize(0xDEADBEEF12345678)) == 0xDEADBEEF12345678


def test_mix_gives_the_published_numbers() -> None:
    counters = torch.tensor([signed(PUBLISHED_SEED + i * GAMMA) for i in range(1, 6)])
    assert tuple(unsigned(rng._mix(counters))) == PUBLISHED


def test_bits_gives_the_published_numbers() -> None:
    """A sample's stream is SplitMix64 from its key: here for the id whose key is the published seed."""
    wanted_key = (definalize(PUBLISHED_SEED) - GAMMA) & MASK
    sample_id = signed(wanted_key ^ rng.derive(7, "purpose", 3))
    assert tuple(unsigned(rng.bits(torch.tensor([sample_id]), 5, 7, "purpose", 3))) == PUBLISHED


@settings(deadline=None, derandomize=True)
@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_mix_is_the_finalizer_on_all_of_int64(z: int) -> None:
    assert unsigned(rng._mix(torch.tensor([z]))) == [finalize(z & MASK)]
    assert rng._mix_int(z) == finalize(z & MASK)


TAGS = st.lists(st.one_of(st.integers(-(1 << 70), 1 << 70), st.text(max_size=6)), max_size=3)


@settings(deadline=None, derandomize=True)
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-(1 << 70), 1 << 70), TAGS)
def test_bits_are_those_of_the_reference(sample_id: int, seed: int, tags: list[int | str]) -> None:
    assert rng.derive(seed, *tags) == key(seed, *tags)
    found = rng.bits(torch.tensor([sample_id]), 4, seed, *tags)
    assert found.dtype == torch.int64
    assert unsigned(found) == reference_bits(sample_id, 4, seed, *tags)


def test_uniform_and_normal_are_made_of_the_bits() -> None:
    ids, shape = torch.tensor([0, 5, -1, 1 << 40]), (2, 3)
    expected = np.array([reference_bits(i, 6, 11, "x") for i in ids.tolist()], dtype=np.uint64).reshape(4, 2, 3)
    single = rng.uniform(ids, shape, 11, "x")
    assert single.dtype == torch.float32
    assert np.array_equal(single.numpy(), ((expected >> np.uint64(40)) / 2**24).astype(np.float32))
    double = rng.uniform(ids, shape, 11, "x", dtype=torch.float64)
    assert np.array_equal(double.numpy(), (expected >> np.uint64(11)) / 2**53)
    normal = rng.normal(ids, shape, 11, "x", dtype=torch.float64)
    quantiles = stats.norm.ppf(((expected >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52)
    np.testing.assert_allclose(normal.numpy(), quantiles, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rng.normal(ids, shape, 11, "x"), normal.float())


# ---------------------------------------------------------------------------------------- independence


DRAWS = {
    "bits": lambda ids: rng.bits(ids, 5, 3, "t"),
    "uniform": lambda ids: rng.uniform(ids, (2, 3), 3, "t"),
    "uniform float64": lambda ids: rng.uniform(ids, (2, 3), 3, "t", dtype=torch.float64),
    "normal": lambda ids: rng.normal(ids, (2, 3), 3, "t"),
}


@pytest.mark.parametrize("what", DRAWS)
def test_a_sample_gets_the_same_in_any_batch_order_and_company(what: str) -> None:
    draw, ids = DRAWS[what], torch.arange(50) * 7 - 20
    whole = draw(ids)
    assert torch.equal(torch.cat([draw(part) for part in ids.split(7)]), whole)
    assert torch.equal(torch.cat([draw(i[None]) for i in ids]), whole)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(ids[order]), whole[order])
    assert torch.equal(draw(ids[::3]), whole[::3])
    assert torch.equal(draw(torch.cat([ids, ids])), torch.cat([whole, whole]))
    assert torch.equal(draw(ids.to(torch.int32)), whole)


def test_longer_draws_begin_as_shorter_ones() -> None:
    ids = torch.arange(9)
    assert torch.equal(rng.bits(ids, 20, 1, "a")[:, :5], rng.bits(ids, 5, 1, "a"))


def test_everything_that_is_told_apart_gives_other_numbers() -> None:
    ids = torch.arange(100)
    said: list[tuple[int | str, ...]] = [
        (0,), (1,), (-1,), (2**63,), (0, 0), (0, 1), (0, 0, 0), (0, "a"), (0, "b"), (0, "ab"), (0, "a", "b"),
        (0, "b", "a"), (0, "a", 1), (0, 1, "a"), (0, ""), (0, "", ""), (0, "é"), (0, "restart", 0), (0, "restart", 1),
    ]  # fmt: skip
    drawn = torch.cat([rng.bits(ids, 10, s[0], *s[1:]).flatten() for s in said])  # type: ignore[arg-type]
    assert len(drawn.unique()) == len(said) * 1000


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    ids = torch.arange(10)
    first = [rng.uniform(ids, (3,), 0), rng.normal(ids, (3,), 0), rng.permutation(30, 0), rng.bits(ids, 2, 0)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]
    torch.manual_seed(2)
    again = [rng.uniform(ids, (3,), 0), rng.normal(ids, (3,), 0), rng.permutation(30, 0), rng.bits(ids, 2, 0)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ----------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("across", ["samples", "positions"])
def test_uniform_is_uniform(across: str, dtype: torch.dtype) -> None:
    n = 200_000
    ids, shape = (torch.arange(n), (1,)) if across == "samples" else (torch.tensor([5]), (n,))
    drawn = rng.uniform(ids, shape, 0, "test", dtype=dtype).flatten()
    assert drawn.dtype == dtype
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 0.01
    assert stats.chisquare(np.histogram(drawn.numpy(), 1000, (0, 1))[0]).pvalue > 0.01
    # Neighbours are independent: pairs fill the square evenly, and the correlation is that of chance.
    pairs = np.histogram2d(drawn[:-1:2].numpy(), drawn[1::2].numpy(), 20, [(0, 1), (0, 1)])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1].numpy(), drawn[1:].numpy())[0, 1]) < 4 / math.sqrt(n)


def test_every_bit_is_a_fair_coin() -> None:
    drawn = rng.bits(torch.arange(20_000), 2, 0, "coins").flatten()
    ones = torch.stack([(drawn >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert float((ones - 0.5).abs().max()) < 4 * 0.5 / math.sqrt(len(drawn))


def test_a_bit_of_the_seed_the_id_or_a_tag_changes_half_of_the_bits() -> None:
    ids = torch.arange(500)
    base = rng.bits(ids, 4, 12, "t", 3)
    for other in (
        *(rng.bits(ids ^ (1 << bit), 4, 12, "t", 3) for bit in (0, 1, 17, 40, 62)),
        *(rng.bits(ids, 4, 12 ^ (1 << bit), "t", 3) for bit in (0, 5, 63)),
        rng.bits(ids, 4, 12, "t", 2),
        rng.bits(ids, 4, 12, "u", 3),
    ):
        changed = torch.stack([((base ^ other) >> bit) & 1 for bit in range(64)]).double().mean()
        assert abs(float(changed) - 0.5) < 4 * 0.5 / math.sqrt(base.numel() * 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_least_and_the_greatest_bits_stay_inside(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number in 2^53 would otherwise be 1 (and its normal infinite), one in 2^11 in half precision."""
    extreme = torch.tensor([[0, -1, (1 << 63) - 1, -(1 << 63)]])
    monkeypatch.setattr(rng, "bits", lambda *_: extreme)
    drawn = rng.uniform(torch.tensor([0]), (4,), 0, dtype=dtype)[0].double()
    precision = {torch.float32: 24, torch.float64: 53, torch.float16: 11, torch.bfloat16: 8}[dtype]
    step = 2.0**-precision
    assert drawn.tolist() == [0, 1 - step, 0.5 - step, 0.5]
    normal = rng.normal(torch.tensor([0]), (4,), 0, dtype=dtype)[0].double()
    assert bool(normal.isfinite().all())
    assert float(normal[0]) == pytest.approx(-8.2, abs=0.1)
    assert float(normal[1]) == -float(normal[0])


def test_normal_is_normal() -> None:
    drawn = rng.normal(torch.arange(2000), (100,), 0, "test", dtype=torch.float64).flatten()
    n = len(drawn)
    assert abs(float(drawn.mean())) < 4 / math.sqrt(n)
    assert abs(float(drawn.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((drawn**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((drawn**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("n", [0, 1, 2, 3, 100, 5000])
def test_a_permutation_is_a_permutation(n: int) -> None:
    order = rng.permutation(n, 4, "p")
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    numbers = rng.bits(torch.arange(n), 1, 4, "p")[:, 0]  # it is their order, as documented, on every machine
    assert order.tolist() == sorted(range(n), key=numbers.tolist().__getitem__)
    if n > 50:
        for other in (rng.permutation(n, 5, "p"), rng.permutation(n, 4, "q"), rng.permutation(n, 4, "p", 0)):
            assert not torch.equal(order, other)


def test_permutations_put_everything_everywhere() -> None:
    orders = torch.stack([rng.permutation(6, 0, "p", i) for i in range(3000)])
    counts = torch.stack([torch.bincount(orders[:, place], minlength=6) for place in range(6)])
    assert stats.chisquare(counts.numpy().ravel(), ddof=10).pvalue > 0.01
    assert len({tuple(o) for o in orders.tolist()}) > 700  # of 720


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (2, 3, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    for n in (0, 1, 3):
        assert rng.uniform(torch.arange(n), shape, 0).shape == (n, *shape)
        assert rng.normal(torch.arange(n), shape, 0).shape == (n, *shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="left out: needs a CUDA device")
def test_the_device_does_not_matter() -> None:
    ids = torch.arange(1000) * 37 - 500
    assert torch.equal(rng.bits(ids.cuda(), 20, 3, "t").cpu(), rng.bits(ids, 20, 3, "t"))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            rng.uniform(ids.cuda(), (20,), 3, dtype=dtype).cpu(), rng.uniform(ids, (20,), 3, dtype=dtype)
        )
    torch.testing.assert_close(rng.normal(ids.cuda(), (20,), 3).cpu(), rng.normal(ids, (20,), 3))
