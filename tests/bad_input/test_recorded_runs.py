"""Recorded-run files: `python -m search.diagnose FILE.json`."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from search import diagnose
from tests.bad_input.harness import examples, folder
from tests.support.called import Outcome, call
from trainer.config import TrainConfig

NUMBER = st.sampled_from(
    [0, 1, 2, 3, -1, 0.5, 1e308, -1e308, 5e-324, 10**400, 10**15, float("inf"), float("nan"), 1.5]
)
ANY: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBER | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LOSS = st.floats(0.1, 5) | NUMBER | st.none()
EPOCH = st.fixed_dictionaries(
    {},
    optional={
        "train_loss": LOSS,
        "val_loss": LOSS,
        "learning_rate": NUMBER | st.none(),
        "elapsed_s": NUMBER | st.floats(0, 1e5),
        "grad_norm_mean": NUMBER | st.none(),
        "grad_norm_max": NUMBER | st.none(),
    },
)
FIELDS = st.sampled_from([*TrainConfig.model_fields, "model_name"])
CONFIG = st.dictionaries(
    FIELDS,
    NUMBER | st.integers(1, 100) | ANY,
    max_size=6,
)


def run(epochs: list[dict[str, Any]], name: Any, config: Any, numbers: list[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "config": config,
        "epochs": [{"epoch": n} | e for n, e in zip(numbers, epochs, strict=False)],
    }


RISING = st.just(list(range(1, 20))) | st.just([1, 2, 5, 10**15]) | st.lists(NUMBER, max_size=5)
RUN = st.builds(run, st.lists(EPOCH, max_size=8), st.text(min_size=1, max_size=5), CONFIG, RISING)


def tried(content: str | bytes, *options: str) -> Outcome:
    with folder() as here:
        file = here / "runs.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        outcome = call(diagnose.app, [str(file), *options])
    outcome.check("runs.json")
    return outcome


@examples(100, deep_factor=40)
@given(st.lists(RUN, min_size=1, max_size=4), st.sampled_from(["en", "zh"]))
def test_runs_of_the_right_form_with_odd_values(runs: list[Any], lang: str) -> None:
    tried(json.dumps({"runs": runs}), "--lang", lang)


@examples(100)
@given(st.one_of(ANY, ANY.map(lambda x: {"runs": x}), st.lists(ANY | RUN, max_size=3).map(lambda x: {"runs": x})))
@example({"runs": [{"name": "\ud800", "epochs": []}]})
@example({"runs": [{"name": "a", "config": {"max_samples": 10**400}, "epochs": [{"epoch": 1, "elapsed_s": 0}]}] * 2})
@example({"runs": [{"name": "a", "config": {"num_epochs": 10**400}, "epochs": [{"epoch": 1, "val_loss": 1.0}]}]})
@example({"runs": [{"name": "x" * 100_000, "epochs": 3}]})
def test_other_forms(content: Any) -> None:
    tried(json.dumps(content))


@examples(60)
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")))
@example(b'{"runs": [{"name": 3}], "runs": []}')
@example(b'{"runs": [], "runs": [{"name": 3}]}')
@example(b'{"runs": [{"name": "a", "name": 3, "epochs": []}]}')
@example(b"[" * 100_000)
@example(b'\xef\xbb\xbf{"runs": []}')
@example(b'{"runs": [{"name": 3, "epochs": [' + b"9" * 5000 + b"]}]}")
@example(b'{"runs": [' + b"1" * 5000 + b"]}")
def test_bytes(content: bytes) -> None:
    tried(content)


def test_files_that_are_no_files() -> None:
    for path in ("/", "/nowhere.json", "n" * 300, "\udcff"):
        call(diagnose.app, [path]).check_refused(
            "cannot be read", path[:40].encode("ascii", "backslashreplace").decode()
        )
