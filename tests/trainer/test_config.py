"""TrainConfig: everything wrong in one message; settings as text; identity."""

from __future__ import annotations

import pytest

from trainer.common.errors import ConfigError, UserError
from trainer.config import (
    LATER,
    MACHINE_FIELDS,
    OTHER_NAMES,
    RETIRED,
    TrainConfig,
    identity_of,
    read_settings,
    without_retired,
)


def test_all_errors_come_in_one_message() -> None:
    wrong = {
        "learning_rat": 1e-4,
        "batch_size": 4,
        "micro_batch_size": 8,
        "num_epochs": 0,
        "lora_dropout": 1.0,
        "learning_rate": float("nan"),
        "torch_dtype": "float64",
        "target_modules": ("query", "query"),
        "device": "gpu",
        "data": "",
        "seed": 2**32,
        "zzz": 1,
    }
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(wrong)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the configuration has 11 errors:"
    assert len(lines) == 12
    text = str(caught.value)
    for part in (
        "TrainConfig has no 'learning_rat'; did you mean 'learning_rate'?",
        "micro_batch_size: must not be larger than batch_size=4, but got micro_batch_size=8",
        "num_epochs: input should be greater than or equal to 1, but got num_epochs=0",
        "lora_dropout: ",
        "learning_rate: input should be a finite number",
        "'float32', 'float16' or 'bfloat16', but got torch_dtype='float64'",
        "target_modules: names a module twice, but got target_modules=('query', 'query')",
        "device: ",
        "data: ",
        "seed: ",
        "TrainConfig has no 'zzz'\n",
    ):
        assert part in text + "\n"
    assert isinstance(caught.value, UserError)


def test_one_error_is_called_one() -> None:
    with pytest.raises(ConfigError, match=r"^the configuration has one error:\n  - TrainConfig has no 'lora_rank'"):
        TrainConfig.parse({"lora_rank": 4})


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lr", "learning_rate"),
        ("rank", "lora_r"),
        ("epochs", "num_epochs"),
        ("bs", "batch_size"),
        ("num-train-epochs", "num_epochs"),
        ("LR", "learning_rate"),
        ("lora_alpa", "lora_alpha"),
    ],
)
def test_what_others_call_a_field(name: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"has no '{name}'; did you mean '{field}'"):
        TrainConfig.parse({name: 1})


def test_other_names_are_of_fields_and_none_is_a_field() -> None:
    assert set(OTHER_NAMES.values()) <= set(TrainConfig.model_fields)
    assert not set(OTHER_NAMES) & {*TrainConfig.model_fields, *RETIRED}


def test_settings_become_values() -> None:
    config = TrainConfig.parse_settings(
        [
            "learning_rate=2e-4",
            "lora_r = 16",
            "skip_bad_rows=true",
            "target_modules=query, value",
            "max_samples=none",
            "micro_batch_size=null",
            "data=a=b",
        ],
        base={"max_samples": 20, "lora_r": 4},
    )
    assert config.learning_rate == 2e-4
    assert config.lora_r == 16
    assert config.skip_bad_rows is True
    assert config.target_modules == ("query", "value")
    assert config.max_samples is None
    assert config.micro_batch_size is None
    assert config.data == "a=b"


def test_form_and_values_of_settings_are_wrong_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse_settings(["lora_r", "=3", "seed=1", "seed=2", "lora_q=3", "batch_size=x", "num_epochs=none"])
    text = str(caught.value)
    assert text.startswith("the configuration has 6 errors:")
    for part in ("'lora_r' is not of the form key=value", "'=3'", "'seed' is set twice", "no 'lora_q'; did you mean"):
        assert part in text
    assert "batch_size='x'" in text
    assert "num_epochs='none'" in text


def test_read_settings_judges_the_form_alone() -> None:
    assert read_settings(["whatever=1"]) == {"whatever": "1"}
    with pytest.raises(ConfigError, match="not of the form"):
        read_settings(["whatever"])


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().learning_rate = 1.0  # type: ignore[misc]


OTHER = {
    "model": "other",
    "data": "other",
    "max_samples": 9,
    "skip_bad_rows": True,
    "cache_features": False,
    "micro_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "target_modules": ("query",),
    "torch_dtype": "float16",
    "base_dtype": "bfloat16",
    "matmul_precision": "high",
    "device_map": "auto",
    "gradient_checkpointing": "always",
    "deterministic": False,
    "device": "cpu",
    "val_fraction": 0.3,
    "lora_dropout": 0.2,
    "adam_epsilon": 1e-7,
    "split": "random",
}


@pytest.mark.parametrize("name", list(TrainConfig.model_fields))
def test_identity_ignores_machine_fields_alone(name: str) -> None:
    value = OTHER.get(name)
    if value is None:
        value = getattr(TrainConfig(), name) + 1
    changed = TrainConfig.parse({name: value})
    assert changed != TrainConfig()
    assert (changed.identity() == TrainConfig().identity()) == (name in MACHINE_FIELDS)


def test_fields_that_came_later_leave_older_identities_as_they_were() -> None:
    """The identity of the defaults at the version before `split`."""
    before = {name: value for name, value in TrainConfig().model_dump(mode="json").items() if name not in LATER}
    assert identity_of(before) == TrainConfig().identity() == "8c046c8afa652d4f"


def test_identity_is_the_same_however_a_value_is_written() -> None:
    assert (
        TrainConfig.parse({"lora_alpha": 16}).identity() == TrainConfig.parse_settings(["lora_alpha=16.0"]).identity()
    )


def test_what_belongs_to_a_study_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse_settings(["patience=5", "min_delta=0.1", "patiense=3", "lora_q=3"])
    text = str(caught.value)
    assert text.startswith("the configuration has 4 errors:")
    for name in RETIRED:
        assert (
            f"  - {name} is not a field of a training run but of a study: write Study({name}=...) in the study file, "
            f"or --set {name}=... for search.run\n" in text + "\n"
        )
    assert "no 'patiense'; did you mean" not in text  # nothing near it is a field of a training run
    assert "no 'lora_q'; did you mean" in text


def test_what_an_older_version_recorded_is_read_and_is_the_same_run() -> None:
    config = TrainConfig(learning_rate=3e-4, target_modules=("query",))
    recorded = {**config.model_dump(mode="json"), "patience": 5, "min_delta": 0.01}
    assert TrainConfig.parse(without_retired(recorded)) == config
    assert identity_of(recorded) == config.identity()
    assert identity_of({**recorded, "learning_rate": 1e-4}) != config.identity()
