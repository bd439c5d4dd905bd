"""Text from data as Markdown."""

from __future__ import annotations

import re

from markupsafe import Markup

_SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that mean something to Markdown anywhere; an underscore within a word does not."""
_AT_START = re.compile(r"^([#>+-]|\d+(?=[.)](\s|$)))")
"""What would begin a heading, quote or list."""


def escape(text: str) -> Markup:
    """Text from data, as Markdown that shows just it, on one line."""
    flat = re.sub(r"\s+", " ", text)
    # Entities before backslashes: "&lt;" has nothing that a backslash would go in front of.
    flat = flat.replace("&", "&amp;").replace("<", "&lt;")
    flat = _SPECIAL.sub(lambda found: f"\\{found[0]}", flat)
    flat = _AT_START.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", flat)
    return Markup(flat)
