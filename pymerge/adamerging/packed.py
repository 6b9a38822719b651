"""Trimmed task vectors for AdaMerging++, stored as bit masks and values.

AdaMerging++ (Yang et al. 2024) replaces each task vector by the part that TIES keeps: it is trimmed
over the whole model, and kept only where its sign is the elected one. A fifth of the elements
remains. A model is therefore stored as one bit for each element and, where it is set, the model's
own number in the checkpoint's dtype: about 0.5 bytes per parameter and model in bf16. The
difference from the base is formed when it is used; this is exact, whereas a stored difference would
have to be rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pymerge.engine.select import Part, order_statistics
from pymerge.methods.ties.passes import zero_elects
from pymerge.methods.ties.record import SEMANTICS, trim_target
from pymerge.ops.backends import resolve
from pymerge.ops.call import call
from pymerge.ops.constants import SUM_CHUNK
from pymerge.primitives import trim

__all__ = ["Packed", "pack_trimmed"]

Tensor = torch.Tensor
_TILE = 1 << 20  # elements processed at a time; a multiple of 32


@dataclass(frozen=True)
class Packed:
    """One trimmed task vector of one tensor.

    Attributes:
        mask: int32 words [ceil(n / 32)]; bit i of word j is element 32 j + i.
        values: [kept], the model's numbers in its own dtype.
        offsets: int64 [ceil(n / 1024) + 1], the number of kept elements before each chunk of 1024.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, mask: Tensor, values: Tensor, numel: int) -> Packed:
        """Make a `Packed` from a mask over `numel` elements and the values that it keeps."""
        chunks = -(-numel // SUM_CHUNK)
        bits = torch.zeros(chunks * (SUM_CHUNK // 32), dtype=torch.int32, device=mask.device)
        bits[: mask.numel()] = mask
        # Count the bits set in each word by adding up ever wider fields.
        bits = bits.long() & 0xFFFFFFFF
        for width, field in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
            bits = (bits & field) + ((bits >> width) & field)
        counts = ((bits * 0x01010101) >> 24) & 0xFF
        offsets = torch.zeros(chunks + 1, dtype=torch.int64, device=mask.device)
        offsets[1:] = counts.view(chunks, SUM_CHUNK // 32).sum(dim=1).cumsum(0)
        return cls(mask, values, offsets)

    def to(self, device: torch.device) -> Packed:
        """Return a copy on a device."""
        return Packed(self.mask.to(device), self.values.to(device), self.offsets.to(device))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mask, self.values, self.offsets

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def pack_trimmed(
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    *,
    density: float = 0.2,
) -> dict[str, list[Packed]]:
    """Return the part that TIES keeps of each task vector, tensor by tensor: a `Packed` for each
    model.

    Trim and election are those of the AdaMerging authors' `ties_merging_split`: one threshold for
    each model over all tensors together (`semantics="adamerging"`, which keeps everything equal to
    the threshold), the sign of the sum, and the majority sign of all elements where the sum is 0.

    Args:
        base, models: tensors by name, with equal names and shapes, on one device.
        density: share of each task vector that the trim keeps, in [0, 1].
    """
    rule = SEMANTICS["adamerging"]
    names = sorted(name for name in base if base[name].numel() > 0)  # the official flat order
    wide = any(t[n].dtype == torch.float64 for t in (base, *models) for n in names)
    total = sum(base[name].numel() for name in names)
    device = next((base[name].device for name in names), torch.device("cpu"))
    backend = resolve(None, device).NAME

    def parts() -> Iterator[Part]:
        for number, name in enumerate(names):
            yield number, _flat(base[name]), [_flat(model[name]) for model in models]

    targets = [trim_target(rule, density, total)] * len(models)
    cuts, _ = order_statistics(parts, targets, total, wide=wide, backend=backend)
    keys = [cut.key for cut in cuts]
    stats = np.zeros(3, np.int64)
    for _, own, others in parts():
        how = {"weights": [], "weighting": "none", "elect": rule.elect}
        call("ties_signs_", stats, own, list(others), keys, wide=wide, backend=backend, **how)
    default = zero_elects(rule, int(stats[0]))
    empty = {name: [_nothing(model[name]) for model in models] for name in set(base) - set(names)}
    return empty | {
        name: _pack(base[name], [model[name] for model in models], keys, default) for name in names
    }


def _pack(base: Tensor, models: Sequence[Tensor], keys: list[int], default: int) -> list[Packed]:
    own, others = _flat(base), [_flat(model) for model in models]
    masks: list[list[Tensor]] = [[] for _ in models]
    values: list[list[Tensor]] = [[] for _ in models]
    for start in range(0, own.numel(), _TILE):
        tile = slice(start, start + _TILE)
        trimmed = trim(own[tile], [model[tile] for model in others], keys)
        vote = torch.zeros_like(trimmed[0])
        for delta in trimmed:
            vote += delta
        positive = vote > 0 if default < 0 else vote >= 0
        for k, delta in enumerate(trimmed):
            kept = torch.where(positive, delta > 0, delta < 0)
            masks[k].append(_words(kept))
            values[k].append(others[k][tile][kept])
    return [
        Packed.of(torch.cat(m), torch.cat(v), own.numel())
        for m, v in zip(masks, values, strict=True)
    ]


def _words(kept: Tensor) -> Tensor:
    """Return booleans packed into int32, 32 in each, the first in the lowest bit."""
    room = -(-kept.numel() // 32) * 32
    bits = torch.zeros(room, dtype=torch.int64, device=kept.device)
    bits[: kept.numel()] = kept
    places = torch.arange(32, dtype=torch.int64, device=kept.device)
    words = (bits.view(-1, 32) << places).sum(dim=1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _nothing(model: Tensor) -> Packed:
    mask = torch.zeros(0, dtype=torch.int32, device=model.device)
    return Packed.of(mask, model.detach().reshape(-1)[:0], 0)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1)
