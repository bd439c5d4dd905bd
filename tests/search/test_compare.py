"""`search.compare`: studies side by side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search import compare, records
from search.comparison import Recorded, rows, sentences
from search.comparison import compare as compared
from search.places import Places
from search.space import Float, Int, to_dict
from search.storage import studies
from search.storage.database import close_storage, open_storage
from search.study import Study
from search.tracking.outbox import Outbox, Point, Write
from tests.support import candidate_trials as made
from trainer.common import cli
from trainer.config import TrainConfig

RATES = {"wide": (1e-4, 2e-4, 4e-4), "narrow": (2e-4, 3e-4)}
LOSSES = {1e-4: 0.5, 2e-4: 0.4, 3e-4: 0.38, 4e-4: 0.45}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies that share one configuration."""
    places = Places.of(tmp_path_factory.mktemp("compare") / "runs")
    places.runs_dir.mkdir()
    storage = open_storage(places.storage_url)
    for name, rates in RATES.items():
        space: dict[str, Any] = {"learning_rate": Float(min(rates), max(rates), log=True)}
        space |= {"lora_r": Int(4, 8)} if name == "wide" else {}
        base = {"num_epochs": 3, "lora_r": 8, "warmup_steps": 0}
        study = studies.open_study(storage, Study(name=name, description="", base=base, space=space, n_trials=3))
        for number, rate in enumerate(rates):
            trial = study.ask()
            config = TrainConfig.parse({**base, "learning_rate": rate, "model": name})
            trial.set_user_attr(records.CONFIG, config.model_dump(mode="json"))
            trial.set_user_attr(records.TRAIN_LOSSES, [1.0] * 3)
            trial.set_user_attr(records.BEST_EPOCH, 2)
            trial.set_user_attr(records.FOLDER, f"trials/{number:04d}")
            trial.set_user_attr(records.RUN_ID, f"local-{number}")
            study.tell(trial, LOSSES[rate])
            now = time.time_ns() // 1_000_000
            points = [Point("epoch_seconds", 1.0, epoch, now) for epoch in (1, 2, 3)]
            Outbox(places.outbox(study.study_name)).append(f"local-{number}", [Write(points=points)])
            time.sleep(0.01)
    close_storage(storage)
    return places.runs_dir


def called(runs: Path, *arguments: str) -> None:
    compare.app([*arguments, "--runs-dir", str(runs)], standalone_mode=False)


