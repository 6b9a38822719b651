"""Tables of coefficients: their initial values, and the form in which users see them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pymerge.errors import RequestError, nearest

__all__ = ["Coefficients", "initial_coefficients"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Coefficients:
    """A table of coefficients with their effective values (clamped to the preset's range).

    Attributes:
        values: float32 [models, groups].
        models: names of the models.
        groups: names of the groups of tensors (with granularity "layer", of the tensors).
        layers: the group of each merged tensor.
    """

    values: Tensor
    models: tuple[str, ...]
    groups: tuple[str, ...]
    layers: Mapping[str, str]

    def __str__(self) -> str:
        from pymerge.adamerging.show import coefficients_text

        return coefficients_text(self)

    def of(self, layer: str) -> list[float]:
        """Return the coefficients of a tensor, one for each model."""
        if layer not in self.layers:
            raise RequestError(
                f"layer: there is no merged tensor {layer!r}{nearest(layer, self.layers)}"
            )
        return self.values[:, self.groups.index(self.layers[layer])].tolist()

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return plain numbers: {model: {group: coefficient}}."""
        return {
            model: dict(zip(self.groups, row, strict=True))
            for model, row in zip(self.models, self.values.tolist(), strict=True)
        }

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Draw a heat map of models by groups with matplotlib (`pymerge-kernels[plot]`)."""
        from pymerge.adamerging.show import save_png

        save_png(self, Path(path))

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the heat map as a table in a self-contained HTML file."""
        from pymerge.adamerging.show import save_html

        save_html(self, Path(path))


def initial_coefficients(init: Any, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return a table [models, groups] from the `init` argument of `AdaMerging`.

    Raises:
        RequestError: it has another shape, or contains NaN or infinity.
    """
    try:
        table = torch.as_tensor(init, dtype=dtype).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"init: expected numbers, got {init!r:.60} ({str(error).splitlines()[0]})"
        ) from None
    if table.dim() == 1 and table.shape[0] == shape[0]:
        table = table.unsqueeze(1)
    if table.dim() not in (0, 2) or (table.dim() == 2 and table.shape[0] != shape[0]):
        raise _bad_init(shape, table)
    if table.dim() == 2 and table.shape[1] not in (1, shape[1]):
        raise _bad_init(shape, table)
    if not bool(torch.isfinite(table).all()):
        raise RequestError("init: expected finite numbers")
    return table.expand(shape).clone()


def _bad_init(shape: tuple[int, int], table: Tensor) -> RequestError:
    return RequestError(
        f"init: expected a number, {shape[0]} numbers (one per model) or a table of shape "
        f"{shape} (models, groups of tensors); got shape {tuple(table.shape)}"
    )
