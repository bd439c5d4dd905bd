"""Our forward equals the library's; adapters have the size of the closed formula; PEFT loads what we save."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests.support import peft_reference
from tests.support.tiny import IMAGE_TOKEN, QUERIES, tiny_batch, tiny_model
from trainer.common.errors import ModelError
from trainer.config import TrainConfig
from trainer.model import peft_format, updates
from trainer.model.base import encode_images, forward, label_logits, load_base
from trainer.model.batch import IGNORE, Batch, layout_of
from trainer.model.forward import query_images
from trainer.model.fused import RMSNorm, TanhGELU, _Normed, fuse
from trainer.model.lora import Adapter, Hooks, Segment, _dropout_mask

KINDS = ("t5", "llama")


def library_forward(model: Any, batch: Batch, kind: str) -> Any:
    """The library's own forward on the same batch, image tokens written out as its processor does."""
    size = len(batch)
    image_ids = torch.full((size, QUERIES), IMAGE_TOKEN)
    ones = torch.ones(size, QUERIES, dtype=torch.long)
    labels = batch.labels
    if kind == "llama":
        labels = torch.cat([torch.full((size, QUERIES), IGNORE), labels], dim=1)
    return model(
        pixel_values=batch.pixel_values,
        qformer_input_ids=batch.qformer_ids,
        qformer_attention_mask=batch.qformer_mask,
        input_ids=torch.cat([image_ids, batch.text_ids], dim=1),
        attention_mask=torch.cat([ones, batch.text_mask], dim=1),
        labels=labels,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_library(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    theirs = library_forward(model, batch, kind)
    fuse(model)
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == {"t5": 12, "llama": 5}[kind]
    ours = forward(model, batch)
    assert ours.loss_sum / batch.num_tokens() == pytest.approx(float(theirs.loss), abs=1e-5)
    layout = layout_of(model.config, batch)
    logits, labels = label_logits(model, ours.query_output.flatten(0, 1), layout), layout.label_ids
    if kind == "t5":
        expected = theirs.logits[batch.labels != IGNORE]
    else:
        shifted = torch.cat([batch.labels[:, 1:], torch.full((len(batch), 1), IGNORE)], dim=1)
        expected = theirs.logits[:, QUERIES:][shifted != IGNORE]
        assert torch.equal(labels, shifted[shifted != IGNORE])
    # float32, summed in another order: on some processors 1.3e-5 of a logit of 2.4.
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_norms_derivative() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: _Normed.apply(x, weight, 1e-3), x)
    expected = torch.nn.functional.rms_norm(x, (5,), weight, 1e-3)
    torch.testing.assert_close(_Normed.apply(x, weight, 1e-3), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_other_dtypes_stay_the_librarys(dtype: torch.dtype) -> None:
    theirs = T5LayerNorm(5).to(dtype).requires_grad_(False)
    x = torch.randn(3, 5, dtype=dtype)
    assert torch.equal(RMSNorm(theirs)(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_library(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    with peft_reference.attached(model, TrainConfig(lora_dropout=0.0)) as (peft_model, _):
        parameters = peft_reference.parameters(peft_model)
        with torch.no_grad():
            for p in parameters.values():
                p.normal_(std=0.1)
        library_forward(model, batch, kind).loss.backward()
        theirs = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        for p in parameters.values():
            p.grad = None
        fuse(model)
        (forward(model, batch).loss_sum / batch.num_tokens()).backward()
        assert theirs
        for name, grad in theirs.items():
            ours = parameters[name].grad
            if ours is None:  # what nobody reads is not computed: the text feed-forward of the last Q-Former layer
                assert ".layer.1.intermediate." in name or ".layer.1.output." in name
                assert not grad.any()
            else:
                torch.testing.assert_close(ours, grad, atol=1e-5, rtol=1e-4)


def query_output(model: Any, embeds: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The library's query output."""
    size = len(batch)
    mask = torch.cat([torch.ones(size, QUERIES, dtype=torch.long), batch.qformer_mask], dim=1)
    return model.qformer(
        input_ids=batch.qformer_ids,
        attention_mask=mask,
        query_embeds=model.query_tokens.expand(size, -1, -1),
        encoder_hidden_states=embeds,
    ).last_hidden_state[:, :QUERIES]


@pytest.mark.parametrize("frequency", [1, 2])
def test_the_last_layer_without_its_text_positions(frequency: int) -> None:
    """With cross-attention in the last layer, and without."""
    model, batch = tiny_model("t5", cross_attention_frequency=frequency), tiny_batch("t5")
    assert model.qformer.encoder.layer[-1].has_cross_attention == (frequency == 1)
    assert batch.pixel_values is not None
    embeds = encode_images(model, batch.pixel_values)
    rows: list[int] = []
    model.qformer.encoder.layer[-1].attention.output.register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    found = query_images(model, embeds, layout_of(model.config, batch))
    assert rows == [len(batch) * QUERIES]
    expected = query_output(model, embeds, batch)
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gelu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-8, 8, 101), torch.tensor([1e4, -1e4, 1e15, -1e15])]).to(dtype).requires_grad_()
    grad = torch.randn(len(x), dtype=dtype)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    found = TanhGELU()(x)
    (found_grad,) = torch.autograd.grad(found, x, grad)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(found_grad, expected_grad, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_matters(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    seen = forward(model, batch).loss_sum
    batch.pixel_values = torch.zeros_like(batch.pixel_values)
    assert not torch.equal(seen, forward(model, batch).loss_sum)


@pytest.mark.parametrize("kind", KINDS)
def test_known_image_embeddings_give_the_same(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    assert batch.pixel_values is not None
    embeds = encode_images(model, batch.pixel_values)
    known = replace(batch, pixel_values=None, image_embeds=embeds)
    assert torch.equal(forward(model, batch).loss_sum, forward(model, known).loss_sum)
    assert forward(model, known).query_output.shape == (3, QUERIES, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    whole = forward(model, batch).loss_sum
    alone = sum(float(forward(model, micro).loss_sum) for micro in batch.micro(1))
    assert float(whole) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [4, 7])
def test_adapter_size_is_the_closed_formula(kind: str, r: int) -> None:
    model = tiny_model(kind)
    names = peft_format.resolve_targets(model, ("query", "key", "value", "dense"))
    # Two layers; self-attention in both, cross-attention in the first (frequency 2), each query, key, value and
    # output.dense; and two feed-forwards (query and text) of two dense modules each.
    assert len(names) == (2 + 1) * 4 + 2 * 2 * 2
    assert all(name.startswith("qformer.") for name in names)
    expected = peft_reference.lora_parameters(model, names, r)
    with peft_reference.attached(model, TrainConfig(lora_r=r, lora_alpha=2 * r)) as (peft_model, modules):
        assert modules == names
        assert sum(p.numel() for p in peft_reference.parameters(peft_model).values()) == expected


def test_the_real_model_has_120_modules() -> None:
    """InstructBLIP-FlanT5-XL's Q-Former: 12 layers, cross-attention in every second."""
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    with torch.device("meta"):
        qformer = InstructBlipQFormerModel(InstructBlipQFormerConfig())
    assert len(peft_format.resolve_targets(qformer, TrainConfig().target_modules)) == 120


def test_language_model_modules_on_request() -> None:
    for kind, names in (("t5", ("q", "v")), ("llama", ("q_proj", "v_proj"))):
        found = peft_format.resolve_targets(tiny_model(kind), names)
        assert found and all(name.startswith("language_model.") for name in found)


def test_a_fresh_adapter_changes_nothing_and_leaves_no_trace() -> None:
    model, batch = tiny_model("t5"), tiny_batch("t5")
    before = forward(model, batch).loss_sum
    keys = set(model.state_dict())
    for _ in range(3):
        with peft_reference.attached(model, TrainConfig()) as (peft_model, _modules):
            peft_model.eval()
            torch.testing.assert_close(forward(model, batch).loss_sum, before)
            assert all("lora_" in name for name in peft_reference.parameters(peft_model))
        assert set(model.state_dict()) == keys
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(forward(model, batch).loss_sum, before)


EVERYWHERE = {
    "q-former": ("t5", ("query", "value", "dense")),
    "vision tower": ("t5", ("qkv", "fc1")),
    "head": ("t5", ("lm_head",)),
    "t5": ("t5", ("q", "k", "wo", "query")),
    "llama": ("llama", ("q_proj", "down_proj", "lm_head", "language_projection")),
}


@pytest.mark.parametrize("where", EVERYWHERE)
def test_gradients_equal_pefts_wherever_adapters_sit(where: str) -> None:
    kind, targets = EVERYWHERE[where]
    model, batch = tiny_model(kind, torch.float64), tiny_batch(kind)
    assert batch.pixel_values is not None
    batch = replace(batch, pixel_values=batch.pixel_values.double())
    config = TrainConfig(target_modules=targets, lora_r=3, lora_dropout=0.0)
    fuse(model)
    adapter, hooks = Adapter(model, config), Hooks(model)
    adapter.weights.normal_(std=0.2)
    hooks.cover(adapter.modules)
    hooks.segments = [Segment(adapter, 0, len(batch), 0, batch.num_tokens())]
    ours = forward(model, batch).loss_sum
    ours.backward()
    hooks.remove()
    found = adapter.named()
    with peft_reference.attached(model, config) as (peft_model, _):
        parameters = peft_reference.parameters(peft_model)
        assert list(parameters) == list(found)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(found[name].weight)
        theirs = forward(model, batch).loss_sum
        theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for name, parameter in parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name].grad, expected, rtol=1e-9, atol=1e-12)
    assert any(each.grad.any() for each in found.values())


@pytest.mark.parametrize("hooked_by_accelerate", [False, True])
def test_an_adapted_module_with_dropout_in_company_and_not(hooked_by_accelerate: bool) -> None:
    """By autograd, with the masks that are drawn: output, the input's gradient and the adapter's."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny_model("t5", torch.float64)
    name = "qformer.encoder.layer.0.attention.attention.query"
    module = model.get_submodule(name)
    if hooked_by_accelerate:
        add_hook_to_module(module, ModelHook())
    adapter = Adapter(model, TrainConfig(target_modules=("query",), lora_r=3, lora_alpha=5, lora_dropout=0.4))
    other = Adapter(model, TrainConfig(target_modules=("value",)))
    adapter.weights.normal_(std=0.3)
    hooks = Hooks(model)
    hooks.cover([*adapter.modules, *other.modules])
    own, others = Segment(adapter, 1, 4, 5, 9), Segment(other, 0, 1, 0, 5)
    hooks.segments, hooks.training = (others, own), True
    torch.manual_seed(1)
    x = torch.randn(6, 4, 16, dtype=torch.float64).transpose(0, 1).requires_grad_()
    adapter.generator.manual_seed(3)
    mask = _dropout_mask(adapter, x[1:4].reshape(-1, 16)).view(3, 6, 16)
    adapter.generator.manual_seed(3)
    y = module(x)
    above = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, above, retain_graph=True)
    adapter.grads.zero_()
    y.backward(above)
    named = adapter.named()
    a, b = (
        named[f"base_model.model.{name}.lora_{part}.default.weight"].weight.clone().requires_grad_() for part in "AB"
    )
    low = (x[1:] * mask) @ a.t() @ b.t() * (5 / 3)
    expected = torch.nn.functional.linear(x, module.weight, module.bias) + torch.cat([torch.zeros_like(y[:1]), low])
    torch.testing.assert_close(y, expected)
    grad_x, grad_a, grad_b = torch.autograd.grad(expected, (x, a, b), above)
    torch.testing.assert_close(found, grad_x)
    torch.testing.assert_close(named[f"base_model.model.{name}.lora_A.default.weight"].grad, grad_a)
    torch.testing.assert_close(named[f"base_model.model.{name}.lora_B.default.weight"].grad, grad_b)
    hooks.remove()
    assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))


def test_moments_are_kept_in_pefts_order() -> None:
    """A checkpoint must not depend on how B lies in memory."""
    adapter = Adapter(tiny_model("t5"), TrainConfig(lora_r=3))
    adapter.grads.normal_()
    updates.update([adapter], [1e-2], torch.ones(1, 3))
    kept = {key: value.clone() for key, value in adapter.optimizer_tensors().items()}
    moments = [each.exp_avg for each in adapter.named().values()]
    assert torch.equal(kept["exp_avg"], torch.cat([m.contiguous().view(-1) for m in moments if m is not None]))
    again = Adapter(tiny_model("t5"), TrainConfig(lora_r=3))
    again.restore_optimizer(kept)
    for one, other in zip(adapter.named().values(), again.named().values(), strict=True):
        assert one.exp_avg is not None and other.exp_avg is not None and torch.equal(one.exp_avg, other.exp_avg)


def test_saved_adapters_load_with_peft(tmp_path: Path) -> None:
    model, batch = tiny_model("t5"), tiny_batch("t5")
    config = TrainConfig(lora_r=3, lora_alpha=5)
    adapter, hooks = Adapter(model, config), Hooks(model)
    adapter.weights.normal_(std=0.2)
    hooks.cover(adapter.modules)
    hooks.segments = [Segment(adapter, 0, len(batch), 0, batch.num_tokens())]
    with torch.no_grad():
        trained = forward(model, batch).loss_sum
    hooks.remove()
    adapter.save(tmp_path / "adapter", "base")
    loaded = PeftModel.from_pretrained(tiny_model("t5"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(forward(loaded.get_base_model(), batch).loss_sum, trained)
    assert abs(float(forward(model, batch).loss_sum) - float(trained)) > 1e-3
    again = Adapter(model, TrainConfig(lora_r=3, lora_alpha=5, seed=7))
    assert not torch.equal(again.weights, adapter.weights)
    again.load(tmp_path / "adapter")
    assert torch.equal(again.weights, adapter.weights)
    with pytest.raises(ModelError, match="the adapter does not fit"):
        Adapter(model, TrainConfig(target_modules=("query",))).load(tmp_path / "adapter")


def test_unknown_target_modules_are_named() -> None:
    with pytest.raises(ModelError, match="'querry'; did you mean 'query'"):
        peft_format.resolve_targets(tiny_model("t5"), ("querry", "value"))


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ModelError, match="does not exist"):
        load_base(str(tmp_path / "nothing"), **options)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_base(str(tmp_path), **options)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="is a 'bert', but an 'instructblip' is needed"):
        load_base(str(tmp_path), **options)
