"""The record of a finished merge, written beside the weights as `pymerge_report.json`."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymerge.byte_sizes import format_size
from pymerge.errors import RequestError
from pymerge.strict_json import decode, load_json

__all__ = [
    "REPORT_NAME",
    "InputFile",
    "InputReport",
    "MergeReport",
    "OutputReport",
    "Phase",
    "versions",
]

REPORT_NAME = "pymerge_report.json"
_FORMAT = 1


@dataclass
class InputFile:
    """A weight file that was read; `sha256` (hex) if checksums were requested."""

    name: str
    bytes: int
    sha256: str | None = None


@dataclass
class InputReport:
    """A checkpoint that was read; `label` is its name in messages."""

    label: str
    path: str
    files: list[InputFile] = field(default_factory=list)


@dataclass
class OutputReport:
    """The written files: names with their sizes, and the sum."""

    path: str
    shards: dict[str, int]
    bytes: int


@dataclass
class Phase:
    """Time and bytes of one phase: "plan", "sample", "thresholds", a method's name, "write"..."""

    seconds: float
    bytes: int = 0


@dataclass
class MergeReport:
    """What was merged, how, and at what cost.

    `tensors` and `parameters` count the output's; `phases` are in order; `seconds` is the total
    wall time; `peak_anonymous` (RssAnon: allocated memory) and `peak_resident` (VmHWM: with mapped
    inputs) are bytes. `backends` names the one that ran each op, `why` gives the reason;
    `peak_device` is the peak of the GPU's memory; `search` records how the coefficients were
    chosen, if a search chose them.
    """

    method: str
    config: dict[str, Any]
    config_text: str
    seed: int
    backend: str
    isa: str | None
    device: str
    threads: int
    inputs: list[InputReport]
    output: OutputReport
    tensors: int
    parameters: int
    phases: dict[str, Phase]
    seconds: float
    peak_anonymous: int
    peak_resident: int
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    backends: dict[str, str] = field(default_factory=dict)
    why: str = ""
    peak_device: int = 0
    search: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the report to a file."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> MergeReport:
        """Return the report that a JSON text contains.

        Raises:
            RequestError: not a report, or of a format that this version does not know.
        """
        data = load_json(text, "report")
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise RequestError(f"report: expected a report of format {_FORMAT}")
        return decode(cls, data, "report")

    def summary(self) -> str:
        """Return a readable summary of a few lines."""
        files = "1 file" if len(self.output.shards) == 1 else f"{len(self.output.shards)} files"
        isa = f" ({self.isa})" if self.isa else ""
        lines = [
            f"{self.method}: {self.tensors} tensors, {self.parameters:,} parameters -> "
            f"{self.output.path}",
            f"  wrote {format_size(self.output.bytes)} in {files}, {self.seconds:.2f} s, backend "
            f"{self.backend}{isa} on {self.device}, {_count(self.threads, 'thread')}",
        ]
        for name, phase in self.phases.items():
            rate = ""
            if phase.bytes and phase.seconds > 0:
                rate = (
                    f", {format_size(phase.bytes)} at {phase.bytes / phase.seconds / 1e9:.2f} GB/s"
                )
            lines.append(f"  {name}: {phase.seconds:.2f} s{rate}")
        if len(set(self.backends.values())) > 1:
            lines.append("  " + ", ".join(f"{op}: {name}" for op, name in self.backends.items()))
        lines.append(
            f"  peak memory {format_size(self.peak_anonymous)} allocated, "
            f"{format_size(self.peak_resident)} with mapped files"
            + (f", {format_size(self.peak_device)} of the GPU's" if self.peak_device else "")
        )
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of the packages on which a result depends."""
    found = {"pymerge": package_version(), "python": platform.python_version()}
    # never import it only for the version: that takes a second
    torch = sys.modules.get("torch")
    found["torch"] = str(torch.__version__) if torch is not None else distribution_version("torch")
    found["platform"] = platform.platform()
    return found


def package_version() -> str:
    """Return pymerge's own version."""
    from pymerge._version import __version__

    return __version__


def distribution_version(name: str) -> str:
    """Return the version of an installed distribution, or "not installed"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _count(number: int, thing: str) -> str:
    return f"1 {thing}" if number == 1 else f"{number} {thing}s"
