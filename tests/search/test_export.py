"""`search.export`: what it writes loads without this project, and the card's own code captions as ours does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from search import export
from search.errors import StudyError
from search.records import StudyRecord
from search.report.card import command
from search.storage import lifecycle
from tests.support import called, small_study
from tests.support import candidate_trials as leaders
from trainer import caption
from trainer.captions.adapter import load
from trainer.data import dataset
from trainer.data.images import open_image

WITHOUT_US = (
    "import sys\nfor name in ('search', 'trainer', 'studies', 'mlflow', 'optuna'):\n    sys.modules[name] = None\n"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> small_study.Small:
    return small_study.build(tmp_path_factory, tiny_checkpoint)


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(small: small_study.Small) -> Call:
    def call(*arguments: object, app: Callable[[], object] = export.app) -> tuple[int, str, str]:
        study = ("--study", small_study.NAME, "--runs-dir", small.runs) if app is export.app else ()
        done = called.call(app, [*map(str, (*study, *arguments))])
        return done.code, done.out, done.err

    return call


@pytest.mark.long
def test_the_cards_own_code_captions_in_a_process_without_this_project(
    call: Call, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    code, printed, told = call("--out", out, "--merge")
    assert (code, printed) == (0, f"{out}\n")
    assert "hf upload" in told
    card = (out / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "peft"
    # The study's model, which the process that ran it has made.
    base = Path(metadata["base_model"])
    assert base.name == tiny_checkpoint.name
    assert (base / "config.json").read_text() == (tiny_checkpoint / "config.json").read_text()
    assert {"tuning-log.md", "tuning-log.zh.md", "training_config.json", "merged"} <= {f.name for f in out.iterdir()}
    # The card's code, beside an image.
    image = dataset.examine("mini").rows[0].image
    shutil.copy(image, out / "image.png")
    match = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert match is not None
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"{WITHOUT_US}{match[1]}\nprint(output.tolist())"],
        cwd=out,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    instruction = json.loads((out / "captioning.json").read_text())["instruction"]
    _, ours, _ = call(image, "--adapter", out, "--instruction", instruction, app=caption.app)
    *text, tokens = ran.stdout.splitlines()
    assert " ".join(" ".join(text).split()) == ours.rstrip("\n").partition("\t")[2]
    # Random weights may say nothing in words; in tokens they do.
    base, adapted = load(str(tiny_checkpoint), out, dtype=torch.float32, device=torch.device("cpu"))
    inputs = base.processor(images=open_image(image), text=instruction, return_tensors="pt")
    expected = adapted.generate(**inputs, max_new_tokens=256, num_beams=1, do_sample=False).tolist()
    assert json.loads(tokens) == expected
    assert len(expected[0]) > 1


def test_the_merged_model_captions_as_the_adapter_does(call: Call, tmp_path: Path, tiny_checkpoint: Path) -> None:
    out = tmp_path / "out"
    assert call("--out", out, "--merge", "--trial", small_study.GOOD)[0] == 0
    image = dataset.examine("mini").rows[0].image
    options = ("--instruction", "What is this?", "--max-new-tokens", 8)
    _, by_adapter, _ = call(image, "--adapter", out, *options, app=caption.app)
    _, merged, _ = call(image, "--model", out / "merged", *options, app=caption.app)
    _, base, _ = call(image, "--model", tiny_checkpoint, *options, app=caption.app)
    assert merged == by_adapter
    assert base != merged


def test_the_card_names_the_trial_its_run_and_the_command_that_trains_it_again(
    call: Call, small: small_study.Small, tmp_path: Path
) -> None:
    from search.options import opened
    from search.places import Places

    assert call("--out", tmp_path / "out", "--trial", small_study.GOOD)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with opened(small_study.NAME, Places.of(small.runs)) as (study, _):
        trial = lifecycle.read_trials(study)[small_study.GOOD]
    assert f"`{trial.run_id}`" in card
    assert f"epoch {trial.best_epoch}" in card
    assert command(trial) in card
    assert "--set learning_rate=0.002" in card
    assert f"--trial {small_study.GOOD} --runs-dir" in card
    assert "Not measured." in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trial", "9"], "has no trial 9; it has 0 to 4"),
        (["--trial", "4"], "has no best epoch"),
    ],
)
def test_wrong_input_leaves_nothing_behind(call: Call, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, _, told = call("--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in told
    assert not list(tmp_path.iterdir())


def test_a_repeat_is_refused_and_its_trial_named() -> None:
    """Log and card tell of the search's trials alone."""
    record = StudyRecord(
        name="x",
        definition={},
        attrs={},
        trials=(leaders.trial(0, 0.4), leaders.trial(1, 0.5), leaders.repeat(2, 1, 1, 0.5)),
        experiment_id=None,
        parent_run_id=None,
    )
    assert export.choose(record, 1).number == 1
    with pytest.raises(StudyError, match=r"trial 2 repeats trial 1 .* export that one \(--trial 1\)"):
        export.choose(record, 2)


@pytest.mark.parametrize(("config", "said"), [("{", "its config.json cannot be read"), ("[]", "is not an object")])
def test_a_base_that_cannot_be_read_is_one_message(call: Call, tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(config)
    code, _, told = call("--out", tmp_path / "out", "--trial", small_study.GOOD, "--model", tmp_path / "bad")
    assert code == 2 and said in told and "Traceback" not in told
    assert [each.name for each in tmp_path.iterdir()] == ["bad"]


def test_a_folder_with_files_is_not_written_over(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, told = call("--out", ".")  # of an empty folder, too: its place would be another folder's
    assert code == 2 and "is the folder you are in" in told
    (tmp_path / "mine").write_text("")
    monkeypatch.undo()
    code, _, told = call("--out", tmp_path)
    assert code == 2
    assert "is there already and not empty" in told
