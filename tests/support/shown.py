"""What the README shows of the product, and what it is made by: `python -m tests.support.shown` notes that it is true.

Whoever changes one of the sources makes the output or the picture again, looks at it, and runs this; until then
`tests/test_docs.py` fails. It cannot know what a picture shows: that somebody has looked is all that it keeps.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTED = ROOT / "docs" / "shown.json"

PICTURES = "python -m tests.support.screenshots --runs-dir runs"
SHOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "README.md": (
        "make demo; its last lines",
        ("search/terminal/summary.py", "search/verdict/text.py", "search/leaderboard.py", "studies/rsicap_mini.py"),
    ),
    "docs/images/mlflow-trials.png": (PICTURES, ("search/tracking/views.py",)),
    "docs/images/mlflow-best-two.png": (PICTURES, ("search/tracking/views.py",)),
    "docs/images/optuna-study.png": (PICTURES, ("search/dashboards/notes.py", "search/dashboards/losses_svg.py")),
    "docs/images/optuna-trial.png": (PICTURES, ("search/dashboards/notes.py", "search/dashboards/losses_svg.py")),
    "docs/images/captions-page.png": ("a search; runs/STUDY/.../captions.html of a trial", ("search/captions.py",)),
    "docs/images/captions-real.png": ("a search on a real input; its captions.html", ("search/captions.py",)),
    "docs/images/data-audit.png": ("python -m tests.support.audit_picture", ("trainer/data/page.py",)),
}
"""For each file that shows the product: how it is made again, and the sources that decide how it looks."""


def current() -> dict[str, str]:
    """A hash of the sources of each."""
    found = {}
    for file, (_, sources) in SHOWN.items():
        digest = hashlib.sha256()
        for source in sources:
            digest.update((ROOT / source).read_bytes())
        found[file] = digest.hexdigest()[:16]
    return found


def stale() -> list[str]:
    """A sentence for each file that is older than what it shows."""
    noted = json.loads(NOTED.read_text(encoding="utf-8"))
    return [
        f"{file} may be older than what it shows ({', '.join(SHOWN[file][1])} changed): make it again "
        f"({SHOWN[file][0]}), look at it, then python -m tests.support.shown"
        for file, now in current().items()
        if noted.get(file) != now or not (ROOT / file).is_file()
    ]


if __name__ == "__main__":
    NOTED.write_text(json.dumps(current(), indent=1) + "\n", encoding="utf-8")
