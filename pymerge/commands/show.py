"""What the command line prints: plans, methods, the installation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymerge.byte_sizes import format_size
from pymerge.memory import CHUNKS, PIECES, TILES, device_sizes
from pymerge.methods import REQUIRED, MethodSpec, Parameter

if TYPE_CHECKING:
    from rich.console import Console

    from pymerge.config import MergeConfig
    from pymerge.plan import MergePlan

__all__ = [
    "gather_info",
    "method_record",
    "plan_text",
    "print_info",
    "print_method",
    "print_methods",
]


def plan_text(plan: MergePlan) -> str:
    """Return a plan for people."""
    config, memory = plan.config, plan.memory
    lines = [f"method    {config.method.name} ({config.method.title})"]
    for checkpoint in plan.inputs:
        size = sum(size for _, size in checkpoint.files)
        dtypes = _counts(info.dtype for info in checkpoint.tensors.values())
        lines.append(
            f"input     {checkpoint.label}: {len(checkpoint.tensors)} tensors ({dtypes}), "
            f"{format_size(size)} in {_files(len(checkpoint.files))}"
        )
    lines += [
        f"settings  {parameter.yaml_names[0]}: {_setting(config, parameter.name)}"
        for parameter in config.method.parameters
        if not (parameter.no_effect or parameter.only is not None or parameter.kind == "path")
        and config.value(parameter.name) is not None
    ]
    dtypes = _counts(tensor.dtype for tensor in plan.tensors.values())
    lines += [
        f"files     config, tokenizer and the like from {plan.side_files}",
        f"passes    {plan.passes_text}",
        f"read      {format_size(plan.bytes_to_read)}{_rarely(plan)}",
        f"write     {format_size(plan.bytes_to_write)}: {len(plan.tensors)} tensors ({dtypes}), "
        f"{plan.parameters_count:,} parameters",
    ]
    lines += [
        f"          {shard.filename}  {format_size(shard.nbytes)}" for shard in plan.layout.shards
    ]
    parts = f"{memory.slots} x {format_size(memory.slot_bytes)} of output"
    if memory.histogram_bins:
        parts += f", {memory.histogram_bins} bins and {memory.sample_elements} samples to select"
    if memory.buffer_bytes:
        parts += f", {CHUNKS + PIECES} x {format_size(memory.buffer_bytes)} on the way"
    if memory.matrix_bytes:
        threads = f" on {memory.solvers} threads" if memory.solvers > 1 else ""
        parts += f", {format_size(memory.matrix_bytes)} for the largest linear system{threads}"
    if memory.folded_bytes:
        parts += f", {format_size(memory.folded_bytes)} for weights with their adapters"
    lines.append(f"memory    {format_size(memory.total)} ({parts}), {plan.threads} threads")
    if plan.device != "cpu":
        lines.append(f"device    {plan.device}: {_device(plan)}")
    return "\n".join(lines)


def _rarely(plan: MergePlan) -> str:
    """Return the bytes of the worst case, where they are more."""
    most = plan.most_bytes_to_read
    return f", at most {format_size(most)}" if most > plan.bytes_to_read else ""


def _device(plan: MergePlan) -> str:
    """Say what a merge takes of a GPU's memory."""
    budget = plan.device_memory
    sizes = device_sizes(budget or 1 << 62, plan.memory.buffer_bytes)
    parts = (
        f"{TILES} x {format_size(sizes.tile_bytes)} of input, {PIECES} x "
        f"{format_size(sizes.buffer_bytes)} of output"
    )
    if plan.passes > 1:
        most = "half of what is free" if budget is None else format_size(sizes.total)
        return f"{most} ({parts}, the rest for tensors that are read again)"
    return f"{format_size(sizes.total - sizes.resident_bytes)} ({parts})"


def _setting(config: MergeConfig, name: str) -> str:
    """Return a parameter's value, noting where models or tensors have their own."""
    holders = [entry for entry in config.models if name in entry.parameters]
    shared = config.parameters.get(name)
    text = "by tensor" if shared is not None and shared.by_tensor else _value(config.value(name))
    own = ", ".join(
        f"{entry.name} "
        + (
            "by tensor"
            if entry.parameters[name].by_tensor
            else _value(entry.parameters[name].value_for(""))
        )
        for entry in holders
    )
    if len(holders) == len(config.models):
        return own
    return f"{text}; {own}" if own else text


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counts(dtypes: Any) -> str:
    from pymerge.plan.records import dtype_counts

    return ", ".join(f"{count} {dtype}" for dtype, count in dtype_counts(dtypes).items())


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


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
    _console().print(table)
    print("\n`pymerge methods NAME` shows the parameters, ranges and defaults of one.")


def print_method(spec: MethodSpec) -> None:
    """Print everything about one method."""
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
    _console().print(table)


def _default(parameter: Parameter) -> str:
    if parameter.default is REQUIRED:
        return "required"
    return parameter.default_doc or _value(parameter.default)


def gather_info() -> dict[str, Any]:
    """Return what is installed, and which backends work or why not."""
    from pymerge.memory import default_threads
    from pymerge.merging.report import distribution_version, versions

    info: dict[str, Any] = {"cuda": _cuda(), "triton": distribution_version("triton")}
    # after torch was imported, so that the version is the one that runs
    info = {**versions(), "processors": default_threads(), **info}
    try:
        from pymerge.ops import backends

        return {**info, **backends.describe()}
    except (ImportError, OSError) as error:  # torch itself is missing or broken
        return {**info, "native": {"error": str(error)}}


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
    """Print what `gather_info` found."""
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
                # what holds for every method stands under the backend
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


def _console() -> Console:
    """Return a console that is wide when nobody's terminal says how wide to be."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)
