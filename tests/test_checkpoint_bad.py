"""Damaged and unfit checkpoints: each is refused with a message that names file and problem."""

from __future__ import annotations

import builtins
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError

LABEL = "models[2] (ft)"


def refusal(path: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, LABEL)
    assert all(problem.startswith(f"{LABEL}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{LABEL}: ") for problem in caught.value.problems]


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changes}


# ------------------------------------------------------------------ the file as a whole


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is no safetensors file: 0 bytes, the header length alone takes 8"),
        (b"\x08\0\0", "is no safetensors file: 3 bytes, the header length alone takes 8"),
        (
            (10).to_bytes(8, "little") + b"{}",
            "is truncated: header of 10 bytes, but only 2 bytes follow its length: "
            "at least 8 bytes are missing",
        ),
        (
            (100_000_001).to_bytes(8, "little") + b"{}",
            "is damaged or no safetensors file: header of 100000001 bytes, "
            "at most 100000000 are allowed",
        ),
        (
            b"\xff" * 64,
            "is damaged or no safetensors file: header of 18446744073709551615 bytes, "
            "at most 100000000 are allowed",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "is a Git LFS pointer, not the weights; get them with `git lfs pull`",
        ),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert refusal(path) == [f"x.safetensors: {expected}"]


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b'{"a\xff": 1}', "the header is not UTF-8 (byte 3)"),
        (b'{"a":', "the header is not JSON: "),
        (b"", "the header is not JSON: "),
        (b"{}{}", "the header is not JSON: "),
        (b'{"a":' + b"9" * 5000 + b"}", "the header is not JSON: "),
        (b"[]", "the header is not a JSON object that begins with '{'"),
        (b" {}", "the header is not a JSON object that begins with '{'"),
        (b'{"a": {}, "a": {}}', "the header has the key 'a' twice"),
        (b'{"a": {"dtype": "U8", "dtype": "U8"}}', "the header has the key 'dtype' twice"),
        (DEEP, "the header is nested too deeply"),
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes, expected: str) -> None:
    (problem,) = refusal(raw(tmp_path / "x.safetensors", header))
    assert problem.startswith(f"x.safetensors: is damaged: {expected}")


@pytest.mark.parametrize("value", [None, [], "x", {"a": 1}, {"a": None}, {"a": "\ud800"}])
def test_metadata_that_is_no_object_of_strings(tmp_path: Path, value: object) -> None:
    header = {"__metadata__": value, "a": entry(0, 1)}
    path = raw(tmp_path / "x.safetensors", header, b"1")
    assert refusal(path) == ["x.safetensors: __metadata__: expected an object of strings"]


# ------------------------------------------------------------------ entries of the header


OFFSETS = "data_offsets: expected [begin, end] with 0 <= begin <= end, got "
SHAPE = "shape: expected a list of integers of at least 0, got "


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "expected an object, got None"),
        ([1], "expected an object, got [1]"),
        ({"dtype": "U8", "shape": [4]}, "'data_offsets' is missing"),
        ({"data_offsets": [0, 4]}, "'dtype' is missing, 'shape' is missing"),
        (entry(0, 4, extra=1), "unknown field 'extra'"),
        (entry(0, 4, dtype="BF61"), "unknown dtype 'BF61'; did you mean 'BF16'?"),
        (entry(0, 4, dtype=7), "unknown dtype 7"),
        (entry(0, 4, dtype=["U8"]), "unknown dtype ['U8']"),
        (
            entry(0, 4, dtype="F4"),
            "dtype F4, whose elements are no whole bytes, is not supported",
        ),
        (entry(0, 4, shape=4), f"{SHAPE}4"),
        (entry(0, 4, shape=[-4]), f"{SHAPE}[-4]"),
        (entry(0, 4, shape=[4.0]), f"{SHAPE}[4.0]"),
        (entry(0, 4, shape=[True, 4]), f"{SHAPE}[True, 4]"),
        (entry(0, 4, shape=[2**63]), f"shape [{2**63}] is impossibly large"),
        (entry(0, 4, shape=[2**40, 2**40, 0]), f"shape [{2**40}, {2**40}, 0] is impossibly large"),
        (entry(0, 4, shape=[2**62], dtype="F32"), f"shape [{2**62}] is impossibly large"),
        (entry(0, 4, data_offsets=[0]), f"{OFFSETS}[0]"),
        (entry(0, 4, data_offsets=[0, 4, 4]), f"{OFFSETS}[0, 4, 4]"),
        (entry(0, 4, data_offsets=[4, 0]), f"{OFFSETS}[4, 0]"),
        (entry(0, 4, data_offsets=[-1, 3]), f"{OFFSETS}[-1, 3]"),
        (entry(0, 4, data_offsets=[0, 2**63]), f"{OFFSETS}[0, {2**63}]"),
        (entry(0, 4, data_offsets=[False, 4]), f"{OFFSETS}[False, 4]"),
        (entry(0, 4, data_offsets="04"), f"{OFFSETS}'04'"),
        (
            entry(0, 4, shape=[3]),
            "shape [3] of U8 takes 3 bytes, but data_offsets give it 4",
        ),
        (
            entry(0, 4, dtype="F32", shape=[]) | {"shape": [2]},
            "shape [2] of F32 takes 8 bytes, but data_offsets give it 4",
        ),
    ],
)
def test_damaged_entry(tmp_path: Path, value: object, expected: str) -> None:
    path = raw(tmp_path / "x.safetensors", {"t": value}, b"data")
    assert refusal(path) == [f"x.safetensors: tensor 't': {expected}"]


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"a\ud800": entry(0, 1)}, b"1")
    (problem,) = refusal(path)
    assert problem == r"x.safetensors: tensor 'a\ud800': the name is no valid Unicode"
    problem.encode()  # can be printed


