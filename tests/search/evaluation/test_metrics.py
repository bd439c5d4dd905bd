"""Tokens and metrics: equal to pycocoevalcap's, whose values tests/data/caption_metrics.py wrote down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.evaluation.compare import differences, estimates
from search.evaluation.metrics import NAMES, score
from search.evaluation.tokens import tokenize

FILE = Path(__file__).parents[2] / "data" / "caption-metrics.json"


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_tokens_are_those_of_the_java_tokenizer(recorded: Any) -> None:
    assert len(recorded["images"]) == 50
    for number, image in enumerate(recorded["images"]):
        for name in ("one", "other"):
            assert " ".join(tokenize(image[name])) == recorded["tokens"][name][number][0]
        for text, expected in zip(image["references"], recorded["tokens"]["references"][number], strict=True):
            assert " ".join(tokenize(text)) == expected


@pytest.mark.parametrize("name", ["one", "other"])
def test_metrics_are_those_of_pycocoevalcap(recorded: Any, name: str) -> None:
    images, expected = recorded["images"], recorded["values"][name]
    found = score([image[name] for image in images], [image["references"] for image in images])
    assert found.values() == {key: pytest.approx(expected[key], abs=1e-9) for key in NAMES}
    assert found.rouge_l.tolist() == pytest.approx(expected["rouge_l_images"], abs=1e-9)
    assert found.cider_d.tolist() == pytest.approx(expected["cider_d_images"], abs=1e-9)


def test_a_caption_that_is_its_reference_scores_highest() -> None:
    texts = ["a large airport with two runways and a lake", "three ships lie in a small harbour near the town"]
    values = score(texts, [[text] for text in texts]).values()
    assert values == {name: pytest.approx(10 if name == "cider_d" else 1) for name in NAMES}


def test_intervals_hold_the_value_and_a_difference_is_told_from_chance(recorded: Any) -> None:
    images = recorded["images"]
    references = [image["references"] for image in images]
    one = score([image["one"] for image in images], references)
    other = score([image["other"] for image in images], references)
    for estimate in estimates(one).values():
        assert estimate.low < estimate.value < estimate.high
    worse = differences(one, other)
    assert all(d.differs and d.high < 0 for d in worse.values())
    same = differences(one, one)
    assert all((d.value, d.low, d.high, d.p) == (0, 0, 0, 1) for d in same.values())


def test_of_two_candidates_alike_one_in_twenty_is_taken_for_different() -> None:
    """Captions drawn from the same sentences: the test's p is uniform, so its errors are as rare as it says."""
    rng = np.random.default_rng(0)
    words = ["ship", "road", "lake", "house", "plane", "field"]

    def texts() -> list[str]:
        return [" ".join(rng.choice(words, 6)) for _ in range(25)]

    wrong = 0
    for _ in range(20):
        references = [[text] for text in texts()]
        found = differences(score(texts(), references), score(texts(), references))
        wrong += found["rouge_l"].differs
    assert wrong <= 3


def test_tiles_of_one_scene_are_drawn_together(recorded: Any) -> None:
    images = recorded["images"] * 4
    scenes = [str(number % 50) for number in range(200)]
    found = score([image["one"] for image in images], [image["references"] for image in images])
    apart, together = estimates(found)["rouge_l"], estimates(found, scenes)["rouge_l"]
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
