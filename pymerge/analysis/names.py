"""The layer and the type of module to which a tensor belongs, derived from its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["OTHER", "Place", "layer_order", "places"]

OTHER = "other"  # the layer of tensors whose names have no block number


@dataclass(frozen=True)
class Place:
    """layer: None if the name has no block number."""

    layer: str | None
    module_type: str


def places(names: Sequence[str]) -> dict[str, Place]:
    """Return the place of each tensor.

    The first component of a name that is a number is the number of a block; what comes before it is
    the stack. A layer is called by its number if the model has one stack, else "stack.number". A
    module's type is what follows the number, without the name of the parameter (`weight`) and with
    * for further numbers; without a number, it is the whole path.

    >>> places(["model.layers.3.mlp.up_proj.weight"])["model.layers.3.mlp.up_proj.weight"]
    Place(layer='3', module_type='mlp.up_proj')
    >>> places(["lm_head.weight"])["lm_head.weight"]
    Place(layer=None, module_type='lm_head')
    """
    split = {name: _split(name) for name in names}
    stacks = {stack for stack, number, _ in split.values() if number is not None}
    found = {}
    for name, (stack, number, rest) in split.items():
        if number is None:
            layer = None
        else:
            layer = number if len(stacks) == 1 else f"{stack}.{number}".lstrip(".")
        parts = rest.split(".")
        parts = parts[:-1] or parts
        found[name] = Place(layer, ".".join("*" if part.isdecimal() else part for part in parts))
    return found


def _split(name: str) -> tuple[str, str | None, str]:
    """Return stack, number and rest of a name; a number that ends a name is not a block's."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[:i]), str(int(part)), ".".join(parts[i + 1 :])
    return "", None, name


def layer_order(layer: str) -> tuple[bool, str, int]:
    """Return a sort key for layers: by stack and number, those without a number last."""
    stack, _, number = layer.rpartition(".")
    if not number.isdecimal():
        return True, layer, 0
    return False, stack, int(number)
