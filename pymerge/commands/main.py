"""The command line: `pymerge merge | plan | ada | collect | analyze | search | fold |
merge-adapters | extract-lora | methods | info`.

Exit codes: 0 done; 1 a failure that is not the request's fault (disk full, I/O); 2 a bad request,
with every problem listed; 130 interrupted by Ctrl-C and 143 by SIGTERM. PYMERGE_DEBUG=1 shows
tracebacks.

torch takes a second to import, so nothing here imports it before a command needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from pymerge.byte_sizes import parse_size
from pymerge.commands import collect_options as collect
from pymerge.commands.adapters_options import ADAPTER_COMMANDS, add_adapter_commands
from pymerge.commands.analyze import add_arguments
from pymerge.errors import MergeError, RequestError

__all__ = ["main", "run"]

_BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")


class _Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files are removed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse's own errors raise SystemExit(2)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    commands = {
        "merge": _merge,
        "plan": _plan,
        "ada": _ada,
        "collect": collect.run,
        **{name: partial(_run_adapters, run) for name, run in ADAPTER_COMMANDS.items()},
        "analyze": _analyze,
        "search": _search,
        "methods": _methods,
        "info": _info,
    }
    try:
        with _terminable():
            commands[options.command](options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except _Terminated:
        return _failed("terminated", 143)
    except RequestError as error:
        return _failed(str(error), 2)
    except BrokenPipeError:
        # the reader of our output is gone (`pymerge methods | head`): nothing to say, nobody to say
        # it to
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

    merge = commands.add_parser("merge", help="merge the models of a config into OUT")
    merge.add_argument("config", metavar="CONFIG", help="a merge configuration (YAML)")
    merge.add_argument(
        "out", metavar="OUT", help="directory to write; it appears complete or not at all"
    )
    _add_plan_options(merge)
    merge.add_argument(
        "--report", metavar="FILE", help="write the report (JSON) there too, beside OUT's own"
    )
    merge.add_argument("--force", action="store_true", help="replace OUT if it exists")
    merge.add_argument("--quiet", action="store_true", help="print nothing but errors")
    merge.add_argument(
        "--checksums", action="store_true", help="put the SHA-256 of every input file in the report"
    )

    plan = commands.add_parser(
        "plan", help="check a config and its models, headers only, and show what a merge would do"
    )
    plan.add_argument("config", metavar="CONFIG", help="a merge configuration (YAML)")
    _add_plan_options(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")

    ada = commands.add_parser(
        "ada", help="learn merging coefficients without labels (AdaMerging), and merge with them"
    )
    ada.add_argument("config", metavar="CONFIG", help="models, entry point and options (YAML)")
    ada.add_argument("out", metavar="OUT", help="directory to write; OUT.ada gets the rest")
    ada.add_argument("--memory", type=_size, default="2GiB", metavar="SIZE", help="of the merge")
    ada.add_argument("--threads", type=_integer(1), metavar="N", help="of the merge")
    ada.add_argument("--restart", action="store_true", help="do not go on from an earlier run")
    ada.add_argument("--force", action="store_true", help="replace OUT if it exists")
    ada.add_argument("--quiet", action="store_true", help="print nothing but errors")

    collect.add_collect_command(commands, _device)
    add_adapter_commands(commands, _size, _integer)

    analyze = commands.add_parser(
        "analyze", help="compare task vectors before a merge: angles, sign conflicts, overlaps"
    )
    add_arguments(analyze)

    search = commands.add_parser(
        "search", help="search the coefficients with which a metric is best (grid, random, CMA-ES)"
    )
    _add_search_options(search)

    methods = commands.add_parser("methods", help="list the merge methods, or describe one")
    methods.add_argument("name", metavar="NAME", nargs="?", help="a method")
    methods.add_argument("--json", action="store_true", help="print as JSON")

    info = commands.add_parser("info", help="show the installation: build, ISA, GPU, backends")
    info.add_argument("--json", action="store_true", help="print as JSON")
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=_device,
        default="auto",
        help="cpu, cuda or cuda:N; auto is the CPU, unless the backend needs a GPU (default: auto)",
    )
    parser.add_argument(
        "--backend", choices=_BACKENDS, default="auto", help="what computes (default: auto)"
    )
    parser.add_argument(
        "--memory",
        type=_size,
        default="2GiB",
        metavar="SIZE",
        help="memory to stay under, whatever the models' size (default: 2GiB)",
    )
    parser.add_argument(
        "--device-memory",
        type=_size,
        metavar="SIZE",
        help="memory of the GPU to stay under (default: half of what is free there)",
    )
    parser.add_argument(
        "--threads", type=_integer(1), metavar="N", help="compute threads (default: one per core)"
    )
    parser.add_argument(
        "--shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest file to write (default: 5GB)",
    )
    parser.add_argument(
        "--seed", type=_integer(0), default=0, metavar="N", help="of random masks (default: 0)"
    )


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="what is searched, and how (YAML)")
    parser.add_argument("out", metavar="OUT", help="folder of the study; a search goes on there")
    parser.add_argument(
        "--metric", metavar="PACKAGE.MODULE:FUNCTION", help="the metric, instead of CONFIG's"
    )
    parser.add_argument("--evaluations", type=int, metavar="N", help="budget, instead of CONFIG's")
    parser.add_argument("--seconds", type=float, metavar="S", help="budget, instead of CONFIG's")
    parser.add_argument("--seed", type=_integer(0), metavar="N", help="instead of CONFIG's")
    parser.add_argument("--workers", type=_integer(1), metavar="N", help="instead of CONFIG's")
    parser.add_argument(
        "--executor", choices=("threads", "processes"), help="what workers are (CONFIG's)"
    )
    parser.add_argument(
        "--memory", type=_size, default="8GiB", metavar="SIZE", help="of all merges (default: 8GiB)"
    )
    parser.add_argument("--threads", type=_integer(1), metavar="N", help="of a merge")
    parser.add_argument("--merge", action="store_true", help="write the best model to OUT/merged")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run's trials")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: object) -> NoReturn:
        from pymerge.merging.report import package_version

        print(f"pymerge {package_version()}")
        parser.exit(0)


def _size(text: str) -> int:
    try:
        return parse_size(text, "size")
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from None


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return value

    return parse


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind, so that temporary files are removed."""

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only that one may say what signals do
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _merge(options: argparse.Namespace) -> None:
    from pymerge.merging.files import merge_checkpoints

    report = merge_checkpoints(
        options.config,
        options.out,
        device=options.device,
        backend=options.backend,
        memory=options.memory,
        device_memory=options.device_memory,
        threads=options.threads,
        shard_size=options.shard_size,
        seed=options.seed,
        report=options.report,
        force=options.force,
        quiet=options.quiet,
        checksums=options.checksums,
    )
    if not options.quiet:
        _print_warnings(report.warnings)
        print(report.summary())


