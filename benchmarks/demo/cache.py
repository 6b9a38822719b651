"""The results that a demo keeps between runs: stages that are built once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint import open_checkpoint

__all__ = ["Cache", "content_hash", "digest", "write_text"]


class Cache:
    """A folder of finished stages, each under a name that includes the hash of its recipe.

    Args:
        root: the folder; `Cache.default(name)` returns the usual one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    @staticmethod
    def default(name: str, kind: str = "demo") -> Path:
        """Return `$PYMERGE_CACHE/KIND-NAME`, or `~/.cache/pymerge/KIND-NAME` (XDG_CACHE_HOME)."""
        own = os.environ.get("PYMERGE_CACHE")
        if own:
            return Path(own) / f"{kind}-{name}"
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(home) / "pymerge" / f"{kind}-{name}"

    def require_space(self, total: int) -> None:
        """Exit, with the numbers, if the disk cannot let this folder grow to `total` bytes.

        Raises:
            SystemExit: too little is free.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        need = total - sum(file.lstat().st_size for file in self.root.rglob("*"))
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise SystemExit(
                f"{self.root}: this needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are"
                " free. PYMERGE_CACHE=DIR puts it elsewhere."
            )

    def path(self, name: str, recipe: Mapping[str, Any]) -> Path:
        """Return the path of the stage `name` made by `recipe`, whether it is built or not."""
        return self.root / f"{name}-{digest(recipe)}"

    def build(self, target: Path, make: Callable[[Path], None]) -> None:
        """Build a stage: `make(temporary)` fills a folder that becomes `target` when it returns.

        An interrupted run leaves no `target`, so the next one repeats the stage.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
        temporary.mkdir()
        try:
            make(temporary)
            try:
                temporary.rename(target)
            except OSError:
                # another run of the demo finished the same stage first: use that
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def load(self, path: Path, compute: Callable[[], Any]) -> Any:
        """Return the JSON value stored at `path`, computing and storing it the first time."""
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        write_text(path, json.dumps(value))
        return value


def digest(recipe: Any) -> str:
    """Return a short hash of a JSON value; equal values have equal hashes."""
    text = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def content_hash(checkpoint: Path) -> str:
    """Return a hash of a checkpoint's tensors: names, dtypes, shapes and bytes, not its files.

    Args:
        checkpoint: a model directory; its division into shards does not matter.
    """
    total = hashlib.sha256()
    with open_checkpoint(checkpoint, str(checkpoint)) as weights:
        for name, info in weights.tensors.items():
            total.update(json.dumps([name, info.dtype, info.shape]).encode())
            total.update(weights.flat(name).view(torch.uint8).numpy().data)
            weights.release(name)
    return total.hexdigest()[:20]


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears either complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed runs left of this stage; a running one keeps its folder."""
    for folder in target.parent.glob(f".{target.name}.tmp-*"):
        process = folder.name.rpartition("-")[2]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue
