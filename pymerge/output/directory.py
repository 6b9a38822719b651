"""An output directory that appears under its name either complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from pymerge.errors import MergeError, RequestError
from pymerge.output.replace import exchange, rename_to_free_name

__all__ = ["OutputDirectory"]

_LOCK = ".lock"


class OutputDirectory:
    """A context manager around the writing of `out`.

    Files are written into `path`, a hidden temporary directory beside `out`; `commit` makes their
    data durable and renames it into place. Leaving the context without `commit` removes it.
    Leftovers of a killed process are removed the next time the same `out` is written.

    Attributes:
        path: the temporary directory, inside the context.
        warnings: problems that occurred after the output was in place.
    """

    path: Path

    def __init__(self, out: Path, *, force: bool, inputs: Sequence[Path]) -> None:
        """Store the request; nothing is touched.

        Args:
            out: the directory to write; missing parents are created.
            force: replace the directory if it exists.
            inputs: the directories and files that are read; the output must not endanger them.
        """
        self.out = Path(out)
        self.warnings: list[str] = []
        self._force = force
        self._inputs = [Path(path) for path in inputs]
        self._target = _resolve_parent(self.out)
        self._locks: list[int] = []
        self._committed = False

    def check(self) -> list[str]:
        """Return every reason why `out` cannot be written, touching nothing."""
        problems: list[str] = []
        target = self._target
        if target.is_symlink():
            problems.append("is a symbolic link; give the directory itself")
        elif target.exists():
            problems += self._existing_problems(target)
        else:
            problems += _parent_problems(target.parent)
        problems += self._input_problems(target.resolve())
        return [f"out ({self.out}): {problem}" for problem in problems]

    def __enter__(self) -> OutputDirectory:
        problems = self.check()
        if problems:
            raise RequestError(problems)
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self._target)
            self.path, self._locks = _make_temporary(self._target)
        except OSError as error:
            raise MergeError(f"out ({self.out}): cannot be created: {error}") from error
        return self

    def commit(self) -> None:
        """Make all files durable and put the directory under its name.

        An existing `out` (with `force`) is swapped with it atomically if Linux and the file system
        support this, and then deleted.

        Raises:
            MergeError: the output could not be put into place.
        """
        try:
            _sync_tree(self.path)
            (self.path / _LOCK).unlink()
            replaced = os.path.lexists(self._target)
            if replaced:
                if problems := self.check():
                    raise MergeError(f"{problems[0]} (this has changed during the merge)")
                exchange(self.path, self._target, _sibling(self._target, "old"))
            else:
                rename_to_free_name(self.path, self._target)
        except OSError as error:
            raise MergeError(f"out ({self.out}): cannot be completed: {error}") from error
        self._committed = True
        with contextlib.suppress(OSError):  # some file systems cannot sync a directory
            _sync(self._target.parent)
        if replaced:
            try:
                shutil.rmtree(self.path)
            except OSError as error:
                # Another process may have removed it in the meantime, as stale.
                if os.path.lexists(self.path):
                    self.warnings.append(f"the replaced {self.out} is left in {self.path}: {error}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._committed:
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            _unlock(self._locks)

    def _existing_problems(self, target: Path) -> Iterator[str]:
        if not target.is_dir():
            yield "is a file; give the name of a directory"
            return
        if not self._force:
            yield "exists already; give another name, or force its replacement (--force)"
            return
        here = Path.cwd()
        if target == Path(target.anchor):
            yield "is the root directory, which is not replaced"
        elif os.path.ismount(target):
            yield "is a mount point, which cannot be replaced; name a directory in it"
        if target == _home():
            yield "is the home directory, which is not replaced"
        if target == here or target in here.parents:
            yield "is or holds the current directory, which is not replaced"
        if os.path.lexists(target / ".git"):
            yield "is a git repository (.git), which is not replaced"
        if not os.access(target.parent, os.W_OK | os.X_OK):
            yield f"cannot be replaced: no permission to write to {target.parent}"

    def _input_problems(self, target: Path) -> Iterator[str]:
        for given in self._inputs:
            path = given.resolve()
            if path == target:
                yield f"is the input {given}"
            elif path in target.parents:
                yield f"lies inside the input {given}"
            elif target in path.parents or target in _resolve_parent(given).parents:
                yield f"holds the input {given}"
            elif self._force and target.is_dir() and _links_into(path, target):
                yield f"holds files that the input {given} links to"


def _resolve_parent(out: Path) -> Path:
    """Return the absolute path, with every link resolved except a last one, which check()
    refuses."""
    if out.name in ("", ".."):
        return out.resolve()
    return out.parent.resolve() / out.name


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (RuntimeError, OSError):
        return None


def _links_into(directory: Path, target: Path) -> bool:
    try:
        entries = list(os.scandir(directory)) if directory.is_dir() else []
    except OSError:
        return False
    return any(
        target in Path(entry.path).resolve().parents for entry in entries if entry.is_symlink()
    )


def _parent_problems(parent: Path) -> list[str]:
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return [f"cannot be created: {parent} is not a directory"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"cannot be created: no permission to write to {parent}"]
    return []


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.pymerge-{kind}-{secrets.token_hex(4)}"


def _make_temporary(target: Path) -> tuple[Path, list[int]]:
    """Create the temporary directory; return it and the locks that show its process is alive."""
    while True:
        path = _sibling(target, "tmp")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            locks: list[int] = []
            try:
                _claim(path, locks)
                return path, locks
            except (FileNotFoundError, BlockingIOError):
                # Another process took the new directory for a stale one before it was locked, and
                # is removing it.
                _unlock(locks)
            except BaseException:
                _unlock(locks)
                shutil.rmtree(path, ignore_errors=True)
                raise


def _claim(path: Path, locks: list[int]) -> None:
    """Lock a temporary directory, adding the descriptors to `locks`.

    The directory itself is locked as well as the lock file: commit() removes that file before the
    rename, and what a process leaves if it dies in between must be recognised as stale.
    """
    locks.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    _lock(locks[0])
    locks.append(os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    _lock(locks[1])
    # The file is already gone if another process was faster.
    if not os.path.samestat(os.fstat(locks[1]), os.stat(path / _LOCK)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path / _LOCK))


def _lock(fd: int) -> bool:
    """Lock a file for the lifetime of this process; return False if the file system cannot.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _unlock(locks: list[int]) -> None:
    while locks:
        os.close(locks.pop())


def _remove_stale(target: Path) -> None:
    """Remove the temporary directories that dead processes left for the same target."""
    pattern = re.compile(re.escape(f".{target.name}.pymerge-tmp-") + r"[0-9a-f]{8}")
    for entry in list(os.scandir(target.parent)):
        if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            locks: list[int] = []
            try:
                if _is_stale(Path(entry.path), locks):
                    shutil.rmtree(entry.path, ignore_errors=True)
            except OSError as error:
                # in use, not ours, or gone in the meantime: not a reason to stop
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EPERM, errno.ENOENT):
                    raise
            finally:
                _unlock(locks)


def _is_stale(path: Path, locks: list[int]) -> bool:
    """Return whether every lock of a temporary directory can be taken; they are then held."""
    locks.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    stale = _lock(locks[0])
    if os.path.lexists(path / _LOCK):
        locks.append(os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        stale = _lock(locks[1])
    return stale


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder, name))
        with contextlib.suppress(OSError):  # some file systems cannot sync a directory
            _sync(Path(folder))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
