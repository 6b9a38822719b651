"""The files that are copied beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pymerge.errors import CheckpointError, MergeError
from pymerge.output import copy_side_files


def make(path: Path, **contents: str) -> Path:
    path.mkdir(parents=True)
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


WANTED = {
    "config.json": '{"torch_dtype": "float32"}',
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "tokenizer.model": "x",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.txt": "x",
    "vocab.json": "{}",
    "merges.txt": "x",
    "spiece.model": "x",
    "qwen.tiktoken": "x",
    "chat_template.jinja": "x",
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "modeling_x.py": "x",
    "other.json": "{}",
    "LICENSE": "x",
    "LICENSE.txt": "x",
    "Notice": "x",
}
UNWANTED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "tokenizer.bin",
    "vocab.pt",
    "model.gguf",
    "optimizer.pt",
    "optimizer.json",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "training_args.json",
    "rng_state_0.pth",
    "adapter_config.json",
    "pymerge_report.json",
    "README.md",
    ".gitattributes",
    ".hidden.json",
)


def test_side_files(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source", **WANTED), make(tmp_path / "target")
    for name in UNWANTED:
        (source / name).write_text("x")
    make(source / "onnx", **{"config.json": "{}"})
    make(source / "tokenizer_dir")
    make(source / "additional_chat_templates", **{"tool.jinja": "x", "model.bin": "x"})
    copied = copy_side_files(source, target, dtype=None)
    assert copied == sorted([*WANTED, "additional_chat_templates/tool.jinja"])
    assert names(target) == sorted([*WANTED, "additional_chat_templates"])
    for name, text in WANTED.items():
        assert (target / name).read_text() == text
    assert names(target / "additional_chat_templates") == ["tool.jinja"]


def test_side_files_that_are_links_become_files(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target")
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "blob").chmod(0o400)
    (source / "tokenizer.json").symlink_to("../blob")
    (source / "vocab.txt").symlink_to("../nowhere")
    assert copy_side_files(source, target, dtype="F32") == ["tokenizer.json"]
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "tokenizer.json").stat().st_mode & 0o200


def test_a_single_file_has_no_side_files(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source", **WANTED), make(tmp_path / "target")
    (source / "model.safetensors").write_text("x")
    assert copy_side_files(source / "model.safetensors", target, dtype="BF16") == []
    assert names(target) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"torch_dtype": "float32", "z": 1}, {"torch_dtype": "bfloat16", "z": 1}),
        ({"dtype": None}, {"dtype": "bfloat16"}),
        ({"dtype": "x", "torch_dtype": "y"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        (
            {"text_config": {"dtype": "float32"}, "quantization_config": {"dtype": "int8"}},
            {"text_config": {"dtype": "bfloat16"}, "quantization_config": {"dtype": "int8"}},
        ),
        ({"hidden": {"dtype": "x"}}, {"hidden": {"dtype": "x"}}),
    ],
)
def test_config_says_the_dtype_of_the_output(tmp_path: Path, before: dict, after: dict) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target")
    (source / "config.json").write_text(json.dumps(before))
    copy_side_files(source, target, dtype="BF16")
    written = json.loads((target / "config.json").read_text())
    assert written == after
    assert list(written) == list(before)


@pytest.mark.parametrize(
    "text", ['{"a":   1, "b": "\\ud800é"}', '{"dtype":   "bfloat16"}', "[1,  2]"]
)
def test_config_that_needs_no_change_keeps_its_bytes(tmp_path: Path, text: str) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target")
    (source / "config.json").write_text(text)
    copy_side_files(source, target, dtype="BF16")
    assert (target / "config.json").read_text() == text


def test_side_files_that_fail(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target")
    (source / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        copy_side_files(source, target, dtype="F32")
    with pytest.raises(MergeError, match=r"config\.json: cannot be copied to .*No such file"):
        copy_side_files(source, tmp_path / "gone" / "deeper", dtype=None)
