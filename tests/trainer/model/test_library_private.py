"""Libraries still have the names that they don't promise; one that went missing is named."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from tests.support.tiny import tiny_model
from trainer.model import library_private

TRAINER = Path(library_private.__file__).parents[1]
PRIVATE = r"\b(?!self\b|cls\b|ctx\b)\w+\._[a-z]|\)\._[a-z]|import _[a-z]|\"_(hf_hook|old_forward)\""
"""An attribute with an underscore of anything but oneself, an import of one, and Accelerate's in quotes."""


def test_softmax_backward() -> None:
    assert hasattr(torch, "_softmax_backward_data"), "PyTorch has no torch._softmax_backward_data any more"
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    shares = torch.softmax(scores, -1)
    above = torch.randn_like(shares)
    (expected,) = torch.autograd.grad(shares, scores, above)
    torch.testing.assert_close(library_private.softmax_backward(above, shares.detach(), -1, scores.dtype), expected)


def test_accelerates_attributes() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = torch.nn.Linear(2, 2)
    assert library_private.forward_attribute(module) == "forward"
    own = module.forward
    add_hook_to_module(module, ModelHook())
    for name in (library_private.ACCELERATE_HOOK, library_private.ACCELERATE_FORWARD):
        assert hasattr(module, name), f"Accelerate sets no {name} on a module any more"
    assert getattr(module, library_private.forward_attribute(module)) == own
    x = torch.randn(1, 2)
    setattr(module, library_private.ACCELERATE_FORWARD, lambda x: x + 1)
    assert torch.equal(module(x), x + 1), "Accelerate's forward calls another than _old_forward"


def test_attention_kernels() -> None:
    config = tiny_model("t5").vision_model.config
    assert hasattr(config, "_attn_implementation"), "Transformers has no config._attn_implementation any more"
    assert library_private.attention_kernels(config) in ("sdpa", "eager")


def test_foreach_and_the_fused_adamw() -> None:
    """tests/trainer/model/test_updates.py compares what they compute."""
    for name in ("_foreach_norm", "_foreach_zero_", "_foreach_add_", "_foreach_sub_", "_fused_adamw_"):
        assert hasattr(torch, name), f"PyTorch has no torch.{name} any more"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers.activations", "NewGELUActivation"),  # replaced in fused.py, as are the two norms
        ("transformers.models.t5.modeling_t5", "T5LayerNorm"),
        ("transformers.models.llama.modeling_llama", "LlamaRMSNorm"),
        ("transformers.trainer_pt_utils", "get_length_grouped_indices"),  # group_by_length
        ("transformers.utils", "cached_file"),  # fingerprint of a checkpoint from the hub
    ],
)
def test_names_without_an_underscore_that_are_not_documented(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), f"{module} has no {name} any more"


def test_no_other_module_of_the_trainer_uses_a_private_name() -> None:
    found = []
    for file in sorted(TRAINER.rglob("*.py")):
        if file.name == "library_private.py":
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            # `os._exit` is documented, underscore and all.
            if re.search(PRIVATE, line.replace("yield from self._", "").replace("os._exit", "")):
                found.append(f"{file.relative_to(TRAINER)}:{number}: {line.strip()}")
    assert not found, "move these to trainer/model/library_private.py:\n" + "\n".join(found)
