"""Missing, unexpected and mis-shaped tensors are errors, by the headers and at loading; known renamings load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import InstructBlipConfig

from tests.support import checkpoints
from trainer.common.errors import ModelError
from trainer.mini import CHECKPOINT
from trainer.model import files, locate, weights
from trainer.model.base import load_base
from trainer.model.probe import Probe, Question

Tensors = dict[str, torch.Tensor]
CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not any(part in k for part in parts)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def with_more(**more: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{k.replace("__", "."): torch.ones(n) for k, n in more.items()}}


def cut(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors[name][:-1].contiguous()}


def both_errors(folder: Path) -> str:
    """What the headers say, which is what loading says."""
    config = InstructBlipConfig.from_pretrained(folder)
    with pytest.raises(ModelError) as early:
        weights.check_headers(str(folder), config, files.shapes(folder), untied=files.has_own_head(folder))
    with pytest.raises(ModelError) as late:
        load_base(str(folder), **CPU)
    assert str(early.value) == str(late.value)
    return str(early.value)


BROKEN: dict[str, tuple[str, Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "query tokens": ("t5", without("query_tokens"), ("1 tensor is missing: query_tokens",)),
    "a layer": ("llama", without("qformer.encoder.layer.1."), ("tensors are missing: qformer.encoder.layer.1.",)),
    "the head, untied": ("t5-untied", without("lm_head"), ("1 tensor is missing: language_model.lm_head.weight",)),
    "the embeddings, untied": ("t5-untied", without("shared"), ("1 tensor is missing: language_model.shared.weight",)),
    "the head of a Llama": ("llama", without("lm_head"), ("1 tensor is missing: language_model.lm_head.weight",)),
    "the embeddings of a tied head": ("t5", without("shared"), ("language_model.shared.weight",)),
    "all names prefixed": (
        "t5",
        lambda tensors: {f"model.{k}": v for k, v in tensors.items()},
        ("tensors are missing:", "tensors are not the model's:", "'model.' before their names"),
    ),
    "left over": ("t5", with_more(adapter__weight=3), ("1 tensor is not the model's: adapter.weight",)),
    "a shape": (
        "t5",
        cut("qformer.embeddings.word_embeddings.weight"),
        ("1 tensor is of another shape:", "(348, 32)"),
    ),
    "several": (
        "llama",
        lambda tensors: with_more(a=1, b=1)(without("query_tokens", "language_projection")(tensors)),
        ("3 tensors are missing: ", "2 tensors are not the model's: a, b"),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_weights_that_are_not_the_models_are_named(what: str, tmp_path: Path) -> None:
    kind, change, said = BROKEN[what]
    message = both_errors(checkpoints.edit_weights(checkpoints.write(tmp_path / "c", kind), change))
    for part in said:
        assert part in message
    assert len(message.splitlines()) <= 4


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("t5", lambda tensors: tensors),
        ("t5", lambda t: {**t, "language_model.lm_head.weight": t["language_model.shared.weight"].clone()}),
        ("t5-untied", with_more(qformer__embeddings__position_ids=64)),
        ("llama", with_more(language_model__model__layers__0__self_attn__rotary_emb__inv_freq=4)),
        ("t5-untied", renamed("LayerNorm.weight", "LayerNorm.gamma")),
        (
            "t5-untied",
            with_more(language_model__decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight=4),
        ),
    ],
    ids=["as saved", "a tied head saved too", "position ids", "inv_freq", "gamma", "t5's leftover"],
)
def test_known_names_load(kind: str, change: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    plain = checkpoints.write(tmp_path / "plain", kind)
    folder = checkpoints.edit_weights(checkpoints.write(tmp_path / "c", kind), change)
    config = InstructBlipConfig.from_pretrained(folder)
    weights.check_headers("c", config, files.shapes(folder), untied=files.has_own_head(folder))
    expected, found = load_base(str(plain), **CPU).model.state_dict(), load_base(str(folder), **CPU).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_check_reads_and_allocates_nothing() -> None:
    config = InstructBlipConfig.from_pretrained(CHECKPOINT)
    model = weights.check_headers("mini", config, files.shapes(CHECKPOINT), untied=False)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_shards_are_looked_at_one_by_one(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c", "llama", shards=3)
    assert load_base(str(folder), **CPU).model.config.text_config.model_type == "llama"
    lost = sorted(folder.glob("model-*.safetensors"))[-1]
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ModelError, match=rf"1 of its \d weight files are missing: {lost.name}"):
        locate.check(str(folder))
    lost.write_bytes(whole[:100])
    with pytest.raises(ModelError, match=f"{lost.name} cannot be read"):
        files.shapes(folder)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for check in (locate.check, lambda name: load_base(name, **CPU)):
        with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\), which are never read"):
            check(str(folder))


@pytest.mark.long
def test_the_process_says_all_that_is_wrong(tmp_path: Path) -> None:
    """In one answer: weights of one model, modules of another, a device."""
    broken = checkpoints.edit_weights(checkpoints.write(tmp_path / "broken"), without("query_tokens"))
    good = checkpoints.write(tmp_path / "good", "llama")
    questions = [
        Question(locate.check(str(broken)), (("query",),)),
        Question(locate.check(str(good)), (("query", "q_proj"), ("querry",), ("q",))),
    ]
    with Probe(questions, ["cuda:0"], cuda="") as probe:
        first, second, third, fourth = probe.answer()
    assert "query_tokens" in first and str(broken) in first
    assert "'querry'" in second and "no linear module is named 'q'" in third and str(good) in third
    assert fourth == "device=cuda:0: this machine has 0 CUDA devices"
    with Probe([]) as nothing:
        assert nothing.answer() == []
