"""The command line: `pymerge merge | plan | ada | collect | analyze | search | fold |
merge-adapters | extract-lora | methods | info`.

Exit codes: 0 done; 1 a failure that is not the request's fault (disk full, I/O); 2 a bad request,
with every problem listed; 130 interrupted by Ctrl-C and 143 by SIGTERM. PYMERGE_DEBUG=1 shows
tracebacks.

torch takes a second to import, so this module leaves the import to the commands that need it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from pymerge.commands import (
    ada,
    analyze,
    collect,
    extract_lora,
    fold,
    info,
    merge,
    merge_adapters,
    methods,
    plan,
    search,
)
from pymerge.errors import MergeError, RequestError

__all__ = ["COMMANDS", "main", "run"]

# In the order of the help.
COMMANDS = (
    merge,
    plan,
    ada,
    collect,
    fold,
    merge_adapters,
    extract_lora,
    analyze,
    search,
    methods,
    info,
)


class _Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files are removed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse's own errors raise SystemExit(2)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        with _terminable():
            options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except _Terminated:
        return _failed("terminated", 143)
    except RequestError as error:
        return _failed(str(error), 2)
    except BrokenPipeError:
        # The reader of our output has closed the pipe (`pymerge methods | head`): end silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MergeError, OSError) as error:
        return _failed(str(error), 1)


def _failed(message: str, code: int) -> int:
    if os.environ.get("PYMERGE_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()
    print(f"pymerge: error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pymerge",
        description="Merge models: averaging, task arithmetic, TIES; mergekit's YAML, natively.",
        epilog="Exit codes: 0 done, 1 failure, 2 bad request, 130 interrupted.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Looks up the version only when it is requested."""

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: object) -> NoReturn:
        from pymerge.merging.report import package_version

        print(f"pymerge {package_version()}")
        parser.exit(0)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind, so that temporary files are removed."""

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install signal handlers
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run() -> NoReturn:
    """Run the command line and end the process with its exit code.

    The process ends at once: all output has been written by then, and unloading torch module by
    module would take half a second.
    """
    try:
        code = main()
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else 2
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
