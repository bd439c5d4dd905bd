"""The tables of training runs in the repository: written and read. Light to import, where `record` loads the model.

What a table has, tests/benchmarks/tables/README.md says.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"


def save(found: dict[str, Any]) -> Path:
    """Write a table into the repository."""
    TABLES.mkdir(exist_ok=True)
    path = TABLES / f"{found['task']}.json.xz"
    path.write_bytes(lzma.compress(json.dumps(found).encode(), preset=9))
    return path


def names() -> list[str]:
    """The repository's tables."""
    return sorted(each.name.removesuffix(".json.xz") for each in TABLES.glob("*.json.xz"))


def load(name: str) -> dict[str, Any]:
    """A table by its name in the repository, or by the path of a file: .json.xz or .json.

    Raises:
        SystemExit: there is none.
    """
    path = Path(name) if name.endswith((".json", ".xz")) else TABLES / f"{name}.json.xz"
    if not path.is_file():
        known = (
            ", ".join(sorted(each.name.removesuffix(".json.xz") for each in TABLES.glob("*.json.xz"))) or "none yet"
        )
        raise SystemExit(f"there is no table {path}; in the repository: {known}")
    content = path.read_bytes()
    found: dict[str, Any] = json.loads(lzma.decompress(content) if path.suffix == ".xz" else content)
    return found
