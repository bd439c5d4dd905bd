"""Files and folders appear whole or not at all, whatever fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.common import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    files.write_whole(file, "größer")
    files.write_whole(file, b"\x00")
    assert file.read_bytes() == b"\x00" and names(tmp_path) == ["a.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    files.write_whole(file, "old")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(file, "new")
    assert file.read_text() == "old" and names(tmp_path) == ["a.json"]


def no_room(_: int) -> None:
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize("where", ["within the block", "while it is flushed"])
def test_a_folder_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    target = tmp_path / "new" / "folder"
    with files.whole_folder(target, replace=True) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(OSError, match="No space left"), files.whole_folder(target, replace=True) as folder:
        (folder / "a").write_text("new")
        if where == "within the block":
            no_room(0)
        monkeypatch.setattr(os, "fsync", no_room)
    assert (target / "a").read_text() == "old" and names(target.parent) == ["folder"]


@pytest.mark.parametrize("replace", [True, False])
def test_who_wins_if_a_folder_appears_meanwhile(tmp_path: Path, replace: bool) -> None:
    target = tmp_path / "folder"
    with files.whole_folder(target, replace=replace) as folder:
        (folder / "a").write_text("ours")
        assert not target.exists() and len(list(tmp_path.glob(files.UNFINISHED))) == 1
        target.mkdir()
        (target / "a").write_text("theirs")
    assert (target / "a").read_text() == ("ours" if replace else "theirs") and names(tmp_path) == ["folder"]
