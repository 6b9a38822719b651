"""How the engine goes through its inputs: what it asks for, lets go of, and looks at again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.checkpoint import Checkpoint
from pymerge.merging import files
from pymerge.merging.files import CheckpointSource
from pymerge.merging.progress import Recorder
from pymerge.merging.tensors import MemorySink
from pymerge.methods import METHODS
from tests import models
from tests.test_methods import in_small_pieces, number_of_models, parameters_of

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

Events = list[tuple[str, str]]

# Those that need files or data have tests of their own.
WAYS = [
    (name, parameters_of(name))
    for name, spec in METHODS.items()
    if name not in models.NEED_FILES and spec.statistics is None
]
WAYS += [
    ("ties", {"semantics": "official"}),
    ("ties", {"semantics": "peft", "density": 0.3}),
    ("pcb", {"scope": "tensor"}),
    ("emr", {"task": 1}),
    ("dare_ties", {"density": 0.5, "rescale": "inv_keep", "trim": 0.2, "trim_scope": "global"}),
]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What merges of files ask for, load and release, in order; hints are given at once."""
    found: Events = []

    def recorded(owner: type, method: str, event: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def record(self: Any, name: str, *arguments: Any) -> Any:
            found.append((event, name))
            return original(self, name, *arguments)

        monkeypatch.setattr(owner, method, record)

    class AtOnce:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def submit(self, function: Callable[..., None], *arguments: Any) -> None:
            function(*arguments)

        def shutdown(self, **_: Any) -> None: ...

    monkeypatch.setattr(files, "ThreadPoolExecutor", AtOnce)
    recorded(CheckpointSource, "load", "load")
    recorded(CheckpointSource, "release", "release")
    recorded(Checkpoint, "will_need", "will need")
    return found


@pytest.mark.parametrize(("method", "parameters"), WAYS, ids=str)
def test_one_tensor_is_held_at_a_time(
    method: str, parameters: dict[str, Any], tmp_path: Path, events: Events
) -> None:
    """Each is let go before the next is loaded, copied ones too, in every pass."""
    count = number_of_models(method)
    base, tuned = models.llama(count, torch.float32, layers=1, hidden=8, mlp=8, vocabulary=8)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, method, count, **parameters)
    if not METHODS[method].needs_base:
        config.pop("base_model", None)
    pymerge.merge_checkpoints(config, tmp_path / "out")
    held: set[str] = set()
    for event, name in events:
        if event == "load":
            held.add(name)
            assert held == {name}
        elif event == "release":
            held.discard(name)
    assert not held
    assert {name for event, name in events if event == "load"} == set(base)


def test_reading_ahead_is_bounded_and_goes_on(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, size = 40_000, 4_000
    monkeypatch.setattr(files, "_READ_AHEAD", limit)
    state = {f"t{number:02d}": torch.zeros(size // 4) for number in range(50)}
    models.save_family(tmp_path, state, [state, state])
    pymerge.merge_checkpoints(models.config(tmp_path, "task_arithmetic", 2), tmp_path / "out")
    ahead: Counter[str] = Counter()
    most = 0
    for event, name in events:
        if event == "will need":
            ahead[name] += 1
        elif event == "load":
            # The first is wanted at once; all others were asked for, of all three.
            assert ahead.pop(name, 0) == (0 if name == "t00" else 3)
        most = max(most, size * ahead.total())
    assert limit <= most <= limit + 3 * size


def test_finite_inputs_are_not_looked_at_for_a_flag_before(tmp_path: Path, events: Events) -> None:
    """A result beyond the range of float32 raises the flag of NaN, although no input is NaN."""
    state = {f"t{number}": torch.ones(100) for number in range(9)}
    state["t3"] *= 3e38
    models.save_family(tmp_path, state, [state, state])
    config = models.config(tmp_path, "linear", 2, normalize=False)
    pymerge.merge_checkpoints(config, tmp_path / "out")
    loaded = Counter(name for event, name in events if event == "load")
    assert loaded == dict.fromkeys(state, 1) | {"t3": 2}
    assert bool(models.load(tmp_path / "out")["t3"].isinf().all())


def test_unequal_integers_are_named_in_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemorySink, "pieces", in_small_pieces)
    integers = torch.arange(5000)
    other = integers.clone()
    other[4321] = 0
    with pytest.raises(pymerge.RequestError, match="at flat index 4321 it has 0 where that has 43"):
        pymerge.linear([integers, other])


def test_phases_of_one_name_are_added_up() -> None:
    with Recorder(quiet=True) as recorder:
        for name, read in (("sample", (3,)), ("merge", (5, 6)), ("sample", (4, 10))):
            recorder.phase(name, 0)
            for nbytes in read:
                recorder.advance(nbytes)
    assert {name: phase.bytes for name, phase in recorder.phases.items()} == {
        "sample": 17,
        "merge": 11,
    }
