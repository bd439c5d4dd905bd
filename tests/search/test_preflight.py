"""What a study can reach is checked before the first trial: every model, device and data folder of its space."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from search import preflight
from search.errors import StudyError
from search.space import Choice, Float
from search.study import Fixed, Study
from tests.bad_input import harness
from tests.support import checkpoints
from tests.support.near_probe import NearProbe
from tests.support.search_process import command, run


def study(*fixed: Fixed, **space: Choice) -> Study:
    return Study(
        name="reached",
        description="a test",
        space={"learning_rate": Float(1e-4, 1e-2), **space},
        base={"max_samples": 24},
        n_trials=2,
        enqueue=fixed,
    )


def refused(given: Study, cuda: str | None = "") -> str:
    with pytest.raises(StudyError) as error:
        preflight.check(given, cuda)
    return str(error.value)


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are checked in this process."""
    monkeypatch.setattr(preflight, "Probe", NearProbe)


@pytest.mark.usefixtures("near")
def test_every_choice_of_a_model_and_device_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    good, bad = checkpoints.write(tmp_path / "good"), checkpoints.write(tmp_path / "bad")
    checkpoints.edit_weights(bad, lambda tensors: {k: v for k, v in tensors.items() if k != "query_tokens"})
    message = refused(study(model=Choice(("mini", str(good), str(bad), str(tmp_path / "none")))))
    assert "1 tensor is missing: query_tokens" in message and str(good) not in message
    assert f"the model folder '{tmp_path}/none' does not exist" in message
    message = refused(study(device=Choice(("cpu", "cuda:1"))))
    assert "device=cuda:1: this machine has 0 CUDA devices" in message
    assert preflight.check(study(device=Choice(("cpu", "cuda:1"))), None).rows  # on Ray, nodes have their own


@pytest.mark.usefixtures("near")
def test_modules_that_a_trial_given_by_hand_names() -> None:
    message = refused(study(Fixed(label="typo", config={"target_modules": ("querry",)})))
    assert "no linear module is named 'querry'; did you mean 'query'?" in message
    assert preflight.check(study(Fixed(label="fine", config={"target_modules": ("query", "qkv")})), "").rows


def test_nothing_is_created(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model")
    shutil.rmtree(model / "qformer_tokenizer")
    wrong = command(tmp_path / "runs", "--set", f"model={model}")
    done = run(wrong)
    assert done.returncode == 2 and "no tokenizer for the Q-Former" in done.stderr
    with harness.no_workers():
        harness.search([*wrong[3:], "--dry-run"]).check_refused("no tokenizer for the Q-Former")
    assert not (tmp_path / "runs").exists()
