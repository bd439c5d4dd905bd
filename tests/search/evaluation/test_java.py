"""METEOR: its figures where Java is there, and what is said where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.errors import StudyError
from search.evaluation.compare import estimate_of_sums
from search.evaluation.java import Meteor, meteor_jar, why_no_meteor

FILE = Path(__file__).parents[2] / "data" / "caption-metrics.json"


@pytest.mark.skipif(why_no_meteor() is not None, reason=f"METEOR is {why_no_meteor()}")
@pytest.mark.timeout(300)
def test_meteor_is_pycocoevalcaps() -> None:
    recorded: Any = json.loads(FILE.read_text(encoding="utf-8"))
    images = recorded["images"]
    with Meteor() as program:
        for name in ("one", "other"):
            counts = program.statistics([i[name] for i in images], [i["references"] for i in images])
            found = estimate_of_sums(counts, program.values)
            assert found.value == pytest.approx(recorded["values"][name]["meteor"], abs=1e-9)
            assert found.low < found.value < found.high
        program._process.kill()
        program._process.wait()
        with pytest.raises(StudyError, match="try --no-meteor"):
            program.values(counts)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "there is no Java" in str(why_no_meteor())
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/java")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'lora-search[meteor]'" in str(why_no_meteor())
    # The package is found without being imported.
    monkeypatch.undo()
    (tmp_path / "pycocoevalcap" / "meteor").mkdir(parents=True)
    jar = tmp_path / "pycocoevalcap" / "meteor" / "meteor-1.5.jar"
    jar.touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert meteor_jar() == jar


def test_an_interval_of_summed_counts() -> None:
    """A share of summed counts is not the mean of shares: its interval is that of resampled sums."""
    counts = np.array([[1.0, 1.0], [0.0, 99.0]] * 50)
    found = estimate_of_sums(counts, lambda sums: sums[:, 0] / sums[:, 1])
    assert found.value == pytest.approx(0.01) and 0.006 < found.low < found.value < found.high < 0.015
    scenes = estimate_of_sums(counts, lambda sums: sums[:, 0] / sums[:, 1], [str(n // 2) for n in range(100)])
    assert scenes.low == scenes.high == pytest.approx(0.01), "pairs are alike"
