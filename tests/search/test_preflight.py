"""What a study can reach is checked before the first trial: every model, device and data folder of its space."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
    assert preflight.check(study(device=Choice(("cpu", "cuda:1"))), None).examined.rows  # on Ray, nodes have their own


@pytest.mark.usefixtures("near")
def test_models_whose_losses_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    """A loss is a mean over tokens: other tokens, another loss. The same tokens are fine."""
    same, other = checkpoints.write(tmp_path / "same"), checkpoints.write(tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["model"]["vocab"][-1][0] += "s"
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    given = study(model=Choice(("mini", str(same))))
    assert given.models() == ("mini", str(same))
    preflight.check(given, "")
    message = refused(study(model=Choice(("mini", str(other)))))
    assert f"'mini' and '{other}' have different tokenizers" in message


def test_room_for_the_batches_of_all_trials_at_once_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the largest trial of the space, and by all that run at once."""
    megabyte = 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=megabyte, used=0, free=megabyte))
    loading = {"num_workers": 2, "cache_features": False, "batch_size": 1, "eval_batch_size": 1}
    one = replace(study(), base={"max_samples": 24, **loading})
    preflight.check(one, "", at_once=1)
    with pytest.raises(StudyError, match=r"16 DataLoader workers of 4 trials at once need .*--shm-size=2g"):
        preflight.check(one, "", at_once=4)
    preflight.check(one, "", at_once=None)  # elsewhere
    larger = replace(one, space={**one.space, "batch_size": Choice((1, 8))})
    with pytest.raises(StudyError, match=r"4 DataLoader workers of a trial need .* of shared memory"):
        preflight.check(larger, "", at_once=1)


def test_what_was_found_is_for_the_log_and_for_mlflow() -> None:
    checked = preflight.check(study(), "")
    heads = [line.partition(":")[0] for line in checked.lines()[1:]]
    assert [head for head in heads if head != "warning"] == ["rows used", "split by scenes", "captions"]
    tags = checked.tags()
    assert tags["split.rule"] == "scenes" and tags["text.captions_cut"] == "0" and tags["text.captions"] == "640"


@pytest.mark.usefixtures("near")
def test_modules_that_a_trial_given_by_hand_names() -> None:
    message = refused(study(Fixed(label="typo", config={"target_modules": ("querry",)})))
    assert "no linear module is named 'querry'; did you mean 'query'?" in message
    assert preflight.check(study(Fixed(label="fine", config={"target_modules": ("query", "qkv")})), "").examined.rows


def test_nothing_is_created(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model")
    shutil.rmtree(model / "qformer_tokenizer")
    wrong = command(tmp_path / "runs", "--set", f"model={model}")
    done = run(wrong, fresh=True)
    assert done.returncode == 2 and "no tokenizer for the Q-Former" in done.stderr
    with harness.no_workers():
        harness.search([*wrong[3:], "--dry-run", "--no-measure"]).check_refused("no tokenizer for the Q-Former")
    assert not (tmp_path / "runs").exists()