def test_text_and_page_say_what_each_came_to_and_what_they_share(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called(runs, "wide", "narrow", "--html", str(tmp_path / "two.html"))
    printed = capsys.readouterr().out
    lines = [line.split("  ") for line in printed.splitlines()]
    found = {line[0].strip(): [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert found["best val_loss"] == ["0.4000", "0.3800"]
    assert found["epochs to the best"] == ["6", "6"] and found["epochs of the search"] == ["9", "6"]
    assert found["search lora_r"] == ["4 to 8", "fixed: 8"]
    assert "wide-1 and narrow-1: 1 configuration in both (trials 1 = 0)" in printed
    page = (tmp_path / "two.html").read_text()
    assert "0.3800" in page and "search learning_rate" in page and "http" not in page.partition("<body>")[2]


def test_json_is_complete(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called(runs, "wide", "narrow", "--json")
    found = json.loads(capsys.readouterr().out)
    assert [side["best_val_loss"] for side in found["sides"]] == [0.4, 0.38]
    assert found["overlaps"][0]["pairs"] == [[1, 0]] and found["overlaps"][0]["fields"] == ["learning_rate"]
    assert found["incomparable"] is None
    assert all(side["seconds"] < 60 for side in found["sides"]), "MLflow is not there, but the outbox is"


def study_of(*trials: records.TrialRecord, times: Mapping[int, Mapping[int, float]]) -> Recorded:
    return Recorded(name="a", definition={}, attrs={}, trials=trials, times=times)


def test_epochs_of_trials_that_wait_when_the_best_ends_count() -> None:
    """Rungs train a few epochs of many trials, and end those that are not worth more when all is done."""
    best = replace(made.trial(0, 0.3), start_s=100.0, end_s=160.0)
    waits = replace(made.trial(1, 0.5, "PRUNED"), start_s=199.0, end_s=200.0)  # started again, to be ended
    times = {0: {n: 100.0 + 10 * n for n in range(1, 7)}, 1: {n: 90.0 + 20 * n for n in range(1, 7)}}
    (side,) = compared([study_of(best, waits, times=times)]).sides
    assert (side.trials_to_best, side.epochs_to_best, side.epochs) == (1, 6 + 3, 12)
    assert side.seconds == 210.0 - 100.0, "both were trained at once"
    unknown = compared([study_of(best, waits, times={0: times[0]})])
    assert unknown.sides[0].epochs_to_best is None
    assert any("not known" in line for line in sentences(unknown))


def test_repeats_have_a_time_of_their_own() -> None:
    best = replace(made.trial(0, 0.3), start_s=100.0, end_s=160.0)
    again = [replace(made.repeat(n, 0, n, 0.3), start_s=170.0, end_s=200.0 + n) for n in (1, 2)]
    found = compared([study_of(best, *again, times={})])
    (side,) = found.sides
    assert (side.seconds, side.repeat_seconds, side.epochs_to_best) == (60.0, 32.0, 6)
    assert dict(rows(found))["first start to last end"] == ["60 s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wide",), "needs two studies or more, but got only 'wide'"),
        (("wide", "wide-1"), "'wide-1' is wide-1, which is named before"),
        (("wide", "narow"), "no study 'narow'; did you mean 'narrow'?"),
        (("wide", "narrow", "--html", "/no/such/folder/x.html"), "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_message(
    runs: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["search.compare", *arguments, "--runs-dir", str(runs)])
    with pytest.raises(SystemExit) as ended:
        cli.run(compare.app)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and message in printed.err and "Traceback" not in printed.err


def test_without_a_database_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["search.compare", "a", "b", "--runs-dir", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as ended:
        cli.run(compare.app)
    assert ended.value.code == 2 and list(tmp_path.iterdir()) == []


def test_losses_on_other_samples_do_not_compare() -> None:
    definition = {"space": {}, "base": {"max_samples": 100}}
    one = Recorded(name="a", definition=definition, attrs={"fingerprints": {"data": "x"}}, trials=())
    two = Recorded(name="b", definition=definition, attrs={"fingerprints": {"data": "y"}}, trials=())
    found = compared([one, two])
    assert found.incomparable == "a and b validate on different samples (data)"
    assert any("do not compare" in line for line in sentences(found)) and rows(found)


@pytest.mark.parametrize(
    ("bases", "expected"),
    [
        (({}, {"max_samples": 400}), "a and b validate on different samples (max_samples)"),  # all rows against 400
        (({"max_samples": None}, {}), None),
        (({"max_samples": 500}, {"max_samples": 400}), "a and b validate on different samples (max_samples)"),
        (({"split": "scenes"}, {"split": "random"}), "a and b validate on different samples (split)"),
        (({}, {"split": "random"}), None),  # `auto` may come to the same
        (({}, {"split": "random"}, {"split": "scenes"}), "b and c validate on different samples (split)"),
        (({"skip_bad_rows": True}, {}), "a and b validate on different samples (skip_bad_rows)"),
    ],
)
def test_what_a_definition_does_not_name_has_its_default(
    bases: tuple[dict[str, Any], ...], expected: str | None
) -> None:
    attrs = {"fingerprints": {"data": "x"}}
    sides = [
        Recorded(name=name, definition={"space": {}, "base": base}, attrs=attrs, trials=())
        for name, base in zip("abc", bases, strict=False)
    ]
    assert compared(sides).incomparable == expected


def test_what_a_study_searches_is_not_known_of_its_samples() -> None:
    attrs = {"fingerprints": {"data": "x"}}
    given = {"space": to_dict({"max_samples": Int(100, 200)}), "base": {"max_samples": 100}}  # of an older version
    sides = [
        Recorded(name=name, definition=definition, attrs=attrs, trials=())
        for name, definition in (("a", given), ("b", {"space": {}, "base": {"max_samples": 150}}))
    ]
    assert compared(sides).incomparable is None
