"""The results of an analysis: frozen records, and their JSON.

K is the number of models. Vectors have K entries, in the order of `Analysis.models`; matrices are
K x K, lists of rows. None marks a number that is not defined: a cosine with a task vector that is
zero, a share of nothing. `docs/analysis.md` has the formulas.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pymerge.errors import RequestError, shown
from pymerge.strict_json import decode, load_json

__all__ = [
    "SCHEMA_VERSION",
    "Analysis",
    "Facts",
    "Group",
    "Histogram",
    "Model",
    "Quantiles",
    "Spectrum",
    "Tensor",
    "Trimmed",
]

SCHEMA_VERSION = 1

Vector = tuple[float | None, ...]  # [K]
Matrix = tuple[Vector, ...]  # [K][K], symmetric


@dataclass(frozen=True)
class Model:
    """An analysed model.

    label: short and unique among the models, its name in plots and tables. path: where it is, or ""
    for tensors in memory.
    """

    label: str
    path: str


@dataclass(frozen=True)
class Trimmed:
    """What TIES' trim over the whole model keeps of a group, at one density.

    density: the share of the whole task vector that is kept: its entries of largest magnitude.
    threshold: [K] smallest magnitude kept, the same in all groups; entries equal to it are all
        kept, so the share may be slightly above `density`.
    kept: [K] share of this group's entries that is kept.
    kept_norm: [K] the kept entries' share of this group's squared norm; None if that is 0.
    sign_conflict: [K][K] share of opposite signs among the coordinates that both keep; 0 on the
        diagonal, None if they share none.
    sign_agreement: mean over coordinates of |#positive - #negative| / #kept (1 where nothing is
        kept), as TIES' `sign_agreement_ratio` has it.
    overlap: [K][K] |A and B| / min(|A|, |B|) of the sets of kept entries: |A and B| / k if both
        have k; 1 on the diagonal, None if one is empty.
    """

    density: float
    threshold: Vector
    kept: Vector
    kept_norm: Vector
    sign_conflict: Matrix
    sign_agreement: float
    overlap: Matrix


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of |tau| of a group, zeros included, estimated from a histogram with bins of an
    eighth of an octave: within 7 % of the value, mostly far less.

    levels: shares, ascending, e.g. 0.5 for the median. values: [K][levels].
    """

    levels: tuple[float, ...]
    values: tuple[Vector, ...]


@dataclass(frozen=True)
class Histogram:
    """How often each magnitude |tau| occurs in a group.

    log2_edges: [bins + 1] ascending borders in log2|tau|: 2^e times 1, 1.25, 1.5 and 1.75, so that
        bins are not equally wide on this scale. Empty if every entry is zero.
    counts: [K][bins] entries from edge j (inclusive) to edge j + 1. Magnitudes below 2^-48 and
        above 2^16 are counted in the outermost bins.
    zeros: [K] entries that are exactly 0; these are in no bin.
    counted: how many entries of each model were counted: all of a tensor of up to 65536, every
        sixteenth of a larger one, at fixed places. `counts` and `zeros` are scaled up, so that they
        add up to the group's parameters.
    """

    log2_edges: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]
    zeros: tuple[int, ...]
    counted: int


@dataclass(frozen=True)
class Group:
    """Statistics of the task vectors over a tensor, a layer, a module type or the whole model.

    name: of the tensor, layer ("0", "1", ..., or "other") or module type. parameters, tensors: how
        many. base_l2: norm of the base's weights.
    l1, l2: [K] norms of the task vectors. norm_share: [K] this group's share of the task vector's
        squared norm over the whole model; None if that is 0.
    unchanged: [K] share of entries that are exactly 0.
    dot, cosine: [K][K]; a cosine is None if a norm is 0.
    l1_distance, l2_distance: [K][K] norms of the differences of two task vectors, which equal those
        of the models.
    equal: [K][K] share of weights that are equal in both models (1 on the diagonal).
    sign_conflict: [K][K] share of opposite signs among the coordinates where neither is 0; 0 on the
        diagonal, None if there are no such coordinates.
    sign_agreement: mean over coordinates of |#positive - #negative| / #nonzero; 1 where all are 0.
    trimmed: one for each of `Analysis.densities`.
    """

    name: str
    parameters: int
    tensors: int
    base_l2: float
    l1: Vector
    l2: Vector
    norm_share: Vector
    unchanged: Vector
    dot: Matrix
    cosine: Matrix
    l1_distance: Matrix
    l2_distance: Matrix
    equal: Matrix
    sign_conflict: Matrix
    sign_agreement: float
    trimmed: tuple[Trimmed, ...]
    quantiles: Quantiles
    histogram: Histogram


