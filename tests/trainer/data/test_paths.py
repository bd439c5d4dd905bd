"""Links are followed, names from caption files stay in their folder, and spelling on disk is found or told."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from trainer.common.errors import DataError
from trainer.data.dataset import Examined, examine
from trainer.data.paths import AMBIGUOUS, OTHER_CASE, Names, relative


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (seed, 20, 30)).save(path, "PNG")
    return path


def examined(folder: Path, *names: str) -> Examined:
    rows = [{"filename": name, "text_input": "Describe it.", "text_output": f"A pier, {name}."} for name in names]
    (folder / "captions.json").write_text(json.dumps({"annotations": rows}), encoding="utf-8")
    return examine(str(folder))


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """As in a hub's cache: every file is a link to a blob elsewhere."""
    blobs = [picture(tmp_path / "blobs" / str(i), i) for i in range(3)]
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for i, blob in enumerate(blobs):
        (images / f"P{i}_1.png").symlink_to(os.path.relpath(blob, images) if i else blob)
    found = examined(tmp_path / "data", "P0_1.png", "P1_1.png", "P2_1.png")
    assert found.bad == ()
    assert [row.scene for row in found.rows] == ["P0", "P1", "P2"]


@pytest.mark.parametrize("linked", ["images", "images/deep", "."])
def test_folders_may_be_links(tmp_path: Path, linked: str) -> None:
    data = tmp_path / "data"
    picture(data / "images" / "deep" / "a_1.png")
    plain = examined(data, "deep/a_1.png")
    place = data / linked
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    through = examine(str(data))
    assert (through.bad, through.fingerprint) == ((), plain.fingerprint)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "x/../../a.png", "..\\a.png", "..", ".", "/"])
def test_names_do_not_leave_the_folder(name: str) -> None:
    with pytest.raises(DataError, match=r"leads out of the images folder|must name a file"):
        relative(name)


@pytest.mark.parametrize("through_a_link", [False, True])
def test_pipes_and_devices_are_not_opened(tmp_path: Path, through_a_link: bool) -> None:
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / ("fifo" if through_a_link else "a.png"))
    if through_a_link:
        (tmp_path / "images" / "a.png").symlink_to("fifo")
        (tmp_path / "images" / "b.png").symlink_to("/dev/zero")
    for problem in examined(tmp_path, *(("a.png", "b.png") if through_a_link else ("a.png",))).bad:
        assert "the image is not a regular file" in problem


def test_a_link_to_nothing_says_how_to_fetch_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to("../.git/annex/objects/x")
    (problem,) = examined(tmp_path, "a.png").bad
    assert "a.png: the image is a link to '../.git/annex/objects/x', which does not exist" in problem
    assert "git annex get, dvc pull" in problem


@pytest.mark.parametrize(
    ("content", "command"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s9--00.png\n", "git annex get"),
    ],
)
def test_a_pointer_in_place_of_the_image(tmp_path: Path, content: str, command: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text(content)
    (problem,) = examined(tmp_path, "a.png").bad
    assert problem.endswith(f"a.png: the image was not fetched: the file is a pointer to it; {command}")


@pytest.mark.parametrize("name", ["café_1.png", "Köln/Brücke_1.png", "한국_1.png"])
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_another_unicode_form_is_the_same_name(tmp_path: Path, name: str, on_disk: str) -> None:
    other = "NFD" if on_disk == "NFC" else "NFC"
    stored = picture(tmp_path / "images" / unicodedata.normalize(on_disk, name))
    found = examined(tmp_path, unicodedata.normalize(other, name))
    assert found.bad == ()
    assert found.rows[0].image == stored


def test_forms_that_differ_by_folder(tmp_path: Path) -> None:
    """The folder in one form, the file in the other; another row as it is."""
    stored = picture(tmp_path / "images" / nfd("Köln") / "Brücke.png")
    found = examined(tmp_path, f"Köln/{nfd('Brücke.png')}", f"{nfd('Köln')}/Brücke.png")
    assert found.bad == ()
    assert {row.image for row in found.rows} == {stored}


def test_a_name_in_several_forms_is_not_guessed(tmp_path: Path) -> None:
    """`ǖ` has a form that is neither NFC nor NFD, and all three may lie in a folder."""
    forms = ["u\u0308\u0304.png", "\u00fc\u0304.png", "\u01d6.png"]
    for i, name in enumerate(forms[:2]):
        picture(tmp_path / "images" / name, i)
    (problem,) = examined(tmp_path, forms[2]).bad
    assert f"the image is missing; {AMBIGUOUS}" in problem
    assert r"'u\u0308\u0304.png', '\xfc\u0304.png'" in problem
    assert examined(tmp_path, *forms[:2]).bad == (), "an exact name is never in doubt"


def test_another_case_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "Deep" / "A_1.PNG")
    (problem,) = examined(tmp_path, "deep/a_1.png").bad
    assert problem.endswith(f"a_1.png: the image is missing; {OTHER_CASE}: 'Deep/A_1.PNG'")


def test_what_is_missing_is_missing(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a_1.png")
    (tmp_path / "images" / "file").write_text("")
    for name in ("b_1.png", "deep/a_1.png", "é.png"):
        (problem,) = examined(tmp_path, name).bad
        assert problem.endswith(f"{Path(name).name}: the image is missing")


def test_a_folder_is_listed_once_and_only_if_a_name_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Path] = []
    original = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: (listed.append(path), original(path))[1])
    names = Names(tmp_path)
    there = picture(tmp_path / "a.png")
    assert names.on_disk(there) == there
    assert listed == []
    for i in range(20):
        assert names.on_disk(tmp_path / f"é{i}.png") == tmp_path / f"é{i}.png"
    assert listed == [tmp_path]
