"""The output directory that appears complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pymerge
from pymerge.errors import MergeError, RequestError
from pymerge.output import OutputDirectory, replace


def make(path: Path, **contents: str) -> Path:
    path.mkdir(parents=True)
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def write(out: Path, *, force: bool = False, inputs: list[Path] | None = None, text="new") -> None:
    with OutputDirectory(out, force=force, inputs=inputs or []) as directory:
        (directory.path / "weights").write_text(text)
        (directory.path / "sub").mkdir()
        (directory.path / "sub" / "more").write_text(text)
        directory.commit()


# ------------------------------------------------------------------ appearing


def test_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"  # the parents are made
    with OutputDirectory(out, force=False, inputs=[]) as directory:
        (directory.path / "weights").write_text("new")
        assert not out.exists()
        assert directory.path.parent == out.parent
        assert directory.path.name.startswith(".out.pymerge-tmp-")
        assert (directory.path / ".lock").exists()
        directory.commit()
        assert names(out) == ["weights"]
    assert names(out.parent) == ["out"]
    assert directory.warnings == []


def test_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_nothing_is_left_without_commit(tmp_path: Path, error: type[BaseException] | None) -> None:
    def fail() -> None:
        with OutputDirectory(tmp_path / "out", force=False, inputs=[]) as directory:
            (directory.path / "weights").write_text("half")
            if error is not None:
                raise error

    if error is None:
        fail()
    else:
        with pytest.raises(error):
            fail()
    assert names(tmp_path) == []


@pytest.mark.parametrize("swap", [True, False])
def test_force_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    if not swap:
        monkeypatch.setattr(replace, "_renameat2", None)
    out = make(tmp_path / "out", old="old")
    with OutputDirectory(out, force=True, inputs=[]) as directory:
        (directory.path / "weights").write_text("new")
        assert names(out) == ["old"]
        directory.commit()
    assert names(out) == ["weights"]
    assert names(tmp_path) == ["out"]


def test_without_swap_a_failing_rename_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace, "_renameat2", None)
    out = make(tmp_path / "out", old="old")
    rename = os.rename
    calls = 0

    def second_fails(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(MergeError, match=r"cannot be completed: .*Input/output error"):
        write(out, force=True)
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_without_swap_an_existing_directory_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace, "_renameat2", None)
    source, target = make(tmp_path / "a"), make(tmp_path / "b")
    with pytest.raises(FileExistsError):
        replace.rename_to_free_name(source, target)
    replace.rename_to_free_name(source, tmp_path / "c")
    assert names(tmp_path) == ["b", "c"]


@pytest.mark.parametrize("force", [True, False])
def test_out_that_appears_during_the_merge(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"

    def run() -> None:
        with OutputDirectory(out, force=force, inputs=[]) as directory:
            (directory.path / "weights").write_text("new")
            make(out, theirs="x")
            directory.commit()

    if force:
        run()
        assert names(out) == ["weights"]
    else:
        with pytest.raises(MergeError, match=r"exists already.*changed during the merge"):
            run()
        assert names(out) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_a_link_that_appears_during_the_merge(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", precious="x")
    out = tmp_path / "out"

    def run() -> None:
        with OutputDirectory(out, force=True, inputs=[]) as directory:
            out.symlink_to(elsewhere)
            directory.commit()

    with pytest.raises(MergeError, match="is a symbolic link"):
        run()
    assert names(elsewhere) == ["precious"]
    assert names(tmp_path) == ["elsewhere", "out"]


def test_a_replaced_directory_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", old="old")

    def denied(path: Path, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with OutputDirectory(out, force=True, inputs=[]) as directory:
        (directory.path / "weights").write_text("new")
        monkeypatch.setattr("shutil.rmtree", denied)
        directory.commit()
    assert names(out) == ["weights"]
    (warning,) = directory.warnings
    assert str(directory.path) in warning
    assert "Permission denied" in warning


def test_commit_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, every directory and the parent are synced, and before the rename."""
    synced: list[str] = []
    fsync = os.fsync

    def recorded(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", recorded)
    out = tmp_path / "out"
    with OutputDirectory(out, force=False, inputs=[]) as directory:
        (directory.path / "weights").write_text("new")
        directory.commit()
    temporary = str(directory.path)
    assert {f"{temporary}/weights", temporary, str(tmp_path)} <= set(synced)
    assert synced.index(f"{temporary}/weights") < synced.index(temporary)
    assert synced[-1] == str(tmp_path)


# ------------------------------------------------------------------ processes that die

CHILD = """
import os, signal, sys
from pathlib import Path
from typing import Any
from pymerge.output import OutputDirectory
directory = OutputDirectory(Path(sys.argv[1]), force=True, inputs=[])
with directory:
    (directory.path / "weights").write_text("half")
    if sys.argv[2] == "unlocked":
        (directory.path / ".lock").unlink()
    print(directory.path, flush=True)
    signal.pause()
"""


def start_child(out: Path, kind: str = "locked") -> tuple[subprocess.Popen[str], Path]:
    root = Path(pymerge.__file__).parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), kind],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    path = Path(child.stdout.readline().strip())
    child.stdout.close()
    assert path.is_dir()
    return child, path


