"""Labels drawn from a model's predictions."""

from __future__ import annotations

import torch

__all__ = ["draw_classes"]

_AT_ONCE = 1 << 21  # odds accumulated at once


def draw_classes(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a class for each row, drawn by its softmax.

    For a large vocabulary `torch.multinomial` draws an exponential variate for each class, which
    takes longer than the model. This draws one uniform number per row and finds where the
    cumulative odds exceed it.

    Args:
        logits: [rows, classes], finite.
        generator: on the CPU.

    Returns: int64 [rows], on the CPU.
    """
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    rows = max(1, _AT_ONCE // logits.shape[-1])
    drawn = [torch.empty(0, 1, dtype=torch.int64)]
    for part, share in zip(logits.split(rows), uniform.split(rows), strict=True):
        wide = part if part.dtype == torch.float64 else part.float()
        odds = wide.softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
        whole = odds[:, -1:]
        # below the total also after rounding, so that no class of odds 0 is drawn at the end
        wanted = torch.minimum(share * whole, torch.nextafter(whole, torch.zeros_like(whole)))
        drawn.append(torch.searchsorted(odds, wanted, right=True))
    return torch.cat(drawn).squeeze(-1)
