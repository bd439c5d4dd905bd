"""Search spaces: what is stored of one is what comes back, and values are those that the configuration reads."""

import json

import pytest

from search import preflight
from search.errors import StudyError
from search.space import Choice, Float, Int, Multiple, Param, from_dict, to_dict
from search.study import Study

SPACE = {
    "learning_rate": Float(5e-6, 1e-3, log=True),
    "batch_size": Int(2, 16),
    "torch_dtype": Choice(("float16", "float32", None)),
    "lora_alpha": Multiple("lora_r", (0.5, 1, 2)),
}


def test_a_space_comes_back_from_its_stored_form() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(SPACE)))) == SPACE


def test_the_stored_form_is_that_of_the_studies_on_disk() -> None:
    assert to_dict(SPACE)["learning_rate"] == {"type": "Float", "low": 5e-6, "high": 1e-3, "log": True}
    assert to_dict(SPACE)["lora_alpha"] == {"type": "Multiple", "of": "lora_r", "factors": [0.5, 1, 2]}


def test_choices_given_as_text_are_what_the_configuration_reads() -> None:
    space = {"num_workers": Choice(("4", 8)), "learning_rate": Choice(("1e-4", 1)), "model": Choice(("3", "mini"))}
    made = Study(name="texts", description="", space={**space, "cache_features": Choice(("false",))}, n_trials=1)
    assert {name: param.edges() for name, param in made.space.items() if isinstance(param, Choice)} == {
        "num_workers": (4, 8),
        "learning_rate": (1e-4, 1),
        "model": ("3", "mini"),
        "cache_features": (False,),
    }
    assert type(made.space["num_workers"].edges()[0]) is int
    with pytest.raises(StudyError, match=r"lora_r: Choice names a value twice: \(4, 4\)"):
        Study(name="texts", description="", space={"lora_r": Choice(("4", 4))}, n_trials=1)


@pytest.mark.parametrize(
    ("name", "choice", "largest"),
    [
        ("num_workers", Choice(("4", "2")), 4),  # once a crash: max() of nothing
        ("num_workers", Choice((4.0, 2.0)), 4),
        ("prefetch_factor", Choice((8, 2)), 8),
        ("batch_size", Int(2, 16), 16),
    ],
)
def test_the_largest_trial_is_found_however_its_values_are_given(name: str, choice: Param, largest: int) -> None:
    made = Study(name="texts", description="", space={name: choice}, n_trials=1)
    assert getattr(preflight._largest(made, made.base_config()), name) == largest
