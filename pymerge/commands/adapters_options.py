"""The commands that have to do with adapters: fold, merge-adapters, extract-lora.

Like `pymerge.commands.main`, it imports nothing heavy before a command needs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["ADAPTER_COMMANDS", "add_adapter_commands"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Integer: TypeAlias = "Callable[[int], Callable[[str], int]]"


def add_adapter_commands(commands: Commands, size: Callable[[str], int], integer: Integer) -> None:
    """Add the parsers of the commands.

    Args:
        size, integer: read a size such as "2GiB", and an integer of at least so much.
    """
    fold = commands.add_parser(
        "fold", help="fold a LoRA or IA3 adapter into its base, and write the model"
    )
    fold.add_argument("base", metavar="BASE", help="the base model")
    fold.add_argument("adapter", metavar="ADAPTER", help="an adapter's directory (PEFT)")
    fold.add_argument("out", metavar="OUT", help="directory to write")
    fold.add_argument("--dtype", metavar="NAME", help="of the output (default: the base's)")
    fold.add_argument("--memory", type=size, default="2GiB", metavar="SIZE", help="to stay under")
    fold.add_argument("--threads", type=integer(1), metavar="N", help="default: one per core")
    fold.add_argument(
        "--shard-size", type=size, default="5GB", metavar="SIZE", help="largest file to write"
    )
    fold.add_argument("--force", action="store_true", help="replace OUT if it exists")
    fold.add_argument("--quiet", action="store_true", help="print nothing but errors")

    adapters = commands.add_parser(
        "merge-adapters",
        help="merge the LoRA or IA3 adapters of a config into one adapter, or onto their base",
    )
    adapters.add_argument(
        "config", metavar="CONFIG", help="a merge configuration whose models are adapters (YAML)"
    )
    adapters.add_argument("out", metavar="OUT", help="directory to write")
    adapters.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="of random masks (default: 0)"
    )
    adapters.add_argument(
        "--memory", type=size, default="2GiB", metavar="SIZE", help="of a model that is written"
    )
    adapters.add_argument("--threads", type=integer(1), metavar="N", help="default: one per core")
    adapters.add_argument(
        "--shard-size", type=size, default="5GB", metavar="SIZE", help="largest file of a model"
    )
    adapters.add_argument("--force", action="store_true", help="replace OUT if it exists")
    adapters.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _add_extract(commands, integer)


def _add_extract(commands: Commands, integer: Integer) -> None:
    extract = commands.add_parser(
        "extract-lora", help="write a LoRA that comes close to what a fine-tune changed"
    )
    extract.add_argument("base", metavar="BASE", help="the base model")
    extract.add_argument("model", metavar="MODEL", help="the fine-tuned model")
    extract.add_argument("out", metavar="OUT", help="directory to write, as PEFT does")
    amount = extract.add_mutually_exclusive_group()
    amount.add_argument("--rank", type=integer(1), metavar="N", help="of each module (default: 16)")
    amount.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="least rank of each module that keeps this share of its change's squared norm",
    )
    extract.add_argument("--max-rank", type=integer(1), metavar="N", help="the most, with --energy")
    extract.add_argument(
        "--modules",
        metavar="NAMES",
        help="last parts of module names, with commas, or /REGEX/ of whole names (default: all "
        "matrices but embeddings and heads)",
    )
    extract.add_argument("--exclude", metavar="NAMES", help="modules to leave out, in the same way")
    extract.add_argument(
        "--save-changed", action="store_true", help="put what is no such matrix in whole"
    )
    extract.add_argument("--method", default="auto", help="auto, exact or randomized")
    extract.add_argument("--dtype", default="float32", help="of the factors (default: float32)")
    extract.add_argument("--prefix", default="", help="put before module names: transformer.")
    extract.add_argument("--seed", type=integer(0), default=0, metavar="N", help="default: 0")
    extract.add_argument("--force", action="store_true", help="replace OUT if it exists")
    extract.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _fold(options: argparse.Namespace) -> Any:
    from pymerge.adapters.fold import fold

    return fold(
        options.base,
        options.adapter,
        options.out,
        dtype=options.dtype,
        memory=options.memory,
        threads=options.threads,
        shard_size=options.shard_size,
        force=options.force,
        quiet=options.quiet,
    )


def _merge_adapters(options: argparse.Namespace) -> Any:
    from pymerge.adapters.config import run_merge_adapters

    return run_merge_adapters(
        options.config,
        options.out,
        seed=options.seed,
        force=options.force,
        quiet=options.quiet,
        memory=options.memory,
        shard_size=options.shard_size,
        threads=options.threads,
    )


def _extract_lora(options: argparse.Namespace) -> Any:
    from pymerge.adapters.extract import extract_lora

    return extract_lora(
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


def _targets(text: str | None) -> str | list[str] | None:
    """Return names, or the expression between slashes."""
    if text is None:
        return None
    if len(text) > 1 and text[0] == text[-1] == "/":
        return text[1:-1]
    return [name for name in text.split(",") if name]


ADAPTER_COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "fold": _fold,
    "merge-adapters": _merge_adapters,
    "extract-lora": _extract_lora,
}
