"""The quality benchmark on a toy: a small network, made-up tasks, no downloads."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import pymerge
from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.demo.packages import package_folder
from benchmarks.quality import __main__ as program
from benchmarks.quality import classifiers, corruptions, ncnn, report, text_tasks, trials
from benchmarks.quality.adaptation import Adaptation, Drawn
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.methods import METHODS, SETTINGS, Method, State
from benchmarks.quality.runner import Outcome, Run, geometry, run
from benchmarks.quality.suite import Split
from benchmarks.quality.training import Training

WIDTH = 12
# Without those that need data: other tests run them.
PLAIN = [method for method in METHODS if not method.data and not method.key.startswith("ada_")]
SOME = [m for m in PLAIN if m.key in ("averaging", "task_arithmetic", "pcb_paper", "tall")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rows:
    """Inputs that are rows of a tensor."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        return self.rows[positions]

    def batches(self, size: int) -> list[torch.Tensor]:
        return list(torch.arange(len(self.rows)).split(size))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.second = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.second(self.first(rows).relu()), dim=1)


class Toy(Classifiers):
    """Three tasks: noisy points around the corners of a random figure each."""

    name = "toy"
    adaptation = Adaptation(batch=8, rate=1e-2)
    title = "A toy"
    tasks = ("a", "b", "c")
    about = ("corners", "other corners", "more corners")
    training = Training(epochs=3, batch=8, rate=5e-3, warmup=2)
    made = 0

    def recipe(self) -> dict[str, Any]:
        return {"toy": 1}

    def settings(self) -> dict[str, Any]:
        return {}

    def load(self) -> nn.Module:
        return Network()

    def read(self) -> list[Split]:
        return [self._task(number) for number in range(3)]

    def _task(self, number: int) -> Split:
        generator = torch.Generator().manual_seed(number)
        corners = torch.randn(4, WIDTH, generator=generator)

        def part(count: int) -> tuple[Rows, torch.Tensor]:
            labels = torch.randint(4, (count,), generator=generator)
            noise = 0.9 * torch.randn(count, WIDTH, generator=generator)
            return Rows(corners[labels] + noise), labels

        return Split(4, part(160), part(40), part(120))

    def item_scores(self, state: State, task: int, part: Any) -> list[float]:
        self.made += 1
        return super().item_scores(state, task, part)


def prepared(folder: Path) -> Toy:
    suite = Toy(Cache(folder), Log())
    suite.prepare()
    return suite


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("quality")
    return folder, run(prepared(folder), [0, 1], methods=SOME)


def mean(found: Run, method: str, chosen: bool = False) -> float:
    scores = [o.scores for o in found.outcomes if o.method == method and o.chosen == chosen]
    return sum(map(sum, scores)) / sum(map(len, scores))


def test_every_method_is_tested_as_recommended_and_as_chosen(finished: tuple[Path, Run]) -> None:
    _, found = finished
    rows = [(o.method, o.chosen, o.seed) for o in found.outcomes]
    assert len(rows) == len(set(rows)) == 2 * (3 + 2 * len(SOME))
    assert mean(found, "individual") > mean(found, "pretrained") + 0.03
    assert mean(found, "averaging") > 0.3
    for search in found.searches:
        totals = [sum(tasks) for tasks in search["validation"]]
        assert search["chosen"] == search["values"][totals.index(max(totals))]
        chosen = [
            o.value
            for o in found.outcomes
            if (o.method, o.chosen, o.seed) == (search["method"], True, search["seed"])
        ]
        assert chosen == [search["chosen"]]


def test_task_arithmetic_is_what_it_says(finished: tuple[Path, Run]) -> None:
    folder, found = finished
    suite = prepared(folder)
    tuned = [suite.fine_tune(task, 1) for task in range(3)]
    base = suite.base()
    state = {n: base[n] + 0.4 * sum(model[n] - base[n] for model in tuned) for n in base}
    expected = [suite.item_scores(state, task, "test") for task in range(3)]
    outcome = next(
        o for o in found.outcomes if (o.method, o.chosen, o.seed) == ("task_arithmetic", False, 1)
    )
    differ = torch.tensor(outcome.items) != torch.tensor(expected)
    assert differ.sum() <= 2  # rounding may turn an item at the border


