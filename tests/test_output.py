"""The writer that fills the output files, also on a disk that misbehaves."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pymerge.checkpoint import DTYPES, open_checkpoint, torch_dtype
from pymerge.errors import MergeError
from pymerge.output import Layout, OutputTensor, ShardWriter, plan_layout
from tests.output_cases import MIXED

PAGE = 4096


def content_of(tensor: OutputTensor) -> torch.Tensor:
    numel = 1
    for size in tensor.shape:
        numel *= size
    nbytes = numel * DTYPES[tensor.dtype]
    seed = sum(tensor.name.encode())
    data = (torch.arange(nbytes, dtype=torch.int64) * 7 + seed) % 2  # 0 and 1: sound as BOOL too
    return data.to(torch.uint8).view(torch_dtype(tensor.dtype))


def write(writer: ShardWriter, tensors: list[OutputTensor], order: list[str]) -> None:
    known = {tensor.name: tensor for tensor in tensors}
    for name in order:
        content = content_of(known[name])
        for start, array in writer.pieces(name):
            piece = array.tensor()
            assert piece.dtype == content.dtype
            piece.copy_(content[start : start + piece.numel()])


def write_all(directory: Path, tensors: list[OutputTensor], layout: Layout, **sizes: int) -> None:
    with ShardWriter(directory, layout, **sizes) as writer:
        write(writer, tensors, layout.order)
        writer.finish()
        assert writer.bytes_written == sum(shard.nbytes for shard in layout.shards)
        assert writer.seconds_blocked >= 0


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def open_files(folder: Path) -> list[str]:
    """What this process has open below a folder; other threads may have other files open."""
    if not os.path.isdir("/proc/self/fd"):
        return []
    targets = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
    return [target for target in targets if target.startswith(str(folder))]


@pytest.fixture(autouse=True)
def nothing_leaks(tmp_path: Path) -> Iterator[None]:
    """No test leaves a thread or a file descriptor behind."""
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("limit", [10**9, 20_000, 1])
@pytest.mark.parametrize("slot_bytes", [PAGE, 3 * PAGE, 1 << 20])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_files_hold_the_tensors(tmp_path: Path, limit: int, slot_bytes: int, slots: int) -> None:
    layout = plan_layout(MIXED, limit)
    write_all(tmp_path, MIXED, layout, slot_bytes=slot_bytes, slots=slots)
    assert sorted(bytes_of(tmp_path)) == [shard.filename for shard in layout.shards]
    for shard in layout.shards:
        path = tmp_path / shard.filename
        assert path.stat().st_size == shard.nbytes
        with open_checkpoint(path, "out") as checkpoint:
            assert checkpoint.metadata == {"format": "pt"}
            for tensor in MIXED:
                if tensor.name in checkpoint.tensors:
                    info = checkpoint.tensors[tensor.name]
                    assert (info.dtype, info.shape) == (tensor.dtype, tensor.shape)
                    flat = checkpoint.flat(tensor.name)
                    # as bytes: some of the patterns are NaN
                    assert torch.equal(flat.view(torch.uint8), content_of(tensor).view(torch.uint8))


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    write_all(tmp_path, MIXED, plan_layout(MIXED, 10**9))
    loaded = load_file(tmp_path / "model.safetensors")
    assert len(loaded) == len(MIXED)
    for tensor in MIXED:
        assert loaded[tensor.name].shape == tensor.shape
        found = loaded[tensor.name].reshape(-1).view(torch.uint8)
        assert torch.equal(found, content_of(tensor).view(torch.uint8))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_same_bytes_whatever_the_memory(tmp_path: Path) -> None:
    layout = plan_layout(MIXED, 30_000)
    results = []
    for i, sizes in enumerate([(PAGE, 1), (2 * PAGE, 3), (1 << 20, 2)]):
        directory = tmp_path / str(i)
        directory.mkdir()
        write_all(directory, MIXED, layout, slot_bytes=sizes[0], slots=sizes[1])
        results.append(bytes_of(directory))
    assert results[0] == results[1] == results[2]


def test_a_header_larger_than_a_slot(tmp_path: Path) -> None:
    tensors = [OutputTensor(f"{i:04}.{'x' * 60}", "F32", (1,)) for i in range(500)]
    layout = plan_layout(tensors, 10**9)
    assert len(layout.shards[0].header) > 10 * PAGE
    write_all(tmp_path, tensors, layout, slot_bytes=PAGE, slots=2)
    assert len(load_file(tmp_path / "model.safetensors")) == 500


def test_no_tensors_at_all(tmp_path: Path) -> None:
    layout = plan_layout([], 10**9)
    write_all(tmp_path, [], layout)
    assert bytes_of(tmp_path) == {"model.safetensors": layout.shards[0].header}


def test_only_empty_tensors(tmp_path: Path) -> None:
    tensors = [OutputTensor("a", "F32", (0,)), OutputTensor("b", "BF16", (2, 0))]
    write_all(tmp_path, tensors, plan_layout(tensors, 10**9))
    assert load_file(tmp_path / "model.safetensors")["b"].shape == (2, 0)


def test_pieces_are_aligned_and_within_the_slots(tmp_path: Path) -> None:
    tensors = [OutputTensor("a", "F32", (10_000,)), OutputTensor("b", "U8", (10_001,))]
    layout = plan_layout(tensors, 10**9)
    seen: set[int] = set()
    with ShardWriter(tmp_path, layout, slot_bytes=PAGE, slots=3) as writer:
        for name, numel in (("a", 10_000), ("b", 10_001)):
            expected = 0
            for start, array in writer.pieces(name):
                piece = array.tensor()
                assert start == expected
                assert 0 < piece.nbytes <= PAGE
                assert piece.data_ptr() % piece.itemsize == 0
                seen.add(piece.data_ptr() // PAGE)
                piece.zero_()
                expected += piece.numel()
            assert expected == numel
        writer.finish()
    assert len(seen) <= 3


@pytest.mark.parametrize("until", [None, "model.0.w", "model.embed", "the end"])
@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_restart_writes_everything_anew(tmp_path: Path, until: str | None, limit: int) -> None:
    """Before anything is written, in the middle of a tensor of the first or a later file, ..."""
    once, again = tmp_path / "once", tmp_path / "again"
    once.mkdir()
    again.mkdir()
    layout = plan_layout(MIXED, limit)
    write_all(once, MIXED, layout)
    with ShardWriter(again, layout, slot_bytes=PAGE, slots=2) as writer:
        stale: Iterator[tuple[int, torch.Tensor]] = iter(())
        for name in layout.order if until else []:
            stale = writer.pieces(name)
            for i, (_, piece) in enumerate(stale):
                piece.tensor().view(torch.uint8).fill_(99)
                if name == until and i == 2:
                    break
            if name == until:
                break
        writer.restart()
        if until in layout.order:
            with pytest.raises(RuntimeError, match="before a restart"):
                next(stale)
        write(writer, MIXED, layout.order)
        writer.finish()
    assert bytes_of(again) == bytes_of(once)


def test_misuse_is_refused(tmp_path: Path) -> None:
    tensors = [OutputTensor("a", "F32", (3000,)), OutputTensor("b", "F32", (2,))]
    layout = plan_layout(tensors, 10**9)
    for sizes in ({"slot_bytes": 5000}, {"slot_bytes": 0}, {"slots": 0}):
        with pytest.raises(ValueError, match="positive multiple of 4096"):
            ShardWriter(tmp_path, layout, **sizes)
    with ShardWriter(tmp_path, layout, slot_bytes=PAGE) as writer:
        with pytest.raises(RuntimeError, match="expected 'a' next, got 'b'"):
            writer.pieces("b")
        pieces = writer.pieces("a")
        next(pieces)
        with pytest.raises(RuntimeError, match="'a' has not been filled to its end"):
            writer.pieces("b")
        with pytest.raises(RuntimeError, match="'a' has not been filled to its end"):
            writer.finish()
        for _ in pieces:
            pass
        with pytest.raises(RuntimeError, match="'b' has not been filled to its end"):
            writer.finish()
        for _ in writer.pieces("b"):
            pass
        with pytest.raises(RuntimeError, match="after the last tensor"):
            writer.pieces("b")
        writer.finish()
        with pytest.raises(RuntimeError, match="already finished or aborted"):
            writer.finish()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_abort_at_any_time(tmp_path: Path, after: int) -> None:
    layout = plan_layout(MIXED, 20_000)
    writer = ShardWriter(tmp_path, layout, slot_bytes=PAGE, slots=2)
    write(writer, MIXED, layout.order[:after])
    begun = writer.pieces(layout.order[after])
    next(begun, None)
    writer.abort()
    writer.abort()
    with pytest.raises(RuntimeError, match="already finished or aborted"):
        writer.pieces(layout.order[after])


def test_interrupt_in_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    layout = plan_layout(MIXED, 10**9)

    def interrupted() -> None:
        with ShardWriter(tmp_path, layout, slot_bytes=PAGE, slots=2) as writer:
            write(writer, MIXED, layout.order[:5])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


# ------------------------------------------------------------------ a disk that misbehaves

real_pwrite = os.pwrite


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: Any, offset: int) -> int:
        time.sleep(0.002)
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def reference_bytes(tmp_path: Path, layout: Layout) -> dict[str, bytes]:
    directory = tmp_path / "reference"
    directory.mkdir()
    write_all(directory, MIXED, layout)
    return bytes_of(directory)


def test_time_spent_waiting_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    layout = plan_layout(MIXED, 10**9)
    with ShardWriter(tmp_path, layout, slot_bytes=PAGE, slots=1) as writer:
        write(writer, MIXED, layout.order)
        writer.finish()
        assert writer.seconds_blocked > 0.02


def test_short_and_interrupted_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = plan_layout(MIXED, 30_000)
    expected = reference_bytes(tmp_path, layout)
    rng = random.Random(5)

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if rng.random() < 0.3:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        # a direct write takes whole blocks only; the tail after one of those is odd
        part = len(data) if len(data) < 2 * PAGE else PAGE
        part = rng.randrange(1, part + 1) if len(data) % PAGE or rng.random() < 0.5 else part
        try:
            return real_pwrite(fd, data[:part], offset)
        except OSError:
            return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    out = tmp_path / "out"
    out.mkdir()
    write_all(out, MIXED, layout, slot_bytes=4 * PAGE, slots=2)
    assert bytes_of(out) == expected


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes here")
@pytest.mark.parametrize("when", ["at open", "at the first write", "later"])
def test_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    layout = plan_layout(MIXED, 30_000)
    expected = reference_bytes(tmp_path, layout)
    real_open = os.open
    direct: set[int] = set()
    calls = {"direct": 0, "buffered": 0}

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            if when == "at open":
                raise OSError(errno.EINVAL, "Invalid argument")
            fd = real_open(path, flags & ~os.O_DIRECT, *args, **kwargs)
            direct.add(fd)
            return fd
        fd = real_open(path, flags, *args, **kwargs)
        direct.discard(fd)
        return fd

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if fd in direct:
            assert offset % PAGE == 0
            assert len(data) % PAGE == 0
            calls["direct"] += 1
            if when == "later" and calls["direct"] == 1:
                return real_pwrite(fd, data[:100], offset)  # what follows is not aligned
            if when == "at the first write" or calls["direct"] > 2:
                raise OSError(errno.EINVAL, "Invalid argument")
        else:
            calls["buffered"] += 1
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    out = tmp_path / "out"
    out.mkdir()
    write_all(out, MIXED, layout, slot_bytes=2 * PAGE, slots=2)
    assert bytes_of(out) == expected
    assert (calls["direct"] == 0) == (when == "at open")
    assert calls["buffered"] > 10


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("after", [0, 4, 20])
def test_a_failing_write_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    count = 0

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(code, os.strerror(code))
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    layout = plan_layout(MIXED, 10**9)
    total = layout.shards[0].nbytes
    with ShardWriter(tmp_path, layout, slot_bytes=PAGE, slots=2) as writer:

        def run() -> None:
            write(writer, MIXED, layout.order)
            writer.finish()

        with pytest.raises(MergeError) as caught:
            run()
        message = str(caught.value)
        path = tmp_path / "model.safetensors"
        assert message.startswith(f"{path}: cannot be written: {os.strerror(code)}")
        if code == errno.ENOSPC:
            assert f"the output takes {total} bytes" in message
            assert f"are free in {tmp_path}" in message
        assert isinstance(caught.value.__cause__, OSError)
        for call in (writer.finish, writer.restart, lambda: writer.pieces("a")):
            with pytest.raises(MergeError):
                call()


def test_a_write_that_takes_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    layout = plan_layout([], 1)
    with ShardWriter(tmp_path, layout) as writer, pytest.raises(MergeError, match="took no bytes"):
        writer.finish()


def test_a_failing_sync_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "fdatasync", fail, raising=False)
    layout = plan_layout([], 1)
    with ShardWriter(tmp_path, layout) as writer, pytest.raises(MergeError, match="Input/output"):
        writer.finish()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"model\.safetensors: cannot be written: No such file"):
        ShardWriter(tmp_path / "no", plan_layout([], 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_too_small_is_seen_before_computing(small_disk: Path) -> None:
    tensors = [OutputTensor(name, "F32", (32 << 10,)) for name in "abc"]
    layout = plan_layout(tensors, 128 << 10)
    assert len(layout.shards) == 3
    needed = sum(shard.nbytes for shard in layout.shards)
    expected = rf"No space left on device; the output takes {needed} bytes, 262144 are free in"
    with pytest.raises(MergeError, match=expected):
        ShardWriter(small_disk, layout)
    assert list(small_disk.iterdir()) == []


def test_a_file_that_fits_a_small_disk(small_disk: Path) -> None:
    tensors = [OutputTensor("a", "F32", (50 << 10,))]
    write_all(small_disk, tensors, plan_layout(tensors, 1 << 30), slot_bytes=PAGE)
    assert len(load_file(small_disk / "model.safetensors")["a"]) == 50 << 10
