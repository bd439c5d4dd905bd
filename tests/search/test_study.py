"""Study definitions and search spaces: what is refused and in which words, and what a definition holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search import study_file as studies
from search.errors import StudyError
from search.planning.laddered import Laddered
from search.planning.prior import Prior
from search.sampling.make import default_strategy, make_sampler
from search.space import Choice, Float, Int, Multiple, Param, contains, param_name, to_config, to_params
from search.study import Fixed, Study, fixed_trial
from trainer.common.errors import ConfigError

SPACE: dict[str, Param] = {
    "learning_rate": Float(5e-6, 1e-3, log=True),
    "lora_r": Int(4, 32, log=True),
    "lora_alpha": Multiple("lora_r", (1, 2, 4)),
}


def make(**changes: Any) -> Study:
    return Study(**{"name": "s", "description": "", "space": SPACE, "n_trials": 3, **changes})


def test_every_study_file_loads() -> None:
    names = studies.available()
    assert {"rsicap", "rsicap_mini", "lora_grid", "lora_grid_mini"} <= set(names)
    for name in names:
        study = studies.load(name)
        assert study.name == name
        assert study.description and "\n" not in study.description
        study.definition()


def test_hyphens_and_paths(tmp_path: Path) -> None:
    assert studies.load("rsicap-mini").name == "rsicap_mini"
    file = tmp_path / "mine.py"
    file.write_text(
        "from search.study import Study\nfrom search.space import Float\n"
        "STUDY = Study(name='mine', description='d', space={'lora_dropout': Float(0, 0.2)}, n_trials=2)\n"
    )
    assert studies.load(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("STUDY = 3\n", "STUDY is 3"),
        ("x = 1\n", "STUDY is None"),
        ("x = (\n", "SyntaxError"),
        ("\nx = 1 / 0\n", "line 2: ZeroDivisionError"),
        ("import nothing_of_that_name\n", "ModuleNotFoundError"),
    ],
)
def test_broken_study_files(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(content)
    with pytest.raises(StudyError) as error:
        studies.load(str(file))
    assert said in str(error.value) and "broken.py" in str(error.value)


def test_unknown_study_names_the_nearest() -> None:
    with pytest.raises(StudyError, match=r"did you mean 'rsicap_mini'\?; known studies: .*rsicap"):
        studies.load("rsicap_mimi")


def test_all_mistakes_in_one_message() -> None:
    with pytest.raises(StudyError) as error:
        make(name="a b", space={**SPACE, "lora_rank": Int(1, 2)}, n_trials=0, base={"batch": 2})
    text = str(error.value)
    for part in ("'a b'", "n_trials must be at least 1", "'lora_rank'", "did you mean 'lora_r'?", "'batch'"):
        assert part in text


def test_impossible_ranges_are_refused() -> None:
    with pytest.raises(StudyError, match="lora_r: input should be greater than or equal to 1"):
        make(space={"lora_r": Int(0, 4)})
    with pytest.raises(StudyError, match="'lora_rank', which TrainConfig does not have"):
        make(space={"lora_alpha": Multiple("lora_rank", (2,))})
    with pytest.raises(ValueError, match="low must not be above high"):
        Float(2, 1)
    with pytest.raises(ValueError, match="a log scale needs low > 0"):
        Float(0, 1, log=True)
    with pytest.raises(ValueError, match="twice"):
        Choice((1, 1))
    with pytest.raises(ValueError, match="positive factors"):
        Multiple("lora_r", (0,))


def test_params_and_config_are_inverse() -> None:
    params = {"learning_rate": 1e-4, "lora_r": 7, "lora_alpha_per_lora_r": 4}
    values = to_config(SPACE, {}, params)
    assert values == {"learning_rate": 1e-4, "lora_r": 7, "lora_alpha": 28}
    assert to_params(SPACE, values) == params
    assert param_name("lora_alpha", SPACE["lora_alpha"]) == "lora_alpha_per_lora_r"
    assert not contains(SPACE["lora_r"], 33)


def test_settings_fix_what_was_searched() -> None:
    study = make().with_settings(["lora_r=8", "num_epochs=2"], seed=5)
    assert list(study.space) == ["learning_rate", "lora_alpha"]
    assert study.seed == 5
    config = study.config({"learning_rate": 1e-4, "lora_alpha_per_lora_r": 2})
    assert (config.lora_r, config.lora_alpha, config.num_epochs) == (8, 16, 2)


@pytest.mark.parametrize(("setting", "alpha"), [("lora_r=32", 64), ("lora_r=6", 12), ("batch_size=2", 16)])
def test_a_trial_given_by_hand_keeps_its_ratio(setting: str, alpha: int) -> None:
    """Of `rsicap`: with an alpha of 16 for another rank its own trial was out of range, and the search was refused."""
    (given,) = studies.load("rsicap").with_settings([setting]).enqueue
    assert given.config["lora_alpha"] == alpha
    (own,) = studies.load("rsicap").with_settings([setting, "lora_alpha=8"]).enqueue
    assert own.config["lora_alpha"] == 8


def test_multiples_of_multiples_are_resolved_in_their_order() -> None:
    batch = Choice((2, 4))
    space = {"lora_alpha": Multiple("lora_r", (2,)), "lora_r": Multiple("batch_size", (1, 4)), "batch_size": batch}
    params = {"lora_alpha_per_lora_r": 2, "lora_r_per_batch_size": 4, "batch_size": 4}
    base = {"lora_alpha": 1, "lora_r": 1, "batch_size": 1}
    assert to_config(space, base, params) == {"lora_alpha": 32, "lora_r": 16, "batch_size": 4}
    given: dict[str, Any] = {"lora_alpha": 16, "lora_r": 8, "batch_size": 2}
    study = make(space=space, enqueue=(Fixed(label="whole", config=given),))
    assert fixed_trial(study, study.enqueue[0])[0] == {**params, "batch_size": 2}
    with pytest.raises(StudyError, match="lora_r=8 lies outside its search range"):
        make(space=space, enqueue=(Fixed(label="part", config={"lora_alpha": 16}),))


@pytest.mark.parametrize("field", ["max_samples", "split_seed", "val_fraction", "max_target_length"])
def test_what_decides_who_validates_is_not_searched(field: str) -> None:
    with pytest.raises(StudyError, match=f"search space of {field}: trials would be validated on different samples"):
        make(space={field: Int(20, 40) if field != "val_fraction" else Float(0.1, 0.3)})


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        ({"batch_size": Choice((8, 16)), "micro_batch_size": Choice((None, 8))}, None),
        ({"batch_size": Choice((4, 16)), "micro_batch_size": Choice((None, 8))}, "micro_batch_size can be 8"),
        ({"batch_size": Choice((8, 16)), "micro_batch_size": Multiple("batch_size", (0.5, 1))}, None),
        ({"batch_size": Choice((8, 16)), "micro_batch_size": Multiple("batch_size", (1, 2))}, "can be 2 times"),
        ({"torch_dtype": Choice(("float32", "bfloat16"))}, None),
        ({"base_dtype": Choice((None, "bfloat16"))}, None),
        (
            {"torch_dtype": Choice(("float32", "bfloat16")), "base_dtype": Choice((None, "bfloat16"))},
            "base_dtype can be bfloat16 where torch_dtype is bfloat16",
        ),
    ],
)
def test_fields_that_limit_each_other_are_judged_together(space: dict[str, Param], problem: str | None) -> None:
    if problem is None:
        study = make(space={"learning_rate": Float(1e-5, 1e-3, log=True), **space})
        propose = make_sampler(study, default_strategy(study))
        assert propose is not None
        Laddered(study, Prior()).propose([])
    else:
        with pytest.raises(StudyError, match=problem):
            make(space=space)


def test_a_trial_given_by_hand_is_on_the_data_of_the_settings() -> None:
    """As all others are: with data or samples of its own it could not be compared with them."""
    fixed = Fixed(label="given", config={"learning_rate": 1e-4, "num_epochs": 3})
    study = make(enqueue=(fixed,)).with_settings(["data=/elsewhere", "max_samples=60", "num_epochs=2", "lora_r=8"])
    assert study.enqueue[0].config == {"learning_rate": 1e-4, "num_epochs": 2}
    params, overrides = fixed_trial(study, study.enqueue[0])
    assert not {"data", "max_samples", "model"} & set(overrides)
    config = study.config(params, overrides)
    assert (config.data, config.max_samples, config.num_epochs, config.lora_r) == ("/elsewhere", 60, 2, 8)


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"'lora_rnk'; did you mean 'lora_r'\?"):
        make().with_settings(["lora_rnk=8"])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        make().with_settings(["lora_r"])


def test_when_trials_stop_is_a_setting_of_the_study() -> None:
    study = make().with_settings(["patience=5", "min_delta=0.01", "num_epochs=2"])
    assert study.stop_rule() == {"patience": 5, "min_delta": 0.01}
    assert study.base == {"num_epochs": 2}
    assert list(study.space) == list(SPACE)
    assert study.definition() == make(base={"num_epochs": 2}).definition(), "another patience is no other study"
    with pytest.raises(ConfigError) as error:
        make().with_settings(["patience=0", "min_delta=nan", "patiense=3", "lora_rnk=8"])
    text = str(error.value)
    assert text.startswith("the configuration has 4 errors:")
    for part in (
        "patience: input should be greater than or equal to 1, but got patience='0'",
        "min_delta: input should be a finite number, but got min_delta='nan'",
        "TrainConfig has no 'patiense'; did you mean 'patience'?",
        "did you mean 'lora_r'?",
    ):
        assert part in text


@pytest.mark.parametrize("name", ["patience", "min_delta"])
def test_when_trials_stop_is_no_part_of_their_configuration(name: str) -> None:
    place = f"write Study\\({name}=\\.\\.\\.\\)"
    refused = f".*\n.*{name} is not a field of a training run .*{place}"
    with pytest.raises(StudyError, match=f"base: {refused}"):
        make(base={name: 5})
    with pytest.raises(StudyError, match=f"given by hand 'a': {refused}"):
        make(enqueue=(Fixed(label="a", config={name: 5}),))
    with pytest.raises(StudyError, match=f"{name} cannot be searched, since it does not change training: {place}"):
        make(space={**SPACE, name: Choice((3, 5))})


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(StudyError) as error:
        make(patience=0, min_delta=-0.1)
    assert "patience must be at least 1, but got 0" in str(error.value)
    assert "min_delta must be finite and not negative, but got -0.1" in str(error.value)
    with pytest.raises(StudyError) as error:
        make(patience=2.5, min_delta="0.1")
    assert "patience must be a whole number, but got 2.5" in str(error.value)
    assert "min_delta must be a number, but got '0.1'" in str(error.value)
    for value in (float("nan"), float("inf"), 10**400):
        with pytest.raises(StudyError, match="min_delta must be finite"):
            make(min_delta=value)


def test_a_trial_that_an_older_version_queued_can_be_run() -> None:
    config = make().config({"learning_rate": 1e-4}, {"torch_dtype": "float16", "patience": 5, "min_delta": 0.1})
    assert (config.learning_rate, config.torch_dtype) == (1e-4, "float16")


def test_fixed_trials_keep_what_lies_outside_the_space() -> None:
    fixed = Fixed(label="1", config={"learning_rate": 5e-6, "lora_r": 4, "lora_alpha": 8, "torch_dtype": "float16"})
    params, overrides = fixed_trial(make(enqueue=(fixed,)), fixed)
    assert params == {"learning_rate": 5e-6, "lora_r": 4, "lora_alpha_per_lora_r": 2}
    assert overrides == {"torch_dtype": "float16"}
    config = make().config(params, overrides)
    assert (config.learning_rate, config.lora_alpha, config.torch_dtype) == (5e-6, 8, "float16")


def test_fixed_trials_outside_their_range_are_refused() -> None:
    with pytest.raises(StudyError, match=r"given by hand 'wild': learning_rate=0\.5 lies outside its search range"):
        make(enqueue=(Fixed(label="wild", config={"learning_rate": 0.5}),))


def test_the_environment_names_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSICAP_ROOT", "/somewhere")
    study = studies.load("rsicap")
    assert study.base["data"] == "/somewhere"
    assert study.with_settings(["data=/elsewhere"]).base["data"] == "/elsewhere"


def test_a_definition_holds_what_decides_the_result() -> None:
    definition = make().definition()
    assert definition != make(base={"num_epochs": 3}).definition()
    assert definition != make(seed=1).definition()
    assert definition != make(space={**SPACE, "lora_r": Int(4, 16)}).definition()
    # Where the data lies and how many workers load it does not.
    assert definition == make(base={"data": "/x", "num_workers": 4, "device": "cpu"}).definition()
    assert definition == make(n_trials=30).definition()


def test_a_screened_study_trains_its_trials_in_a_faster_precision() -> None:
    plain, screened = make(), make(screen="bfloat16")
    params = {"learning_rate": 1e-4, "lora_r": 8, "lora_alpha / lora_r": 2}
    assert screened.config(params).base_dtype == "bfloat16" and plain.config(params).base_dtype is None
    assert screened.unscreened() == {"base_dtype": None} and plain.unscreened() == {}
    repeated = screened.config(params, screened.unscreened())
    assert repeated == plain.config(params)
    assert screened.definition() != plain.definition()
    assert make().with_settings(["screen=TF32"]).config(params).matmul_precision == "high"
    assert screened.with_settings(["lora_r=8"]).screen == "bfloat16"
    assert screened.with_settings(["screen=none"]) == plain


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"screen": "bfloat"}, "screen must be one of TF32, bfloat16, but got 'bfloat'; did you mean 'bfloat16'?"),
        ({"screen": 3}, "screen must be one of TF32, bfloat16, but got 3"),
        ({"screen": "bfloat16", "base": {"base_dtype": "bfloat16"}}, "but base_dtype is set already"),
        ({"screen": "TF32", "base": {"torch_dtype": "float16"}}, "but torch_dtype is set already"),
        ({"screen": "TF32", "space": {"matmul_precision": Choice(("high", "highest"))}}, "matmul_precision is set"),
    ],
)
def test_a_screen_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError) as error:
        make(**changes)
    assert said in str(error.value)
