"""The output: its layout, the shard writer, the atomic directory, the files beside the weights."""

from __future__ import annotations

from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import Layout, OutputTensor, PlacedTensor, Shard, plan_layout
from pymerge.output.replace import write_file
from pymerge.output.side_files import copy_side_files
from pymerge.output.writer import ShardWriter

__all__ = [
    "Layout",
    "OutputDirectory",
    "OutputTensor",
    "PlacedTensor",
    "Shard",
    "ShardWriter",
    "copy_side_files",
    "plan_layout",
    "write_file",
]
