"""What a file of statistics says of itself, in the metadata of its safetensors header.

No torch here: a plan reads headers only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from pymerge.errors import RequestError, listed, nearest
from pymerge.strict_json import decode, load_json

__all__ = [
    "KINDS",
    "METADATA_KEY",
    "StatisticsRecord",
    "filename_of",
    "foreign_problem",
    "kind_problem",
    "shape_problem",
]

KINDS = ("fisher", "gram")
METADATA_KEY = "pymerge_statistics"
_VERSION = 1


def filename_of(kind: str) -> str:
    """Return the name of a file of statistics beside a model: `fisher.safetensors`."""
    return f"{kind}.safetensors"


@dataclass(frozen=True)
class StatisticsRecord:
    """Where statistics come from.

    Attributes:
        kind: "fisher" (a diagonal for each parameter, of its shape) or "gram" (X^T X of the inputs
            of a linear layer or a convolution, [in, in], by the name of its weight).
        estimator: how they were estimated, e.g. "exact, expected labels".
        examples: how many.
        tokens: rows of X of the layer that saw the most (of a convolution, patches); 0 for Fisher
            information.
        transposed: weights of shape [in, out] (transformers' Conv1D), not [out, in].
        aliases: {other name of a shared parameter: the name that the tensor has}.
        model_tensors: names of all tensors of the model.
        made_by: the version of pymerge.
        settings: all settings of `pymerge collect`, as JSON values; empty otherwise.
    """

    kind: str
    estimator: str = ""
    examples: int = 0
    tokens: int = 0
    transposed: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    model_tensors: tuple[str, ...] = ()
    made_by: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def name_of(self, tensor: str, names: Iterable[str] | Mapping[str, Any]) -> str | None:
        """Return the name under which the statistics of a model's tensor are kept, or None."""
        if tensor in names:
            return tensor
        other = self.aliases.get(tensor)
        return other if other is not None and other in names else None

    def to_metadata(self) -> dict[str, str]:
        """Return it as metadata of a safetensors file."""
        values = {
            "version": _VERSION,
            "kind": self.kind,
            "estimator": self.estimator,
            "examples": self.examples,
            "tokens": self.tokens,
            "transposed": sorted(self.transposed),
            "aliases": dict(self.aliases),
            "model_tensors": list(self.model_tensors),
            "made_by": self.made_by,
            **({"settings": dict(self.settings)} if self.settings else {}),
        }
        return {"format": "pt", METADATA_KEY: json.dumps(values, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> StatisticsRecord:
        """Read the metadata of a file.

        Raises:
            RequestError: the file was not written by `save_statistics`, or by a later version.
        """
        if METADATA_KEY not in metadata:
            raise RequestError(
                f"{where}: is no file of statistics: its metadata has no {METADATA_KEY!r}; "
                "expected one that pymerge.save_statistics wrote"
            )
        where = f"{where}: its metadata {METADATA_KEY!r}"
        values = load_json(metadata[METADATA_KEY], f"{where} is damaged")
        version = values.get("version") if isinstance(values, dict) else None
        if type(version) is int and version not in range(1, _VERSION + 1):
            raise RequestError(f"{where} has format {version}; this pymerge reads up to {_VERSION}")
        read = decode(_Metadata, values, f"{where} is damaged")
        if read.kind not in KINDS:
            raise RequestError(
                f"{where}: statistics of kind {read.kind!r}; expected one of {', '.join(KINDS)}"
            )
        fields = {key: value for key, value in vars(read).items() if key != "version"}
        return cls(**fields)


@dataclass(frozen=True)
class _Metadata:
    """What a file has of a `StatisticsRecord`."""

    version: int
    kind: str
    estimator: str
    examples: int
    tokens: int
    transposed: frozenset[str]
    aliases: dict[str, str]
    model_tensors: tuple[str, ...]
    made_by: str
    settings: dict[str, Any] = field(default_factory=dict)


def kind_problem(record: StatisticsRecord, needed: str, method: str) -> str | None:
    """Say that a method needs statistics of another kind."""
    if record.kind == needed:
        return None
    return f"holds {record.kind} statistics; {method} needs {needed}"


def foreign_problem(foreign: Sequence[str], count: int, model: str, known: Iterable[str]) -> str:
    """Say that statistics are those of another architecture.

    Args:
        foreign: the tensors that the model does not have. count: the tensors of the statistics.
        model: its name in messages. known: the names of its tensors.
    """
    hint = nearest(foreign[0], known) if len(foreign) == 1 else ""
    return (
        f"statistics of another architecture: {model} lacks {len(foreign)} of their {count} "
        f"tensors: {listed(foreign)}{hint}"
    )


def shape_problem(
    record: StatisticsRecord, name: str, shape: Sequence[int], wanted: Sequence[int]
) -> str | None:
    """Return what is wrong with the shape of statistics for a tensor of shape `wanted`, or None."""
    if record.kind == "fisher":
        if tuple(shape) != tuple(wanted):
            return f"has shape {tuple(shape)}, expected {tuple(wanted)} like the tensor"
        return None
    across = name in record.transposed
    if len(wanted) < 2 or (across and len(wanted) > 2):
        return f"is a Gram matrix, but the tensor has shape {tuple(wanted)}, which is no matrix"
    # A convolution's weight [out, in, *kernel] is that of a linear layer on patches.
    inputs = wanted[0] if across else prod(wanted[1:])
    if tuple(shape) != (inputs, inputs):
        return (
            f"has shape {tuple(shape)}, expected {(inputs, inputs)} for the weight {tuple(wanted)}"
        )
    return None
