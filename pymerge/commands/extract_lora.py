"""`pymerge extract-lora BASE MODEL OUT`: writes a LoRA that approximates a fine-tune's changes."""

from __future__ import annotations

import argparse

from pymerge.commands.options import Commands, integer
from pymerge.commands.words import print_warnings

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "extract-lora", help="write a LoRA that approximates the changes of a fine-tune"
    )
    parser.add_argument("base", metavar="BASE", help="the base model")
    parser.add_argument("model", metavar="MODEL", help="the fine-tuned model")
    parser.add_argument("out", metavar="OUT", help="directory to write, as PEFT does")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--rank", type=integer(1), metavar="N", help="rank (default: 16)")
    amount.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="take each module's smallest rank that keeps this share of its change's squared norm",
    )
    parser.add_argument("--max-rank", type=integer(1), metavar="N", help="limit with --energy")
    parser.add_argument(
        "--modules",
        metavar="NAMES",
        help="last parts of module names, with commas, or /REGEX/ for whole names (default: all "
        "matrices but embeddings and heads)",
    )
    parser.add_argument("--exclude", metavar="NAMES", help="modules to skip, in the same format")
    parser.add_argument(
        "--save-changed", action="store_true", help="store other changed tensors in full"
    )
    parser.add_argument("--method", default="auto", help="auto, exact or randomized")
    parser.add_argument("--dtype", default="float32", help="of the factors (default: float32)")
    parser.add_argument("--prefix", default="", help="prefix of module names, e.g. transformer.")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="default: 0")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pymerge.adapters.extract import extract_lora

    report = extract_lora(
        options.base,
        options.model,
        options.out,
        rank=options.rank,
        energy=options.energy,
        max_rank=options.max_rank,
        modules=_targets(options.modules),
        exclude=_targets(options.exclude),
        save_changed=options.save_changed,
        method=options.method,
        dtype=options.dtype,
        prefix=options.prefix,
        seed=options.seed,
        force=options.force,
        quiet=options.quiet,
    )
    if not options.quiet:
        print_warnings(report.warnings)
        print(report.summary())


def _targets(text: str | None) -> str | list[str] | None:
    """Return a list of names, or the expression between slashes."""
    if text is None:
        return None
    if len(text) > 1 and text[0] == text[-1] == "/":
        return text[1:-1]
    return [name for name in text.split(",") if name]
