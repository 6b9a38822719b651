"""Reads the ncnn networks (`.param` and `.bin`) in which Real-CUGAN is published, and runs them.

It supports only the layers that Real-CUGAN uses. Formats: the `.param` file is text, a layer a line
(type, name, numbers of inputs and outputs, their names, settings as key=value); the `.bin` file has
the weights in the order of the layers, those of a matrix preceded by a flag that states whether
they are float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["Layer", "Network", "read"]

_HALF = 0x01306B47
_MAGIC = "7767517"
_WEIGHTED = ("Convolution", "Deconvolution", "InnerProduct")


@dataclass(frozen=True)
class Layer:
    """A line of the `.param` file."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Mapping[int, tuple[float, ...]]

    def number(self, key: int, default: int) -> int:
        """Return a setting that is a whole number."""
        return int(self.settings[key][0]) if key in self.settings else default


class Network:
    """The layers of a `.param` file, run with weights that are passed each time."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.layers = layers

    @torch.inference_mode()
    def __call__(self, weights: Mapping[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        """Run images [n, 3, height, width] through the network; return the last layer's output."""
        values: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            if layer.kind == "Input":
                values[layer.outputs[0]] = image
                continue
            inputs = [values[name] for name in layer.inputs]
            result = _run(layer, inputs, weights)
            for name in layer.outputs:
                values[name] = result
        return values[self.layers[-1].outputs[0]]


def read(param: Path) -> tuple[Network, dict[str, torch.Tensor]]:
    """Read a network and the weights beside it.

    Returns:
        The network, and float32 weights by "layer.weight" and "layer.bias".

    Raises:
        SystemExit: the files are not as expected.
    """
    lines = param.read_text(encoding="ascii").split("\n")
    if lines[0].strip() != _MAGIC:
        raise SystemExit(f"{param}: expected a first line {_MAGIC}, got {lines[0]!r}")
    layers = tuple(_layer(line) for line in lines[2:] if line.strip())
    data = param.with_suffix(".bin").read_bytes()
    weights: dict[str, torch.Tensor] = {}
    place = 0
    for layer in layers:
        if layer.kind not in _WEIGHTED:
            continue
        dense = layer.kind == "InnerProduct"
        outputs = layer.number(0, 0)
        count = layer.number(2 if dense else 6, 0)
        flag = int.from_bytes(data[place : place + 4], "little")
        if flag not in (0, _HALF):
            raise SystemExit(f"{param}: {layer.name} has weights of the unknown kind {flag:#x}")
        kind, width = (np.float16, 2) if flag else (np.float32, 4)
        place += 4
        values = np.frombuffer(data, kind, count, place).astype(np.float32)
        place += -(-count * width // 4) * 4
        shape = (outputs, -1)
        if not dense:
            size = layer.number(1, 1)
            shape = (outputs, count // outputs // size // size, size, size)
        weights[f"{layer.name}.weight"] = torch.from_numpy(values).view(shape)
        if layer.number(1 if dense else 5, 0):
            values = np.frombuffer(data, np.float32, outputs, place).copy()
            weights[f"{layer.name}.bias"] = torch.from_numpy(values)
            place += 4 * outputs
    if place != len(data):
        raise SystemExit(f"{param}: the layers take {place} bytes of {len(data)}")
    return Network(layers), weights


def _layer(line: str) -> Layer:
    kind, name, inputs, outputs, *rest = line.split()
    ins, outs = int(inputs), int(outputs)
    settings: dict[int, tuple[float, ...]] = {}
    for pair in rest[ins + outs :]:
        key, _, value = pair.partition("=")
        number = int(key)
        if number <= -23300:  # an array: its length comes first
            settings[-23300 - number] = tuple(float(part) for part in value.split(",")[1:])
        else:
            settings[number] = (float(value),)
    return Layer(kind, name, tuple(rest[:ins]), tuple(rest[ins : ins + outs]), settings)


def _run(
    layer: Layer, inputs: list[torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    first = inputs[0]
    if layer.kind in _WEIGHTED:
        weight, bias = weights[f"{layer.name}.weight"], weights.get(f"{layer.name}.bias")
        stride, padding = layer.number(3, 1), layer.number(4, 0)
        if layer.kind == "Convolution":
            return _activated(layer, F.conv2d(first, weight, bias, stride, padding))
        if layer.kind == "Deconvolution":
            # ncnn stores the outputs first
            swapped = weight.transpose(0, 1)
            return _activated(layer, F.conv_transpose2d(first, swapped, bias, stride, padding))
        return _activated(layer, F.linear(first.flatten(1), weight, bias))
    if layer.kind == "Split":
        return first
    if layer.kind == "Pooling":
        return first.mean(dim=(2, 3))
    if layer.kind == "BinaryOp":
        second = inputs[1]
        if second.ndim == 2:
            second = second[:, :, None, None]
        return first * second if layer.number(0, 0) == 2 else first + second
    if layer.kind == "Crop":
        top, left = (int(value) for value in layer.settings[9])
        bottom, right = (int(value) for value in layer.settings[10])
        return first[:, :, top:bottom, left:right]
    raise SystemExit(f"the layer {layer.name} is a {layer.kind}, which is not known here")


def _activated(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    kind = layer.number(9, 0)
    if kind == 0:
        return values
    if kind == 1:
        return values.relu()
    if kind == 2:
        return F.leaky_relu(values, layer.settings[10][0])
    if kind == 4:
        return values.sigmoid()
    raise SystemExit(f"the layer {layer.name} has an activation {kind}, which is not known here")