def test_the_empty_name_is_a_name(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"": entry(0, 1)}, b"1")
    assert open_checkpoint(path, LABEL).flat("").tolist() == [49]


# ------------------------------------------------------------------ the data section


def test_truncated_data_says_how_much_is_missing(tmp_path: Path) -> None:
    header = {"a": entry(0, 4), "b": entry(4, 10), "c": entry(10, 20)}
    path = raw(tmp_path / "x.safetensors", header, b"1234567")
    assert refusal(path) == [
        "x.safetensors: is truncated: 13 bytes are missing (7 of 20 data bytes are there); "
        "2 of 3 tensors are affected"
    ]


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": entry(0, 4)}, b"1234567")
    assert refusal(path) == ["x.safetensors: has 3 bytes after its last tensor"]


def test_overlap_and_hole(tmp_path: Path) -> None:
    header = {"d": entry(12, 14), "c": entry(6, 10), "b": entry(2, 5), "a": entry(0, 4)}
    path = raw(tmp_path / "x.safetensors", header, bytes(14))
    assert refusal(path) == [
        "x.safetensors: tensor 'b': overlaps 'a' in the data",
        "x.safetensors: tensor 'c': a hole of 1 bytes lies before it",
        "x.safetensors: tensor 'd': a hole of 2 bytes lies before it",
    ]


def test_an_empty_tensor_may_lie_between_others_only(tmp_path: Path) -> None:
    header = {"a": entry(0, 4), "empty": entry(4, 4), "b": entry(4, 6)}
    path = raw(tmp_path / "x.safetensors", header, bytes(6))
    assert len(open_checkpoint(path, LABEL).tensors) == 3
    header = {"a": entry(0, 4), "empty": entry(2, 2)}
    path = raw(tmp_path / "x.safetensors", header, bytes(4))
    assert refusal(path) == ["x.safetensors: tensor 'empty': overlaps 'a' in the data"]


def test_one_unplaced_tensor_does_not_make_the_rest_look_holey(tmp_path: Path) -> None:
    header = {"a": entry(0, 4), "b": entry(4, 8, data_offsets=None), "c": entry(8, 12)}
    (problem,) = refusal(raw(tmp_path / "x.safetensors", header, bytes(14)))
    assert "tensor 'b': data_offsets" in problem


def test_all_problems_of_all_files_at_once(tmp_path: Path) -> None:
    raw(tmp_path / "m-1.safetensors", {"a": entry(0, 2, dtype="Q8"), "b": entry(2, 9)}, b"12345")
    (tmp_path / "m-2.safetensors").write_bytes(b"")
    weight_map = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    weight_map |= {"d": "m-3.safetensors"}
    content = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (tmp_path / "config.json").write_text("{")
    text = "\n".join(refusal(tmp_path))
    for expected in (
        "index.json: names 'm-3.safetensors', which is missing",
        "config.json: is not JSON",
        "m-1.safetensors: tensor 'a': unknown dtype 'Q8'",
        "m-1.safetensors: is truncated: 4 bytes are missing",
        "m-2.safetensors: is no safetensors file: 0 bytes",
    ):
        assert expected in text


