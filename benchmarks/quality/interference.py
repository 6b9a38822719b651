"""Do statistics of task vectors predict the loss of a merge? Pairs and triples of the text suite.

    python -m benchmarks.quality.interference [--seeds 2] [--triples 12] [--quick] [--save]

`make quality-interference`. Every pair of the eight fine-tunes, and some triples, are merged with
fixed coefficients and tested on the tasks that were merged; `pymerge.analyze` analyses the same
fine-tunes beforehand. docs/analysis.md has the results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.quality import interference_report as report
from benchmarks.quality.interference_study import study
from benchmarks.tables import RESULTS

__all__ = ["main"]

PLOTS = Path(__file__).resolve().parent.parent.parent / "docs" / "images"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    from benchmarks.quality.text import Text
    from benchmarks.tables import save

    parser = argparse.ArgumentParser(prog="benchmarks.quality.interference", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="fine-tunes of each task (default: 2)")
    parser.add_argument("--triples", type=int, default=12, help="how many (default: 12)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: a trial of the program")
    parser.add_argument("--output", type=Path, help="folder of results (default: of the cache)")
    parser.add_argument(
        "--save", action="store_true", help=f"write into {RESULTS.name}/ and docs/images/"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if options.save and options.quick:
        parser.error("--save: the results of --quick are no results")
    log = Log()
    cache = Cache(Cache.default("text", "quality"))
    output = options.output or cache.root / "interference" / "output"
    results, plots = (RESULTS, PLOTS) if options.save else (output, output)
    suite = Text(cache, log, quick=options.quick)
    start = time.perf_counter()
    suite.prepare()
    found = study(suite, range(1 if options.quick else options.seeds), options.triples)
    tables = report.tables(found)
    for table in tables.values():
        table.show()
    record = {"seconds": round(time.perf_counter() - start, 1), **report.record(found)}
    save("quality-interference", tables, [{**record, "settings": suite.settings()}], results)
    report.plot(found, plots / "quality-interference.png")
    log.say("done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
