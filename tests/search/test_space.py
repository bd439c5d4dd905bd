"""Search spaces: what is stored of one is what comes back."""

import json

from search.space import Choice, Float, Int, Multiple, from_dict, to_dict

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
