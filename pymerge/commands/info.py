"""`pymerge info`: describes the installation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from pymerge.commands.options import Commands
from pymerge.methods import METHODS

__all__ = ["add", "gather_info", "print_info", "run", "support"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("info", help="show the installation: build, ISA, GPU, backends")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    info = gather_info()
    if options.json:
        print(json.dumps(info, indent=2, ensure_ascii=False))
    else:
        print_info(info)


def gather_info() -> dict[str, Any]:
    """Return the versions installed, and for each backend whether it works or why not."""
    from pymerge.memory import default_threads
    from pymerge.merging.report import distribution_version, versions

    info: dict[str, Any] = {"cuda": _cuda(), "triton": distribution_version("triton")}
    # After torch was imported, so that this is the version in use.
    info = {**versions(), "processors": default_threads(), **info}
    try:
        from pymerge.ops import backends

        described = backends.describe()
    except (ImportError, OSError) as error:  # torch itself is missing or broken
        return {**info, "native": {"error": str(error)}}
    return {
        **info,
        **described,
        "methods": support(described["backends"]),
        "analyze": "cpu or reference; no GPU kernels: tensors on a GPU are copied to the host",
    }


def support(backends: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each method the backends that it runs on, or why a backend cannot run it."""
    return {
        method: {
            name: (entry["available"] or entry["reason"])
            if name in spec.backends
            else f"no kernels: the reference computes it ({spec.torch_because or 'not yet'})"
            for name, entry in backends.items()
        }
        for method, spec in METHODS.items()
    }


def _cuda() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported: {error}"
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch was built for CUDA {torch.version.cuda}, but finds no device"
    count = torch.cuda.device_count()
    devices = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
    return f"CUDA {torch.version.cuda}: {', '.join(devices)}"


def print_info(info: Mapping[str, Any]) -> None:
    """Print the result of `gather_info`."""
    for name, value in info.items():
        if not isinstance(value, Mapping):
            print(f"{name:<12}{_scalar(value)}")
    native = info.get("native", {})
    if native:
        print("\nnative code")
        for name, value in native.items():
            print(f"  {name:<12}{_scalar(value)}")
    backends = info.get("backends", {})
    if backends:
        print("\nbackends")
        for name, state in backends.items():
            reason = state.get("reason") or ""
            status = "available" if state.get("available") else "not available"
            print(f"  {name:<12}{status}{': ' if reason else ''}{reason}")
    for kind, runs in info.get("auto", {}).items():
        print(f"  auto on {kind:<5}{runs}")
    methods = info.get("methods", {})
    if methods:
        print("\nmethods")
        for method, support in methods.items():
            runs = [backend for backend, state in support.items() if state is True]
            print(f"  {method:<18}{', '.join(runs) or 'no backend'}")
            for backend, state in support.items():
                # A reason that holds for every method is printed with the backend.
                if isinstance(state, str) and state != backends.get(backend, {}).get("reason"):
                    print(f"    {backend}: {state}")


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping):
        if all(isinstance(item, bool) for item in value.values()):
            return ", ".join(name if item else f"no {name}" for name, item in value.items())
        return ", ".join(f"{name} {_scalar(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)
