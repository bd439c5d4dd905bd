"""`Outbox`: records that MLflow did not take, kept on disk until it does. Also the values that records are made of.

A file of JSON lines for each run, written whole batches at a time and synced to the disk. A process that is killed
leaves at most a torn last line, which was never counted as kept and is cut off by the next write. Files may be written
by one process (a worker) while another (the supervisor) delivers them: see `Outbox.remove`.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from search.errors import StorageError
from trainer.common.files import flush_folder

CAPTIONS = "caption/"
"""How the keys of metrics of captions begin: by rows, then metric."""
STUDY = "study"
"""Stands for the id of the study's own run."""
_SUFFIX = ".jsonl"
_REJECTED = ".rejected"
_LOCAL = "local-"

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    step: int
    time_ms: int
    """Milliseconds since the epoch (UTC)."""


@dataclass(frozen=True, kw_only=True)
class Create:
    """A trial's run began while the store was away."""

    name: str
    params: dict[str, str]
    tags: dict[str, str]
    start_ms: int


@dataclass(frozen=True, kw_only=True)
class StudyBegun:
    """A search of the study began."""

    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A run that had ended continues."""

    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Write:
    """Metrics and tags."""

    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text kept as a file of the run."""

    text: str
    file: str


@dataclass(frozen=True, kw_only=True)
class File:
    """A file kept with the run, as it is when it is delivered."""

    path: str
    folder: str | None


@dataclass(frozen=True, kw_only=True)
class DataUsed:
    """The data that a run trains on, as MLflow's dataset input."""

    name: str
    digest: str
    """Fingerprint of rows and images."""
    source: str
    profile: dict[str, str]
    """Sizes and rule of the split."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An adapter as the run's model, registered; its files are those at the time of delivery."""

    path: str
    """Folder of the adapter."""
    name: str
    """Of the registered model, unless another study of this name has it: see `search.tracking.models`."""
    alias: str
    step: int
    metrics: dict[str, float]
    params: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class End:
    """The run ended."""

    status: Status
    tags: dict[str, str]
    description: str
    end_ms: int


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A line that cannot be read."""

    line: str


Entry = Create | StudyBegun | Resume | Write | Text | File | DataUsed | Model | End | Damaged
_KINDS: dict[str, type[Any]] = {
    "create": Create,
    "study": StudyBegun,
    "resume": Resume,
    "write": Write,
    "text": Text,
    "file": File,
    "data": DataUsed,
    "model": Model,
    "end": End,
    "damaged": Damaged,
}
"""Entries by their names on disk, which stay when classes are renamed."""
_NAMES = {kind: name for name, kind in _KINDS.items()}


class Kept(NamedTuple):
    """An entry, and where it ends in its file."""

    entry: Entry
    end: int


def local_id() -> str:
    """An id for a run that MLflow has not given one yet; later ids sort after earlier ones."""
    return f"{_LOCAL}{time.time_ns() // 1_000_000:x}-{secrets.token_hex(4)}"


def is_local(run_id: str) -> bool:
    """Whether the id was made by `local_id`."""
    return run_id.startswith(_LOCAL)


def count(entries: Sequence[Entry]) -> int:
    """Metrics, tags, files and events in these entries."""
    return sum(len(e.points) + len(e.tags) if isinstance(e, Write) else 1 for e in entries)


class Outbox:
    """The undelivered records of a study's runs, in one folder. Any number of processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, run_id: str, entries: Sequence[Entry]) -> None:
        """Keep entries of a run, after those it has. When this returns all of them are on the disk; if it fails, none.

        Raises:
            StorageError: they cannot be written: no room, no rights.
        """
        self._append(self._path(run_id), [_encode(entry) for entry in entries])

    def reject(self, run_id: str, entries: Sequence[Entry], why: str) -> Path:
        """Keep entries that the store refuses for good in a file that is not delivered; returns the file."""
        path = self.folder / f"{run_id}{_REJECTED}"
        self._append(path, [{**_encode(entry), "rejected": why} for entry in entries])
        return path

    def holds(self, run_id: str) -> bool:
        """Whether some entry of the run is not yet delivered. Costs microseconds."""
        return self._path(run_id).exists()

    def runs(self) -> list[str]:
        """Ids of the runs with undelivered records, the study's own first, then the oldest."""
        ids = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):  # delivered by another process meanwhile; the others are still there
                ids.append((path.stat().st_mtime, path.stem))
        return [run_id for _, run_id in sorted(ids, key=lambda item: (item[1] != STUDY, *item))]

    def read(self, run_id: str, start: int = 0) -> list[Kept]:
        """The run's entries from an offset in its file, without a torn last line.

        From the beginning if the file ends before: it is another one, or a batch that did not reach the disk was cut
        off and may have been followed by others.
        """
        try:
            with self._path(run_id).open("rb") as file:
                if _whole(file.fileno()) < start:
                    start = 0
                file.seek(start)
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        kept, end = [], start
        for line in lines:
            end += len(line) + 1
            kept.append(Kept(_decode(line), end))
        return kept

    def remove(self, run_id: str, end: int) -> bool:
        """Remove a run whose entries up to `end` are delivered; False if the file ends elsewhere: `read` it again."""
        path = self._path(run_id)
        with _locked(path) as file:
            if _whole(file) not in (0, end):
                return False
            path.unlink()
        return True

    @contextmanager
    def delivering(self) -> Iterator[bool]:
        """Whether this process may deliver: one at a time does, and the lock of a process that dies is released."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}{_SUFFIX}"

    def _append(self, path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
        data = b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in objects)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(path) as file:
                end = _whole(file)
                os.ftruncate(file, end)  # a torn line of a process that was killed
                try:
                    _write_all(file, data)
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, end)
                    raise
                if end == 0:
                    flush_folder(self.folder)
        except OSError as error:
            raise StorageError(
                f"MLflow is away, and its records cannot be kept in {path}: {error.strerror}"
            ) from error


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of the file, created if missing, which no other process changes within the block."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # otherwise it was delivered and removed while this process waited
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _whole(file: int) -> int:
    """The offset at which the last whole line ends."""
    size = os.fstat(file).st_size
    step = 65_536
    for high in range(size, 0, -step):
        low = max(0, high - step)
        newline = os.pread(file, high - low, low).rfind(b"\n")
        if newline >= 0:
            return low + newline + 1
    return 0


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _encode(entry: Entry) -> dict[str, Any]:
    fields = vars(entry) if isinstance(entry, Write) else asdict(entry)  # a point is a tuple, thus a list in JSON
    return {"do": _NAMES[type(entry)], **fields}


def _decode(line: bytes) -> Entry:
    try:
        fields = json.loads(line)
        kind = _KINDS[fields.pop("do")]
        fields.pop("rejected", None)
        if kind is Write:
            fields["points"] = [Point(*point) for point in fields["points"]]
        entry: Entry = kind(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Damaged(line=line.decode(errors="replace"))
    return entry
