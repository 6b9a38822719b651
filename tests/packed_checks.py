"""Results that trimmed task vectors, stored as bit masks and values, must give on every backend:
random cases of the ops, and layers that are merged from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pymerge import AdaMerging
from pymerge.adamerging import Packed, merged_packed_layer, pack_trimmed
from pymerge.adamerging.ops import merged_layer
from tests.case import DTYPES, make_inputs
from tests.packing import CHUNK, pack
from tests.test_adamerging import make


def _layer(device: str, kind: torch.dtype) -> tuple[torch.Tensor, list[Packed]]:
    torch.manual_seed(1)
    base = torch.randn(7, 5, dtype=kind)
    models = [base + torch.randn(7, 5, dtype=kind) for _ in range(3)]
    packed = pack_trimmed({"w": base}, [{"w": model} for model in models], density=0.4)["w"]
    return base.to(device), [one.to(torch.device(device)) for one in packed]


def _gradient(device: str) -> bool:
    base, packed = _layer(device, torch.float64)
    at = torch.tensor([0.3, 0.0, -0.7], dtype=torch.float64, device=device, requires_grad=True)
    return torch.autograd.gradcheck(lambda c: merged_packed_layer(c, base, packed), (at,))


def _bits(device: str) -> bool:
    """Return whether the layer and its gradient have the bits of dense task vectors."""
    for kind in (torch.float32, torch.bfloat16):
        torch.manual_seed(5)
        base = torch.randn(1100).to(kind)
        models = [(base.float() + 0.2 * torch.randn(1100)).to(kind) for _ in range(3)]
        kept = pack(models, [1.0] * 3)
        packed = [
            Packed(*(tensor.to(device) for tensor in one))
            for one in zip(kept["masks"], kept["values"], kept["offsets"], strict=True)
        ]
        gradient = torch.randn(1100).to(kind).to(device)
        told = []
        for layer, given in ((merged_packed_layer, packed), (merged_layer, models)):
            at = torch.tensor([0.3, 1.0, -0.7], device=device, requires_grad=True)
            moved = [one.to(device) if isinstance(one, torch.Tensor) else one for one in given]
            merged = layer(at, base.to(device), moved)  # pyright: ignore[reportArgumentType]
            merged.backward(gradient)
            told += [merged.detach(), at.grad]
        if not (torch.equal(told[0], told[2]) and torch.equal(told[1], told[3])):
            return False
    return True


def _opcheck(device: str) -> bool:
    base, packed = _layer(device, torch.float32)
    masks, values, offsets = ([*t] for t in zip(*(one.tensors for one in packed), strict=True))
    at = torch.tensor([0.3, 1.0, -0.7], device=device)
    ops = torch.ops.pymerge
    arguments = base, masks, values, offsets
    torch.library.opcheck(ops.merged_packed_layer.default, (at, *arguments, torch.float32))
    torch.library.opcheck(ops.merged_packed_layer_dots.default, (base + 1, *arguments))
    return True


def _compiles(device: str) -> bool:
    """Return whether the wrapped model and its gradient compile without a graph break."""
    net, base, models = make()
    ada = AdaMerging(net, base, models, trimmed=True).to(device)
    x = torch.randn(6, 8, device=device)
    compiled = torch.compile(lambda value: ada(value), backend="aot_eager", fullgraph=True)
    output, plain = compiled(x), ada(x)
    torch.testing.assert_close(output, plain)
    got, expected = (
        torch.autograd.grad(one.sum(), ada.raw_coefficients)[0] for one in (output, plain)
    )
    torch.testing.assert_close(got, expected)
    return True


CHECKS: dict[str, Callable[[str], Any]] = {
    "gradcheck": _gradient,
    "bits": _bits,
    "opcheck": _opcheck,
    "torch.compile": _compiles,
}


@dataclass(frozen=True)
class Draw:
    """A random case: sizes near the borders of words, chunks and blocks; models that keep nothing,
    everything, or what trims keep; differing dtypes; unaligned addresses."""

    numel: int
    count: int
    dtypes: tuple[torch.dtype, ...]
    result: torch.dtype
    shares: list[float]
    misaligned: bool
    wide: bool

    @classmethod
    def of(cls, seed: int, most: int) -> Draw:
        """Return a draw of at most `most` elements."""
        draw = random.Random(seed)
        sizes = [n for n in SIZES if n <= most]
        count = draw.randint(1, 20)
        dtypes = draw.choice(list(DTYPES.values()))
        return cls(
            draw.choice([*sizes, draw.randint(1, most)]),
            count,
            dtypes,
            draw.choice([dtypes[0], torch.float32]),
            [draw.choice((0.0, 0.03, 0.2, 0.2, 0.6, 1.0)) for _ in range(count)],
            draw.random() < 0.4,
            torch.float64 in dtypes,
        )


SIZES = (1, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 3077, 16_384, 16_385, 17_409)


def differing(
    backend: str, seeds: Iterable[int], most: int, place: Callable[[torch.Tensor], torch.Tensor]
) -> list[Any]:
    """Return the draws whose sum or dot products differ from those of the reference and the CPU,
    bit by bit. place: moves a tensor to where the backend works."""
    found = []
    for seed in seeds:
        draw = Draw.of(seed, most)
        base, models = make_inputs(draw.numel, draw.count, draw.dtypes, str(seed), draw.misaligned)
        kept = pack(models, draw.shares)
        weights = [random.Random(seed + k).uniform(-2, 2) for k in range(draw.count)]
        told = []
        for name in dict.fromkeys(("reference", "cpu", backend)):
            here = place if name == backend else _as_it_is
            own = {key: [here(tensor) for tensor in tensors] for key, tensors in kept.items()}
            origin, gradient = here(base), here(models[0])
            out = here(torch.full(base.shape, float("nan"), dtype=draw.result))
            chunks = -(-draw.numel // CHUNK)
            partials = here(torch.full((draw.count, chunks), 7.0, dtype=torch.float64))
            how = {**own, "wide": draw.wide, "backend": name}
            torch.ops.pymerge.packed_sum_(out, origin, weights=weights, **how)
            torch.ops.pymerge.packed_dots_(partials, gradient, origin, **how)
            told.append((out.cpu(), partials.cpu()))
        for out, partials in told[1:]:
            if not (torch.equal(told[0][0], out) and torch.equal(told[0][1], partials)):
                found.append((seed, draw))
    return found


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
