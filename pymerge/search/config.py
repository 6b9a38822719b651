"""Reads the configuration of a search."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)

from pymerge.config import MergeConfig, load_config
from pymerge.config.problems import Fault, Number, validated
from pymerge.config.reader import config_of, yaml_text
from pymerge.config.yaml_lines import LinedYaml, read_yaml
from pymerge.errors import RequestError, nearest, shown
from pymerge.search.data import Split, check_splits, read_split
from pymerge.search.presets import preset
from pymerge.search.samplers import SAMPLERS

__all__ = ["Budget", "SearchConfig", "load_search"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Domain(_Strict):
    low: Number | None = None
    high: Number | None = None
    scale: Literal["linear", "log"] = "linear"
    values: list[Number] | None = None
    points: StrictInt | None = None
    initial: Number | None = None
    groups: StrictStr | StrictInt | dict[str, StrictStr] | None = Field(
        None, description="thirds, layers, an integer, or a mapping of regular expressions"
    )
    shared: StrictBool = False


class _Budget(_Strict):
    evaluations: StrictInt | None = None
    seconds: Number | None = None


_SPLIT = "a text or a mapping"
_PARAMETER = f"a list of numbers, null, or a mapping of {', '.join(_Domain.model_fields)}"


class _Data(_Strict):
    search: StrictStr | dict[str, Any] = Field(description=_SPLIT)
    report: StrictStr | dict[str, Any] | None = Field(None, description=_SPLIT)


class _Document(_Strict):
    merge: StrictStr | dict[str, Any] = Field(description="a path or a mapping")
    data: _Data = Field(description="{search: ..., report: ...}")
    metric: StrictStr | None = Field(None, description="package.module:function")
    arguments: dict[str, Any] = {}
    receives: Literal["tensors", "folder"] = "tensors"
    direction: Literal["maximize", "minimize"] = "maximize"
    optimise: StrictStr | None = None
    preset: StrictStr | None = None
    sampler: StrictStr | None = None
    parameters: dict[
        str, Annotated[_Domain | list[Number] | None, Field(description=_PARAMETER)]
    ] = Field({}, description="a mapping of paths")
    budget: StrictInt | _Budget | None = Field(
        None, description="an integer, or {evaluations: ..., seconds: ...}"
    )
    seed: StrictInt = Field(0, ge=0, lt=2**63, description="an integer >= 0 and below 2^63")
    sigma: Number | None = Field(None, gt=0, le=1, description="a number above 0 and at most 1")
    population: StrictInt | None = Field(None, ge=3, description="an integer >= 3")
    max_failures: StrictInt = Field(10, ge=1, description="an integer >= 1")
    allow_test_split: StrictBool = False
    workers: StrictInt = Field(1, ge=1, description="an integer >= 1")
    executor: Literal["threads", "processes"] = "threads"


@dataclass(frozen=True)
class Budget:
    """When a search ends: after so many evaluations, or so many seconds of searching."""

    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SearchConfig:
    """A valid configuration of a search; docs/search.md describes its keys."""

    merge: MergeConfig
    parameters: dict[str, dict[str, Any]]
    sampler: str
    metric: str | Callable[..., Any]
    arguments: dict[str, Any]
    search_data: Split
    report_data: Split | None
    budget: Budget
    receives: str = "tensors"
    direction: str = "maximize"
    optimise: str | None = None
    preset: str | None = None
    seed: int = 0
    sigma: float | None = None
    population: int | None = None
    max_failures: int = 10
    allow_test_split: bool = False
    workers: int = 1
    executor: str = "threads"

    @property
    def metric_name(self) -> str:
        """What records call the metric."""
        if isinstance(self.metric, str):
            return self.metric
        kind = type(self.metric)
        own = self.metric if hasattr(self.metric, "__qualname__") else kind
        return f"{own.__module__}:{own.__qualname__}"

    def identity(self) -> dict[str, Any]:
        """Return all that trials depend on, as plain values: a study is of one of these.

        The budget, the workers and how many failures are put up with may change.
        """
        return {
            "merge": self.merge.raw,
            "parameters": self.parameters,
            "sampler": self.sampler,
            "metric": self.metric_name,
            "arguments": self.arguments,
            "data": {
                "search": self.search_data.to_dict(),
                "report": self.report_data and self.report_data.to_dict(),
            },
            "receives": self.receives,
            "direction": self.direction,
            "optimise": self.optimise,
            "seed": self.seed,
            "sigma": self.sigma,
            "population": self.population,
            "allow_test_split": self.allow_test_split,
        }


def load_search(
    source: str | os.PathLike[str] | Mapping[str, Any],
    metric: str | Callable[..., Any] | None = None,
    **changes: Any,
) -> SearchConfig:
    """Read and check the configuration of a search.

    Args:
        source: path of a YAML file, or its content as a mapping.
        metric: instead of the file's.
        changes: of the keys `seed`, `workers`, `executor`, `evaluations` and `seconds`, where not
            None.

    Raises:
        RequestError: listing what is wrong, with its line.
    """
    if isinstance(source, Mapping):
        document = LinedYaml("search", dict(source))
    else:
        document, _ = read_yaml(source, "a search configuration", "merge: ..., data: ...")
    found = validated(_Document, document.data, document, _words(document))
    return _Reader(found, document, metric, changes).read()


class _Reader:
    def __init__(
        self,
        found: _Document,
        document: LinedYaml,
        metric: str | Callable[..., Any] | None,
        changes: Mapping[str, Any],
    ) -> None:
        self.found = found
        self.document = document
        self.metric = metric if metric is not None else found.metric
        self.changes = {key: value for key, value in changes.items() if value is not None}
        self.problems: list[str] = []

    def where(self, *path: str | int) -> str:
        shown = ".".join(str(part) for part in path)
        return f"{self.document.where(path)}: {shown}"

    def read(self) -> SearchConfig:
        found = self.found
        merge = self._merge()
        defaults: dict[str, Any] = {}
        if found.preset is not None:
            try:
                defaults = preset(found.preset, merge, self.where("preset"))
            except RequestError as error:
                self.problems += error.problems
        sampler = found.sampler or defaults.get("sampler")
        if sampler is None:
            self.problems.append(
                f"{self.document.name}: sampler: is missing; expected one of {', '.join(SAMPLERS)}"
            )
        elif sampler not in SAMPLERS:
            self.problems.append(
                f"{self.where('sampler')}: expected one of {', '.join(SAMPLERS)}; got "
                f"{sampler!r}{nearest(sampler, SAMPLERS)}"
            )
        if self.metric is None:
            self.problems.append(
                f"{self.document.name}: metric: is missing; expected package.module:function, here "
                "or as --metric"
            )
        search, report = self._splits()
        budget = self._budget(defaults, str(sampler))
        numbers = {key: self._number(key, getattr(found, key)) for key in ("seed", "workers")}
        if self.problems or search is None:
            raise RequestError(self.problems)
        assert sampler is not None
        assert self.metric is not None
        return SearchConfig(
            merge=merge,
            parameters=self._parameters(defaults),
            sampler=sampler,
            metric=self.metric,
            arguments=found.arguments,
            search_data=search,
            report_data=report,
            budget=budget,
            receives=found.receives,
            direction=found.direction,
            optimise=found.optimise,
            preset=found.preset,
            seed=numbers["seed"],
            sigma=found.sigma if found.sigma is not None else defaults.get("sigma"),
            population=found.population,
            max_failures=found.max_failures,
            allow_test_split=found.allow_test_split,
            workers=numbers["workers"],
            executor=self.changes.get("executor", found.executor),
        )

    def _number(self, key: str, value: int) -> int:
        value = self.changes.get(key, value)
        least = 1 if key == "workers" else 0
        if not isinstance(value, int) or value < least:
            self.problems.append(f"{key}: expected an integer >= {least}, got {value!r}")
        return value

    def _merge(self) -> MergeConfig:
        merge = self.found.merge
        if isinstance(merge, str):
            if not os.path.exists(merge):
                raise RequestError(f"{self.where('merge')}: no such file: {shown(merge)}")
            return load_config(Path(merge))
        if not self.document.lines:  # of a mapping
            return load_config(merge)
        return config_of(self.document.part("merge"), yaml_text(merge))

    def _splits(self) -> tuple[Split | None, Split | None]:
        splits: list[Split | None] = []
        for key in ("search", "report"):
            value = getattr(self.found.data, key)
            try:
                where = self.where("data", key)
                splits.append(None if value is None else read_split(value, where))
            except RequestError as error:
                self.problems += error.problems
                splits.append(None)
        search, report = splits
        if search is not None:
            allowed = self.found.allow_test_split
            self.problems += check_splits(search, report, allowed, self.where("data"))
        return search, report

    def _budget(self, defaults: Mapping[str, Any], sampler: str) -> Budget:
        given = self.found.budget
        if isinstance(given, int):
            given = _Budget(evaluations=given)
        evaluations = None if given is None else given.evaluations
        seconds = None if given is None else given.seconds
        if given is None and not {"evaluations", "seconds"} & set(self.changes):
            evaluations = defaults.get("budget", {}).get("evaluations")
        evaluations = self.changes.get("evaluations", evaluations)
        seconds = self.changes.get("seconds", seconds)
        for key, value in (("evaluations", evaluations), ("seconds", seconds)):
            if value is not None and value <= 0:
                self.problems.append(
                    f"{self.where('budget')}: {key}: expected more than 0, got {value:g}"
                )
        if evaluations is None and seconds is None and sampler != "grid":
            self.problems.append(
                f"{self.document.name}: budget: is missing; expected a number of evaluations, or "
                "{evaluations: ..., seconds: ...}"
            )
        return Budget(evaluations, None if seconds is None else float(seconds))

    def _parameters(self, defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what is searched: the preset's, as changed by the file's; null takes one away."""
        merged: dict[str, dict[str, Any]] = dict(defaults.get("parameters", {}))
        for path, value in self.found.parameters.items():
            if value is None:
                if path not in merged:
                    known = ", ".join(merged) or "none"
                    raise RequestError(
                        f"{self.where('parameters', path)}: null takes away a parameter of the "
                        f"preset (there are: {known})"
                    )
                del merged[path]
            elif isinstance(value, list):
                merged[path] = {"values": value}
            else:
                own = value.model_dump(exclude_unset=True, exclude_none=True)
                if "values" in own:
                    merged[path] = own
                else:
                    merged[path] = {**merged.get(path, {}), **own}
        return merged


def _words(document: LinedYaml) -> Callable[[Fault], str | None]:
    def words(fault: Fault) -> str | None:
        if (fault.kind, fault.path) == ("missing", ("data",)):
            return (
                f"{document.name}: data: is missing; say which data chooses: data: "
                "{search: validation}"
            )
        return None

    return words