def test_a_second_run_computes_nothing(
    finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = finished
    suite = prepared(folder)
    monkeypatch.setattr(classifiers, "fine_tune", lambda *_: pytest.fail("trained"))
    again = run(suite, [0, 1], methods=SOME)
    assert suite.made == 0
    assert again == found


def test_another_test_set_trains_nothing_again(
    finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fewer(Toy):
        def test_recipe(self) -> dict[str, Any]:
            return {"test": 30}

        def read(self) -> list[Split]:
            found = super().read()
            tests = [(Rows(one.test[0][torch.arange(30)]), one.test[1][:30]) for one in found]
            return [replace(one, test=test) for one, test in zip(found, tests, strict=True)]

        def item_scores(self, state: State, task: int, part: Any) -> list[float]:
            assert part == "test"
            return super().item_scores(state, task, part)

    folder, found = finished
    suite = Fewer(Cache(folder), Log())
    suite.prepare()
    monkeypatch.setattr(classifiers, "fine_tune", lambda *_: pytest.fail("trained"))
    fewer = run(suite, [0, 1], methods=SOME)
    assert suite.made > 0
    assert fewer.searches == found.searches
    for one, other in zip(fewer.outcomes, found.outcomes, strict=True):
        first = torch.tensor([items[:30] for items in other.items])
        # rounding may turn an item at the border
        assert (torch.tensor(one.items) != first).sum() <= 2


def test_an_interrupted_run_goes_on(finished: tuple[Path, Run], tmp_path: Path) -> None:
    class Stopped(Toy):
        def item_scores(self, state: State, task: int, part: Any) -> list[float]:
            if self.made == 20:
                raise KeyboardInterrupt
            return super().item_scores(state, task, part)

    suite = Stopped(Cache(tmp_path), Log())
    suite.prepare()
    with pytest.raises(KeyboardInterrupt):
        run(suite, [0], methods=SOME)
    rest = prepared(tmp_path)
    found = run(rest, [0], methods=SOME)
    assert [o for o in finished[1].outcomes if o.seed == 0] == found.outcomes
    assert not list(tmp_path.glob(".*tmp*"))


def test_what_a_version_lacks_is_said_in_the_table(
    finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, load = ("fisher_merge", "regmean_merge", "AdaMerging"), pymerge.__getattr__

    def lacking(name: str) -> Any:
        if name in gone:
            raise AttributeError(name)
        return load(name)

    for name in gone:
        monkeypatch.delattr(pymerge, name, raising=False)
    monkeypatch.setattr(pymerge, "__getattr__", lacking)
    suite = prepared(finished[0])
    found = run(suite, [0], settings=1)
    assert {outcome.method for outcome in found.outcomes} >= {method.key for method in PLAIN}
    assert set(found.missing) == {method.key for method in METHODS} - {m.key for m in PLAIN}
    text = report.tables(suite, found)["quality-toy"].markdown()
    assert re.search(r"RegMean \| not available yet", text)
    assert "this version has no pymerge.regmean_merge" in text


def test_tables_plots_and_records(finished: tuple[Path, Run], tmp_path: Path) -> None:
    folder, found = finished
    suite = prepared(folder)
    tables = report.tables(suite, found, published=True)
    overview = tables["quality-toy"].markdown()
    expected = f"{100 * mean(found, 'individual'):.1f}"
    assert re.search(rf"\| individual fine-tunes \| {expected} ", overview)
    assert "| 69.1 |" in overview
    kept = json.loads(json.dumps(report.records(suite, found, 1.0)))[0]
    assert len(kept["outcomes"]) == len(found.outcomes)
    pytest.importorskip("matplotlib")
    report.plot(suite, found, tmp_path / "plots" / "toy.png")
    assert (tmp_path / "plots" / "toy.png").stat().st_size > 10_000


def test_settings_are_as_many_for_every_method() -> None:
    assert {len(method.values) for method in METHODS} <= {1, SETTINGS}
    assert len({method.key for method in METHODS}) == len(METHODS)
    with pytest.raises(ValueError, match="of"):
        Method("x", "x", PLAIN[0].make, "scale", (1.0, 2.0), 1.0)


def test_geometry() -> None:
    base = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0]), "n": torch.tensor(7)}
    steps = [(0.5, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 1.0)]
    tuned = [
        {**base, "a": base["a"] + torch.tensor([x, y]), "b": torch.tensor([z])} for x, y, z in steps
    ]
    found = geometry(base, tuned)
    assert found["lengths"] == pytest.approx([0.1, 0.2, 2**0.5 / 5])
    assert found["cosines"] == pytest.approx([0.0, 0.5**0.5, 0.5**0.5])


def outcomes(*items: Sequence[Sequence[float]]) -> list[Outcome]:
    return [Outcome("m", "m", seed, True, None, value) for seed, value in enumerate(items)]


