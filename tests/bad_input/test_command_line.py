"""`--set` and the other options: random ones, near misses, enormous values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from search.run import read_duration
from search.study_file import available
from tests.bad_input.harness import TEXT, argument, examples, folder, plain, search, written
from tests.support.called import Outcome
from trainer.config import TrainConfig

NAMES = [*TrainConfig.model_fields, "patience", "min_delta"]
NUMBERS = st.sampled_from(
    ["0", "-1", "1", "2", "1e999", "nan", "-inf", "9" * 30, "9" * 5000, "1.5", "5e-324", "0x10", "1_0"]
)
VALUES = (
    NUMBERS | TEXT | st.sampled_from(["none", "true", "mini", "a/b c", "a/" + "b" * 300, "cuda:9", "query,,query"])
)


def near_miss(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(NAMES))
    place = draw(st.integers(0, len(name) - 1))
    return name[:place] + draw(st.sampled_from(["", "x", name[place] * 2, name[place].upper()])) + name[place + 1 :]


KEYS = st.sampled_from(NAMES) | st.composite(near_miss)() | TEXT


def tried(*arguments: str) -> Outcome:
    """The study checked to its end, and nothing written."""
    with folder() as here:
        outcome = search(
            ["--study", "rsicap_mini", "--runs-dir", str(here / "runs"), "--dry-run", "--no-measure", *arguments]
        )
        assert written(here) == []
    return outcome


@examples(60, deep_factor=40)
@given(KEYS, VALUES)
@example("micro_batch_size", "3")  # the space's batches go down to 2
@example("model", "a" * 300)  # longer than a file system takes
@example("model", "a/b c")  # looks like a hub id, and can be none
@example("warmup_steps", "9" * 400)  # more than a float can hold
@example("data", "\udcff")  # a file name that is no UTF-8
@example("lora_alpha", "1e-320")  # a learning rate that would make up for it is none that a float can hold
@example("lora_alpha", "1e308")
def test_one_setting(key: str, value: str) -> None:
    outcome = tried("--set", f"{key}={value}")
    name = key.strip().partition("=")[0]
    if outcome.accepted:
        assert name in NAMES
    elif name in NAMES:
        outcome.check_refused(name)
    else:
        outcome.check_refused(*plain(name))


@examples(40)
@given(st.lists(st.builds("{}={}".format, KEYS, VALUES) | TEXT, min_size=2, max_size=6))
def test_several_settings(texts: list[str]) -> None:
    tried(*(part for text in texts for part in ("--set", text))).check()


@examples(60)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), st.integers(0, 10**6))
def test_what_is_accepted_can_be_sampled_to_the_end(values: dict[str, str], seed: int) -> None:
    import optuna

    from search.sampling import params
    from search.study_file import load
    from trainer.common.errors import UserError

    try:
        study = load("rsicap_mini").with_settings([f"{k}={v}" for k, v in values.items()], seed)
    except UserError:
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(8):
        trial = trials.ask()
        params.suggest(trial, study)
        study.config(trial.params)


OPTIONS = ("--slots", "--timeout", "--pruner", "--strategy", "--trials", "--workers", "--seed")


@examples(50, deep_factor=32)
@given(st.sampled_from(OPTIONS), TEXT | NUMBERS | st.from_regex(r"\d{1,3}(\.\d)?[hms]?", fullmatch=True))
@example("--slots", "1" * 5000)
@example("--timeout", "9" * 400 + "h")
@example("--workers", "100000")
@example("--seed", str(2**32))
def test_options(option: str, value: str) -> None:
    tried(f"{option}={value}").check(option.strip("-"))


@examples(100)
@given(TEXT | NUMBERS | st.from_regex(r"\d{0,400}h?\d{0,4}m?\d{0,4}s?", fullmatch=True))
def test_a_duration_is_read_or_refused(text: str) -> None:
    from search.errors import StudyError

    try:
        seconds = read_duration(text)
    except StudyError as error:
        assert repr(text)[:40] in str(error) and "2h" in str(error)
    else:
        assert 0 < seconds < float("inf") and re.search(r"\d", text)


@examples(60)
@given(TEXT | st.sampled_from([name[:-1] for name in available()]) | TEXT.map(lambda text: text[:300] + ".py"))
def test_names_of_studies(name: str) -> None:
    outcome = search([f"--study={name}", "--dry-run", "--no-measure"])
    if not outcome.accepted:
        outcome.check_refused("known studies:" if len(name) < 250 else "file", *plain(name))


@pytest.mark.parametrize(
    "runs", ["/proc/nothing/runs", "/dev/null", "/dev/null/runs", "n" * 300, "a/" * 3000], ids=lambda text: text[:20]
)
def test_runs_folders_that_cannot_be_made(runs: str) -> None:
    search(["--study", "rsicap_mini", "--runs-dir", runs]).check_refused(runs[:40], "--runs-dir")


def test_a_file_where_the_study_would_lie(tmp_path: Path) -> None:
    (tmp_path / "rsicap_mini").write_text("notes")
    search(["--study", "rsicap_mini", "--runs-dir", str(tmp_path)]).check_refused("rsicap_mini", "--runs-dir")
    assert (tmp_path / "rsicap_mini").read_text() == "notes"


def test_arguments_are_what_a_shell_can_give() -> None:
    assert not argument("a\0")


@pytest.mark.parametrize("name", ["a%20b", "a?b=c", "a#b", "a b", "é"])
def test_odd_runs_folders_hold_their_own_databases(tmp_path: Path, name: str) -> None:
    import sqlalchemy

    from search.places import Places

    url = sqlalchemy.make_url(Places.of(tmp_path / name).storage_url)
    assert url.database == str(tmp_path / name / "optuna.db") and not url.query


def test_a_runs_folder_that_is_no_utf8(tmp_path: Path) -> None:
    outcome = search(["--study", "rsicap_mini", "--runs-dir", str(tmp_path / "\udcff")])
    outcome.check_refused("\\udcff", "--runs-dir")
    assert written(tmp_path) == []
