"""`--warm-start`: from files and studies to where a new study looks first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search import records
from search.errors import StudyError
from search.places import Places
from search.planning.coordinates import DECAYING, model_rate
from search.planning.laddered import REACH
from search.planning.prior import ELSEWHERE, LEAST_WIDTH, Conditions, Prior
from search.sampling.make import RUNGS, make_sampler
from search.sampling.params import distribution
from search.space import Choice, Float, param_name
from search.storage.database import close_storage, open_storage
from search.storage.studies import open_study
from search.storage.warm_start import prior_for, read
from search.study import Study

RECORDED = Path(__file__).parents[2] / "data" / "recorded-runs.json"
XL = "Salesforce/instructblip-flan-t5-xl"
SIZE = 400
"""Samples of the study that begins."""
STUDY = Study(
    name="begins",
    description="",
    base={"model": "mini", "num_epochs": 6, "lora_r": 8, "lora_alpha": 16, "batch_size": 4},
    space={"learning_rate": Float(1e-8, 1.0, log=True)},
    n_trials=16,
)


def config_at(z: float, **conditions: Any) -> dict[str, Any]:
    """What a run at this rate, like one of the study's, would have recorded: a falling one's mean is half as high."""
    base = STUDY.base_config().model_dump(mode="json")
    falls = conditions.get("lr_scheduler_type") in DECAYING
    return {**base, "max_samples": SIZE, "learning_rate": 10**z * 2 / 16 * (2 if falls else 1), **conditions}


def losses(best: float) -> list[tuple[float, float]]:
    """(rate, lowest loss) of five runs."""
    return [(best + offset, 1 + offset**2 / 4) for offset in (-0.8, -0.4, 0.0, 0.4, 0.8)]


def write_file(path: Path, best: float, **conditions: Any) -> str:
    runs = [
        {"name": str(z), "config": config_at(z, **conditions), "epochs": [{"epoch": 1, "val_loss": loss}]}
        for z, loss in losses(best)
    ]
    path.write_text(json.dumps({"runs": runs}), encoding="utf-8")
    return str(path)


def write_study(places: Places, name: str, best: float, **conditions: Any) -> str:
    places.runs_dir.mkdir(exist_ok=True)
    storage = open_storage(places.storage_url)
    study = open_study(storage, replace(STUDY, name=name))
    for z, loss in losses(best):
        config = config_at(z, **conditions)
        study.add_trial(
            create_trial(
                value=loss,
                params={"learning_rate": config["learning_rate"]},
                distributions={"learning_rate": distribution(STUDY.space["learning_rate"])},
                intermediate_values={1: loss},
                user_attrs={records.CONFIG: config},
            )
        )
    close_storage(storage)
    return name


def rungs(study: Study, prior: Prior | None, number: int = 8) -> list[float]:
    """log10 of the rates of the ladder's first so many rungs, as the sampler of the default strategy proposes them."""
    asked = {param_name(field, param): distribution(param) for field, param in study.space.items()}
    searched = optuna.create_study(sampler=make_sampler(study, RUNGS, prior))
    found = []
    for count in range(2 * number):
        trial = searched.ask(asked)
        if count % 2 == 0:  # the others vary the best
            found.append(model_rate(study.config(trial.params).model_dump()))
        trial.report(1.0, 1)
        searched.tell(trial, state=TrialState.PRUNED)
    return found


def warmed(places: Places, *sources: str, study: Study = STUDY) -> Prior:
    found = prior_for(study, SIZE, read(sources, places))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["file", "study"])
def test_the_ladder_begins_where_the_runs_were_best(tmp_path: Path, kind: str) -> None:
    places = Places.of(tmp_path / "runs")
    source = write_file(tmp_path / "runs.json", -3.4) if kind == "file" else write_study(places, "earlier", -3.4)
    prior = warmed(places, source)
    assert prior.centre == pytest.approx(-3.4, abs=1e-6)
    begins = rungs(STUDY, prior)
    assert all(abs(z + 3.4) <= REACH + 1e-6 for z in begins)
    # Each of them is where it would be without, moved by as much as the runs are away from what is known of others.
    moved = prior.centre - Prior().centre
    assert begins == pytest.approx([z + moved for z in rungs(STUDY, None)], abs=1e-6)