def test_paired_difference() -> None:
    one = outcomes([[1, 1, 0, 1], [1, 0]])
    other = outcomes([[1, 0, 0, 0], [0, 0]])
    centre, half = report.paired(one, other)
    assert centre == pytest.approx((0.5 + 0.5) / 2)
    first, second = (4 * 0.25 / 3) / 4, (2 * 0.25 / 1) / 2
    assert half == pytest.approx(1.96 * (first + second) ** 0.5 / 2)
    assert report.paired(one, one) == (0.0, 0.0)


def test_groups_are_on_one_side() -> None:
    examples = [
        text_tasks.Example(f"text {n} of {n % 40}", str(n % 3), f"group {n % 40}")
        for n in range(400)
    ]
    task = text_tasks.split("t", "", examples, train=400, validation=400, test=400)
    parts = (task.train, task.validation, task.test)
    sides = [{text.rpartition(" ")[2] for text, _ in part} for part in parts]
    assert all(len(side) > 2 for side in sides)
    assert len(set.union(*sides)) == sum(map(len, sides))
    assert len(task.train) + len(task.validation) + len(task.test) == 400
    assert task == text_tasks.split("t", "", examples, train=400, validation=400, test=400)
    fewer = text_tasks.split("t", "", examples, train=400, validation=400, test=5)
    whole = text_tasks.split("t", "", examples, train=400, validation=400, test=None)
    assert (fewer.test, whole.test) == (task.test[:5], task.test)


def test_own_test_splits_are_kept_and_doubles_are_not() -> None:
    examples = [text_tasks.Example(f"a{n}", "x", f"a{n}", "train") for n in range(50)]
    examples += [text_tasks.Example(f"b{n}", "x", f"b{n}", "test") for n in range(9)]
    examples += [text_tasks.Example("A1 ", "x", "a1", "test")]
    task = text_tasks.split("t", "", examples, train=99, validation=99, test=99)
    assert {text for text, _ in task.test} == {f"b{n}" for n in range(9)}
    with pytest.raises(SystemExit, match="task t: no text for test"):
        text_tasks.split("t", "", examples[:50], train=9, validation=9, test=9)


def test_messages_of_gettext() -> None:
    text = (
        'msgid ""\nmsgstr ""\n"Language: sl\\n"\n\nmsgid "Enter a value"\nmsgstr ""\n"Vnesite "\n'
    )
    text += '"\\"vrednost\\""\n\nmsgid "a"\nmsgid_plural "b"\nmsgstr[0] "c"\n'
    assert list(text_tasks.messages(text)) == [("Enter a value", 'Vnesite "vrednost"')]


def test_a_missing_package_is_named() -> None:
    with pytest.raises(SystemExit, match="no-such-package"):
        package_folder("no-such-package", "x/__init__.py")


def write_network(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = torch.randn(2, 3, 3, 3), torch.randn(2)
    lines = ["7767517", "3 3", "Input in0 0 1 in0"]
    lines += ["Convolution c0 1 1 in0 1 0=2 1=3 5=1 6=54 9=2 -23310=1,1.0e-01"]
    lines += ["Crop p0 1 1 1 out0 -23309=2,1,1 -23310=2,-1,-1 -23311=2,-2,-1"]
    (folder / "n.param").write_text("\n".join(lines) + "\n")
    half = weight.numpy().astype(np.float16)
    flag = (0x01306B47).to_bytes(4, "little")
    (folder / "n.bin").write_bytes(flag + half.tobytes() + bias.numpy().tobytes())
    return torch.from_numpy(half.astype(np.float32)), bias


def test_networks_of_ncnn(tmp_path: Path) -> None:
    weight, bias = write_network(tmp_path)
    network, weights = ncnn.read(tmp_path / "n.param")
    image = torch.rand(1, 3, 8, 9)
    expected = nn.functional.leaky_relu(nn.functional.conv2d(image, weight, bias), 0.1)
    assert torch.equal(network(weights, image), expected[..., 1:-1, 1:-1])


def test_a_damaged_network_is_an_error(tmp_path: Path) -> None:
    write_network(tmp_path)
    data = (tmp_path / "n.bin").read_bytes()
    (tmp_path / "n.bin").write_bytes(data + b"1234")
    with pytest.raises(SystemExit, match=r"take 120 bytes of 124"):
        ncnn.read(tmp_path / "n.param")
    (tmp_path / "n.bin").write_bytes(b"xxxx" + data[4:])
    with pytest.raises(SystemExit, match="c0 has weights of the unknown kind"):
        ncnn.read(tmp_path / "n.param")


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["nothing"], "invalid choice"),
        (["text", "--seeds", "0"], "expected at least 1, got 0"),
        (["text", "--quick", "--save"], "are no results"),
        (["text", "llm", "--whole-tests"], "the text suite alone"),
    ):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert words in capsys.readouterr().err


