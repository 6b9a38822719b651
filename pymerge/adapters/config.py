"""`pymerge merge-adapters`: a configuration in mergekit's YAML whose models are adapters."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from pymerge.adapters.combine import (
    ADAPTER_METHODS,
    check_rank,
    merge_adapters,
    merge_by,
    method_of,
)
from pymerge.adapters.dialects import PARAMETERS
from pymerge.adapters.onto import merge_onto_base
from pymerge.checkpoint.peft.adapter import Adapter
from pymerge.checkpoint.peft.files import CODES, load, write
from pymerge.config.reader import config_of, read_document
from pymerge.config.yaml_lines import YamlPath, dotted
from pymerge.errors import RequestError, nearest, shown
from pymerge.merging.progress import Recorder
from pymerge.merging.publish import Publication
from pymerge.merging.report import MergeReport, versions
from pymerge.plan.parameters import resolve_parameters, unused_filters

__all__ = ["REPORT", "AdaptersReport", "run_merge_adapters"]

REPORT = "pymerge_adapters.json"
_OWN = ("rank", "energy", "saved", "dtype")
_KNOWN = ("merge_method", "models", "parameters", *_OWN)
# Takes the place of a base in a configuration of adapters, which need none.
_NO_BASE = "(zero)"


@dataclass
class AdaptersReport:
    """The record of a merge: `captured` is the share of each module's delta that the result
    holds."""

    method: str
    out: str
    config_text: str
    inputs: dict[str, dict[str, int]]
    modules: int
    ranks: list[int]
    captured: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def summary(self) -> str:
        """Return a human-readable summary of a line or two."""
        ranks = f"rank {self.ranks[0]}"
        if self.ranks[0] != self.ranks[-1]:
            ranks = f"ranks {self.ranks[0]} to {self.ranks[-1]}"
        text = (
            f"{self.method}: {len(self.inputs)} adapters, {self.modules} modules, {ranks} -> "
            f"{self.out}, {self.seconds:.1f} s"
        )
        if self.captured:
            least = min(self.captured, key=lambda name: self.captured[name])
            text += f"\n  energy: least {self.captured[least]:.4f} ('{least}')"
        return text


def run_merge_adapters(
    config: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    force: bool = False,
    quiet: bool = True,
    **options: Any,
) -> AdaptersReport | MergeReport:
    """Merge the adapters of a configuration: into one adapter, or onto their base.

    Args:
        config: path of a YAML file, or its content: `merge_method`, `models` (each `model` is an
            adapter's directory, with its `parameters`), `parameters`; and `rank` or `energy`,
            `saved` and `dtype` as in `merge_adapters` and `Adapter.save`. With `base_model` (and
            one of the methods of `pymerge methods`) the merged deltas are added to the base, and a
            whole model is written; there is no truncation to a rank, and only one rounding.
        out: directory to write; must not exist unless `force`.
        seed: of random masks.
        force: replace an existing `out`.
        quiet: show no progress on stderr.
        options: for a whole model: memory, shard_size (bytes), threads.

    Raises:
        RequestError: listing every problem with the configuration, then with the adapters.
        MergeError: the output could not be written.
    """
    request = _Request(config)
    with ExitStack() as opened:
        adapters: list[Adapter] = []
        output = Publication(out, request.paths, force=force, quiet=quiet)
        output.problems += request.problems
        for path, name in zip(request.paths, request.names, strict=True):
            label = f"{name} ({path})"
            adapter = output.collect(lambda path=path, label=label: load(path, label))
            if adapter is not None:
                opened.callback(adapter.close)
                adapters.append(adapter)
        if request.onto_base and not output.problems:
            return request.merge_onto_base(
                adapters, out, seed=seed, force=force, quiet=quiet, **options
            )
        with output:
            output.begin()
            merged = request.merge(adapters, seed, output.recorder)
            ranks = sorted(module.rank for module in merged.modules.values())
            report = AdaptersReport(
                request.method,
                str(output.out.absolute()),
                request.document_text,
                {
                    adapter.label: {str(path): size for path, size in adapter.files}
                    for adapter in adapters
                },
                len(merged.modules),
                ranks,
                merged.captured,
                warnings=[*request.warnings, *(w for one in adapters for w in one.warnings)],
            )
            output.recorder.phase("write", 0)
            write(merged, output.path, request.dtype)
            return output.publish(report, REPORT)


class _Request:
    """A configuration, read and checked; problems are collected."""

    def __init__(self, config: str | os.PathLike[str] | Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.paths: list[str] = []
        self.names: list[str] = []
        self._config: Any = None
        self.onto_base = False
        self._weights: list[float] = []
        self._given: dict[str, Any] = {}
        self._document, self.document_text = read_document(config)
        data = self._document.data
        self.rank, self.energy = data.get("rank"), data.get("energy")
        self.saved, self.dtype = data.get("saved", "error"), data.get("dtype")
        method = data.get("merge_method")
        self.method = method if isinstance(method, str) else ""
        if self.method not in ADAPTER_METHODS:
            self._read_method()
        else:
            self._read_by_name()
        self._check_own()

    def _where(self, path: YamlPath) -> str:
        where = self._document.where(path)
        return f"{where}: {dotted(path)}" if path else where

    def _check_own(self) -> None:
        try:
            check_rank(self.rank, self.energy, self.method, self._document.name)
        except RequestError as error:
            self.problems += error.problems
        for key, known in (("saved", ("error", "drop")), ("dtype", tuple(CODES))):
            value = self._document.data.get(key)
            if value is not None and value not in known:
                self.problems.append(
                    f"{self._where((key,))}: expected one of {', '.join(known)}, got "
                    f"{shown(value)}{nearest(str(value), known)}"
                )

    def _read_method(self) -> None:
        """Read a merge method on tensors: the syntax is that of `pymerge merge`."""
        data = {key: value for key, value in self._document.data.items() if key not in _OWN}
        if isinstance(data.get("merge_method"), str):
            try:
                spec = method_of(self.method, self._where(("merge_method",)))
                if spec.needs_base:
                    data.setdefault("base_model", _NO_BASE)
            except RequestError as error:
                self.problems += error.problems
                return
        self.onto_base = self._document.data.get("base_model") is not None
        cut = [key for key in ("rank", "energy") if self._document.data.get(key) is not None]
        if self.onto_base and cut:
            self.problems.append(
                f"{self._where((cut[0],))}: applies to an adapter, but with base_model a whole "
                "model is written; remove one of them"
            )
        try:
            self._config = config_of(
                dataclasses.replace(self._document, data=data), self.document_text
            )
        except RequestError as error:
            self.problems += error.problems
            return
        self.warnings += self._config.warnings
        self.paths = [entry.path for entry in self._config.models]
        self.names = [entry.name for entry in self._config.models]

    def _read_by_name(self) -> None:
        """Read `cat`, `svd`, or one of PEFT's combinations."""
        data = self._document.data
        for key in data:
            if key not in _KNOWN:
                self.problems.append(
                    f"{self._where((key,))}: unknown key '{key}'{nearest(key, _KNOWN)} (known: "
                    f"{', '.join(_KNOWN)})"
                )
        known = [parameter.name for parameter in PARAMETERS.get(self.method, ())]
        self._given = self._parameters(("parameters",), data.get("parameters"), [*known, "weight"])
        shared = self._given.pop("weight", 1.0)
        entries = data.get("models")
        if not isinstance(entries, list) or not entries:
            self.problems.append(
                f"{self._where(('models',))}: expected a list of adapters, got {shown(entries)}"
            )
            return
        for index, entry in enumerate(entries):
            at: YamlPath = ("models", index)
            path = entry.get("model") if isinstance(entry, Mapping) else None
            if not isinstance(path, str) or not path or set(entry) - {"model", "parameters"}:
                self.problems.append(
                    f"{self._where(at)}: expected {{model: an adapter's directory, parameters: "
                    "...}"
                )
                continue
            own = self._parameters((*at, "parameters"), entry.get("parameters"), ["weight"])
            self.paths.append(path)
            self.names.append(dotted(at))
            self._weights.append(own.get("weight", shared))

    def _parameters(self, path: YamlPath, value: Any, known: list[str]) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problems.append(f"{self._where(path)}: expected a mapping, got {shown(value)}")
            return {}
        for key in value:
            if key not in known:
                self.problems.append(
                    f"{self._where((*path, key))}: unknown parameter '{key}' of method "
                    f"{self.method}{nearest(str(key), known)} (known: {', '.join(known)})"
                )
        return {key: item for key, item in value.items() if key in known}

    def merge_onto_base(self, adapters: list[Adapter], out: Any, **options: Any) -> MergeReport:
        """Merge opened adapters, and write the base plus the result."""
        return merge_onto_base(
            self._config, adapters, out, saved=self.saved, dtype=self.dtype, **options
        )

    def merge(self, adapters: list[Adapter], seed: int, recorder: Recorder) -> Adapter:
        """Merge opened adapters."""
        if self._config is None:
            given = dict(self._given)
            if any(parameter.name == "seed" for parameter in PARAMETERS.get(self.method, ())):
                given.setdefault("seed", seed)
            return merge_adapters(
                adapters,
                self.method,
                weights=self._weights,
                rank=self.rank,
                energy=self.energy,
                saved=self.saved,
                **given,
            )
        names = sorted({m.weight for one in adapters for m in one.modules.values()})
        problems: list[str] = []
        resolved = resolve_parameters(self._config, names, problems)
        if problems:
            raise RequestError(problems)
        self.warnings += unused_filters(self._config, names)
        return merge_by(
            self._config.method,
            adapters,
            resolved.__getitem__,
            self.rank,
            self.energy,
            self.saved,
            seed=seed,
            progress=recorder,
        )
