"""The output ritual: what is checked, measured and written around the making of a directory.

    with Publication(out, inputs, force=force, quiet=quiet) as output:
        plan = output.open(lambda: make_plan(...))  # what is wrong is collected
        output.begin()  # raises all that is wrong; nothing has been touched before
        ...  # writes files into output.path
        return output.publish(output.merge_report(plan, config, ...))

A command has its own words and its own report; the order, and what happens when something fails, is
the same for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from pymerge.config import MergeConfig
from pymerge.errors import RequestError
from pymerge.memory import PeakMemory
from pymerge.merging.card import model_card
from pymerge.merging.progress import Recorder
from pymerge.merging.report import REPORT_NAME, MergeReport, OutputReport, package_version
from pymerge.output import OutputDirectory, ShardWriter, copy_side_files, write_file
from pymerge.output.layout import INDEX_NAME, Layout
from pymerge.plan import MergePlan

__all__ = ["Publication", "Report", "check_output"]

PathLike = str | os.PathLike[str]
T = TypeVar("T")


class Report(Protocol):
    """What is known of a finished run; the directory gets it as JSON."""

    warnings: list[str]
    seconds: float

    def to_json(self) -> str: ...


R = TypeVar("R", bound=Report)


def check_output(out: PathLike, inputs: Sequence[PathLike], *, force: bool) -> None:
    """Raise RequestError with every reason why `out` cannot be written, before hours of work."""
    problems = _directory(out, inputs, force).check()
    if problems:
        raise RequestError(problems)


def _directory(out: PathLike, inputs: Sequence[PathLike], force: bool) -> OutputDirectory:
    return OutputDirectory(Path(out), force=force, inputs=[Path(path) for path in inputs])


class Publication:
    """An output directory in the making.

    Attributes:
        out: the directory that will be there.
        path: the temporary directory in which it is made; from `begin` on.
        problems: what is wrong with the request, as far as it is known.
        recorder: shows and keeps the phases; the first one is "plan".
    """

    path: Path

    def __init__(
        self,
        out: PathLike,
        inputs: Sequence[PathLike],
        *,
        force: bool,
        quiet: bool = True,
        report: PathLike | None = None,
    ) -> None:
        """Remember what is wanted; nothing is touched.

        Args:
            out: the directory to write.
            inputs: files and directories that are read.
            force: replace an existing `out`.
            quiet: show no progress on stderr.
            report: a file that gets the report, too.
        """
        self.out = Path(out)
        self.problems: list[str] = []
        self.recorder = Recorder(quiet=quiet)
        self._directory = _directory(out, inputs, force)
        self._report = None if report is None else Path(report)
        self._peak = PeakMemory()
        self._started = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> Publication:
        self._stack.enter_context(self._peak)
        self._stack.enter_context(self.recorder)
        self.recorder.phase("plan", 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def collect(self, make: Callable[[], T]) -> T | None:
        """Return what a function makes; if it raises RequestError, collect its problems."""
        try:
            return make()
        except RequestError as error:
            self.problems += error.problems
            return None

    def keep(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that lasts as long as this one."""
        return self._stack.enter_context(context)

    def open(self, make: Callable[[], AbstractContextManager[T]]) -> T | None:
        """Collect what a function makes, and keep it open."""
        return self.collect(lambda: self.keep(make()))

    def begin(self) -> None:
        """Create the temporary directory.

        Raises:
            RequestError: something is wrong with the request: all problems.
            MergeError: the directory cannot be created.
        """
        problems = [*self.problems, *self._report_problems(), *self._directory.check()]
        if problems:
            raise RequestError(problems)
        self._stack.enter_context(self._directory)
        self.path = self._directory.path

    def _report_problems(self) -> list[str]:
        path = self._report
        if path is not None and not path.parent.is_dir():
            return [f"report: the directory {path.parent} does not exist"]
        if path is not None and path.is_dir():
            return [f"report: expected a file to write, got the directory {path}"]
        return []

    def write(self, name: str, text: str) -> None:
        """Write a small file into the directory.

        Raises:
            MergeError: it cannot be written.
        """
        write_file(self.path / name, text)

    @contextmanager
    def shards(self, layout: Layout, **ring: int) -> Iterator[ShardWriter]:
        """Yield a writer for all tensors of a layout; afterwards the files and their index exist.

        Args:
            ring: `slot_bytes` and `slots` of the writer.
        """
        with ShardWriter(self.path, layout, **ring) as writer:
            yield writer
            self.recorder.phase("write", 0)
            writer.finish()
        if layout.index is not None:
            self.write(INDEX_NAME, layout.index.decode())

    def describe(
        self, plan: MergePlan, config: MergeConfig, search: Mapping[str, Any] | None = None
    ) -> None:
        """Copy the files that belong beside the weights, and write the model card."""
        self.recorder.phase("finish", 0)
        dtypes = {tensor.dtype for tensor in plan.tensors.values() if tensor.compute is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        copied = copy_side_files(plan.side_files, self.path, dtype=dtype)
        card = model_card(
            self.out.name, config, version=package_version(), side_files=copied, search=search
        )
        self.write("README.md", card)

    def merge_report(self, plan: MergePlan, config: MergeConfig, **own: Any) -> MergeReport:
        """Return the report of a model that was written; `own` is what only the caller knows."""
        files = {shard.filename: shard.nbytes for shard in plan.layout.shards}
        return MergeReport(
            method=config.method.name,
            config=config.raw,
            config_text=config.text,
            seed=plan.seed,
            threads=plan.threads,
            output=OutputReport(str(self.out.absolute()), files, sum(files.values())),
            tensors=len(plan.tensors),
            parameters=plan.parameters_count,
            phases=self.recorder.phases,
            seconds=0.0,
            peak_anonymous=0,
            peak_resident=0,
            **own,
        )

    def publish(self, report: R, name: str = REPORT_NAME) -> R:
        """Write the report, and put the directory under its name; return the report, complete.

        Raises:
            MergeError: something cannot be written.
        """
        self._measure(report)
        self.write(name, report.to_json())
        self.commit()
        report.warnings = [*report.warnings, *self._directory.warnings]
        self._measure(report)
        if self._report is not None:
            write_file(self._report, report.to_json())
        return report

    def commit(self) -> None:
        """Put the directory under its name; for what has no report."""
        self._directory.commit()
        self.recorder.close()

    def _measure(self, report: Report) -> None:
        report.seconds = time.monotonic() - self._started
        if isinstance(report, MergeReport):
            report.peak_anonymous = self._peak.anonymous
            report.peak_resident = self._peak.resident
