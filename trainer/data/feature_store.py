"""Feature segments on disk: written once, mapped into memory, checked by checksum, free of pickle.

    <folder>/
        key.json             what the features depend on, for people to read; its hash names the folder
        segment-000001.bin   rows one after the other, in the machine's byte order
        segment-000001.json  shape, dtype, and for each row the image's sha256 and the row's crc32
        lock                 held by the process that repairs and adds

A segment never changes: more images make more segments, and a row that turns out damaged is written again to a later
segment, which counts before earlier ones. A reader therefore needs no lock, and its mapping stays intact whatever
others do. The index is renamed into place after its rows are on disk, so rows without an index are those of a process
that was killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal

import torch
from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.common.errors import DataError
from trainer.common.files import UNFINISHED, write_whole

log = logging.getLogger("trainer.data.features")

SEGMENT_BYTES = 256 << 20
"""A segment is closed at this size: a process that is killed loses this much work, not the whole pass."""
SPARE_BYTES = 256 << 20
"""Space to leave free on the disk, for databases and checkpoints."""
WAYS_OUT = "set LORA_SEARCH_CACHE to a folder elsewhere, or do without a store: --set cache_features=false"
_TEMPORARY = "writing-"


class Index(BaseModel):
    """The contents of a segment's JSON file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1] = 1
    shape: tuple[int, int]
    """Shape of a row: (patches + 1, vision hidden size)."""
    dtype: str
    images: Annotated[list[tuple[str, int]], Field(min_length=1)]
    """For each row the sha256 of the image file and the crc32 of the row's bytes."""


@dataclass(frozen=True)
class Stored:
    """The features of one image in the store."""

    data: torch.Tensor
    """(patches + 1, vision hidden size), mapped from the segment; never write to it."""
    checksum: int

    def sound(self) -> bool:
        """Whether the bytes are those that were written; reads all of them."""
        return zlib.crc32(bytes_of(self.data)) == self.checksum


class _DamagedError(Exception):
    """A segment cannot be used; the message says why."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype (NumPy has no bfloat16)."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Store:
    """The features of one key: one vision tower, preprocessing, dtype and kind of machine."""

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = dtype
        self.row_bytes = shape[0] * shape[1] * dtype.itemsize

    def find(self, digests: Collection[str]) -> dict[str, Stored]:
        """The rows that the store holds of these images, by sha256. They are not checked yet: see `Stored.sound`.

        Unusable segments are skipped; `repair` removes them.
        """
        wanted = set(digests)
        found: dict[str, Stored] = {}
        for index_file in self._index_files():
            try:
                index, rows = self._open(index_file)
            except _DamagedError:
                continue
            for (digest, checksum), row in zip(index.images, rows, strict=True):
                if digest in wanted:
                    found[digest] = Stored(row, checksum)
        return found

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the store for writing; while another process holds it, `waiting` is called every second.

        The operating system frees the lock when its holder dies.

        Raises:
            DataError: the folder cannot be made or written.
        """
        lock = FileLock(self.folder / "lock")
        if not self._acquire(lock, timeout_s=0):
            log.info("waiting for another process that computes vision features in %s", self.folder)
            while not self._acquire(lock, timeout_s=1):
                waiting()
        try:
            yield
        finally:
            lock.release()

    def _acquire(self, lock: BaseFileLock, timeout_s: float) -> bool:
        with said(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=timeout_s)
            except Timeout:
                return False
        return True

    def repair(self) -> None:
        """Remove damaged segments, rows without an index, and files of processes that were killed.

        To be called with the lock held: an unfinished file then has no writer any more.

        Raises:
            DataError: the folder cannot be written.
        """
        with said(self.folder):
            self._repair()

    def _repair(self) -> None:
        for unfinished in (*self.folder.glob(f"{_TEMPORARY}*"), *self.folder.glob(UNFINISHED)):
            unfinished.unlink()
        for index_file in self._index_files():
            try:
                self._open(index_file)
            except _DamagedError as problem:
                log.warning("%s: %s; its vision features are computed again", index_file, problem)
                index_file.unlink()
        for rows in self.folder.glob("segment-*.bin"):
            if not rows.with_suffix(".json").exists():
                log.warning("%s has no index; its vision features are computed again", rows)
                rows.unlink()

    def reserve(self, images: int) -> None:
        """Log the space that these images will take on the disk, and make sure that it is free.

        Raises:
            DataError: it is not free.
        """
        needed, free = images * self.row_bytes, shutil.disk_usage(self.folder).free
        log.info("vision features of %d images: %s in %s, %s free", images, gb(needed), self.folder, gb(free))
        if needed + SPARE_BYTES > free:
            raise DataError(
                f"the vision features of {images} images need {gb(needed)} in {self.folder} and {gb(SPARE_BYTES)} "
                f"to spare, but {gb(free)} are free there; {WAYS_OUT}"
            )

    def describe(self, key: Mapping[str, Any]) -> None:
        """Write `key.json` unless it is there."""
        if not (self.folder / "key.json").exists():
            text = json.dumps(key, indent=1, sort_keys=True)
            with said(self.folder):
                write_whole(self.folder / "key.json", text)

    def writer(self) -> Writer:
        """A writer that adds rows; to be used with the lock held."""
        numbers = [int(file.stem.removeprefix("segment-")) for file in self._index_files()]
        return Writer(self, max(numbers, default=0) + 1)

    def _index_files(self) -> list[Path]:
        """All index files, from the oldest to the newest."""
        return sorted(self.folder.glob("segment-[0-9][0-9][0-9][0-9][0-9][0-9].json"))

    def _open(self, index_file: Path) -> tuple[Index, torch.Tensor]:
        """A segment's index and its rows, (N, *shape), mapped into memory.

        Raises:
            _DamagedError: it is not intact.
        """
        rows_file = index_file.with_suffix(".bin")
        try:
            index = Index.model_validate_json(index_file.read_bytes())
            size = rows_file.stat().st_size
        except ValidationError as error:
            raise _DamagedError(f"damaged ({error.errors()[0]['msg']})") from None
        except OSError as error:
            raise _DamagedError(f"{error.filename or rows_file} cannot be read ({error.strerror})") from None
        expected = len(index.images) * self.row_bytes
        if index.shape != self.shape or index.dtype != str(self.dtype):
            raise _DamagedError(f"holds {index.shape} of {index.dtype}, not {self.shape} of {self.dtype}")
        if size != expected:
            raise _DamagedError(f"{rows_file} has {size} bytes, not {expected}")
        try:
            # Not shared: a write to the tensor by mistake would not reach the file.
            flat = torch.from_file(
                str(rows_file), shared=False, size=expected // self.dtype.itemsize, dtype=self.dtype
            )
        except RuntimeError as error:  # it was removed or cut just now
            raise _DamagedError(f"{rows_file} cannot be mapped ({str(error).splitlines()[0]})") from None
        return index, flat.view(-1, *self.shape)


