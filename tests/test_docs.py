"""The documents name files and tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.shown import stale

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "SECURITY.md"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])((?:search|trainer|tests|studies)/[\w/]+\.py)", text))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    missing, file = [], ""
    for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?", text):
        file = path or file
        if test and not re.search(rf"^\s*def {test}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE):
            missing.append(f"{file}::{test}")
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert dead == []


def test_pictures_and_output_are_not_older_than_what_they_show() -> None:
    assert not stale()
