"""Runs the quality benchmark: `python -m benchmarks.quality text|published|vision|llm [...]`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.quality.allocation import keep_freed_memory
from benchmarks.quality.runner import Run
from benchmarks.quality.suite import Suite
from benchmarks.tables import RESULTS

__all__ = ["SUITES", "main"]

PLOTS = Path(__file__).resolve().parent.parent.parent / "docs" / "images"
_DISK = 3_000_000_000


def _text(cache: Cache, log: Log, quick: bool, whole_tests: bool = False) -> Suite:
    from benchmarks.quality.text import Text

    return Text(cache, log, quick=quick, whole_tests=whole_tests)


def _published(cache: Cache, log: Log, quick: bool) -> Suite:
    from benchmarks.quality.published import Published

    return Published(cache, log, quick=quick)


def _vision(cache: Cache, log: Log, quick: bool) -> Suite:
    from benchmarks.quality.vision import Vision

    return Vision(cache, log, quick=quick)


def _llm(cache: Cache, log: Log, quick: bool) -> Suite:
    from benchmarks.quality.llm import Languages

    return Languages(cache, log, quick=quick)


SUITES: dict[str, Callable[..., Suite]] = {
    "text": _text,
    "published": _published,
    "vision": _vision,
    "llm": _llm,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run suites; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("suites", nargs="+", choices=list(SUITES), metavar="SUITE")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunes of each task (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes and one seed: a trial of the program"
    )
    parser.add_argument(
        "--whole-tests",
        action="store_true",
        help="text: all 44,367 test texts, not 1,500 a task: an hour more for three seeds",
    )
    parser.add_argument("--output", type=Path, help="folder of results (default: of the cache)")
    parser.add_argument(
        "--save", action="store_true", help=f"write into {RESULTS.name}/ and docs/images/"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if options.save and options.quick:
        parser.error("--save: the results of --quick are no results")
    if options.whole_tests and set(options.suites) != {"text"}:
        parser.error("--whole-tests: the text suite alone draws from its test sets")
    keep_freed_memory()
    log = Log()
    for name in options.suites:
        cache = Cache(Cache.default(name, "quality"))
        output = options.output or cache.root / ("quick" if options.quick else "output")
        results, plots = (RESULTS, PLOTS) if options.save else (output, output)
        log.say(f"quality, {name}. What is slow is kept in {cache.root}")
        cache.require_space(_DISK)
        try:
            how = {"whole_tests": True} if options.whole_tests else {}
            suite = SUITES[name](cache, log, options.quick, **how)
            _run(suite, options, results, plots, log)
        except KeyboardInterrupt:
            log.say("interrupted; what is done is kept, and the next run goes on from there")
            return 130
    return 0


def _run(suite: Suite, options: argparse.Namespace, results: Path, plots: Path, log: Log) -> None:
    from benchmarks.quality import report
    from benchmarks.quality.extras import extra_plots, extra_tables
    from benchmarks.quality.runner import run
    from benchmarks.tables import save

    start, busy = time.perf_counter(), os.getloadavg()[0]
    suite.prepare()

    def finished(found: Run) -> None:
        tables = report.tables(suite, found, published=suite.name == "text")
        tables |= extra_tables(suite, found.extras)
        seeds = sorted({outcome.seed for outcome in found.outcomes})
        load = max(busy, os.getloadavg()[0])
        note = f"Seeds: {len(seeds)}."
        if load > 1.5 * (os.cpu_count() or 1):
            note += (
                f" Made beside other programs (load average {load:.1f}), which changes times only."
            )
        first = tables[f"quality-{suite.name}"]
        first.notes[:0] = [*suite.notes, note]
        first.show()
        seconds = time.perf_counter() - start
        save(f"quality-{suite.name}", tables, report.records(suite, found, seconds), results)
        report.plot(suite, found, plots / f"quality-{suite.name}.png")
        extra_plots(suite, found.extras, plots)

    seeds = range(1 if options.quick or not suite.trained else options.seeds)
    run(suite, seeds, settings=2 if options.quick else None, finished=finished)
    log.say("done")


if __name__ == "__main__":
    raise SystemExit(main())