def _ada(options: argparse.Namespace) -> None:
    from pymerge.adamerging.run import run_ada

    result, report = run_ada(
        options.config,
        options.out,
        force=options.force,
        quiet=options.quiet,
        memory=options.memory,
        threads=options.threads,
        resume=not options.restart,
    )
    if not options.quiet:
        _print_warnings(report.warnings)
        if result.history:
            first, last = result.history[0]["entropy"], result.history[-1]["entropy"]
            print(f"{result.steps} steps: mean entropy {first:.4f} -> {last:.4f} nats")
        print(f"coefficients: {options.out}.ada")
        print(report.summary())


def _run_adapters(
    command: Callable[[argparse.Namespace], Any], options: argparse.Namespace
) -> None:
    report = command(options)
    if not options.quiet:
        _print_warnings(report.warnings)
        print(report.summary())


def _analyze(options: argparse.Namespace) -> None:
    from pymerge.commands.analyze import run_analyze

    run_analyze(options)


def _search(options: argparse.Namespace) -> None:
    from pathlib import Path

    from pymerge.search import run_search
    from pymerge.search.results import print_result

    result = run_search(
        options.config,
        options.out,
        metric=options.metric,
        evaluations=options.evaluations,
        seconds=options.seconds,
        seed=options.seed,
        workers=options.workers,
        executor=options.executor,
        memory=options.memory,
        threads=options.threads,
        merge=options.merge,
        restart=options.restart,
        quiet=options.quiet,
    )
    if not options.quiet:
        _print_warnings(result.warnings)
        print_result(result, Path(options.out))
        if result.merged is not None:
            print(result.merged.summary())


def _plan(options: argparse.Namespace) -> None:
    from pymerge.config import load_config

    config = load_config(options.config)
    from pymerge.merging.gpu.place import planned_device
    from pymerge.plan import make_plan

    with make_plan(
        config,
        memory=options.memory,
        shard_size=options.shard_size,
        threads=options.threads,
        seed=options.seed,
        device=planned_device(config.dialect, options.device, options.backend),
        device_memory=options.device_memory,
    ) as plan:
        if options.json:
            print(json.dumps(plan.to_dict(), indent=2, ensure_ascii=False))
        else:
            from pymerge.commands.show import plan_text

            _print_warnings(plan.warnings)
            print(plan_text(plan))


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"pymerge: warning: {warning}", file=sys.stderr)


def _methods(options: argparse.Namespace) -> None:
    from pymerge.commands import show
    from pymerge.methods import METHODS, get

    chosen = list(METHODS.values()) if options.name is None else [get(options.name, "methods")]
    if options.json:
        records = [show.method_record(spec) for spec in chosen]
        result = records if options.name is None else records[0]
        print(json.dumps(result, indent=2, ensure_ascii=False))
    elif options.name is None:
        show.print_methods(chosen)
    else:
        show.print_method(chosen[0])


def _info(options: argparse.Namespace) -> None:
    from pymerge.commands import show

    info = show.gather_info()
    if options.json:
        print(json.dumps(info, indent=2, ensure_ascii=False))
    else:
        show.print_info(info)


def run() -> NoReturn:
    """Run the command line and end the process with its exit code.

    It ends at once: everything is written by then, and taking torch apart again, module by module,
    costs half a second.
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
