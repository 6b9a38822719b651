"""Random masks that depend only on (seed, tensor name, model, element).

An element is kept if a hash of its flat index, keyed by two 32-bit words, is at most a limit. The
words are the BLAKE2b hash of the seed, the tensor name and the number of the model. A mask
therefore does not depend on the device, tiles, threads, shards or other tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["keep_limit", "mask_hash", "seed_words", "words_at"]

_WORD = 1 << 32


def seed_words(seed: int, name: str, models: int) -> list[int]:
    """Return two words below 2^32 for each model of a tensor."""
    words: list[int] = []
    for model in range(models):
        text = f"{seed}\0{model}\0{name}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8, person=b"pymerge mask").digest()
        words += [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]
    return words


def words_at(words: Sequence[int], start: int) -> list[int]:
    """Return the words for the elements from flat index `start` to the next multiple of 2^32.

    The hash takes the low 32 bits of an index; the high bits change the words.
    """
    high = start >> 32
    if high == 0:
        return list(words)
    changed = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        changed += [(first ^ (high * 0x9E3779B9)) % _WORD, (second + high * 0x85EBCA6B) % _WORD]
    return changed


def keep_limit(density: float) -> int:
    """Return the largest hash kept, for a share `density` of the elements; -1 keeps nothing."""
    return round(density * _WORD) - 1


def mask_hash(index: np.ndarray, first: int, second: int) -> np.ndarray:
    """Return the hash of indices (uint32) as csrc/math/sparse.h defines it."""
    x = (index ^ (index >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return (x ^ (x >> np.uint32(16))) * np.uint32(second | 1) + np.uint32(first)
