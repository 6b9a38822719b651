"""Models, data and entry points for the tests of `pymerge collect`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from pymerge.statistics.run import CollectSetup

Tensor = torch.Tensor
HERE = "tests.collect_entries"


class Net(nn.Module):
    """A convolution, a buffer of either kind, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor)
        return self.head(torch.tanh(self.norm(self.conv(x))).mean(2) * self.scale)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def data(seed: int, batches: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 2, 5, generator=generator), torch.randint(4, (4,), generator=generator))
        for _ in range(batches)
    ]


def setup(count: int = 2, form: str = "list", **more: Any) -> Any:
    """Return a setup: the entry point of most tests."""
    torch.manual_seed(9)
    loaders: Any = [data(k) for k in range(count)]
    if form == "names":
        loaders = {f"m{k}": loader for k, loader in enumerate(loaders)}
    return {"model": Net(), "loaders": loaders, **more}


def nets(count: int = 2) -> list[Net]:
    made = []
    for k in range(count):
        torch.manual_seed(20 + k)
        net = Net()
        with torch.no_grad():
            net.norm.weight.add_(0.1 * (k + 1))
        net.norm.running_mean = torch.randn(3)
        made.append(net.eval())
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, net in enumerate(nets()):
        (tmp_path / f"m{k}").mkdir()
        save_file(dict(net.state_dict()), tmp_path / f"m{k}" / "model.safetensors")
    return tmp_path


def config(folder: Path, **more: Any) -> Path:
    """Write a configuration; None leaves a key out."""
    values = {
        "kind": "fisher",
        "models": [str(folder / "m0"), str(folder / "m1")],
        "entry": f"{HERE}:setup",
    } | more
    path = folder / "collect.yml"
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path


def other() -> Any:
    return setup()


def tied(count: int = 3) -> CollectSetup:
    return CollectSetup(Tied(), [[torch.arange(4)]] * count)


def second() -> Any:
    torch.manual_seed(77)
    return {"model": Net(), "loaders": [data(1)]}


def slow(stop: str, folder: str) -> Any:
    """Return a setup in which the data of the second model never arrive."""

    def waiting() -> Iterator[Any]:
        yield data(1)[0]
        if stop == "raise":
            raise KeyboardInterrupt
        Path(folder, "waits").touch()
        while not Path(folder, "go").exists():
            time.sleep(0.02)
        yield data(1)[1]

    return {"model": Net(), "loaders": [data(0), waiting()]}


def with_functions(kind: str) -> CollectSetup:
    """Return functions for both kinds: for all models, by position and by name."""

    def logits(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])[:, :3]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(2 * batch["x"])

    loaders = {f"m{k}": [{"x": x} for x, _ in data(k)] for k in (0, 1)}
    own: Any = {"m0": forward, "m1": None} if kind == "names" else forward
    return CollectSetup(Net(), loaders, logits=[logits, logits], forward=own, mask=lambda _: None)


def entry_of(what: str) -> Any:
    """Return a setup that is wrong in one way or another."""
    good = setup()
    nan = torch.full((4, 2, 5), torch.nan)
    headless = Net()
    headless.head = nn.Linear(3, 5)
    headless.extra = nn.Linear(1, 1)
    made: dict[str, Any] = {
        "nothing": None,
        "module": Net(),
        "no loaders": {"model": Net()},
        "odd key": {**good, "loader": []},
        "no module": {**good, "model": "net"},
        "no parameters": {**good, "model": nn.Tanh()},
        "meta": {**good, "model": Net().to("meta")},
        "one loader": {**good, "loaders": good["loaders"][:1]},
        "tensor": {**good, "loaders": torch.zeros(2, 3)},
        "names": {**good, "loaders": {"m0": [], "x": []}},
        "no function": {**good, "logits": 3},
        "few functions": {**good, "logits": [len]},
        "no functions": {**good, "logits": [len, 3]},
        "empty": {**good, "loaders": [[], []]},
        "no batches": {**good, "loaders": [good["loaders"][0][0][0]] * 2},
        "no tensors": {**good, "loaders": [[{"x": 3}]] * 2},
        "nan": {**good, "loaders": [[nan]] * 2},
        "bad shape": {**good, "loaders": [[torch.zeros(4, 3, 5)]] * 2},
        "misfit": {**good, "model": headless},
        "frozen": {**good, "model": Net().requires_grad_(False)},
    }
    if what == "raises":
        raise KeyError("the data are gone")
    return made[what]