def test_a_flood_of_similar_problems_is_cut(tmp_path: Path) -> None:
    header = {f"t{i:03}": entry(i, i + 1, dtype="Q8") for i in range(100)} | {"z": entry(100, 101)}
    problems = refusal(raw(tmp_path / "x.safetensors", header, bytes(100)))
    assert len(problems) == 22
    assert "tensor 't019': unknown dtype" in problems[19]
    assert problems[20] == "x.safetensors: and 80 more like the last one"
    assert "is truncated" in problems[21]


def test_an_absurd_value_does_not_flood_the_message(tmp_path: Path) -> None:
    header = {"n" * 10_000: entry(0, 1, shape=[1] * 10_000 + [2], dtype="x" * 10_000)}
    for problem in refusal(raw(tmp_path / "x.safetensors", header, b"1")):
        assert len(problem) < 500


def test_no_tensors(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}})
    assert refusal(path) == ["holds no tensors"]


def mutate(good: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(good)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(damaged[: rng.randrange(len(good))])
    if kind == 1:
        position = rng.randrange(len(good))
        damaged[position:position] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 2:
        position = rng.randrange(len(good))
        del damaged[position : position + rng.randrange(1, 9)]
    else:
        for _ in range(rng.randrange(1, 5)):
            position = rng.randrange(len(good))
            damaged[position] = rng.choice(
                [damaged[position] ^ (1 << rng.randrange(8)), 0x31, 0x5D]
            )
    return bytes(damaged)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    tensors = {f"layer.{i}.weight": torch.ones(2, i, dtype=torch.bfloat16) for i in range(6)}
    save_file(tensors, good, metadata={"format": "pt"})
    content = good.read_bytes()
    rng = random.Random(20240607)
    outcomes = {"refused": 0, "opened": 0}
    path = tmp_path / "bad.safetensors"
    for _ in range(400):
        path.write_bytes(mutate(content, rng))
        try:
            with open_checkpoint(path, LABEL) as checkpoint:
                for name, info in checkpoint.tensors.items():
                    assert checkpoint.flat(name).numel() == info.numel
            outcomes["opened"] += 1
        except CheckpointError as error:
            assert "bad.safetensors" in str(error)
            str(error).encode()
            outcomes["refused"] += 1
    # a flipped bit in the data or in a name is no visible damage
    assert outcomes["refused"] > 200
    assert outcomes["opened"] > 5


# ------------------------------------------------------------------ the index


def with_index(directory: Path, content: object) -> Path:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, directory / "m-1.safetensors")
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


OUTSIDE = "which lies outside the model directory"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON: "),
        ("[]", "expected a JSON object, got list"),
        ({}, "weight_map: expected an object of tensor name -> file name, got nothing"),
        (
            {"weight_map": ["a"]},
            "weight_map: expected an object of tensor name -> file name, got list",
        ),
        ({"weight_map": {}}, "weight_map is empty"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "has the key 'a' twice"),
        ({"weight_map": {"a": 3}}, "weight_map['a']: expected a file name, got 3"),
        ({"weight_map": {"a": "\ud800"}}, r"weight_map['a']: expected a file name, got '\ud800'"),
        ({"weight_map": {"a": "gone.safetensors"}}, "names 'gone.safetensors', which is missing"),
        ({"weight_map": {"a": "/m-1.safetensors"}}, f"names '/m-1.safetensors', {OUTSIDE}"),
        ({"weight_map": {"a": "../m-1.safetensors"}}, f"names '../m-1.safetensors', {OUTSIDE}"),
        ({"weight_map": {"a": "x/../../m"}}, f"names 'x/../../m', {OUTSIDE}"),
        ({"weight_map": {"a": ""}}, "names '', which is no file name"),
        ({"weight_map": {"a": "m\0"}}, r"names 'm\x00', which is no file name"),
        ({"weight_map": {"a": "m" * 300}}, f"names '{'m' * 300}', which cannot be read: File name"),
    ],
)
def test_damaged_index(tmp_path: Path, content: object, expected: str) -> None:
    problems = refusal(with_index(tmp_path, content))
    assert problems[0].startswith(f"model.safetensors.index.json: {expected}")
    assert len(problems) == 1


