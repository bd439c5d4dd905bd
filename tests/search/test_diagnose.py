"""`python -m search.diagnose`: what it prints, and its messages for wrong files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search.diagnose import app
from search.diagnosis import IDS
from tests.support.called import call

RECORDED = Path(__file__).parents[1] / "data" / "recorded-runs.json"


def run(*args: str) -> tuple[int, str, str]:
    outcome = call(app, args)
    return outcome.code, outcome.out, outcome.err


def file(tmp_path: Path, data: Any) -> str:
    path = tmp_path / "runs.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def one(**changes: Any) -> dict[str, Any]:
    epochs = [{"epoch": n, "train_loss": 2.0 - 0.1 * n, "val_loss": 1.9 - 0.1 * n} for n in (1, 2, 3, 4)]
    return {"runs": [{"name": "a", "config": {}, "epochs": epochs} | changes]}


def test_one_line_a_finding() -> None:
    code, out, err = run(str(RECORDED))
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert all(len(row) == 3 and row[1] in IDS and row[2] for row in rows)
    assert len({row[0] for row in rows}) == 10
    assert ["lora_r8_alpha16", "slow_epoch"] in [row[:2] for row in rows]


def test_as_a_module_in_chinese() -> None:
    done = python("-m", "search.diagnose", str(RECORDED), "--lang", "zh")
    assert (done.returncode, done.stderr) == (0, "")
    assert "quick_test_epoch0\tinconclusive\t只有 2 个 epoch" in done.stdout


def test_the_diagnosis_needs_no_heavy_library() -> None:
    code = "import sys, search.diagnose; print([m for m in ('torch', 'optuna', 'mlflow') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def python(*args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, encoding="utf-8")


def test_extra_keys_are_ignored_and_missing_values_allowed(tmp_path: Path) -> None:
    data = one(more=1, config={"lora_rank": 4})
    data["runs"][0]["epochs"][1] |= {"val_loss": None, "bleu": 0.3}
    del data["runs"][0]["epochs"][2]["train_loss"]
    code, out, _ = run(file(tmp_path, data | {"about": "x"}))
    assert (code, out.split("\t")[:2]) == (0, ["a", "too_slow"])


def test_nan_is_a_finding(tmp_path: Path) -> None:
    data = one()
    data["runs"][0]["epochs"][3]["train_loss"] = float("nan")
    code, out, _ = run(file(tmp_path, data))
    assert (code, out.split("\t")[1]) == (0, "non_finite")


def test_tabs_in_names_do_not_break_the_columns(tmp_path: Path) -> None:
    assert run(file(tmp_path, one(name="a\tb\nc")))[1].count("\t") == 2


def test_a_file_without_runs_prints_nothing(tmp_path: Path) -> None:
    assert run(file(tmp_path, {"runs": []})) == (0, "", "")


def test_everything_wrong_comes_in_one_message(tmp_path: Path) -> None:
    data = one()
    data["runs"][0]["epochs"][0]["train_loss"] = "1.5"
    data["runs"].append({"name": "b", "epochs": [{"epoch": 2}, {"epoch": 2}]})
    data["runs"].append({"name": "", "epochs": [{"epoch": 0, "elapsed_s": -1}]})
    data["runs"].append({"epochs": None})
    code, out, err = run(file(tmp_path, data))
    assert (code, out) == (2, "")
    assert "has 7 errors:" in err
    for part in (
        "run 1 ('a'), entry 1 of epochs, train_loss: input should be a valid number, but got '1.5'",
        "run 2 ('b'): the epochs must be in rising order, each once, but are [2, 2]",
        "run 3 (''), name: string should have at least 1 character, but got ''",
        "run 3 (''), entry 1 of epochs, epoch: input should be greater than or equal to 1, but got 0",
        "run 3 (''), entry 1 of epochs, elapsed_s: input should be greater than or equal to 0, but got -1",
        "run 4, name: field required",
        "run 4, epochs: input should be a valid",
    ):
        assert part in err


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the file: invalid JSON"),
        ("{", "the file: invalid JSON"),
        ("[]", "the file: "),
        ("null", "the file: "),
        ("{}", "the file, runs: field required"),
        ('{"runs": {}}', "the file, runs: input should be a valid"),
        ('{"runs": [3]}', "run 1: input should be"),
        ('{"runs": [{"name": 1, "epochs": [true]}]}', "run 1, entry 1 of epochs: input should be"),
        ('{"runs": [{"name": "a", "epochs": [{"epoch": 1.5}]}]}', "epoch: input should be a valid integer"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, text: str, part: str) -> None:
    code, out, err = run(file(tmp_path, text))
    assert (code, out) == (2, "")
    assert part in err
    assert "Traceback" not in err


def test_a_wrong_kind_of_file_is_cut_short(tmp_path: Path) -> None:
    err = run(file(tmp_path, {"runs": [1] * 100}))[2]
    assert "and 80 more" in err
    assert len(err.splitlines()) == 22


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in run(str(tmp_path / "none.json"))[2]
    assert "cannot be read: Is a directory" in run(str(tmp_path))[2]
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe{}")
    code, _, err = run(str(tmp_path / "latin.json"))
    assert (code, "is not UTF-8 text" in err) == (2, True)


def test_unknown_languages_are_refused() -> None:
    code, out, err = run(str(RECORDED), "--lang", "fr")
    assert (code, out) == (2, "")
    assert "--lang must be one of en, zh, but got 'fr'" in err
