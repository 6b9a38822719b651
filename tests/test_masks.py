"""The hash behind random masks is as good as random: bias, neighbours, models, seeds, avalanche.

And it is the same in every version: a mask is part of what a configuration and a seed mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import pymerge
from pymerge.ops.masks import keep_limit, mask_hash, seed_words, words_at
from tests.conftest import BACKEND_IDS

N = 1 << 18
# Standard errors that none of some thousands of correct random numbers is away from its mean.
FAR = 5.0
DENSITIES = (0.02, 0.1, 0.25, 0.5, 0.8, 0.95)
LAGS = (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 63, 64, 128, 1000, 1024, 4096, 4097, 65536)
STARTS = (0, 12345, 3 << 20, 2**32 - N)


def drawn(start: int, seed: int, models: int, name: str = "w") -> list[np.ndarray]:
    index = np.arange(start, start + N, dtype=np.uint64).astype(np.uint32)
    words = seed_words(seed, name, models)
    return [mask_hash(index, *words[2 * k : 2 * k + 2]) for k in range(models)]


def masks(hashes: list[np.ndarray], density: float) -> list[np.ndarray]:
    """Return masks, less their mean, over their deviation."""
    deviation = math.sqrt(density * (1 - density))
    limit = np.uint32(keep_limit(density))
    return [((h <= limit).astype(np.float64) - density) / deviation for h in hashes]


def correlation(*factors: np.ndarray) -> float:
    """Return the mean of a product in standard errors."""
    return float(np.prod(factors, axis=0).sum()) / math.sqrt(len(factors[0]))


def chi_square(values: np.ndarray, bins: int) -> float:
    """Return chi-square of values that should be uniform, in standard errors from its mean."""
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    found = float(((counts - expected) ** 2).sum()) / expected
    return (found - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("start", STARTS)
def test_shares_and_neighbours(start: int) -> None:
    for seed in range(4):
        hashes = drawn(start, seed, 2)
        for density in DENSITIES:
            first, second = masks(hashes, density)
            assert abs(correlation(first)) < FAR
            for lag in LAGS:
                assert abs(correlation(first[lag:], first[:-lag])) < FAR, (density, lag)
                assert abs(correlation(first[lag:], second[:-lag])) < FAR, (density, lag)
                assert abs(correlation(second[lag:], first[:-lag])) < FAR, (density, lag)
            assert abs(correlation(first[2:], first[1:-1], first[:-2])) < FAR


@pytest.mark.parametrize("start", STARTS)
def test_models_seeds_and_tensors(start: int) -> None:
    """Pairs and triples of masks over the same elements, which share the mixed index."""
    every = drawn(start, 0, 6) + drawn(start, 1, 3) + drawn(start, 0, 3, "v")
    for density in DENSITIES:
        found = masks(every, density)
        for i, first in enumerate(found):
            for j in range(i):
                assert abs(correlation(first, found[j])) < FAR, (density, i, j)
                if density == 0.5:
                    for third in found[:j]:
                        assert abs(correlation(first, found[j], third)) < FAR


def test_hashes_are_uniform() -> None:
    for seed in range(8):
        for h in drawn(0, seed, 2):
            assert abs(chi_square(h >> np.uint32(20), 1 << 12)) < FAR
            halves = (h >> np.uint32(31)).reshape(-1, 8) @ (1 << np.arange(8))
            assert abs(chi_square(halves, 256)) < FAR  # of eight neighbours, all patterns
        first, second = drawn(0, seed, 2)
        pairs = (first >> np.uint32(26)) * 64 + (second >> np.uint32(26))
        assert abs(chi_square(pairs.astype(np.int64), 1 << 12)) < FAR


def test_one_element_over_seeds_and_tensors() -> None:
    words = np.array([seed_words(seed, "w", 4) for seed in range(20_000)]).reshape(-1, 2)
    for index in (0, 1, 2, 1000):
        one = np.array([index], dtype=np.uint32)
        found = np.array([mask_hash(one, int(a), int(b))[0] for a, b in words[:20_000]])
        assert abs(chi_square(found >> np.uint32(24), 256)) < FAR


def test_avalanche() -> None:
    """A bit of the index changes each of the upper bits of the hash half of the time."""
    generator = np.random.default_rng(0)
    index = generator.integers(0, 1 << 32, 1 << 14, dtype=np.uint64).astype(np.uint32)
    for words in (seed_words(0, "a", 1), seed_words(5, "b", 1)):
        plain = mask_hash(index, *words)
        for bit in range(32):
            changed = plain ^ mask_hash(index ^ np.uint32(1 << bit), *words)
            for out in range(24, 32):
                share = float((changed >> np.uint32(out) & np.uint32(1)).mean())
                assert abs(share - 0.5) < 0.025, (bit, out)


def test_beyond_32_bits() -> None:
    """The next 2^32 elements share mixed indices, but neither words nor masks."""
    words = seed_words(3, "w", 2)
    index = np.arange(N, dtype=np.uint32)
    parts = [words_at(words, high << 32) for high in range(4)]
    hashes = [mask_hash(index, *part[2 * k : 2 * k + 2]) for part in parts for k in range(2)]
    found = masks(hashes, 0.5)
    for i, first in enumerate(found):
        assert all(abs(correlation(first, other)) < FAR for other in found[:i])


# Recorded; no version may change them.

WORDS = {
    (0, "w", 2): [0x296A8577, 0x90A498C4, 0xAE93E86D, 0x57F45922],
    (0, "", 1): [0x6442C25C, 0x6150B18B],
    (2**63 - 1, "model.layers.0.mlp.up_proj.weight", 1): [0x2D5D5A90, 0x558E0325],
    (5, "gr\u00f6\u00dfe.\ud800", 1): [0x64160118, 0x1CDA6C42],
}
# The masks of 64 elements by seed 0 in tensor "w", the first element in the highest bit.
MASKS = {
    (0.25, 0): 0xC419016820C60354,
    (0.25, 1): 0x43D0160160421850,
    (0.5, 0): 0xE75F01EAA5C727FC,
    (0.5, 1): 0x53FB572179D25D51,
}


def test_words_and_hashes_are_those_of_every_version() -> None:
    for arguments, words in WORDS.items():
        assert seed_words(*arguments) == words
    words = WORDS[0, "w", 2]
    assert words_at(words, 2**32 - 1) == words
    assert words_at(words, 3 << 32) == [0xF3CCE85C, 0x2267F805, 0x74358546, 0xE9B7B863]
    index = np.array([0, 1, 2, 1000, 2**32 - 1], dtype=np.uint32)
    hashes = [0x296A8577, 0x0438E937, 0x6FABE5BC, 0x85CA5591, 0xE19AB869]
    assert mask_hash(index, words[0], words[1]).tolist() == hashes
    limits = [keep_limit(density) for density in (0.0, 2**-32, 0.25, 0.5, 1.0)]
    assert limits == [-1, 0, 2**30 - 1, 2**31 - 1, 2**32 - 1]


@pytest.mark.parametrize("identifier", BACKEND_IDS)
def test_masks_are_those_of_every_version(
    identifier: str, use_backend: Callable[[str], str]
) -> None:
    backend = use_backend(identifier)
    zeros, ones = {"w": torch.zeros(64)}, {"w": torch.ones(64)}
    for (density, model), bits in MASKS.items():
        tuned = [ones if k == model else zeros for k in range(2)]
        merged = pymerge.dare_linear(zeros, tuned, density=density, backend=backend)
        kept = torch.tensor([bits >> (63 - index) & 1 for index in range(64)])
        assert torch.equal(merged["w"], kept / density)
        # DELLA compares the upper 24 bits; without epsilon all elements are alike.
        merged = pymerge.della_linear(zeros, tuned, density=density, epsilon=0.0, backend=backend)
        assert torch.equal(merged["w"], kept / density)
