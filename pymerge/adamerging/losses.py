"""The entropy of predictions, which AdaMerging minimises in place of a loss that needs labels.

H(x) = - sum_c p_c(x) log p_c(x),  p = softmax(f(x))          Yang et al. 2024, eq. 4
"""

from __future__ import annotations

from typing import Any

import torch

from pymerge.errors import RequestError

__all__ = ["ENTROPIES", "entropy", "entropy_of_each", "find_logits"]

Tensor = torch.Tensor

# "exact": uses log_softmax, like the authors' code. "fusion_bench": -sum p log(p + 1e-8), like its.
ENTROPIES = ("exact", "fusion_bench")


def find_logits(output: Any, where: str = "logits") -> Tensor:
    """Return the logits of an output: a tensor, its `.logits`, its "logits", or its first item.

    Raises:
        RequestError: there is no floating-point tensor of shape [..., classes], classes >= 2.
    """
    logits = output
    if not isinstance(logits, Tensor):
        if hasattr(output, "logits"):
            logits = output.logits
        elif isinstance(output, dict) and "logits" in output:
            logits = output["logits"]
        elif isinstance(output, (tuple, list)) and output:
            logits = output[0]
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"{where}: expected a tensor, or an output with logits; got {type(output).__name__}"
        )
    if not logits.is_floating_point():
        raise RequestError(f"{where}: expected a floating-point tensor, got {logits.dtype}")
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise RequestError(
            f"{where}: expected shape [batch, ..., classes] with at least 2 classes, got "
            f"{tuple(logits.shape)}"
        )
    return logits


def entropy_of_each(logits: Tensor, kind: str = "exact") -> Tensor:
    """Return the entropy of each prediction, in nats: [..., classes] -> [...], in float32 or wider.

    A class of probability 0 adds 0, whatever its logit; -inf (a masked class) is allowed.

    >>> entropy_of_each(torch.zeros(1, 2))
    tensor([0.6931])
    """
    if kind not in ENTROPIES:
        raise RequestError(f"entropy: expected one of {', '.join(ENTROPIES)}; got {kind!r}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logs = torch.log_softmax(wide, dim=-1)
    if kind == "fusion_bench":
        probabilities = logs.exp()
        return -(probabilities * (probabilities + 1e-8).log()).sum(dim=-1)
    # 0 times -inf would be NaN, and so would its gradient.
    logs = logs.clamp_min(torch.finfo(logs.dtype).min)
    return -(logs.exp() * logs).sum(dim=-1)


def entropy(
    logits: Tensor,
    *,
    kind: str = "exact",
    mask: Tensor | None = None,
    tokens: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean entropy of predictions, a scalar.

    Args:
        logits: [batch, classes], or [batch, length, classes] for a language model.
        kind: "exact", or "fusion_bench" with its 1e-8 inside the logarithm.
        mask: [batch, length] (or [batch]); predictions where it is 0, such as padding, are not
            counted.
        tokens: number of counted predictions to use, drawn without replacement, because the logits
            of a language model over all tokens and classes need much memory.
        generator: generator of the draw, on the CPU.

    Raises:
        RequestError: no prediction is left to count, or the mask has the wrong shape.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    if mask is not None:
        if tuple(mask.shape) != tuple(logits.shape[:-1]):
            raise RequestError(
                f"mask: expected shape {tuple(logits.shape[:-1])} like the predictions, got "
                f"{tuple(mask.shape)}"
            )
        flat = flat[mask.reshape(-1).to(device=flat.device) != 0]
    if flat.shape[0] == 0:
        raise RequestError("mask: expected at least one prediction that counts, got none")
    if tokens is not None and tokens < flat.shape[0]:
        drawn = torch.randperm(flat.shape[0], generator=generator)[:tokens]
        flat = flat[drawn.sort().values.to(flat.device)]
    return entropy_of_each(flat, kind).mean()
