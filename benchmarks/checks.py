"""Independent computations of the result of a merge, in plain torch from the files.

Nothing here uses pymerge: tensors are read with `safetensors`, and the selections use `kthvalue`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.measure import WrongResult, in_threads

__all__ = [
    "Reader",
    "check_linear",
    "check_same_names",
    "check_task_arithmetic",
    "check_ties_official",
    "check_ties_tensor",
    "digest",
    "official_thresholds",
    "sample_names",
]

_TILE = 1 << 18


def digest(directory: Path) -> str:
    """Return a hash of the weight files of a directory, including their names."""
    found = hashlib.blake2b()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(path.name.encode())
        with path.open("rb", buffering=0) as file:
            while block := file.read(16 << 20):
                found.update(block)
    return found.hexdigest()


class Reader:
    """Reads single tensors of a checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            self.files = {name: directory / file for name, file in weight_map.items()}
        else:
            single = directory / "model.safetensors"
            with safe_open(single, framework="pt") as opened:
                self.files = dict.fromkeys(opened.keys(), single)
        self.names = sorted(self.files)

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor, flattened."""
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name).flatten()


def check_same_names(out: Reader, source: Reader) -> None:
    """Raise WrongResult unless both have the same tensors."""
    if out.names != source.names:
        differ = sorted(set(out.names) ^ set(source.names))
        raise WrongResult(f"the output's tensors differ from the inputs': {', '.join(differ[:5])}")


def sample_names(reader: Reader) -> list[str]:
    """Return a few representative tensors: a norm, attention, MLP."""
    wanted = ("model.norm", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
    return [name for name in reader.names if any(part in name for part in wanted)]


def _close(what: str, found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    if found.dtype != dtype:
        raise WrongResult(f"{what}: dtype {found.dtype}, expected {dtype}")
    # One rounding to the output's dtype: half a unit in the last place, and the sums' own error.
    tolerance = torch.finfo(dtype).eps * 0.51
    wrong = ~((found.double() - exact).abs() <= tolerance * exact.abs() + 1e-8)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise WrongResult(
            f"{what}: {int(wrong.sum())} elements differ; at {index} {float(found[index])}, "
            f"expected {float(exact[index])}"
        )


def check_linear(
    out: Reader, models: Sequence[Reader], weights: Sequence[float], names: Sequence[str]
) -> None:
    """Compare with a weighted average in float64."""
    for name in names:
        total = sum(w * m.get(name).double() for m, w in zip(models, weights, strict=True))
        assert isinstance(total, torch.Tensor)
        _close(f"linear: {name}", out.get(name), total / sum(weights), models[0].get(name).dtype)


def check_task_arithmetic(
    out: Reader,
    base: Reader,
    models: Sequence[Reader],
    weights: Sequence[float],
    scale: float,
    names: Sequence[str],
) -> None:
    """Compare with base + scale * the weighted sum of deltas, in float64."""
    for name in names:
        origin = base.get(name)
        total = sum(
            w * (m.get(name).double() - origin.double())
            for m, w in zip(models, weights, strict=True)
        )
        assert isinstance(total, torch.Tensor)
        exact = origin.double() + scale * total
        _close(f"task_arithmetic: {name}", out.get(name), exact, origin.dtype)


def keep_exactly(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Return a mask of the max(1, int(density n)) largest magnitudes, the first of equal ones."""
    kept = max(1, int(density * delta.numel()))
    magnitude = delta.abs()
    threshold = magnitude.kthvalue(delta.numel() - kept + 1).values
    above = magnitude > threshold
    equal = magnitude == threshold
    return above | (equal & (equal.cumsum(0) <= kept - int(above.sum())))


def _elect_and_merge(
    values: Sequence[torch.Tensor], weights: Sequence[float], zero_sign: float
) -> torch.Tensor:
    """Return the merged delta: a mean, by weight, over the models that agree with the vote."""
    votes = torch.zeros_like(values[0])
    for value in values:
        votes = votes + value
    positive = (votes > 0) if zero_sign < 0 else (votes >= 0)
    merged, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for value, weight in zip(values, weights, strict=True):
        agrees = torch.where(positive, value > 0, value < 0)
        merged = merged + torch.where(agrees, value, 0.0)
        divisor = divisor + agrees * torch.tensor(weight, dtype=torch.float32)
    return merged / torch.where(divisor == 0, 1.0, divisor)


