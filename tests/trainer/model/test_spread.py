"""A base that is spread over two devices, without two GPUs: PyTorch's fake tensors have the shape, dtype and
device that an operation would give, and refuse operands on different devices. The second device is `meta`.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.tiny import tiny_batch, tiny_model
from trainer.config import TrainConfig
from trainer.model import attention, ragged
from trainer.model.base import forward, layout_of
from trainer.model.batch import Batch
from trainer.model.fused import fuse
from trainer.model.lora import Adapter, Hooks, Segment

FIRST, SECOND = torch.device("cpu"), torch.device("meta")


def on(value: Any, device: torch.device) -> Any:
    """The same on another device; of tensors, what fake ones have."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value


@pytest.mark.parametrize("how", ["fused", "written out", "written out, as on a GPU"])
@pytest.mark.parametrize("kind", ["t5", "llama", "llama-gqa"])
def test_a_pass_over_two_devices(kind: str, how: str) -> None:
    """Forward and backward, the Q-Former on one and most of the language model on the other; attention by PyTorch's
    kernels or, as on GPUs where the same bits are wanted twice, written out.
    """
    model, batch = tiny_model(kind), tiny_batch(kind)
    layout, tokens = layout_of(model.config, batch), batch.num_tokens()
    images = len(batch), 5, model.config.vision_config.hidden_size
    model.requires_grad_(False)
    blocks = [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith(("block", "layers"))]
    places: dict[str, torch.device] = {"": FIRST}
    places |= {f"language_model.{name}": SECOND for name, _ in model.language_model.named_children()}
    places |= {name: FIRST if name.endswith(".0") else SECOND for name in blocks}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(attention, "_written_out", lambda *_: how != "fused"),
        mock.patch.object(ragged, "ZEROS_GATHERED", ("cpu", "meta") if how.endswith("GPU") else ()),
        mock.patch("accelerate.hooks.set_module_tensor_to_device"),  # they are where they belong
    ):
        at = {}
        for name, module in model.named_modules():
            at[name] = places[max((p for p in places if name == p or not p or name.startswith(f"{p}.")), key=len)]
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, torch.nn.Parameter(on(parameter, at[name]), requires_grad=False))
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, on(buffer, at[name]))
        leaves = [name for name, module in model.named_modules() if not any(module.children())]
        attach_align_device_hook_on_blocks(model, execution_device={name: at[name] for name in leaves})
        fuse(model)
        adapter, hooks = Adapter(model, TrainConfig(lora_r=3, lora_dropout=0.0)), Hooks(model)
        hooks.cover(adapter.modules)
        hooks.segments = [Segment(adapter, 0, len(batch), 0, tokens)]
        moved: Batch = on(replace(batch, pixel_values=None), FIRST)
        out = forward(model, replace(moved, layout=on(layout, FIRST), image_embeds=torch.empty(images, device=FIRST)))
        assert out.token_losses.device == FIRST and out.query_output.device == FIRST
        out.loss_sum.backward()
