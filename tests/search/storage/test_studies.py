"""A study's definition: created, continued, refused when it changed."""

from dataclasses import replace

import optuna
import pytest

from search import records
from search.errors import DefinitionChanged, StorageError, StudyError
from search.space import Float
from search.storage.lifecycle import counted, read_trials
from search.storage.studies import check_definition, check_fingerprints, check_strategy, find_study, open_study
from tests.search.storage.databases import BY_HAND, SPACE, STUDY, reopen, suggest_all


def test_a_study_is_created_and_continued(storage):
    first = open_study(storage, STUDY)
    assert first.direction == optuna.study.StudyDirection.MINIMIZE
    assert first.user_attrs["definition"] == STUDY.definition()
    first.tell(first.ask(), 1.0)
    again = reopen(storage, replace(STUDY, n_trials=99, description="other words"))
    assert again.study_name == "rsicap"
    assert len(again.trials) == 1


def test_sampler_and_pruner_are_used(storage):
    sampler, pruner = optuna.samplers.RandomSampler(), optuna.pruners.NopPruner()
    for fresh in (True, False):
        study = open_study(storage, STUDY, fresh=fresh, sampler=sampler, pruner=pruner)
        assert (study.sampler, study.pruner) == (sampler, pruner)


def test_a_changed_definition_is_refused_with_every_difference(storage):
    study = open_study(storage, STUDY)
    study.tell(study.ask(), 1.0)
    space = {**SPACE, "learning_rate": Float(5e-6, 2e-3, log=True), "lora_dropout": Float(0, 0.2)}
    del space["torch_dtype"]
    changed = replace(STUDY, space=space, seed=3, sampler="random", base={"num_epochs": 6, "max_samples": 40})
    with pytest.raises(DefinitionChanged) as caught:
        open_study(storage, changed)
    assert str(caught.value).splitlines() == [
        "the study 'rsicap' exists with another definition, so its 1 trials cannot be compared with new ones:",
        "  - space.learning_rate.high: 0.001 -> 0.002",
        '  - space.torch_dtype: {"type": "Choice", "values": ["float32", "bfloat16"]} -> not there',
        '  - space.lora_dropout: not there -> {"type": "Float", "low": 0, "high": 0.2, "log": false}',
        "  - base.max_samples: null -> 40 (as before with --set max_samples=none)",
        "  - base.num_epochs: 10 -> 6 (as before with --set num_epochs=10)",
        "  - sampler: tpe -> random",
        "  - seed: 0 -> 3 (as before with --seed 0)",
        "undo the change, or start a new study with --fresh (as 'rsicap-2')",
    ]


def test_the_advice_keeps_what_is_said_in_one_word(storage):
    """`--set base_dtype=bfloat16` would be accepted, and the repeats would be trained in bfloat16 too."""
    plain = replace(STUDY, space={"learning_rate": Float(5e-6, 1e-3, log=True)})
    study = open_study(storage, replace(plain, screen="bfloat16", objective="loss"))
    study.set_user_attr(records.SETTINGS, ["screen=bfloat16"])
    study.tell(study.ask(), 1.0)
    with pytest.raises(DefinitionChanged, match=r"base.base_dtype: .* \(as before with --set screen=bfloat16\)"):
        open_study(storage, plain)
    with pytest.raises(DefinitionChanged, match=r"objective: .* \(as before with --set objective=loss\)"):
        open_study(storage, replace(plain, objective="cider"))


def test_another_patience_is_no_other_study(storage):
    study = open_study(storage, STUDY)
    study.tell(study.ask(), 1.0)
    again = reopen(storage, replace(STUDY, patience=5, min_delta=0.01))
    assert again.study_name == "rsicap" and len(again.trials) == 1
    assert again.user_attrs[records.STOP_RULE] == {"patience": 5, "min_delta": 0.01}
    assert study.user_attrs["definition"] == STUDY.definition()


def test_a_study_of_an_older_version_goes_on(storage):
    """Patience and min_delta were part of its definition's base and of its trials' configurations."""
    study = open_study(storage, STUDY)
    retired = {"patience": 4, "min_delta": 0.02}
    definition = study.user_attrs["definition"]
    study.set_user_attr("definition", {**definition, "base": {**definition["base"], **retired}})
    config = STUDY.base_config().model_dump(mode="json")
    trial = study.ask()
    trial.set_user_attr(records.CONFIG, {**config, **retired})
    study.tell(trial, 1.0)
    again = reopen(storage, STUDY)
    check_definition(again, STUDY)
    assert read_trials(again)[0].config == config
    with pytest.raises(DefinitionChanged) as caught:
        open_study(storage, replace(STUDY, base={"num_epochs": 6}))
    assert [line for line in str(caught.value).splitlines() if line.startswith("  - ")] == [
        "  - base.num_epochs: 10 -> 6 (as before with --set num_epochs=10)"
    ]