def test_the_program_writes_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYMERGE_CACHE", str(tmp_path))
    monkeypatch.setitem(program.SUITES, "toy", lambda cache, log, quick: Toy(cache, log))
    assert program.main(["toy", "--quick", "--output", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sorted(re.sub(r"-\d[\d-]*", "", name) for name in names) == [
        "quality-toy-coefficients.png",
        "quality-toy-entropy.png",
        "quality-toy.json",
        "quality-toy.md",
        "quality-toy.png",
    ]
    extras = json.loads(next((tmp_path / "out").glob("*.json")).read_text())["records"][0]["extras"]
    study = extras["entropy"]
    assert study["gradients"]["tasks"]["loss"] == pytest.approx([1.0] * 3)
    for one in study["examples"]:
        correlation = stats.spearmanr(one["entropy"], one["loss"])
        assert one["spearman"] == pytest.approx(correlation[0], abs=0.02)
    learned = torch.tensor(extras["coefficients"]["values"])
    assert learned.shape == (3, 4)
    assert (learned - 0.3).abs().max() > 1e-3


def test_batches_of_several_sets() -> None:
    first, second = Rows(torch.arange(10)[:, None]), Rows(torch.arange(100, 125)[:, None])
    batches = Drawn([first, second], 5, 14, seed=3)
    found = [batch.flatten().tolist() for batch in batches]
    assert len(batches) == 14
    assert sorted(itertools.chain(*found[:7])) == [*range(10), *range(100, 125)]
    assert sorted(itertools.chain(*found[7:])) == [*range(10), *range(100, 125)]
    assert all(len({value >= 100 for value in batch}) == 1 for batch in found)
    shorter = [batch.flatten().tolist() for batch in Drawn([first, second], 5, 9, seed=3)]
    assert shorter == found[:9]


def test_coefficients_after_more_steps_go_on_from_fewer(tmp_path: Path) -> None:
    suite = prepared(tmp_path)
    tuned = [suite.fine_tune(task, 0) for task in range(3)]
    how = {"granularity": "layer", "trimmed": False, "init": 0.3}
    few = suite.learned(suite.base(), tuned, 0, steps=10, **how)
    more = suite.learned(suite.base(), tuned, 0, steps=20, **how)
    assert torch.equal(more.entropies[:10], few.entropies)
    assert len(more.entropies) == 20
    (tmp_path / "other").mkdir()
    other = prepared(tmp_path / "other")
    other.adaptation = Adaptation(steps=(20,), batch=8, rate=1e-2)
    whole = other.learned(other.base(), tuned, 0, steps=20, **how)
    torch.testing.assert_close(whole.coefficients, more.coefficients, rtol=0, atol=1e-6)
    assert whole.groups == more.groups


@pytest.mark.skipif(find_spec("imagecorruptions") is None, reason="imagecorruptions is missing")
def test_damaged_images_are_the_same_again() -> None:
    images = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    for severity in (1, 5):
        found = corruptions.corrupted(images, corruptions.CORRUPTIONS, severity)
        again = corruptions.corrupted(images, corruptions.CORRUPTIONS, severity)
        for name, one, other in zip(corruptions.CORRUPTIONS, found, again, strict=True):
            assert torch.equal(one, other), name
            assert one.shape == (3, 3, 64, 64)
            assert (one[:, 0] != images).any(), name


def test_parts_add_up_to_tsv_m() -> None:
    torch.manual_seed(0)
    base = {"matrix": torch.randn(12, 9), "bias": torch.randn(5), "count": torch.tensor(3)}
    tuned = [
        {n: t + 0.1 * torch.randn(t.shape) if t.is_floating_point() else t for n, t in base.items()}
        for _ in range(3)
    ]
    parts = trials.singular_parts(base, tuned)
    expected = pymerge.merge("tsv_m", base, tuned)
    for name in ("matrix", "bias"):
        total = base[name] + sum(part[name] - base[name] for part in parts)
        torch.testing.assert_close(total, expected[name], rtol=0, atol=1e-5)


def test_a_trial_with_labels_lowers_the_loss(tmp_path: Path) -> None:
    suite = prepared(tmp_path)
    tuned = [suite.fine_tune(task, 0) for task in range(3)]
    for trial in (trials.Trial("a", 20.0, labelled=True), trials.Trial("b", 50.0, singular=True)):
        rows = trials.run_trial(suite, tuned, trial, 40, lambda: None)
        assert [row["step"] for row in rows] == [0, 10, 20, 30, 40]
        assert sum(rows[-1]["aim"]) < sum(rows[1]["aim"])
        assert len(rows[0]["accuracy"]) == 3
