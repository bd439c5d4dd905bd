"""Files and folders that appear whole or not at all, and stay after a power cut.

They are written beside their place, flushed to the disk and renamed; then the folder with the new name is flushed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".*.tmp"
"""Pattern, within a folder, of what was being written; without its process, the leftover of one that was killed."""


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file, over one that is there: whoever reads it finds the old content or the new.

    Raises:
        OSError: it cannot be written; what was there is intact.
    """
    temporary = unfinished_name(file)
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(file.parent)


@contextmanager
def whole_folder(target: Path, *, replace: bool, flush: bool = True) -> Iterator[Path]:
    """A new folder to write to, which gets its name once the block ends.

    Args:
        target: its name.
        replace: whether it takes the place of a folder of that name; otherwise one that is there by then stays, and
            the new one goes.
        flush: whether it is flushed to the disk, file by file: for what could not simply be made again.

    Raises:
        OSError: it cannot be written. What was there is intact then, as it is after an error within the block.
    """
    temporary = unfinished_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if flush:
            flush_tree(temporary)
        if replace and target.exists():
            shutil.rmtree(target)
        try:
            temporary.rename(target)
        except OSError:  # a rename never replaces a folder that has content
            if replace or not target.is_dir():
                raise
            shutil.rmtree(temporary)
        if flush:
            flush_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush_tree(folder: Path) -> None:
    """Flush a folder with all that is below it to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            flush_folder(path)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: without it, a file that was renamed may be gone after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished_name(path: Path) -> Path:
    """A name in the same folder that is this thread's alone; `UNFINISHED` finds it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