FAR: list[tuple[int, dict[str, Any]]] = [
    (1, {"model": XL}),
    (1, {"max_samples": 4 * SIZE + 1}),
    (2, {"max_samples": SIZE // 5, "target_modules": ["query", "q"]}),
    (2, {"num_epochs": 1, "lr_scheduler_type": "cosine"}),
    (5, {"model": XL, "max_samples": 9000, "target_modules": ["q"], "num_epochs": 60, "lr_scheduler_type": "linear"}),
]


@pytest.mark.parametrize(("number", "conditions"), FAR)
def test_a_near_source_moves_the_centre_more_than_a_far_one(
    tmp_path: Path, number: int, conditions: dict[str, Any]
) -> None:
    """Whichever of the two is the near one, in files and in studies."""
    places = Places.of(tmp_path / "runs")
    plain = read([write_file(tmp_path / "plain.json", -3.4)], places)[0].prior
    for near, far in ((-3.4, -2.4), (-2.4, -3.4)):
        one = write_file(tmp_path / "near.json", near)
        other = write_study(places, f"far{near:.1f}", far, **conditions)
        centres = [warmed(places, *sources).centre for sources in ((one,), (other,), (one, other))]
        assert centres[:2] == pytest.approx([near, far], abs=1e-6), "alone it is all that is known"
        share = 1 / (1 + plain.width**2 / (plain.width**2 + number * ELSEWHERE**2))
        assert share > 0.7
        assert centres[2] == pytest.approx(share * near + (1 - share) * far, abs=1e-6)
        assert sum(rungs(STUDY, Prior(centres[2]))) / 8 == pytest.approx(
            sum(rungs(STUDY, None)) / 8 + centres[2] - Prior().centre, abs=1e-6
        )
        alone = warmed(places, other)
        assert alone.width == pytest.approx((plain.width**2 + number * ELSEWHERE**2) ** 0.5)
        assert alone.width > warmed(places, one, other).width >= LEAST_WIDTH


def test_two_that_are_as_near_count_the_same(tmp_path: Path) -> None:
    places = Places.of(tmp_path / "runs")
    one = write_study(places, "one", -3.4, max_samples=4 * SIZE)  # not more than four times as many
    other = write_file(tmp_path / "runs.json", -2.4, num_epochs=24)
    assert warmed(places, one, other).centre == pytest.approx(-2.9, abs=1e-6)


def test_what_is_not_known_or_is_searched_is_no_difference(tmp_path: Path) -> None:
    places = Places.of(tmp_path / "runs")
    unknown = {"model": 7, "target_modules": [1], "num_epochs": "6", "lr_scheduler_type": None, "max_samples": None}
    source = read([write_file(tmp_path / "runs.json", -3.0, **unknown)], places)[0]
    assert source.conditions == Conditions()
    far = read([write_file(tmp_path / "runs.json", -3.0, lr_scheduler_type="linear")], places)
    either = {**STUDY.space, "lr_scheduler_type": Choice(("constant_with_warmup", "linear"))}
    found = [prior_for(study, SIZE, far) for study in (STUDY, replace(STUDY, space=either))]
    assert found[0] == far[0].prior.widened(1) and found[1] == far[0].prior
    assert prior_for(STUDY, SIZE, []) is None


def test_the_same_model_in_another_folder_is_no_difference() -> None:
    names = ("/hub/models--Salesforce--InstructBLIP-flan-t5-xl/snapshots/1a2b", f"/models/{XL}", XL)
    recorded = Conditions.of({"model_name": XL})
    assert not any(recorded.differences(Conditions.of({"model": name})) for name in names)
    assert recorded.differences(Conditions.of({"model": "mini"})) == ("model",)


def test_the_published_runs_count_most_for_a_study_like_them(tmp_path: Path) -> None:
    """On 2,068 images they are as near as runs can be; the embedded model's 160 tiles have little of that."""
    sources = read([str(RECORDED)], Places.of(tmp_path))
    assert sources[0].conditions.samples == 2068 and sources[0].prior.centre == pytest.approx(-2.98, abs=0.01)
    real = replace(STUDY, base={**STUDY.base, "model": f"/models/{XL}", "num_epochs": 10})
    for study, samples, differences in ((real, 2585, 0), (STUDY, 160, 2)):
        found, expected = prior_for(study, samples, sources), sources[0].prior.widened(differences)
        assert found is not None
        assert (found.centre, found.width) == pytest.approx((expected.centre, expected.width))


def test_a_source_without_a_loss_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text('{"runs": [{"name": "a", "config": {"learning_rate": 1e-4}, "epochs": []}]}', encoding="utf-8")
    with pytest.raises(StudyError, match="none of its runs has a validation loss and a learning rate"):
        read([str(path)], Places.of(tmp_path))
    with pytest.raises(StudyError, match="there is no study yet"):
        read(["earlier"], Places.of(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
