"""Merges three fine-tunes of EfficientNet-Lite0; shows what each method keeps (`make demo-small`).

python -m benchmarks.demo.vision [--output DIR]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.demo.cache import Cache, content_hash, digest
from benchmarks.demo.console import Log
from benchmarks.demo.launch import fill, launch, show
from benchmarks.demo.merging import Merged, merge_all
from benchmarks.demo.packages import package_version
from benchmarks.demo.scoreboard import Scoreboard

__all__ = ["main"]

# Increase this when the code produces something else from the same settings.
_REVISION = 1
_DISK = 300_000_000


class Demo:
    """The stages of the demo, each stored in the cache when it is complete."""

    def __init__(self, cache: Cache, output: Path, log: Log) -> None:
        # scikit-learn takes seconds to import: not before the first line is on the screen
        from benchmarks.demo import image_model
        from benchmarks.demo.images import load_tasks

        self.cache, self.output, self.log, self.network = cache, output, log, image_model
        self.training = image_model.Training()
        self.tasks = load_tasks()
        self.heads: list[torch.Tensor] = []
        self.data = {
            "revision": _REVISION,
            "packages": [package_version(name) for name in ("scikit-learn", "mlxtend", "pillow")],
            "sizes": [[len(task.train_labels), len(task.test_labels)] for task in self.tasks],
        }

    def base(self) -> Path:
        """Return the pretrained checkpoint; create the heads of the tasks with it."""
        network = self.network
        packages = [package_version(name) for name in (network.PACKAGE, network.CODE_PACKAGE)]
        target = self.cache.path("base", {"revision": _REVISION, "packages": packages})
        if not target.is_dir():
            self.cache.build(target, network.unpack)
        self.log.say(f"pretrained: {target}")
        model = network.load(target)
        for task in self.tasks:
            self.heads.append(network.class_means(model, task))
            self.log.say(f"images: [bold]{task.name}[/], {task.about}")
        return target

    def fine_tune(self, base: Path, number: int) -> Path:
        """Return the checkpoint fine-tuned on a task."""
        task, head = self.tasks[number], self.heads[number]
        recipe = {
            "data": self.data,
            "task": task.name,
            "base": base.name,
            "training": self.training.recipe(),
        }
        target = self.cache.path(task.name.lower().replace(" ", "-"), recipe)
        if target.is_dir():
            self.log.say(f"fine-tuned on {task.name}: {target}")
            return target
        with self.log.steps(f"fine-tune on {task.name}", self.training.steps(task)) as advance:
            self.cache.build(
                target,
                lambda folder: self.network.fine_tune(
                    base, task, head, self.training, folder, advance
                ),
            )
        return target

    def accuracies(self, label: str, checkpoint: Path, base: Path) -> list[float]:
        """Return the held-out accuracy of a checkpoint on each task, in per cent."""
        recipe = {"data": self.data, "base": base.name, "weights": content_hash(checkpoint)}
        path = self.cache.root / "evaluations" / f"{digest(recipe)}.json"

        def compute() -> list[float]:
            model = self.network.load(checkpoint)
            found = []
            with self.log.steps(f"measure {label}", len(self.tasks)) as advance:
                for task, head in zip(self.tasks, self.heads, strict=True):
                    found.append(self.network.accuracy(model, task, head))
                    advance()
            return found

        return self.cache.load(path, compute)

    def run(self) -> None:
        """Do everything and show the table."""
        base = self.base()
        tuned = [self.fine_tune(base, number) for number in range(len(self.tasks))]
        merged = merge_all(base, tuned, self.output, "float32", self.log)
        found = {"pretrained": self.accuracies("pretrained", base, base)}
        for task, path in zip(self.tasks, tuned, strict=True):
            label = f"only {task.name}"
            found[label] = self.accuracies(label, path, base)
        for one in merged:
            found[one.recipe.label] = self.accuracies(one.recipe.label, one.path, base)
        self.show(found, merged)

    def show(self, found: dict[str, list[float]], merged: Sequence[Merged]) -> None:
        """Print and save the table."""
        board = Scoreboard(
            title="EfficientNet-Lite0: held-out accuracy in per cent, higher is better",
            tasks=[task.name for task in self.tasks],
            mean_label="mean",
            better="higher",
            decimals=1,
        )
        fill(board, found, lambda values: sum(values) / len(values), merged)
        counts = ", ".join(f"{len(task.test_labels)} {task.name}" for task in self.tasks)
        board.notes.append(
            f"Held-out images: {counts}; one seed. The head of a task is the mean feature of each"
            " class under the pretrained model, the same for all models. peak MB: memory that the"
            " merge allocated."
        )
        show(board, self.output, self.log, {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    return launch(
        "vision",
        "EfficientNet-Lite0, three tasks, four merges.",
        _DISK,
        lambda cache, output, log: Demo(cache, output, log).run(),
        arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
