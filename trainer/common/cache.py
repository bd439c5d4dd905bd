"""The folder for what is made once and used by all runs: generated data, vision features, empty databases."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LORA_SEARCH_CACHE"


def cache_folder() -> Path:
    """The folder of the environment variable LORA_SEARCH_CACHE, or `~/.cache/lora-search`."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/lora-search").expanduser()
