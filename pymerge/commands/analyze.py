"""`pymerge analyze BASE MODEL...`: compares task vectors before a merge."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pymerge.commands.options import Commands, one_of
from pymerge.errors import RequestError

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "analyze", help="compare task vectors before a merge: angles, sign conflicts, overlaps"
    )
    parser.add_argument("base", metavar="BASE", help="the pre-trained model")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="fine-tuned models")
    parser.add_argument(
        "--out", metavar="OUT", help="directory to write: report, JSON, CSV (default: nothing)"
    )
    parser.add_argument(
        "--names", type=_list(str), metavar="A,B,...", help="names of the models in reports"
    )
    parser.add_argument(
        "--densities",
        type=_list(float),
        default=[0.1, 0.2, 0.5],
        metavar="D,D,...",
        help="densities of TIES' trim over the whole model; '' for none (default: 0.1,0.2,0.5)",
    )
    parser.add_argument(
        "--thresholds",
        choices=("sampled", "exact"),
        default="sampled",
        help="thresholds of these trims; exact ones take another pass or two (default: sampled)",
    )
    parser.add_argument(
        "--spectra", action="store_true", help="add singular values and subspaces, which is slow"
    )
    parser.add_argument(
        "--rank", type=_count, default=16, metavar="R", help="rank of the subspaces (default: 16)"
    )
    parser.add_argument(
        "--scores",
        type=_list(float),
        metavar="S,S,...",
        help="scores of the models on validation data, for advice on averages",
    )
    parser.add_argument(
        "--nan",
        choices=("error", "skip"),
        default="error",
        help="what to do with tensors that contain NaN or infinity (default: error)",
    )
    parser.add_argument(
        "--backend",
        type=one_of("auto", "reference", "cpu"),
        default="auto",
        metavar="{auto,reference,cpu}",
        help="backend that computes (default: auto)",
    )
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="compute threads (default: one per core)"
    )
    parser.add_argument("--no-html", action="store_true", help="write JSON and CSV only")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print the analysis as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",")] if text.strip() else []
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected numbers with commas between them, got {text!r}"
            ) from None

    return parse


def run(options: argparse.Namespace) -> None:
    from pymerge.analysis import advise, analyze, write_analysis
    from pymerge.analysis.output import check_output
    from pymerge.analysis.summary import print_summary

    if options.scores is not None and len(options.scores) != len(options.models):
        raise RequestError(
            f"--scores: expected {len(options.models)}, one for each model; got "
            f"{len(options.scores)}"
        )
    html = not options.no_html
    if options.out is not None:
        inputs = [Path(path) for path in (options.base, *options.models)]
        check_output(options.out, html=html, force=options.force, inputs=inputs)
    analysis = analyze(
        options.base,
        options.models,
        names=options.names,
        densities=options.densities,
        thresholds=options.thresholds,
        spectra=options.spectra,
        rank=options.rank,
        nan=options.nan,
        backend=options.backend,
        threads=options.threads,
        quiet=options.quiet,
    )
    advice = advise(analysis, scores=options.scores).texts
    written: list[str] = []
    if options.out is not None:
        written = write_analysis(
            analysis, options.out, html=html, force=options.force, advice=advice
        )
    if options.json:
        print(analysis.to_json())
    elif not options.quiet:
        print_summary(analysis, advice=advice)
        if written:
            print(f"written to {options.out}: {', '.join(written)}")
