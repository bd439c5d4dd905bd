"""What a step costs, for the dry run: memory at its peak, and what other precisions would save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.common import nvidia
from trainer.model import memory, peak
from trainer.model.arithmetic import Card, card_of, step_flops

if TYPE_CHECKING:
    from search.preflight import Checked
    from search.study import Study
    from trainer.config import TrainConfig

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"base_dtype": None, "matmul_precision": "highest"},
    "TF32": {"base_dtype": None, "matmul_precision": "high"},
    "bfloat16": {"base_dtype": "bfloat16"},
}
"""The fields of each."""
LARGE = 2**30
"""Bytes of weights."""
REACHED = "40, 14 and 8 %"
"""Of the data sheet's arithmetic, by a step of 4 at the real size on an H200: tests/benchmarks/gpu/h200-2.json."""
SWITCH = {"TF32": "--set matmul_precision=high", "bfloat16": "--set base_dtype=bfloat16"}


def lines(study: Study, checked: Checked) -> Iterator[str]:
    """A line on memory, and one on the other precisions for a GPU; none for a model that is not known here.

    On a machine without a GPU, the second is for models that nobody would train on a CPU.
    """
    config = study.base_config()
    sizes, need = peak.sizes_of(config.model), memory.needed(config.model, config.dtype_of_base)
    if sizes is None or need is None:
        return
    lengths = lengths_of(checked, config)
    step = peak.estimate(sizes, [config], lengths, weights=need.weights, on_cpu=config.device == "cpu")
    yield f"a step of {config.batch_size} samples takes some {step} at its peak"
    if study.screen is not None:
        yield f"trials run in {study.screen}, their leaders again in the base's own precision (screen)"
    there = nvidia.gpus()
    if config.device == "cpu" or config.torch_dtype != "float32" or (not there and need.weights < LARGE):
        return
    card = card_of(there[0].name) if there else card_of("H100")
    elements = need.weights // memory.BYTES[config.dtype_of_base]
    said = [
        _precision(name, config.model_copy(update=fields), sizes, lengths, elements, card)
        for name, fields in PRECISIONS.items()
    ]
    where = f" on a GPU like an {card.name}, by its data sheet" if card else ""
    reached = f"; an H200 reached {REACHED} of its data sheet with one run of 4 (docs/gpu.md)" if card else ""
    yield f"the same step{where}: {'; '.join(said)}{reached}"


def lengths_of(checked: Checked, config: TrainConfig) -> peak.Lengths:
    """The captions' mean and longest, as far as a tokenizer has seen them."""
    if checked.text is None or not checked.text.lengths:
        return peak.TYPICAL
    cut = [min(length, config.max_target_length) for length in checked.text.lengths]
    return replace(peak.TYPICAL, labels=sum(cut) / len(cut), longest_labels=max(cut))


def _precision(
    name: str, config: TrainConfig, sizes: peak.Sizes, lengths: peak.Lengths, elements: int, card: Card | None
) -> str:
    """The memory of a precision, the time of its arithmetic, and how it is chosen."""
    taken = peak.estimate(sizes, [config], lengths, weights=elements * memory.BYTES[config.dtype_of_base])
    text = f"{name} {memory.shown(taken.total)}"
    if card is not None:
        flops = config.batch_size * step_flops(sizes, lengths, vision_kept=config.cache_features)
        text += f" and {1e3 * flops / (1e12 * card.of(config)):.2g} ms of arithmetic"
    return f"{text} ({SWITCH[name]})" if name in SWITCH else text
