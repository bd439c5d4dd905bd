"""Options of `search.run` that are refused, and `--dry-run`: one message, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from search.places import Places
from search.storage import studies
from search.storage.database import close_storage, open_storage
from studies.rsicap_mini import STUDY
from tests.bad_input import harness
from tests.support.search_process import command, run

BAD = [
    (["--study", "rsicap_mimi"], "did you mean 'rsicap_mini'?"),
    ([], "name a study with --study"),
    (["--study", "rsicap_mini", "--set", "lora_rnk=3"], "did you mean 'lora_r'?"),
    (["--study", "rsicap_mini", "--set", "learning_rate"], "not of the form key=value"),
    (["--study", "rsicap_mini", "--set", "learning_rate=fast"], "learning_rate: input should be a valid number"),
    (["--study", "rsicap_mini", "--set", "data=/nowhere"], "the data folder '/nowhere' does not exist"),
    (["--study", "rsicap_mini", "--set", "model=/nowhere"], "the model folder '/nowhere' does not exist"),
    (["--study", "rsicap_mini", "--timeout", "soon"], "--timeout must be a time such as 2h"),
    (["--study", "rsicap_mini", "--hang-timeout", "5s"], "--hang-timeout must be at least 10s, but got '5s'"),
    (["--study", "rsicap_mini", "--lost-after", "soon"], "--lost-after must be a time such as 2h"),
    (["--study", "rsicap_mini", "--pruner", "hyperbnd"], "did you mean 'hyperband'?"),
    (["--study", "rsicap_mini", "--storage", "nonsense"], "is not a database URL"),
    (["--study", "rsicap_mini", "--storage", "postgresql://u:secret@127.0.0.1:1/x"], "cannot reach the database"),
    (["--study", "rsicap_mini", "--tracking-uri", "http://no-such-host.invalid:1"], "no-such-host.invalid:1"),
    (["--study", "rsicap_mini", "--strategy", "rugs"], "'rugs' is not one of"),
    (["--study", "rsicap_mini", "--trials", "0"], "Invalid value"),
    (["--study", "rsicap_mini", "--slots", "17"], "--slots must be auto or a number from 1 to 16"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input_gets_one_message(tmp_path: Path, arguments: list[str], said: str) -> None:
    """By the program's own way to its exit code, in this process; the test below goes through another."""
    runs = tmp_path / "runs"
    with harness.no_workers():
        outcome = harness.search(["--runs-dir", str(runs), *arguments])
    outcome.check_refused(said)
    assert "secret" not in outcome.err
    assert not list(runs.rglob("*.safetensors")) and not (runs / "rsicap_mini" / "trials").exists()
    if "--tracking-uri" not in arguments:
        assert not runs.exists() or not any(runs.iterdir()), "something was written"


@pytest.mark.parametrize("more", [[], ["--strategy", "joint"], ["--dry-run", "--no-measure"]], ids=" ".join)
def test_a_study_with_a_strategy_of_an_older_version_is_not_gone_on_with(tmp_path: Path, more: list[str]) -> None:
    storage = open_storage(Places.of(tmp_path).storage_url)
    opened = studies.open_study(storage, STUDY)
    studies.check_strategy(opened, "staged")
    opened.add_trial(optuna.create_trial(value=1.0))
    with harness.no_workers():
        outcome = harness.search(["--study", "rsicap_mini", "--runs-dir", str(tmp_path), *more])
    outcome.check_refused("begun with --strategy staged, which there is no longer", "with --fresh")
    assert len(opened.get_trials()) == 1
    close_storage(storage)


def test_missing_model_and_data_are_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = run(
        [sys.executable, "-m", "search.run", "--study", "rsicap", "--runs-dir", str(tmp_path / "runs")], fresh=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("- model:", "- data:", "hf download", "RSICAP_ROOT", "rsicap_mini"):
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = run(command(tmp_path / "runs", "--dry-run"))
    assert done.returncode == 0 and "the first sampled trial would be" in done.stdout
    assert not (tmp_path / "runs").exists()
