"""Text from data as Markdown: escaped, as code, as an anchor; and the templates, which escape by default.

What these functions return is marked as safe (`Markup`): a template prints it as it is, and escapes the rest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

_SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that mean something to Markdown anywhere; an underscore within a word does not."""
_AT_START = re.compile(r"^([#>+-]|\d+(?=[.)](\s|$)))")
"""What would begin a heading, quote or list."""


def escape(text: str) -> Markup:
    """Text from data, as Markdown that shows exactly that text, on one line."""
    flat = re.sub(r"\s+", " ", text)
    # Entities before backslashes: "&lt;" has nothing that a backslash would go in front of.
    flat = flat.replace("&", "&amp;").replace("<", "&lt;")
    flat = _SPECIAL.sub(lambda found: f"\\{found[0]}", flat)
    flat = _AT_START.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", flat)
    return Markup(flat)


def code(text: Any) -> Markup:
    """Text in a code span, fenced so that no backtick in it ends it. A pipe would end a table's cell."""
    flat = " ".join(str(text).split()).replace("|", "¦") or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return Markup(f"{ticks}{pad}{flat}{pad}{ticks}")


def fenced(text: str, language: str = "") -> Markup:
    """A code block, fenced so that nothing in it ends it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def environment(templates: Path, **options: Any) -> Environment:
    """Jinja's environment over a folder of templates: values are escaped, an unknown name is an error.

    Args:
        templates: The folder.
        options: Further arguments of `jinja2.Environment`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(templates, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