def test_without_a_trial_there_is_nothing_to_compare(storage):
    """A typo no trial was made with: mended, the same command goes on; who opened the study with the typo may not."""
    first = open_study(storage, STUDY)
    check_fingerprints(first, data="d1", model="m1")
    check_strategy(first, "joint")
    check_definition(first, STUDY)
    changed = replace(STUDY, seed=3)
    second = open_study(storage, changed)
    assert second.study_name == first.study_name
    check_fingerprints(second, data="d2", model="m1")
    check_strategy(second, "rungs")
    check_definition(second, changed)
    with pytest.raises(DefinitionChanged, match=r"seed: 3 -> 0"):
        check_definition(first, STUDY)
    second.ask()
    with pytest.raises(DefinitionChanged, match=r"its 1 trials cannot be compared"):
        open_study(storage, STUDY)
    with pytest.raises(DefinitionChanged, match="data: d2 -> d1"):
        check_fingerprints(first, data="d1", model="m1")


def test_what_cannot_change_a_result_may_change(storage):
    open_study(storage, STUDY)
    open_study(storage, replace(STUDY, base={"device": "cpu", "num_workers": 2, "data": "/elsewhere"}))


def test_fresh_starts_a_new_generation_and_the_latest_goes_on(storage):
    names = [open_study(storage, STUDY, fresh=fresh).study_name for fresh in (True, True, False, True, False)]
    assert names == ["rsicap", "rsicap-2", "rsicap-2", "rsicap-3", "rsicap-3"]
    changed = replace(STUDY, seed=1)
    assert open_study(storage, changed, fresh=True).study_name == "rsicap-4"
    assert open_study(storage, changed).study_name == "rsicap-4"
    assert find_study(storage, "rsicap").study_name == "rsicap-4"
    assert find_study(storage, "rsicap-2").study_name == "rsicap-2"


def test_a_study_whose_own_name_looks_like_a_generation(storage):
    open_study(storage, replace(STUDY, name="rsicap-2"))
    assert open_study(storage, STUDY).study_name == "rsicap"
    assert open_study(storage, STUDY, fresh=True).study_name == "rsicap-3"
    assert open_study(storage, STUDY).study_name == "rsicap-3"
    assert find_study(storage, "rsicap-2").user_attrs["study"] == "rsicap-2"


def test_another_programs_study_is_left_alone(storage):
    theirs = optuna.create_study(study_name="rsicap", storage=storage)
    theirs.tell(theirs.ask(), 1.0)
    with pytest.raises(StorageError, match="'rsicap' that another program made"):
        open_study(storage, STUDY)
    assert "study" not in theirs.user_attrs


def test_find_study_names_what_there_is(storage):
    with pytest.raises(StudyError, match="no study 'rsicap'; it has none yet"):
        find_study(storage, "rsicap")
    open_study(storage, STUDY)
    with pytest.raises(StudyError, match="did you mean 'rsicap'"):
        find_study(storage, "rsicab")


def test_trials_given_by_hand_are_queued_once(storage):
    study = open_study(storage, replace(STUDY, enqueue=BY_HAND))
    assert len(reopen(storage, replace(STUDY, enqueue=BY_HAND)).trials) == 2
    assert counted(study) == 2
    first, second = study.ask(), study.ask()
    assert (first.user_attrs[records.LABEL], second.user_attrs[records.LABEL]) == ("1", "2")
    assert first.user_attrs[records.OVERRIDES] == {"max_samples": 20}
    assert second.user_attrs[records.OVERRIDES] == {}
    assert suggest_all(first) == {"learning_rate": 5e-6, "lora_r": 4}
    assert first.suggest_categorical("lora_alpha_per_lora_r", [1, 2, 4]) == 2
    assert reopen(storage, replace(STUDY, enqueue=BY_HAND)).ask().number == 2


@pytest.mark.parametrize("dies_after", ["create_new_study", "set_study_user_attr", "create_new_trial"])
def test_a_process_that_dies_while_it_creates_a_study(storage, monkeypatch, dies_after):
    class Died(BaseException):
        pass

    original = getattr(type(storage), dies_after)

    def die(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), dies_after, die)
        if dies_after == "create_new_trial":  # the cache around the storage calls this one
            inner = type(storage)._create_new_trial
            patch.setattr(type(storage), "_create_new_trial", lambda *a, **k: (inner(*a, **k), die_now())[0])

        def die_now():
            raise Died

        with pytest.raises(Died):
            open_study(storage, replace(STUDY, enqueue=BY_HAND))
    study = open_study(storage, replace(STUDY, enqueue=BY_HAND))
    assert study.study_name == "rsicap"
    assert [t.user_attrs[records.LABEL] for t in study.trials] == ["1", "2"]
    open_study(storage, replace(STUDY, enqueue=BY_HAND))
    assert len(study.trials) == 2


def test_fingerprints_and_strategy_are_held(storage):
    study = open_study(storage, STUDY)
    check_fingerprints(study, data="d1", model="m1")
    check_fingerprints(reopen(storage), data="d1", model="m1")
    with pytest.raises(DefinitionChanged, match="data: d1 -> d2"):
        check_fingerprints(study, data="d2", model="m1")
    check_strategy(study, "joint")
    with pytest.raises(DefinitionChanged, match="strategy: joint -> rungs"):
        check_strategy(study, "rungs")
