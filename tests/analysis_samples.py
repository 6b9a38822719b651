"""Analyses with made-up numbers of the right shapes, for tests of their display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymerge.analysis.records import (
    Analysis,
    Facts,
    Group,
    Histogram,
    Model,
    Quantiles,
    Spectrum,
    Tensor,
    Trimmed,
)

TYPES = ("attention.query.weight", "attention.output.weight", "mlp.up.weight", "mlp.down.weight")


def sample(
    labels: Sequence[str] = ("german", "legal", "code"),
    layers: int = 3,
    types: Sequence[str] = TYPES,
    densities: Sequence[float] = (0.1, 0.2, 0.5),
    *,
    spectra: bool = True,
    base: str = "base",
    seed: int = 0,
) -> Analysis:
    """Return an analysis; the last tensor is in no layer. If there are several models, the last one
    is
    the base itself: a task vector of zeros, whose cosines and conflicts are undefined."""
    make = _Maker(len(labels), tuple(densities), np.random.default_rng(seed))
    inventory = [
        Tensor(f"layers.{n}.{kind}", (64, 32), str(n), kind, ("BF16",) * (len(labels) + 1))
        for n in range(layers)
        for kind in types
    ]
    inventory.append(Tensor("embed.weight", (1000, 32), None, "embed.weight", ("BF16",)))
    count = len(inventory)
    return Analysis(
        base=Model(base, f"/models/{base}"),
        models=tuple(Model(label, f"/models/{label}") for label in labels),
        densities=tuple(densities),
        inventory=tuple(inventory),
        whole=make.group("model", count, 1.0),
        layers=(
            *(make.group(str(n), len(types), 1 / (layers + 1)) for n in range(layers)),
            make.group("other", 1, 1 / (layers + 1)),
        ),
        module_types=tuple(
            make.group(kind, layers, 1 / (len(types) + 1)) for kind in (*types, "embed.weight")
        ),
        tensors=tuple(make.group(tensor.name, 1, 1 / count) for tensor in inventory),
        spectra=tuple(make.spectrum(tensor) for tensor in inventory[:-1]) if spectra else (),
        notes=("position_ids: integers, left out",),
        facts=Facts("0.1", 1.25, 123_456_789, 2, "cpu", "avx512", "cpu", 2, 50_000_000, "exact"),
    )


class _Maker:
    def __init__(self, count: int, densities: tuple[float, ...], random: np.random.Generator):
        self.count, self.densities, self.random = count, densities, random

    def _zero(self, k: int) -> bool:
        return self.count > 1 and k == self.count - 1

    def vector(self, low: float, high: float, zero: float | None) -> Any:
        values = self.random.uniform(low, high, self.count).tolist()
        return tuple(zero if self._zero(k) else x for k, x in enumerate(values))

    def matrix(self, low: float, high: float, diagonal: float, zero: float | None) -> Any:
        values = self.random.uniform(low, high, (self.count, self.count))
        values = (values + values.T) / 2
        np.fill_diagonal(values, diagonal)
        return tuple(
            tuple(zero if self._zero(i) or self._zero(j) else x for j, x in enumerate(row))
            for i, row in enumerate(values.tolist())
        )

    def group(self, name: str, tensors: int, share: float) -> Group:
        edges = tuple(np.arange(-24.0, -4.0, 0.5).tolist())
        cosine = self.matrix(-0.1, 0.3, 1.0, None)
        l2 = self.vector(2.0 * share, 3.0 * share, 0.0)
        dot = tuple(
            tuple((c or 0.0) * l2[i] * l2[j] for j, c in enumerate(row))
            for i, row in enumerate(cosine)
        )
        counts = tuple(
            tuple((self.random.integers(1, 50, len(edges) - 1) * (not self._zero(k))).tolist())
            for k in range(self.count)
        )
        return Group(
            name=name,
            parameters=2048 * tensors,
            tensors=tensors,
            base_l2=40.0 * share,
            l1=self.vector(50.0, 60.0, 0.0),
            l2=l2,
            norm_share=self.vector(0.8 * share, share, None),
            unchanged=self.vector(0.0, 0.1, 1.0),
            dot=dot,
            cosine=cosine,
            l1_distance=self.matrix(60.0, 80.0, 0.0, 55.0),
            l2_distance=self.matrix(3.0, 4.0, 0.0, 2.5),
            equal=self.matrix(0.0, 0.1, 1.0, 0.05),
            sign_conflict=self.matrix(0.4, 0.5, 0.0, None),
            sign_agreement=0.55,
            trimmed=tuple(self.trimmed(density) for density in self.densities),
            quantiles=Quantiles(
                (0.5, 0.9, 0.99), tuple((1e-4, 3e-4, 6e-4) for _ in range(self.count))
            ),
            histogram=Histogram(edges, counts, (7,) * self.count, 2048),
        )

    def trimmed(self, density: float) -> Trimmed:
        return Trimmed(
            density=density,
            threshold=self.vector(1e-4, 1e-3, 0.0),
            kept=self.vector(0.9 * density, density, 1.0),
            kept_norm=self.vector(density, 1.0, None),
            sign_conflict=self.matrix(0.3, 0.5, 0.0, None),
            sign_agreement=0.8,
            overlap=self.matrix(density, min(1.0, 1.5 * density), 1.0, None),
        )

    def spectrum(self, tensor: Tensor) -> Spectrum:
        values = np.sort(self.random.uniform(0.1, 1.0, (self.count, 4)))[:, ::-1]
        return Spectrum(
            tensor=tensor.name,
            shape=(64, 32),
            rank=4,
            effective_rank=self.vector(10.0, 30.0, None),
            stable_rank=self.vector(2.0, 9.0, None),
            top_singular_values=tuple(map(tuple, values.tolist())),
            energy=self.vector(0.3, 0.6, None),
            left_overlap=self.matrix(0.05, 0.2, 1.0, None),
            right_overlap=self.matrix(0.05, 0.2, 1.0, None),
            interference=None if self.count == 1 else 12.5,
        )