def test_index_and_files_that_disagree(tmp_path: Path) -> None:
    save_file({"b": torch.ones(1), "d": torch.ones(1)}, tmp_path / "m-2.safetensors")
    weight_map = {"a": "m-1.safetensors", "c": "m-1.safetensors", "d": "m-2.safetensors"}
    assert refusal(with_index(tmp_path, {"weight_map": weight_map})) == [
        "m-1.safetensors: lacks tensor 'c', which model.safetensors.index.json says it holds",
        "m-1.safetensors: tensor 'b' is not in model.safetensors.index.json",
        "m-2.safetensors: tensor 'b' is not in model.safetensors.index.json",
        "m-2.safetensors: tensor 'b' is also in m-1.safetensors",
    ]


def test_a_tensor_in_the_file_before_the_one_that_the_index_names(tmp_path: Path) -> None:
    save_file({"b": torch.ones(1)}, tmp_path / "m-2.safetensors")
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    assert refusal(with_index(tmp_path, {"weight_map": weight_map})) == [
        "m-2.safetensors: tensor 'b' is also in m-1.safetensors"
    ]


def test_index_with_a_dangling_link_and_a_directory(tmp_path: Path) -> None:
    (tmp_path / "l.safetensors").symlink_to("nowhere")
    (tmp_path / "d.safetensors").mkdir()
    weight_map = {"a": "m-1.safetensors", "b": "m-1.safetensors"}
    weight_map |= {"x": "l.safetensors", "y": "d.safetensors"}
    assert refusal(with_index(tmp_path, {"weight_map": weight_map})) == [
        "model.safetensors.index.json: names 'l.safetensors', "
        "which is a link to a file that is missing",
        "d.safetensors: is not a regular file",
    ]


# ------------------------------------------------------------------ the directory


def test_missing_directory_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "llama-math").mkdir()
    (problem,) = refusal(tmp_path / "llama-meth")
    assert problem.startswith("no such file or directory; did you mean 'llama-math'?")
    assert "pymerge reads local checkpoints" in problem
    assert "`hf download NAME --local-dir DIR`" in problem


def test_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = refusal(Path("org/model"))
    assert "`hf download org/model --local-dir DIR`" in problem


def test_null_byte_in_the_path() -> None:
    (problem,) = refusal(Path("a\0b"))
    assert "no such file" in problem or "is no path" in problem


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "the directory is empty"),
        (["a.safetensors", "b.safetensors"], "several weight files without an index"),
        (["a.bin", "b.pt"], "several weight files without an index"),
        (["adapter_model.safetensors", "adapter_config.json"], "only a LoRA adapter"),
        (["adapter_model.bin"], "only a LoRA adapter"),
        (["m-Q4.gguf", "README.md"], "holds README.md, m-Q4.gguf; GGUF cannot be read"),
        (["README.md"], "holds no weights (expected *.safetensors, or pytorch_model.bin)"),
        (["training_args.bin", "optimizer.pt"], "holds no weights"),
        (
            ["a.safetensors.index.json", "b.safetensors.index.json"],
            "several indexes, cannot tell which one to read: a.safetensors.index.json, b.safe",
        ),
    ],
)
def test_unfit_directory(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (problem,) = refusal(tmp_path)
    assert expected in problem
    if expected.startswith("several"):
        assert all(name in problem for name in names)


def test_unfit_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    (problem,) = refusal(path)
    assert "got a file 'model.gguf'; GGUF cannot be read: convert to safetensors" in problem


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert refusal(tmp_path) == ["model.safetensors: is not a regular file"]


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a patched open(), because root may read anything."""
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    expected = ["config.json", "model.safetensors"]
    assert refusal(tmp_path) == [f"{name}: cannot be read: Permission denied" for name in expected]
    monkeypatch.setattr(os, "listdir", denied)
    assert refusal(tmp_path) == ["the directory cannot be read: Permission denied"]


@pytest.mark.parametrize("change", ["grows", "shrinks", "loses its header", "is replaced"])
def test_a_file_that_changes_while_its_header_is_read(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size and its header are read by two calls: something else may write between them."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    size, times = path.stat().st_size, 0
    real = builtins.open

    def changing(name: Any, *args: Any, **options: Any) -> Any:
        nonlocal times
        if name == path:
            times += 1
            if times == 2 and change == "is replaced":
                save_file({"a": torch.ones(1001)}, tmp_path / "other")
                os.replace(tmp_path / "other", path)
            elif times == 2:
                ends = {"grows": size + 4, "shrinks": size - 4, "loses its header": 20}
                os.truncate(path, ends[change])
        return real(name, *args, **options)

    monkeypatch.setattr("builtins.open", changing)
    assert refusal(path) == ["x.safetensors: changed while it was read"]
    assert times == 2
