"""Ranks in rows and random masks, which decide element by element what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pymerge.engine.select import KEEP_NONE
from pymerge.ops import contract as contract  # declares torch.ops.pymerge
from pymerge.ops.arguments import padded
from pymerge.ops.call import call
from pymerge.ops.masks import keep_limit, seed_words
from pymerge.primitives.arguments import backend_name, check, flattened, is_wide, require

__all__ = ["random_mask", "row_ranks"]

Tensor = torch.Tensor


def row_ranks(base: Tensor, models: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Return the rank of each `|delta|` within its row, from 0; equal magnitudes by index.

    Returns: int32 [models, *shape].
    """
    check(base, models)
    columns = base.shape[-1] if base.dim() > 0 else 1
    ranks = np.zeros((len(models), padded(base.numel())), np.int32)
    if base.numel() > 0:
        wide = is_wide(base, *models)
        flat = flattened(base), [flattened(model) for model in models]
        call("row_ranks_", ranks, *flat, columns, wide=wide, backend=backend_name(backend, base))
    return torch.from_numpy(ranks[:, : base.numel()].copy()).reshape(len(models), *base.shape)


def random_mask(
    shape: Sequence[int], density: float, *, seed: int = 0, name: str = "", model: int = 0
) -> Tensor:
    """Return the mask that DARE draws: a hash of (seed, name, model, flat index), on any backend.

    Args:
        density: probability that an element is kept, in [0, 1].
        name: the tensor's name; model: the model's number, from 0.

    Returns: bool, of the given shape.
    """
    require(0 <= density <= 1, "density", "a number in [0, 1]", f"{density}")
    numel, limit = math.prod(shape), keep_limit(density)
    if limit < 0 or numel == 0:
        return torch.zeros(tuple(shape), dtype=torch.bool)
    seeds = seed_words(seed, name, model + 1)[2 * model :]
    out = torch.empty(numel)
    torch.ops.pymerge.sparse_merge_(
        out,
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(numel),
        [torch.ones(numel)],
        [0],
        [KEEP_NONE],
        seeds,
        [limit],
        [1.0],
        [1.0],
        False,
        False,
        1.0,
        1.0,
        0,
        bare=True,
    )
    return out.reshape(tuple(shape)) != 0
