"""Hyperparameter search for LoRA fine-tuning of InstructBLIP.

    from search import SearchOptions, Session

is the entrance for programs (docs/python.md); `python -m search.run` and `lora-search run` the one for people.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.options import SearchOptions
    from search.result import Result
    from search.session import Session

__all__ = ["Result", "SearchOptions", "Session"]

_HOMES = {"Result": "search.result", "SearchOptions": "search.options", "Session": "search.session"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: a command must not wait for what it does not use."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'search' has no attribute {name!r}")


def _refuse_strangers() -> None:
    """Say which file of the user's stands where Python would look for our other packages.

    `python -m search.run` looks into the current folder first: a `trainer.py` there would be imported instead of ours.
    """
    ours = Path(__file__).resolve().parent.parent
    for name in ("trainer", "studies"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is None or found == ours / name / "__init__.py":
            continue
        message = (
            f"{found} is in the way of lora-search's own package {name!r}: start from another folder, or use the "
            "command `lora-search`, which does not look into the current one"
        )
        if sys.argv[:1] == ["-m"]:  # being found by `python -m search...`, which would print a traceback's remains
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        raise ImportError(message)


_refuse_strangers()
