"""The outbox on disk: whole batches or nothing, whatever is killed, and several processes at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from search.errors import StorageError
from search.tracking.outbox import (
    STUDY,
    Create,
    Damaged,
    End,
    Entry,
    File,
    Outbox,
    Point,
    Resume,
    StudyBegun,
    Text,
    Write,
    is_local,
    local_id,
)

EVERY: list[Entry] = [
    StudyBegun(tags={"a": "b"}),
    Create(name="trial \u00fc\n", params={"lr": "1e-05"}, tags={}, start_ms=7),
    Write(points=[Point("val_loss", 0.1 + 0.2, 3, 1_700_000_000_123)], tags={"state": "RUNNING"}),
    Text(text="two\nlines\n", file="x.txt"),
    Resume(tags={"host": "here"}),
    File(path="/log.md", folder=None),
    End(status="KILLED", tags={}, description="**x**\n", end_ms=9),
]


def write(number: int) -> Write:
    return Write(points=[Point("loss", float(number), number, number)])


def numbers(outbox: Outbox, run_id: str) -> list[int]:
    return [entry.points[0].step for entry, _ in outbox.read(run_id) if isinstance(entry, Write)]


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "study" / "spool")
    assert outbox.runs() == [] and outbox.read("run") == [] and not outbox.holds("run")
    outbox.append("run", EVERY[:3])
    outbox.append("run", EVERY[3:])
    kept = Outbox(outbox.folder).read("run")
    assert [entry for entry, _ in kept] == EVERY
    assert outbox.read("run", kept[1].end) == kept[2:]
    assert outbox.holds("run")


def test_lines_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """The folder and the names of entries on disk have stayed."""
    outbox = Outbox(tmp_path / "spool")
    outbox.append("run", EVERY)
    lines = (tmp_path / "spool" / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["do"] for line in lines] == ["study", "create", "write", "text", "resume", "file", "end"]
    (tmp_path / "spool" / "study.jsonl").write_text('{"do": "study", "tags": {"a": "b"}}\n')
    assert [entry for entry, _ in outbox.read(STUDY)] == [StudyBegun(tags={"a": "b"})]


def test_the_study_first_then_the_oldest(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for run_id in ("b", "a", STUDY):
        outbox.append(run_id, EVERY[:1])
        time.sleep(0.01)
    assert outbox.runs() == [STUDY, "b", "a"]
    assert is_local(local_id()) and not is_local("0" * 32) and local_id() != local_id()


@pytest.mark.parametrize("torn", [b'{"do": "wri', b'{"do": "write", "points": [], "tags": {}}', b"\0" * 70_000])
def test_a_torn_last_line_is_cut_off(torn: bytes, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append("run", [write(1)])
    with (tmp_path / "run.jsonl").open("ab") as file:
        file.write(torn)
    assert numbers(outbox, "run") == [1]
    outbox.append("run", [write(2)])
    assert numbers(outbox, "run") == [1, 2] and len(outbox.read("run")) == 2


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append("run", [write(1), write(2), write(3)])
    lines = (tmp_path / "run.jsonl").read_bytes().split(b"\n")
    lines[1] = lines[1][:-9]
    (tmp_path / "run.jsonl").write_bytes(b"\n".join(lines))
    assert numbers(outbox, "run") == [1, 3]
    assert isinstance(outbox.read("run")[1].entry, Damaged)


def test_what_comes_while_it_is_delivered_stays(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append("run", [write(1)])
    (kept,) = outbox.read("run")
    outbox.append("run", [write(2)])
    assert not outbox.remove("run", kept.end)
    end = outbox.read("run", kept.end)[-1].end
    assert outbox.remove("run", end) and not outbox.holds("run") and outbox.runs() == []


def test_a_file_that_ends_before_what_was_delivered_is_another_one(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append("run", [write(number) for number in range(9)])
    end = outbox.read("run")[-1].end
    assert outbox.remove("run", end)
    outbox.append("run", [write(9)])
    assert not outbox.remove("run", end) and outbox.holds("run")
    (kept,) = outbox.read("run", end)
    assert kept.entry == write(9) and outbox.remove("run", kept.end)
    assert outbox.remove("run", end) and not outbox.holds("run"), "a file that somebody deleted"


def test_one_process_delivers(tmp_path: Path) -> None:
    with Outbox(tmp_path).delivering() as first, Outbox(tmp_path).delivering() as second:
        assert first and not second
    with Outbox(tmp_path).delivering() as again:
        assert again


def test_no_room_is_told_and_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(tmp_path)
    outbox.append("run", [write(1)])
    before = (tmp_path / "run.jsonl").read_bytes()
    real = os.write

    def full(file: int, data: memoryview) -> int:
        if len(data) > 10:
            return real(file, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        outbox.append("run", [write(i) for i in range(2, 9)])
    assert (tmp_path / "run.jsonl").read_bytes()[: len(before)] == before
    monkeypatch.undo()
    outbox.append("run", [write(2)])
    assert numbers(outbox, "run") == [1, 2]


def _append_for_ever(folder: Path, ready: object) -> None:
    outbox, number = Outbox(folder), 0
    while True:
        number += 1
        outbox.append("run", [write(2 * number - 1), write(2 * number)])
        ready.put(2 * number)  # type: ignore[attr-defined]


def test_killed_at_any_moment_it_holds_all_that_was_kept(tmp_path: Path) -> None:
    """A writer is killed while the test takes away what it has written, as a delivery does."""
    context = multiprocessing.get_context("fork")
    random.seed(0)
    for turn in range(8):
        outbox = Outbox(tmp_path / str(turn))
        counted = context.SimpleQueue()
        process = context.Process(target=_append_for_ever, args=(outbox.folder, counted))
        process.start()
        promised = counted.get()
        found: list[int] = []
        end, until = 0, time.monotonic() + random.uniform(0.0, 0.1)
        while time.monotonic() < until:
            for entry, after in outbox.read("run", end):
                assert isinstance(entry, Write)
                found.append(entry.points[0].step)
                end = after
            if end and outbox.remove("run", end):
                end = 0
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while not counted.empty():
            promised = counted.get()
        found += [e.points[0].step for e, _ in outbox.read("run", end) if isinstance(e, Write)]
        assert found == list(range(1, len(found) + 1)) and len(found) >= promised


def test_a_run_that_another_process_delivers_meanwhile_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path / "spool")
    for run_id in ("a", "b", "c"):
        outbox.append(run_id, [Write(tags={"key": "value"})])
    stat = Path.stat

    def delivered_first(path: Path, **options: Any) -> Any:
        if path.name == "b.jsonl":
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", delivered_first)
    assert sorted(outbox.runs()) == ["a", "c"]
