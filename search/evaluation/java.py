"""METEOR, where Java and pycocoevalcap are there; SPICE, and why it is not computed.

Both are programs in Java. METEOR (Denkowski and Lavie 2014, version 1.5) comes with the wheel of `pycocoevalcap`, an
optional dependency of 104 MB: `pip install 'lora-search[meteor]'`. Its figure for many images is that of their summed
statistics, as in `pycocoevalcap`; the program is asked for the figures of resampled sums, too.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from search.errors import StudyError
from search.evaluation.tokens import tokenize

METEOR = "meteor"
SPICE = "not computed: its parser (Stanford CoreNLP 3.6.0) is downloaded at its first use, and is in no package"
"""Why there is no SPICE."""
MEMORY = "-Xmx2G"


def meteor_jar() -> Path | None:
    """METEOR's program; None where `pycocoevalcap` is not installed. It is not imported."""
    found = importlib.util.find_spec("pycocoevalcap")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    return next((jar for folder in folders for jar in Path(folder, "meteor").glob("meteor-*.jar")), None)


def why_no_meteor() -> str | None:
    """Why METEOR cannot be computed here; None if it can."""
    if shutil.which("java") is None:
        return "not computed: there is no Java (no `java` on PATH)"
    if meteor_jar() is None:
        return "not computed: pycocoevalcap is not installed; pip install 'lora-search[meteor]'"
    return None


class Meteor:
    """The running program; use it in a `with`. Its start takes seconds, since it reads its table of paraphrases.

    Raises:
        StudyError: it has ended.
    """

    def __enter__(self) -> Meteor:
        jar = meteor_jar()
        assert jar is not None
        self._process = subprocess.Popen(
            ["java", MEMORY, "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def statistics(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(images, 23): METEOR's counts for each caption, of its nearest reference."""
        found = []
        for caption, refs in zip(captions, references, strict=True):
            texts = [*(" ".join(tokenize(text)) for text in refs), " ".join(tokenize(caption))]
            self._say("SCORE ||| " + " ||| ".join(text.replace("|||", "") for text in texts))
            found.append([float(part) for part in self._answer().split()])
        return np.array(found)

    def values(self, sums: np.ndarray) -> np.ndarray:
        """METEOR of sums of statistics, (samples, 23), as (samples,)."""
        found = []
        for row in sums:
            self._say("EVAL ||| " + " ".join(f"{value:.1f}" for value in row))
            found.append(float(self._answer()))
            self._answer()  # the same for all that were asked, which is one
        return np.array(found)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StudyError(f"METEOR's Java program has ended (exit code {self._process.wait()}); try --no-meteor")
        return line