@dataclass(frozen=True)
class Tensor:
    """A tensor of the base, and the groups in which it is counted.

    layer: name of its layer, or None if its name has no block number. dtypes: of base and models,
    as safetensors writes them.
    """

    name: str
    shape: tuple[int, ...]
    layer: str | None
    module_type: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Spectrum:
    """Singular values and subspaces of the task vectors of one matrix.

    rank: r, how many singular vectors subspaces have. effective_rank: [K] exp of the entropy of
        sigma / sum sigma (Roy & Vetterli 2007). stable_rank: [K] ||tau||_F^2 / sigma_1^2.
    top_singular_values: [K][r] the largest ones. energy: [K] their share of ||tau||_F^2.
    left_overlap, right_overlap: [K][K] ||A' B||_F^2 / r of the top r left (right) singular vectors:
        1 for equal subspaces, r / n for random ones. None if a task vector is 0.
    interference: the singular task interference ||(U'U - I) S (V'V - I)||_1 of all models' top r
        triplets together (TSV; entrywise sum of magnitudes); None with one model.
    """

    tensor: str
    shape: tuple[int, int]
    rank: int
    effective_rank: Vector
    stable_rank: Vector
    top_singular_values: tuple[Vector, ...]
    energy: Vector
    left_overlap: Matrix
    right_overlap: Matrix
    interference: float | None


@dataclass(frozen=True)
class Facts:
    """How an analysis was made.

    bytes_read: in all passes; passes: over the files. backend, isa: what computed. peak_anonymous:
    highest anonymous memory of the process, in bytes. thresholds: "sampled" or "exact", see
    `pymerge.analyze`; "none" without densities.
    """

    version: str
    seconds: float
    bytes_read: int
    passes: int
    backend: str
    isa: str | None
    device: str
    threads: int
    peak_anonymous: int
    thresholds: str = "sampled"


@dataclass(frozen=True)
class Analysis:
    """The result of `pymerge.analyze`.

    base: label and path. models: K of them. densities: those at which the trim was analysed.
    inventory: the analysed tensors, by name. tensors, layers, module_types, whole: the statistics;
    tensors in the order of `inventory`, layers by block number ("other", for tensors without one,
    last). spectra: of matrices, if requested. notes: what was left out and why, and other things
    that a reader should know.
    """

    base: Model
    models: tuple[Model, ...]
    densities: tuple[float, ...]
    inventory: tuple[Tensor, ...]
    whole: Group
    layers: tuple[Group, ...]
    module_types: tuple[Group, ...]
    tensors: tuple[Group, ...]
    spectra: tuple[Spectrum, ...]
    notes: tuple[str, ...]
    facts: Facts

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the models' labels."""
        return tuple(model.label for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, with "schema_version"."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return JSON that `from_json` reads; undefined numbers are null."""
        # This avoids `to_dict`, which copies every number of hundreds of groups.
        whole = {"schema_version": SCHEMA_VERSION, **_fields(self)}
        return json.dumps(whole, ensure_ascii=False, allow_nan=False, default=_fields)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Analysis:
        """Return the analysis that `to_dict` was called on.

        Raises:
            RequestError: another schema version, or fields that are missing or unknown.
        """
        return _from_dict(data, "analysis")

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "analysis") -> Analysis:
        """Return the analysis that `to_json` was called on; raises as `from_dict` does.

        where: what messages begin with.
        """
        data = load_json(text, where)
        if not isinstance(data, dict):
            raise RequestError(f"{where}: expected an object, got {type(data).__name__}")
        return _from_dict(data, where)


def _from_dict(data: Mapping[str, Any], where: str) -> Analysis:
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise RequestError(
            f"{where}: expected schema_version {SCHEMA_VERSION}, got {shown(version)}"
        )
    rest = {key: value for key, value in data.items() if key != "schema_version"}
    analysis: Analysis = decode(Analysis, rest, where)
    problem = next(_misfits(analysis), None)
    if problem is not None:
        raise RequestError(f"{where}: {problem}")
    return analysis


def _misfits(analysis: Analysis) -> Iterator[str]:
    """Yield what does not fit the number of models, of densities, or of tensors."""
    models, densities = len(analysis.models), len(analysis.densities)

    def sizes(path: str, values: Any, *expected: int) -> Iterator[str]:
        if len(values) != expected[0]:
            yield f"{path}: expected {expected[0]} entries, got {len(values)}"
        elif len(expected) > 1:
            for index, row in enumerate(values):
                yield from sizes(f"{path}[{index}]", row, *expected[1:])

    def fields(path: str, record: Any) -> Iterator[str]:
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if field.type in ("Vector", "Matrix"):
                shape = (models,) if field.type == "Vector" else (models, models)
                yield from sizes(f"{path}.{field.name}", value, *shape)

    groups = {"whole": analysis.whole}
    for scope in ("layers", "module_types", "tensors"):
        groups |= {f"{scope}[{k}]": one for k, one in enumerate(getattr(analysis, scope))}
    yield from sizes("tensors", analysis.tensors, len(analysis.inventory))
    for path, group in groups.items():
        yield from fields(path, group)
        yield from sizes(f"{path}.trimmed", group.trimmed, densities)
        for k, trimmed in enumerate(group.trimmed):
            yield from fields(f"{path}.trimmed[{k}]", trimmed)
        levels, bins = len(group.quantiles.levels), max(0, len(group.histogram.log2_edges) - 1)
        yield from sizes(f"{path}.quantiles.values", group.quantiles.values, models, levels)
        yield from sizes(f"{path}.histogram.counts", group.histogram.counts, models, bins)
        yield from sizes(f"{path}.histogram.zeros", group.histogram.zeros, models)
    for k, spectrum in enumerate(analysis.spectra):
        path = f"spectra[{k}]"
        yield from fields(path, spectrum)
        values = spectrum.top_singular_values
        yield from sizes(f"{path}.top_singular_values", values, models, spectrum.rank)


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
