"""The folder that a command makes: built hidden beside its place, then put there with one rename, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path


class WriteError(Exception):
    """The target cannot be written; the message says what to do. The source was not touched."""


@contextlib.contextmanager
def replacing(source: Path, target: Path, force: bool, nbytes: int) -> Iterator[Path]:
    """A hidden folder beside the target, which takes the target's place when all went well. Raises WriteError."""
    target = target.absolute()
    _check_target(source, target, force)
    hidden = target.parent / f".{target.name}.partial"
    old = target.parent / f".{target.name}.replaced"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir(exist_ok=True)
        lock = (hidden / ".lock").open("w")
    except OSError as error:
        raise WriteError(f"{target}: cannot be written: {error.strerror}; name a folder that can be made") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WriteError(f"{target}: another run is writing it; wait for it, or name another folder") from error
        _empty(hidden)  # of a run that was killed
        try:
            _check_space(hidden, nbytes)
            yield hidden
            (hidden / ".lock").unlink()
            _sync(hidden)
            if target.exists() and any(target.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            hidden.rename(target)
            _sync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            reason = f"writing failed: {error.strerror or error}; free some space or name another folder"
            raise WriteError(f"{target}: {reason}. Nothing was left behind") from error
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(hidden, ignore_errors=True)


def _check_target(source: Path, target: Path, force: bool) -> None:
    here, there = source.resolve(), target.resolve()
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


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


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
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self.fd)

    def write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self.fd, view, at)
            view, at = view[n:], at + n
