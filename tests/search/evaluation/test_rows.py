"""The rows that trials are judged on: what is left out, and what they are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from search import records
from search.evaluation.rows import FEWEST, Chosen, _apart, choose_rows, configs_of
from tests.support import candidate_trials as leaders
from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.dataset import Row, Split


def config(**values: Any) -> TrainConfig:
    return TrainConfig.parse({"data": "mini", **values})


def split_of(of: TrainConfig) -> Split:
    return dataset.split(dataset.examine("mini"), of)


def scenes(*parts: tuple[Row, ...]) -> set[str]:
    return {row.scene for part in parts for row in part}


def told(chosen: Chosen) -> dict[str, Any]:
    """As the study keeps an evaluation."""
    return {"fingerprint": chosen.fingerprint, "digest": chosen.digest, "images": len(chosen.rows)}


def test_rows_that_the_trial_left_out_are_judged_on_where_there_is_no_test_split() -> None:
    one = config(max_samples=100)
    chosen = choose_rows({4: one}, None, "auto")
    used = split_of(one)
    assert chosen.name == "unused" and "that trial 4 did not use (max_samples=100)" in chosen.where
    assert not scenes(chosen.rows) & scenes(used.train, used.val)
    everything = choose_rows({4: config()}, None, "auto")
    assert (everything.name, len(everything.warnings)) == ("validation", 1)
    with pytest.raises(DataError, match="given test split"):
        choose_rows({4: one}, None, "test")


@pytest.mark.parametrize("others", [{"max_samples": 48}, {"max_samples": 24, "split_seed": 3}])
def test_none_is_judged_on_rows_that_it_has_seen(others: dict[str, Any]) -> None:
    """Other samples of a trial given by hand, another split of a repeat."""
    one, other = config(max_samples=24), config(**others)
    chosen = choose_rows({0: one, 1: other}, None, "auto")
    assert chosen.name == "unused" and len(chosen.rows) >= FEWEST
    for each in (split_of(one), split_of(other)):
        assert not scenes(chosen.rows) & scenes(each.train, each.val)
    sizes = ", ".join(dict.fromkeys(str(each.max_samples) for each in (one, other)))
    assert f"that trials 0, 1 did not use (max_samples={sizes})" in chosen.where


def test_validation_rows_that_another_trial_trained_on_are_left_out() -> None:
    one, other = config(max_samples=200), config()
    chosen = choose_rows({0: one, 1: other}, None, "validation")
    assert 0 < len(chosen.rows) < len(split_of(one).val)
    assert not scenes(chosen.rows) & scenes(split_of(other).train)
    assert any(f"only {len(chosen.rows)} rows are left" in warning for warning in chosen.warnings)
    assert choose_rows({0: one, 1: other}, None, "auto").rows == chosen.rows, "nothing is unused"


def test_a_copy_of_a_picture_that_was_seen_is_left_out(tmp_path: Path) -> None:
    """Under another name, and of no scene that is known."""
    for i in range(4):
        Image.effect_noise((12, 10), 60).convert("RGB").save(tmp_path / f"{'abcd'[i]}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "z.png")
    rows = "".join(f"{name}.png,a view\n" for name in "abcdz")
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    found = dataset.examine(str(tmp_path))
    apart = _apart(found, found.rows, [row for row in found.rows if row.image.name == "a.png"])
    assert [row.image.name for row in apart] == ["b.png", "c.png", "d.png"]


def test_where_no_row_is_left_one_message_says_so() -> None:
    every = {n: config(split_seed=n) for n in range(8)}
    with pytest.raises(DataError, match="rows of trial 0 is of a scene that another of these 8 trials"):
        choose_rows(every, None, "auto")


def test_the_studys_own_folder_by_its_path_is_no_other_data() -> None:
    one = config(max_samples=100)
    own = choose_rows({0: one}, None, "auto")
    named = choose_rows({0: one}, str(dataset.resolve_folder("mini")), "auto")
    assert (named.name, named.rows) == ("unused", own.rows), "the rows that it trained on were among these, unsaid"


def test_trials_on_other_data_are_not_judged_on_the_first_ones(tmp_path: Path) -> None:
    folder = written(tmp_path / "other")
    trials = [
        leaders.trial(0, 0.4, config={"data": "mini"}),
        leaders.trial(1, 0.4, config={"data": "/elsewhere/mini"}),  # another host has the study's data there
        leaders.trial(2, 0.4, config={"data": str(folder)}, attrs={records.OVERRIDES: {"data": str(folder)}}),
    ]
    found = configs_of(trials)
    assert {n: each.data for n, each in found.items()} == {0: "mini", 1: "mini", 2: str(folder)}
    with pytest.raises(DataError, match="trial 0 was trained on mini, but trial 2 on"):
        choose_rows(found, None, "auto")
    assert choose_rows(found, str(written(tmp_path / "third")), "auto").name == "third"


def written(folder: Path, captions: str = "a lake") -> Path:
    """A data folder of eight of the embedded images."""
    rows = dataset.examine("mini").rows[:8]
    folder.mkdir(parents=True)
    listed = [{"image": row.image.name, "caption": f"{captions}: {row.caption}"} for row in rows]
    (folder / "rows.json").write_text(json.dumps(listed))
    (folder / "images").symlink_to(rows[0].image.parent)
    return folder


def test_no_two_data_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second evaluation would replace the first: in Optuna, in MLflow's metrics, in the file of its captions."""
    one = {0: config()}
    for folder in ("RSIEval", "test", "other/RSIEval"):
        written(tmp_path / folder, folder)
    first = choose_rows(one, str(tmp_path / "RSIEval"), "auto")
    assert first.name == "RSIEval" and not first.warnings
    taken = {first.name: told(first)}
    assert choose_rows(one, str(tmp_path / "RSIEval"), "auto", taken).name == "RSIEval"
    second = choose_rows(one, str(tmp_path / "other" / "RSIEval"), "auto", taken)
    assert second.name == f"RSIEval-{second.fingerprint[:8]}"
    assert choose_rows(one, str(tmp_path / "test"), "auto").name == f"{tmp_path.name}-test"
    validation = choose_rows(one, str(tmp_path / "RSIEval"), "validation")
    assert validation.name == "RSIEval-validation" and not validation.warnings
    monkeypatch.chdir(tmp_path / "RSIEval")
    assert choose_rows(one, ".", "auto").name == "RSIEval"


def test_other_rows_of_the_same_data_have_another_name() -> None:
    """Figures of other rows under one name would stand side by side in MLflow."""
    small, large = {0: config(max_samples=24)}, {1: config(max_samples=100)}
    first = choose_rows(small, None, "auto")
    taken = {"unused": told(first)}
    second = choose_rows(large, None, "auto", taken)
    assert second.name == f"unused-{second.digest}"
    assert choose_rows(small, None, "auto", taken).name == "unused"
    taken["unused"].pop("digest")  # of an earlier version
    assert choose_rows(small, None, "auto", taken).name == "unused"
