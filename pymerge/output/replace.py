"""Renames of directories that never overwrite by accident, and swap two if Linux can; files that
are written, or replaced as a whole."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from pymerge.errors import MergeError

__all__ = ["exchange", "rename_to_free_name", "replace_file", "write_file"]

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file; text in UTF-8, with JSON escapes for characters that UTF-8 cannot hold.

    Raises:
        MergeError: it cannot be written.
    """
    try:
        if isinstance(content, str):  # file names need not be valid UTF-8
            path.write_text(content, encoding="utf-8", errors="backslashreplace")
        else:
            path.write_bytes(content)
    except OSError as error:
        raise MergeError(f"{path}: cannot be written: {error.strerror or error}") from error


def replace_file(path: Path, content: bytes, label: str = "") -> None:
    """Write a file so that it is either new as a whole or unchanged, even after a power failure.

    Args:
        path: the file, new or replaced.
        content: all of it.
        label: text before the path in a message.

    Raises:
        MergeError: it cannot be written; nothing is left behind.
    """
    if not path.name:
        raise MergeError(f"{label}{path}: cannot be written: {os.strerror(errno.EISDIR)}")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise MergeError(f"{label}{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def rename_to_free_name(source: Path, target: Path) -> None:
    """Rename a directory; FileExistsError if the target exists, even as an empty directory."""
    if not _rename(source, target, _RENAME_NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def exchange(first: Path, second: Path, aside: Path) -> None:
    """Swap two directories: atomically if the system can, else by way of `aside`.

    Args:
        first: ends up at `second`.
        second: ends up at `first`.
        aside: a free name in the same file system. Dying between the renames leaves `second` there.
    """
    if _rename(first, second, _RENAME_EXCHANGE):
        return
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Call renameat2; return False if the system or the file system does not support it."""
    if _renameat2 is None:
        return False
    if _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
