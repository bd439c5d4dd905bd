"""What a study can reach is checked before the first trial: every model, device and data folder of its space."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from search import preflight
from search.errors import StudyError
from search.space import Choice, Float
from search.study import Fixed, Study
from tests.support import checkpoints
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


def test_every_choice_of_a_model_and_device_is_looked_at(tmp_path: Path) -> None:
    good, bad = checkpoints.write(tmp_path / "good"), checkpoints.write(tmp_path / "bad")
    checkpoints.edit_weights(bad, lambda tensors: {k: v for k, v in tensors.items() if k != "query_tokens"})
    message = refused(study(model=Choice(("mini", str(good), str(bad), str(tmp_path / "none")))))
    assert "1 tensor is missing: query_tokens" in message and str(good) not in message
    assert f"the model folder '{tmp_path}/none' does not exist" in message
    message = refused(study(device=Choice(("cpu", "cuda:1"))))
    assert "device=cuda:1: this machine has 0 CUDA devices" in message
    assert preflight.check(study(device=Choice(("cpu", "cuda:1"))), None).examined.rows  # on Ray, nodes have their own


def test_modules_that_a_trial_given_by_hand_names() -> None:
    message = refused(study(Fixed(label="typo", config={"target_modules": ("querry",)})))
    assert "no linear module is named 'querry'; did you mean 'query'?" in message
    assert preflight.check(study(Fixed(label="fine", config={"target_modules": ("query", "qkv")})), "").examined.rows


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_nothing_is_created(more: tuple[str, ...], tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model")
    shutil.rmtree(model / "qformer_tokenizer")
    done = run(command(tmp_path / "runs", "--set", f"model={model}", *more))
    assert done.returncode == 2 and "no tokenizer for the Q-Former" in done.stderr
    assert not (tmp_path / "runs").exists()
