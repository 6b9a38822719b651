"""Options and argument types that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TypeAlias

from pymerge.byte_sizes import parse_size
from pymerge.errors import RequestError, not_one_of

__all__ = ["Commands", "add_plan_options", "device", "integer", "one_of", "size"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")


def size(text: str) -> int:
    """Parse a size such as 2GiB."""
    try:
        return parse_size(text, "size")
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from None


def integer(least: int) -> Callable[[str], int]:
    """Return a parser of integers that are at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return value

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """Return a parser of one of a few words, which refuses others as the functions do."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(not_one_of(text, words))
        return text

    return parse


def device(text: str) -> str:
    """Parse the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `merge` and `plan` share."""
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        help="cpu, cuda or cuda:N; auto is the CPU, unless the backend needs a GPU (default: auto)",
    )
    parser.add_argument(
        "--backend",
        type=one_of(*BACKENDS),
        default="auto",
        metavar="{" + ",".join(BACKENDS) + "}",
        help="backend that computes (default: auto)",
    )
    parser.add_argument(
        "--memory",
        type=size,
        default="2GiB",
        metavar="SIZE",
        help="memory to stay under, whatever the models' size (default: 2GiB)",
    )
    parser.add_argument(
        "--device-memory",
        type=size,
        metavar="SIZE",
        help="memory of the GPU to stay under (default: half of its free memory)",
    )
    parser.add_argument(
        "--threads", type=integer(1), metavar="N", help="compute threads (default: one per core)"
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="largest file to write (default: 5GB)",
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="seed of random masks (default: 0)"
    )
