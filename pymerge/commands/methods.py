"""`pymerge methods [NAME]`: lists the merge methods, or describes one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from pymerge.commands.options import Commands
from pymerge.commands.words import console, value_text
from pymerge.methods import METHODS, REQUIRED, MethodSpec, Parameter, get

__all__ = ["add", "method_record", "print_method", "print_methods", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("methods", help="list the merge methods, or describe one")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a method")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    chosen = list(METHODS.values()) if options.name is None else [get(options.name, "methods")]
    if options.json:
        records = [method_record(spec) for spec in chosen]
        result = records if options.name is None else records[0]
        print(json.dumps(result, indent=2, ensure_ascii=False))
    elif options.name is None:
        print_methods(chosen)
    else:
        print_method(chosen[0])


def method_record(spec: MethodSpec) -> dict[str, Any]:
    """Return a method's record as plain values."""
    return {
        "name": spec.name,
        "title": spec.title,
        "summary": spec.summary,
        "formula": spec.formula,
        "source": spec.source,
        "url": spec.url,
        "needs_base": spec.needs_base,
        "min_models": spec.min_models,
        "max_models": spec.max_models,
        "passes": spec.passes,
        "backends": list(spec.backends),
        "parameters": [
            {
                "name": parameter.name,
                "yaml_names": list(parameter.yaml_names),
                "kind": parameter.kind,
                "scope": parameter.scope,
                "per_tensor": parameter.per_tensor,
                "required": parameter.default is REQUIRED,
                "default": None if parameter.default is REQUIRED else parameter.default,
                "yaml_default": _yaml_default(spec, parameter),
                "minimum": parameter.minimum,
                "maximum": parameter.maximum,
                "choices": None if parameter.choices is None else list(parameter.choices),
                "has_effect": not parameter.no_effect,
                "doc": parameter.doc,
            }
            for parameter in spec.parameters
        ],
    }


def _yaml_default(spec: MethodSpec, parameter: Parameter) -> Any:
    default = spec.yaml_defaults.get(parameter.name, parameter.default)
    return None if default is REQUIRED else default


def print_methods(specs: Sequence[MethodSpec]) -> None:
    """Print the list of methods."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("method", "base", "passes", "backends", "what it does"):
        table.add_column(column, no_wrap=column == "method")
    for spec in specs:
        table.add_row(
            spec.name,
            "yes" if spec.needs_base else "no",
            spec.passes.split(" ", 1)[0],
            ", ".join(spec.backends),
            Text(spec.summary),
        )
    console().print(table)
    print("\n`pymerge methods NAME` shows the parameters, ranges and defaults of one.")


def print_method(spec: MethodSpec) -> None:
    """Print the full description of one method."""
    from rich.table import Table
    from rich.text import Text

    needs = "base_model and " if spec.needs_base else ""
    most = "" if spec.max_models is None else f", at most {spec.max_models}"
    print(f"{spec.name}: {spec.title}\n\n  {spec.summary}\n  {spec.formula}\n")
    print(f"  source    {spec.source}\n            {spec.url}")
    print(f"  inputs    {needs}at least {spec.min_models} under models{most}")
    print(f"  passes    {spec.passes}\n  backends  {', '.join(spec.backends)}\n")
    table = Table(box=None, pad_edge=False)
    for column in ("parameter", "default", "expected", "for", "meaning"):
        table.add_column(column, no_wrap=column == "parameter")
    for parameter in spec.parameters:
        table.add_row(
            " / ".join(parameter.yaml_names),
            Text(_default(parameter)),
            Text(parameter.expected),
            "each model" if parameter.scope == "model" else "the merge",
            Text(("No effect. " if parameter.no_effect else "") + parameter.doc),
        )
    console().print(table)


def _default(parameter: Parameter) -> str:
    if parameter.default is REQUIRED:
        return "required"
    return parameter.default_doc or value_text(parameter.default)
