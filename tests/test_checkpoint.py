"""Opening sound checkpoints: directories, single files, pickles, tied embeddings, tensors."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint import (
    DTYPES,
    TensorInfo,
    dtype_code,
    open_checkpoint,
    torch_dtype,
)
from pymerge.errors import CheckpointError, RequestError

LABEL = "models[0] (m)"


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5).to(torch.bfloat16),
        "a.weight": torch.randn(3, 4),
        "c.scalar": torch.tensor(3.5, dtype=torch.float64),
        "d.empty": torch.zeros(0, 4),
        "e.mask": torch.tensor([True, False, True]),
        "f.ids": torch.arange(11),
        "g.half": torch.randn(129).half(),
    }


def assert_holds(checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == dtype_code(tensor.dtype)
        assert (info.numel, info.nbytes) == (tensor.numel(), tensor.nbytes)
        flat = checkpoint.flat(name)
        assert flat.dtype == tensor.dtype
        assert flat.ndim == 1
        assert torch.equal(flat, tensor.reshape(-1))


def write_sharded(directory: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    for filename, tensors in shards.items():
        save_file(tensors, directory / filename)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_raw(path: Path, entries: dict[str, tuple[str, list[int], bytes]], pad: int = 0) -> None:
    header: dict[str, object] = {}
    data = b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_single_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights(), path, metadata={"format": "pt"})
    with open_checkpoint(path, LABEL) as checkpoint:
        assert_holds(checkpoint, weights())
        assert checkpoint.label == LABEL
        assert checkpoint.path == path
        assert checkpoint.files == [(path, path.stat().st_size)]
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.config is None
        assert checkpoint.warnings == []
        assert checkpoint.tied == {}


def test_directory_with_an_index(tmp_path: Path) -> None:
    tensors = weights()
    names = sorted(tensors)
    write_sharded(
        tmp_path,
        {
            "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:3]},
            "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[3:]},
        },
    )
    # Mistral's repositories hold a second copy under this name; the index decides.
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_checkpoint(str(tmp_path), LABEL) as checkpoint:
        assert_holds(checkpoint, tensors)
        assert [path.name for path, _ in checkpoint.files] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.warnings == []


def test_index_of_another_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "diffusion.safetensors.index.json").write_text(
        '{"weight_map":{"a":"x.safetensors"}}'
    )
    assert list(open_checkpoint(tmp_path, LABEL).tensors) == ["a"]


def test_index_wins_over_a_single_file_with_a_warning(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"model-00001-of-00001.safetensors": {"new": torch.ones(1)}})
    save_file({"old": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, LABEL)
    assert list(checkpoint.tensors) == ["new"]
    assert "holds both" in checkpoint.warnings[0]


@pytest.mark.parametrize("name", ["model.safetensors", "only.safetensors"])
def test_directory_with_one_file(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    if name == "model.safetensors":
        save_file({"b": torch.ones(2)}, tmp_path / "extra.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    (tmp_path / ".hidden.safetensors").write_bytes(b"not looked at")
    assert list(open_checkpoint(tmp_path, LABEL).tensors) == ["a"]


def test_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.arange(4)}, blobs / "0f3a")
    (snapshot / "m-1.safetensors").symlink_to("../../blobs/0f3a")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map":{"a":"m-1.safetensors"}}')
    checkpoint = open_checkpoint(snapshot, LABEL)
    assert checkpoint.flat("a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pad", range(4))
def test_misaligned_tensors_are_views_too(tmp_path: Path, pad: int) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.randn(100)
    write_raw(
        path,
        {
            "byte": ("U8", [1], b"\x07"),
            "values": ("F32", [10, 10], values.numpy().tobytes()),
            "half": ("BF16", [3], b"\x80\x3f\x00\x40\x40\x40"),
        },
        pad,
    )
    checkpoint = open_checkpoint(path, LABEL)
    flat = checkpoint.flat("values")
    assert torch.equal(flat, values)
    assert checkpoint.flat("half").tolist() == [1.0, 2.0, 3.0]
    assert flat.data_ptr() % 4 == checkpoint.tensors["values"].offset % 4
    assert checkpoint.flat("values").data_ptr() == flat.data_ptr()  # no copy


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype(tmp_path: Path, code: str) -> None:
    path = tmp_path / "x.safetensors"
    content = bytes(i % 2 for i in range(3 * DTYPES[code]))
    write_raw(path, {"t": (code, [3], content)})
    flat = open_checkpoint(path, LABEL).flat("t")
    assert flat.dtype == torch_dtype(code)
    assert flat.itemsize == DTYPES[code]
    assert bytes(flat.view(torch.uint8).tolist()) == content
    assert dtype_code(flat.dtype) == code


def test_unknown_dtypes_are_named() -> None:
    with pytest.raises(RequestError, match=r"unknown code 'BF61'; did you mean 'BF16'\?"):
        torch_dtype("BF61")
    with pytest.raises(RequestError, match=r"no code for torch\.qint8"):
        dtype_code(torch.qint8)


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100_000, dtype=torch.float32)}, path)
    checkpoint = open_checkpoint(path, LABEL)
    flat = checkpoint.flat("a")
    checkpoint.close()
    checkpoint.close()
    del checkpoint
    path.unlink()
    gc.collect()
    assert flat.sum().item() == torch.arange(100_000, dtype=torch.float32).sum().item()


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def descriptors_of(path: Path) -> int:
    """How many open descriptors of this process are of the file; threads open others."""
    return sum(
        os.path.realpath(link) == os.path.realpath(path) for link in Path("/proc/self/fd").iterdir()
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_files_are_mapped_once_lazily_and_unmapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5000), "b": torch.ones(5000)}, path)
    checkpoint = open_checkpoint(path, LABEL)
    assert maps_of(path) == 0
    a, b = checkpoint.flat("a"), checkpoint.flat("b")
    assert maps_of(path) == 1
    assert descriptors_of(path) == 0  # a map needs none
    checkpoint.close()
    del a
    gc.collect()
    assert maps_of(path) == 1
    assert b.sum().item() == 5000
    del b
    gc.collect()
    assert maps_of(path) == 0


def resident_kib(path: Path) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(s.split()[1]) for s in lines if s.startswith("Rss:"))
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_release_gives_pages_back_and_keeps_content(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    big = torch.arange(1 << 20, dtype=torch.int32)  # 4 MiB
    save_file({"big": big, "small": torch.arange(1000)}, path)
    checkpoint = open_checkpoint(path, LABEL)
    flat, small = checkpoint.flat("big"), checkpoint.flat("small")
    assert torch.equal(flat, big)
    assert resident_kib(path) >= 4096
    checkpoint.release("big")
    assert resident_kib(path) < 512
    assert torch.equal(flat, big)
    assert torch.equal(small, torch.arange(1000))
    checkpoint.release("big", 0, 1 << 19)
    assert resident_kib(path) < 3500  # how much of the rest stays is the kernel's affair
    assert torch.equal(flat, big)


def test_hints_accept_any_range(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights(), path)
    with open_checkpoint(path, LABEL) as checkpoint:
        for name, info in checkpoint.tensors.items():
            for start, stop in ((0, None), (1, 2), (2, 1), (0, 0), (-5, info.numel + 10)):
                checkpoint.will_need(name, start, stop)
                checkpoint.release(name, start, stop)
        assert_holds(checkpoint, weights())


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"lm_head.weight": torch.ones(1)}, path)
    with open_checkpoint(path, LABEL) as checkpoint:
        expected = r"models\[0\] \(m\): there is no tensor 'lm_heed.weight'; did you mean"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.flat("lm_heed.weight")
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.flat("lm_head.weight")


def test_a_file_that_changes_after_opening_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    checkpoint = open_checkpoint(path, LABEL)
    os.truncate(path, 500)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: changed since its header was read"):
        checkpoint.flat("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read: No such file"):
        checkpoint.flat("a")


def same_size(path: Path, value: float, changed_ns: int) -> None:
    """Write a checkpoint whose header and size are those of another one."""
    save_file({"a": torch.full((1000,), value)}, path)
    os.utime(path, ns=(changed_ns, changed_ns))


@pytest.mark.parametrize("how", ["replaced", "replaced, of the same time", "written to"])
def test_another_file_of_the_same_size_is_not_mapped(how: str, tmp_path: Path) -> None:
    """A file is known by its inode and its time: replaced by another, or with other content."""
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    before, after = 10**18, 10**18 + (0 if how.endswith("time") else 1)
    same_size(path, 1.0, before)
    with open_checkpoint(path, LABEL) as untouched:
        assert torch.equal(untouched.flat("a"), torch.ones(1000))
    checkpoint = open_checkpoint(path, LABEL)
    if how == "written to":
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size - 4)
            file.write(b"\0\0\0@")
        os.utime(path, ns=(after, after))
        assert path.stat().st_size == size
    else:
        same_size(other, 2.0, after)
        assert other.stat().st_size == path.stat().st_size
        os.replace(other, path)
    for _ in range(2):
        expected = rf"^{re.escape(LABEL)}: x\.safetensors: changed since its header was read$"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.flat("a")
    with open_checkpoint(path, LABEL) as again:
        assert float(again.flat("a")[-1]) == 2.0


def test_what_is_mapped_stays_when_the_file_is_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    same_size(path, 1.0, 10**18)
    same_size(other, 2.0, 10**18)
    with open_checkpoint(path, LABEL) as checkpoint:
        first = checkpoint.flat("a")
        os.replace(other, path)
        checkpoint.release("a")
        assert torch.equal(checkpoint.flat("a"), torch.ones(1000))
        assert torch.equal(first, torch.ones(1000))


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    code = (
        "import importlib.util, sys, types\n"
        "sys.modules['torch'] = None\n"  # any import of torch now fails
        "root = types.ModuleType('pymerge'); root.__path__ = [sys.argv[2]]\n"
        "sys.modules['pymerge'] = root\n"
        "from pymerge.checkpoint import open_checkpoint\n"
        "print(list(open_checkpoint(sys.argv[1], 'm').tensors))\n"
    )
    package = Path(sys.modules["pymerge"].__file__ or "").parent
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(package)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "['a']", run.stderr


def test_tensor_info_is_a_value() -> None:
    info = TensorInfo("a", "BF16", (2, 3), Path("x"), 8, 12)
    assert info.numel == 6
    assert info == TensorInfo("a", "BF16", (2, 3), Path("x"), 8, 12)


# ------------------------------------------------------------------ tied embeddings


def open_named(tmp_path: Path, names: list[str], config: dict) -> dict[str, str]:
    path = tmp_path / "model"
    path.mkdir()
    save_file(
        {name: torch.full((2,), float(i)) for i, name in enumerate(names)}, path / "m.safetensors"
    )
    (path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(path, LABEL)
    for alias, name in checkpoint.tied.items():
        assert alias not in checkpoint.tensors
        assert torch.equal(checkpoint.flat(alias), checkpoint.flat(name))
        checkpoint.will_need(alias)
        checkpoint.release(alias)
    return checkpoint.tied


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("embedding", "alias"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
        ("transformer.word_embeddings.weight", "lm_head.weight"),
        ("model.decoder.embed_tokens.weight", "lm_head.weight"),
        ("embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_tied_head(tmp_path: Path, embedding: str, alias: str) -> None:
    assert open_named(tmp_path, ["x", embedding], TIED) == {alias: embedding}


def test_tied_head_of_a_text_config(tmp_path: Path) -> None:
    config = {"tie_word_embeddings": False, "text_config": TIED}
    assert open_named(tmp_path, ["model.embed_tokens.weight"], config) != {}


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (["model.embed_tokens.weight"], {}),
        (["model.embed_tokens.weight"], {"tie_word_embeddings": False}),
        (["model.embed_tokens.weight"], {"tie_word_embeddings": 1}),
        (["model.embed_tokens.weight", "lm_head.weight"], TIED),
        (["a.embed_tokens.weight", "language_model.lm_head.weight"], TIED),
        (["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], TIED),
        (["model.not_embed_tokens.weight"], TIED),
    ],
)
def test_not_tied(tmp_path: Path, names: list[str], config: dict) -> None:
    assert open_named(tmp_path, names, config) == {}