@pytest.mark.parametrize("kind", ["locked", "unlocked"])
def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path, kind: str) -> None:
    """Also one that is killed when commit() has taken the lock file away already."""
    out = make(tmp_path / "out", old="old")
    other = make(tmp_path / ".other.pymerge-tmp-01234567", theirs="x")
    child, left = start_child(out, kind)
    try:
        write(tmp_path / "different")
        assert left.is_dir()
        # A second process that writes the same directory leaves the temporary of a live one alone.
        write(out, force=True, text="second")
        assert left.is_dir()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert left.is_dir()
    assert (out / "weights").read_text() == "second"
    write(out, force=True, text="third")
    assert not left.exists()
    assert other.is_dir()
    assert names(tmp_path) == [other.name, "different", "out"]


def test_stale_directories_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system locks files only, the lock file decides."""
    lock = fcntl.flock

    def files_only(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.ENOLCK, "No locks available")
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", files_only)
    left = make(tmp_path / ".out.pymerge-tmp-01234567", weights="half")
    (left / ".lock").touch()
    write(tmp_path / "out")
    assert not left.exists()


def test_sigint_cleans_up(tmp_path: Path) -> None:
    child, left = start_child(tmp_path / "out")
    child.send_signal(signal.SIGINT)
    assert child.wait() != 0
    assert not left.exists()
    assert names(tmp_path) == []


def test_a_new_temporary_that_another_process_takes_for_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir
    taken: list[Path] = []

    def removed_at_once(self: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(self, *args, **kwargs)
        if ".pymerge-tmp-" in self.name and not taken:
            taken.append(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_at_once)
    write(tmp_path / "out")
    assert len(taken) == 1
    assert names(tmp_path) == ["out"]


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = OutputDirectory(out, force=False, inputs=[])
    with first:
        write(out, text="second")
        assert first.path.is_dir()
        with pytest.raises(MergeError, match="exists already"):
            first.commit()
    assert (out / "weights").read_text() == "second"
    assert names(tmp_path) == ["out"]


# ------------------------------------------------------------------ what is refused


def problems(out: Path, *, force: bool = False, inputs: list[Path] | None = None) -> list[str]:
    directory = OutputDirectory(out, force=force, inputs=inputs or [])
    found = directory.check()
    if found:
        with pytest.raises(RequestError) as caught, directory:
            pass
        assert caught.value.problems == found
    assert all(problem.startswith(f"out ({out}): ") for problem in found)
    return [problem.removeprefix(f"out ({out}): ") for problem in found]


def test_an_existing_directory(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (problem,) = problems(out)
    assert problem.startswith("exists already")
    assert problems(out, force=True) == []


def test_a_file_or_a_link(tmp_path: Path) -> None:
    real = make(tmp_path / "real", precious="x")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to("nowhere")
    for force in (False, True):
        assert problems(real / "precious", force=force)[0].startswith("is a file")
        assert problems(tmp_path / "link", force=force)[0].startswith("is a symbolic link")
        assert problems(tmp_path / "dangling", force=force)[0].startswith("is a symbolic link")
        (problem,) = problems(real / "precious" / "out", force=force)
        assert problem == f"cannot be created: {real / 'precious'} is not a directory"


def test_a_linked_parent_is_fine(tmp_path: Path) -> None:
    make(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link" / "out")
    assert names(tmp_path / "real") == ["out"]


def test_inputs_are_not_endangered(tmp_path: Path) -> None:
    model = make(tmp_path / "models" / "m", weights="x")
    inputs = [model]
    assert problems(model, inputs=inputs, force=True) == [f"is the input {model}"]
    assert problems(model / "out", inputs=inputs) == [f"lies inside the input {model}"]
    assert problems(model.parent, inputs=inputs, force=True) == [f"holds the input {model}"]
    assert len(problems(model, inputs=inputs)) == 2
    assert problems(model.parent / "out", inputs=inputs) == []
    (tmp_path / "alias").symlink_to(model)
    assert problems(model, inputs=[tmp_path / "alias"], force=True) == [
        f"is the input {tmp_path / 'alias'}"
    ]
    assert problems(model, inputs=[model / "weights"], force=True) == [
        f"holds the input {model / 'weights'}"
    ]


def test_inputs_that_are_links_into_out(tmp_path: Path) -> None:
    blobs = make(tmp_path / "blobs", a="x")
    snapshot = make(tmp_path / "snapshot")
    (snapshot / "model.safetensors").symlink_to(blobs / "a")
    assert problems(blobs, inputs=[snapshot], force=True) == [
        f"holds files that the input {snapshot} links to"
    ]
    hub = make(tmp_path / "hub")
    (hub / "link").symlink_to(blobs)
    assert problems(hub, inputs=[hub / "link"], force=True) == [f"holds the input {hub / 'link'}"]


def test_precious_directories_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make(tmp_path / "home")
    monkeypatch.setenv("HOME", str(home))
    work = make(home / "work" / "deep")
    monkeypatch.chdir(work)
    assert problems(home, force=True) == [
        "is the home directory, which is not replaced",
        "is or holds the current directory, which is not replaced",
    ]
    for path in (Path(), Path(".."), work, work.parent):
        assert problems(path, force=True) == [
            "is or holds the current directory, which is not replaced"
        ]
    assert "is the root directory, which is not replaced" in problems(Path("/"), force=True)
    repository = make(tmp_path / "repository" / ".git").parent
    assert problems(repository, force=True) == ["is a git repository (.git), which is not replaced"]


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no mount point that is sure to be one")
def test_a_mount_point_is_not_replaced() -> None:
    assert any("is a mount point" in problem for problem in problems(Path("/proc"), force=True))


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a patched access(), because root may write anywhere."""
    make(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    denied = f"no permission to write to {tmp_path}"
    assert problems(tmp_path / "a" / "b") == [f"cannot be created: {denied}"]
    assert problems(tmp_path / "out", force=True) == [f"cannot be replaced: {denied}"]


def test_checking_touches_nothing(tmp_path: Path) -> None:
    assert problems(tmp_path / "a" / "b" / "out") == []
    assert names(tmp_path) == []


def test_a_name_that_is_too_long_for_the_temporary(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"cannot be created: .*File name too long"):
        write(tmp_path / ("n" * 250))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "table.csv"
    replace.replace_file(target, b"old")
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(MergeError, match=r"^table: .*table\.csv: cannot be written: No space"):
            replace.replace_file(target, b"new", "table: ")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert target.read_bytes() == b"old"
    replace.replace_file(target, b"new")
    assert target.read_bytes() == b"new"


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str | int] = []
    rename = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("named"), rename(*paths)))
    replace.replace_file(tmp_path / "table.csv", b"x" * 1000)
    assert steps == [1000, "named"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
