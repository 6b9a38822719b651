"""`pymerge plan CONFIG`: what a merge would read, write and need, from file headers alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from pymerge.byte_sizes import format_size
from pymerge.commands.options import Commands, add_plan_options
from pymerge.commands.words import print_warnings, value_text
from pymerge.memory import CHUNKS, PIECES, TILES, device_sizes

if TYPE_CHECKING:
    from pymerge.config import MergeConfig
    from pymerge.plan import MergePlan

__all__ = ["add", "plan_text", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "plan", help="check a config and its models, headers only, and show what a merge would do"
    )
    parser.add_argument("config", metavar="CONFIG", help="a merge configuration (YAML)")
    add_plan_options(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
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
            print_warnings(plan.warnings)
            print(plan_text(plan))


def plan_text(plan: MergePlan) -> str:
    """Return a plan as text for people."""
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
    """Return the worst case of the bytes to read, if it is more than the usual."""
    most = plan.most_bytes_to_read
    return f", at most {format_size(most)}" if most > plan.bytes_to_read else ""


def _device(plan: MergePlan) -> str:
    """Describe how much of a GPU's memory a merge needs."""
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
    """Return a parameter's value; note where models or tensors have values of their own."""
    holders = [entry for entry in config.models if name in entry.parameters]
    shared = config.parameters.get(name)
    text = (
        "by tensor" if shared is not None and shared.by_tensor else value_text(config.value(name))
    )
    own = ", ".join(
        f"{entry.name} "
        + (
            "by tensor"
            if entry.parameters[name].by_tensor
            else value_text(entry.parameters[name].value_for(""))
        )
        for entry in holders
    )
    if len(holders) == len(config.models):
        return own
    return f"{text}; {own}" if own else text


def _counts(dtypes: Any) -> str:
    from pymerge.plan.records import dtype_counts

    return ", ".join(f"{count} {dtype}" for dtype, count in dtype_counts(dtypes).items())


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