class Writer:
    """Adds rows to a store, segment after segment; an error within the block drops the unfinished one."""

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self._number = number
        self._stream: BinaryIO | None = None
        self._images: list[tuple[str, int]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is None:
            return
        try:
            if error is None:
                with said(self._store.folder):
                    self._finish()
        finally:
            if self._stream is not None:
                self._stream.close()
                self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self._store.folder / f"{_TEMPORARY}{self._number:06d}.bin"

    def add(self, digests: Sequence[str], rows: torch.Tensor) -> None:
        """Append rows, (N, *shape) contiguous on CPU, with the sha256 of their images.

        Raises:
            DataError: the file cannot be written; the disk is full, for example.
        """
        assert rows.shape == (len(digests), *self._store.shape) and rows.dtype == self._store.dtype
        with said(self._store.folder):
            self._append(digests, rows)

    def _append(self, digests: Sequence[str], rows: torch.Tensor) -> None:
        if self._stream is None:
            self._stream = self._temporary.open("wb")
        for digest, row in zip(digests, rows, strict=True):
            content = bytes_of(row)
            self._stream.write(content)
            self._images.append((digest, zlib.crc32(content)))
        if len(self._images) * self._store.row_bytes >= SEGMENT_BYTES:
            self._finish()

    def _finish(self) -> None:
        """Make the open segment count: flush and name its rows, then write its index."""
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        target = self._store.folder / f"segment-{self._number:06d}.bin"
        self._temporary.replace(target)
        index = Index(shape=self._store.shape, dtype=str(self._store.dtype), images=self._images)
        write_whole(target.with_suffix(".json"), index.model_dump_json())
        self._stream, self._images = None, []
        self._number += 1


def gb(size: int) -> str:
    """A number of bytes in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextmanager
def said(folder: Path) -> Iterator[None]:
    """Turn an error of the file system within the block into one message."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the store of vision features {folder} cannot be written: {error.strerror or error}; {WAYS_OUT}"
        ) from error
