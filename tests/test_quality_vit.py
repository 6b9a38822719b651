"""The vit suite on made-up pictures: no downloads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fontTools")
pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")

from fontTools.fontBuilder import FontBuilder  # noqa: E402
from fontTools.pens.ttGlyphPen import TTGlyphPen  # noqa: E402

from benchmarks.demo.cache import Cache  # noqa: E402
from benchmarks.demo.console import Log  # noqa: E402
from benchmarks.quality import __main__ as program  # noqa: E402
from benchmarks.quality import vit, vit_pictures, vit_tasks, vit_training  # noqa: E402
from benchmarks.quality.image_tasks import ImageSet  # noqa: E402
from benchmarks.quality.training import CosineHead, centred_means  # noqa: E402
from benchmarks.quality.vit_model import Shape, Upper  # noqa: E402
from benchmarks.quality.vit_pictures import Pictures  # noqa: E402
from benchmarks.quality.vit_training import PreTraining  # noqa: E402

SHAPE = Shape(image=16, width=24, heads=3, blocks=1)
SHORT = PreTraining(steps=6, batch=16, warmup=2, save_every=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_pictures() -> Pictures:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (36, 4, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.arange(36) // 3
    return Pictures(images, labels, labels // 4)


def write_font(path: Path, characters: str) -> None:
    """Write a typeface whose letters are rectangles of different widths."""
    names = {ord(one): f"glyph{number}" for number, one in enumerate(characters)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    glyphs = {}
    for number, name in enumerate([".notdef", *names.values()]):
        pen = TTGlyphPen(None)
        right = 200 + 10 * number
        pen.moveTo((100, 0))
        for corner in ((100, 700), (right, 700), (right, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (900, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Toy", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


def write_picture(path: Path, side: int = 80, colour: tuple[int, ...] = (200, 30, 30, 255)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGBA", (side, side // 2), colour).save(path)


def test_pictures_of_a_category_are_a_class(tmp_path: Path) -> None:
    top = tmp_path / "usr/share/openclipart/png"
    for number in range(13):
        write_picture(top / "food" / "fruit" / f"{number}.png")
        write_picture(top / "tools" / f"{number}.png", colour=(1, 2, 3, 255))
        write_picture(top / "unsorted" / f"{number}.png")
    write_picture(top / "few" / "one.png")
    (top / "tools" / "again.png").symlink_to(top / "food" / "fruit" / "1.png")
    write_picture(top / "tools" / "poster.png", side=4000)
    found = list(vit_pictures.clip_art({"openclipart-png": tmp_path}))
    assert [len(one) for one in found] == [13, 13]
    assert found[0][0].shape == (4, 64, 64)
    assert found[0][0][:, 32, 32].tolist() == [200, 30, 30, 255]
    assert found[0][0][3, 2, 32] == 0  # half as high as it is wide


def test_glyphs_are_drawn_in_the_middle(tmp_path: Path) -> None:
    write_font(tmp_path / "toy.ttf", "AB")
    ink = vit_pictures.drawn(tmp_path / "toy.ttf", "A")
    assert ink is not None
    rows, columns = np.nonzero(ink > 127)
    assert abs((rows.min() + rows.max()) / 2 - 31.5) <= 1
    assert abs((columns.min() + columns.max()) / 2 - 31.5) <= 1
    assert rows.max() - rows.min() == pytest.approx(45, abs=2)
    assert vit_pictures.drawn(tmp_path / "toy.ttf", " ") is not None  # the box of what is missing


def test_typefaces_of_a_family_are_for_one_purpose(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/fonts/truetype/aenigma"
    folder.mkdir(parents=True)
    for family, style in itertools.product("abcdefghijklmnopqrst", ("", "bold", "tilt")):
        (folder / f"{family * 5}{style}.ttf").touch()
    found = vit_pictures.typefaces({"fonts-aenigma": tmp_path})
    families = [{path.name[:5] for path in paths} for paths in found.values()]
    assert [len(one) for one in families] == [9, 8, 3]
    assert len(set.union(*families)) == 20
    assert sum(map(len, found.values())) == 60


def test_units_are_split_by_animation(tmp_path: Path) -> None:
    units = tmp_path / "usr/share/games/wesnoth/1.0/data/core/images/units"
    for animation, frame in itertools.product("abcdefghij", range(1, 4)):
        write_picture(units / "elves" / f"archer-{animation}-{frame}.png", side=72)
        write_picture(units / "undead" / "ghost" / f"ghost-{animation}{frame}.png", side=72)
        write_picture(units / "orcs" / f"grunt-{frame}.png", side=72)
    found = vit_tasks.units({"wesnoth-1.16-data": tmp_path})
    assert found.images.shape == (60, 3, 64, 64)
    assert found.labels.bincount().tolist() == [30, 30]
    names = itertools.product(("elves/archer", "undead/ghost/ghost"), "abcdefghij")
    assert set(found.groups) == {f"{unit}-{animation}" for unit, animation in names}


def test_augmented_pictures() -> None:
    images = some_pictures().images

    def made(seed: int) -> torch.Tensor:
        return vit_training.augmented(images, 24, torch.Generator().manual_seed(seed))

    found = made(1)
    assert found.shape == (36, 3, 24, 24)
    assert found.abs().max() <= 1.0
    assert torch.equal(found, made(1))
    assert not torch.equal(found, made(2))


def test_pre_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = some_pictures()
    whole = vit_training.pre_train(pictures, SHAPE, SHORT, tmp_path / "a.pt", Log())
    augmented = vit_training.augmented
    calls = itertools.count()

    def stopped(*arguments: Any) -> torch.Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return augmented(*arguments)

    monkeypatch.setattr(vit_training, "augmented", stopped)
    with pytest.raises(KeyboardInterrupt):
        vit_training.pre_train(pictures, SHAPE, SHORT, tmp_path / "b.pt", Log())
    again = vit_training.pre_train(pictures, SHAPE, SHORT, tmp_path / "b.pt", Log())
    assert next(calls) == 5 + 1 + 2  # the interrupted step, and those after the fourth
    for one, other in zip(whole, again, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def test_the_last_norm_centres_the_features() -> None:
    torch.manual_seed(0)
    network = vit_training.Network(SHAPE, 5).eval()
    for buffer in (network.centre.running_mean, network.centre.running_var):
        assert buffer is not None
        buffer.uniform_(0.5, 2.0)
    tokens = torch.randn(7, SHAPE.tokens, SHAPE.width)
    upper = Upper(SHAPE)
    upper.load_state_dict(network.states()[1])
    with torch.no_grad():
        expected = network.centre(network.upper.pooled(tokens))
        torch.testing.assert_close(upper.pooled(tokens), expected, rtol=1e-4, atol=1e-5)
        lengths = upper(tokens).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(7))


def test_centred_heads_do_not_see_a_common_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator) + 3, dim=1)
    labels = torch.arange(40) % 4
    head = CosineHead(centred_means(features, labels, 4), centred=True)
    shift = torch.randn(6, generator=generator)
    torch.testing.assert_close(head(features + shift), head(features), rtol=1e-4, atol=1e-4)
    fixed = head.at(features.mean(dim=0))
    torch.testing.assert_close(fixed(features[:3]), head(features)[:3])
    torch.testing.assert_close(head.scaled(50.0)(features), 2.5 * head(features))
    plain = CosineHead(head.means)
    assert (plain(features + shift) - plain(features)).abs().max() > 1


def _toy_task(seed: int, colour: bool) -> Callable[[Mapping[str, Path]], ImageSet]:
    def make(folders: Mapping[str, Path]) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(160) % 2
        shape = (160, 3, 64, 64) if colour else (160, 64, 64)
        images = torch.randint(100, shape, generator=generator, dtype=torch.uint8)
        images[labels == 1, ..., 20:40, :] += 6
        return ImageSet(images, labels, tuple(map(str, range(160))))

    return make


def test_the_suite_writes_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    tasks = {"grey": ("bars", _toy_task(1, False)), "colour": ("bars", _toy_task(2, True))}

    class Toy(vit.Vit):
        tasks = ("grey", "colour")
        about = ("bars", "bars")
        shape = SHAPE

        def _folders(self, packages: Any) -> dict[str, Path]:
            return {}

    made = []

    def toy(cache: Cache, log: Log, quick: bool) -> Toy:
        made.append(Toy(cache, log, quick=quick))
        return made[-1]

    monkeypatch.setattr(vit, "TASKS", tasks)
    monkeypatch.setattr(vit_pictures, "pictures", lambda folders: some_pictures())
    monkeypatch.setenv("PYMERGE_CACHE", str(tmp_path))
    monkeypatch.setitem(program.SUITES, "vit", toy)
    assert program.main(["vit", "--quick", "--output", str(tmp_path / "out")]) == 0
    table = next((tmp_path / "out").glob("quality-vit-*.md")).read_text(encoding="utf-8")
    for row in ("RegMean", "Fisher", "TSV-M", "AdaMerging, layers", "EMR"):
        assert row in table
    assert "not available yet" not in table
    assert not list((tmp_path / "quality-vit").glob("*unfinished*"))
    monkeypatch.setattr(vit_training, "pre_train", lambda *_: pytest.fail("trained again"))
    again = toy(Cache(tmp_path / "quality-vit"), Log(), True)
    again.prepare()
    assert all(torch.equal(t, made[0].base()[name]) for name, t in again.base().items())