def check_ties_tensor(
    out: Reader,
    base: Reader,
    models: Sequence[Reader],
    weights: Sequence[float],
    density: float,
    names: Sequence[str],
) -> None:
    """Compare with TIES as mergekit defines it: exactly k elements of each tensor; bit for bit."""
    for name in names:
        origin = base.get(name)
        values = []
        for model, weight in zip(models, weights, strict=True):
            delta = model.get(name).float() - origin.float()
            values.append(torch.where(keep_exactly(delta, density), delta, 0.0) * weight)
        merged = _elect_and_merge(values, weights, 1.0)
        _equal(f"ties: {name}", out.get(name), (origin.float() + merged).to(origin.dtype))


def _equal(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.dtype != expected.dtype or not torch.equal(found, expected):
        wrong = int((found.to(expected.dtype) != expected).sum())
        raise WrongResult(f"{what}: {wrong} of {found.numel()} elements are wrong ({found.dtype})")


def official_thresholds(base: Reader, models: Sequence[Reader], density: float) -> list[float]:
    """Return each whole task vector's threshold: the (d - int(d density))-th smallest |delta|."""
    return in_threads(lambda model: _official_threshold(base, model, density), models)


def _magnitudes(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    return model.float().sub_(base.float()).abs_()


def _official_threshold(base: Reader, model: Reader, density: float) -> float:
    """Return the threshold in one pass: a bracket from a sample, a count below it, and an exact
    selection inside."""
    sizes = {name: base.get(name).numel() for name in base.names}
    total = sum(sizes.values())
    rank = total - int(total * density)
    step = max(1, total >> 20)
    sample = torch.cat([_magnitudes(base.get(n)[::step], model.get(n)[::step]) for n in sizes])
    share = torch.tensor([rank / total - 0.005, rank / total + 0.005]).clamp(0, 1)
    low, high = sample.sort().values[((len(sample) - 1) * share).long()].tolist()
    below, inside = 0, []
    for name, numel in sizes.items():
        origin, tuned = base.get(name), model.get(name)
        for start in range(0, numel, _TILE):
            magnitude = _magnitudes(origin[start : start + _TILE], tuned[start : start + _TILE])
            reached = magnitude >= low
            below += magnitude.numel() - int(torch.count_nonzero(reached))
            chosen = reached.logical_and_(magnitude <= high).nonzero().view(-1)
            inside.append(magnitude[chosen])
    candidates = torch.cat(inside)
    if not 0 < rank - below <= candidates.numel():
        raise RuntimeError("the sample gave no bracket around the threshold")
    return float(candidates.kthvalue(rank - below).values)


def check_ties_official(
    out: Reader,
    base: Reader,
    models: Sequence[Reader],
    thresholds: Sequence[float],
    names: Sequence[str],
) -> None:
    """Compare with TIES as published, given the whole task vectors' thresholds; bit for bit.

    Where the votes cancel, the elected sign is the majority of the whole model. It is computed if
    `names` are all tensors; otherwise either sign is accepted, but the same everywhere.
    """
    equal_weights = [1.0] * len(models)

    def trimmed(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        origin = base.get(name)
        deltas = [model.get(name).float() - origin.float() for model in models]
        pairs = zip(deltas, thresholds, strict=True)
        return origin, [torch.where(delta.abs() >= limit, delta, 0.0) for delta, limit in pairs]

    signs = [1.0, -1.0]
    if set(names) == set(base.names):
        balance = 0
        for name in names:
            votes = torch.stack(trimmed(name)[1]).sum(dim=0)
            balance += int(votes.sign().sum())
        signs = [1.0] if balance > 0 else [-1.0]
    for name in names:
        origin, values = trimmed(name)
        found = out.get(name)
        merged = {sign: _elect_and_merge(values, equal_weights, sign) for sign in signs}
        expected = {
            sign: (origin.float() + delta).to(origin.dtype) for sign, delta in merged.items()
        }
        right = [sign for sign, tensor in expected.items() if torch.equal(found, tensor)]
        if not right:
            _equal(f"ties, whole model: {name}", found, expected[signs[0]])
        signs = right
