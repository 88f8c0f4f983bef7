"""The folder that a command makes: built hidden beside its place, then put there in one step, or not at all.

One run at a time writes a target: it holds a lock from before the first byte until the folder is in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


class WriteError(Exception):
    """The target cannot be written; the message says what to do. The source was not touched."""


@contextlib.contextmanager
def replacing(source: Path, target: Path, force: bool, nbytes: int) -> Iterator[Path]:
    """A hidden folder beside the target, which takes the target's place if the block ends well.

    force: a checkpoint that is there may be replaced. nbytes: what will be written. Raises WriteError.
    """
    target = target.absolute()
    _check_target(source, target, force)
    with contextlib.ExitStack() as stack:
        try:
            with contextlib.suppress(FileNotFoundError):
                target.parent.stat()  # says what is wrong with a loop of links; mkdir says that it exists
            target.parent.mkdir(parents=True, exist_ok=True)
            parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, parent)
            stack.enter_context(_lock(target, parent))
            hidden, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
            _clean_up(target, hidden, old)  # after a run that was killed
            _check_target(source, target, force)  # again: another run may have finished it since
            hidden.mkdir()
        except OSError as error:
            raise WriteError(
                f"{target}: cannot be written: {error.strerror}; name a folder that can be made"
            ) from error
        stack.callback(_tidy, target, hidden, old)
        try:
            _check_space(hidden, nbytes)
            yield hidden
            _sync(hidden)
            _check_target(source, target, force)
            _put(hidden, target, old)
            _sync_folder(target.parent)
        except OSError as error:
            reason = f"writing failed: {error.strerror or error}; free some space or name another folder"
            raise WriteError(f"{target}: {reason}. Nothing was left behind") from error


@contextlib.contextmanager
def _lock(target: Path, parent: int) -> Iterator[None]:
    """Hold the target's lock, a file in the folder `parent`. Unlinking it is the last act of its holder.

    Raises WriteError where another run holds it, OSError where it cannot be made.
    """
    name = f".{target.name}.lock"
    lock = _open_lock(target, name, parent)
    try:
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        os.close(lock)


def _open_lock(target: Path, name: str, parent: int) -> int:
    """The lock's file descriptor, locked. A file that was opened before its holder unlinked it is opened anew."""
    while True:
        _refuse_link(target.with_name(name))
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=parent)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode(errors="replace")
            os.close(lock)
            who = f", process {holder}" if holder else ""
            raise WriteError(
                f"{target}: another run is writing it{who}; wait for it, or name another folder"
            ) from error
        if _is_named(lock, name, parent):
            return lock
        os.close(lock)


def _is_named(fd: int, name: str, parent: int) -> bool:
    """Whether the name stands for the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=parent, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _refuse_link(path: Path) -> None:
    """What a link leads to is not ours to empty or to write. Raises WriteError."""
    try:
        status = path.lstat()  # once: another run may remove the file at any moment
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
        raise WriteError(f"{path}: is a link, which is not followed; remove it")


def _clean_up(target: Path, hidden: Path, old: Path) -> None:
    """Remove the hidden folder, and put the old target back where its place is empty. The lock must be held."""
    for path in (hidden, old):
        _refuse_link(path)
    if old.is_dir() and not target.exists():
        old.rename(target)
    for path in (hidden, old):
        if path.is_dir():
            shutil.rmtree(path)


def _tidy(target: Path, hidden: Path, old: Path) -> None:
    """Clean up at the end of a run. The next run removes what this one cannot."""
    with contextlib.suppress(OSError):
        _clean_up(target, hidden, old)


def _put(hidden: Path, target: Path, old: Path) -> None:
    """Give the folder its name, in one step wherever the file system can swap two folders."""
    if not target.exists() or not any(target.iterdir()):
        hidden.rename(target)
    elif not _exchange(hidden, target):
        target.rename(old)
        hidden.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot. Raises OSError."""
    if not hasattr(_LIBC, "renameat2"):
        return False
    names = os.fsencode(first), os.fsencode(second)
    if _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def _check_target(source: Path, target: Path, force: bool) -> None:
    here, there = (Path(os.path.realpath(path)) for path in (source, target))
    if here.exists() and (there in (here, *here.parents) or here in there.parents):
        raise WriteError(
            f"{target}: is, holds or lies in the source {here}, which is never changed; name another folder"
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise WriteError(f"{target}: is not a folder; name another one")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise WriteError(f"{target}: is already there; name another folder, or add --force to replace it")
    if not any((target / name).is_file() for name in ("config.json", "params.json")):
        raise WriteError(f"{target}: holds no checkpoint, so --force does not replace it; name another folder")


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise WriteError(
            f"{folder.parent}: has {free / 1e9:.2f} GB free, {nbytes / 1e9:.2f} GB are needed; free some space, name a "
            "folder on another disk, or ask for a smaller --dtype"
        )


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class OutFile:
    """A file to write into at any place, closed when this object is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self.fd)

    def write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self.fd, view, at)
            view, at = view[n:], at + n
