"""Counter-based randomness: a value depends on what it is for, never on what was drawn before it.

A stream of random numbers gives other values when the batch size, the order, or the point of resumption
changes. Here every number is a hash of (seed, sample id, tags…, position): SplitMix64 (Steele, Lea & Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) keyed per sample. The arithmetic is on 64-bit
integers, so CPU and CUDA agree bit for bit on the integers; the uniform numbers are exact on both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer torch.int64 stores it as."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch shifts int64 arithmetically)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 tensors (multiplication wraps modulo 2^64)."""
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX2)
    return z ^ _shift_right(z, 31)


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def derive(seed: int, *tags: int | str) -> int:
    """One 64-bit key from a seed and any tags (restart number, step, the name of the purpose)."""
    key = _mix_int(seed + _GAMMA)
    for tag in tags:
        words = [tag] if isinstance(tag, int) else [*tag.encode(), 256]
        for word in words:
            key = _mix_int((key ^ (word & _MASK)) + _GAMMA)
    return key


def bits(sample_ids: Tensor, count: int, seed: int, *tags: int | str) -> Tensor:
    """`count` random 64-bit patterns for every sample.

    Args:
        sample_ids: (N,) int64, the identity of each sample (its place in the data set).
        count: how many patterns a sample needs.
        seed, tags: what the numbers are for; other tags give independent numbers.

    Returns:
        (N, count) int64.
    """
    keys = _mix((sample_ids.to(torch.int64) ^ _signed(derive(seed, *tags))) + _signed(_GAMMA))
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=sample_ids.device) * _signed(_GAMMA)
    return _mix(keys[:, None] + steps[None, :])


def uniform(
    sample_ids: Tensor,
    shape: tuple[int, ...],
    seed: int,
    *tags: int | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1) of shape (N, *shape), as many random bits as the dtype holds: 24 in float32."""
    raw = bits(sample_ids, math.prod(shape), seed, *tags)
    precision = 1 - round(math.log2(torch.finfo(dtype).eps))  # more would round up to 1
    value = _shift_right(raw, 64 - precision).to(torch.float64) * 2.0**-precision
    return value.to(dtype).view(len(sample_ids), *shape)


def normal(
    sample_ids: Tensor,
    shape: tuple[int, ...],
    seed: int,
    *tags: int | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers of shape (N, *shape), by the inverse distribution function in float64."""
    raw = bits(sample_ids, math.prod(shape), seed, *tags)
    value = (_shift_right(raw, 12).to(torch.float64) + 0.5) * 2.0**-52  # exact, hence never 0 or 1
    quantile: Tensor = torch.special.ndtri(value)
    return quantile.to(dtype).view(len(sample_ids), *shape)


def one_a_stretch(n: int, count: int, seed: int, *tags: int | str) -> Tensor:
    """Places drawn at random from 0..n − 1, one from each of `count` equal stretches, ascending: (count,) or fewer."""
    stretches = torch.arange(count, dtype=torch.int64)
    within = uniform(stretches, (), seed, *tags, dtype=torch.float64)
    places: Tensor = ((stretches + within) * (n / count)).long().clamp_max_(n - 1).unique()
    return places


def permutation(n: int, seed: int, *tags: int | str) -> Tensor:
    """A random order of range(n), (n,) int64: the argsort of n counted 64-bit numbers."""
    return torch.argsort(bits(torch.arange(n), 1, seed, *tags)[:, 0], stable=True)
