"""How much memory a base needs, read from its files before anything is loaded. Needs no torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import ModelError
from trainer.config import TrainConfig
from trainer.model.locate import locate

if TYPE_CHECKING:
    import torch

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element, by `TrainConfig.dtype_of_base`."""
TOKENS = 32
"""Text tokens of the sample whose activations are estimated: about a prompt and the shortest of captions."""

log = logging.getLogger("trainer.model.memory")


@dataclass(frozen=True)
class Need:
    """What a base takes on its device."""

    weights: int
    """Bytes, exactly: all tensors of the checkpoint in the run's dtype."""
    activations: int
    """Bytes that a training step of one sample of TOKENS tokens keeps for its backward pass, at the least: 0 where the
    model's config.json lacks the sizes."""

    @property
    def total(self) -> int:
        """Bytes that a single step takes at the least."""
        return self.weights + self.activations

    def __str__(self) -> str:
        step = f", a training step of one sample at least {shown(self.activations)} more" if self.activations else ""
        return f"weights take {shown(self.weights)}{step}"


def needed(model: str, dtype: str) -> Need | None:
    """What a model takes; None if its files are not on this machine yet.

    Raises:
        ModelError: the files cannot be read.
    """
    folder = Path(locate(model))
    if not folder.is_dir():
        return None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None  # the loader says what is missing
    size = BYTES[dtype]
    try:
        elements = sum(_elements(file) for file in files)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise ModelError(f"the model {model!r}: its files cannot be read: {error}") from error
    return Need(size * elements, size * _kept(config))


def check(config: TrainConfig, device: torch.device) -> None:
    """Make sure that the base of this configuration fits on its device, or devices, and log what it needs.

    Raises:
        ModelError: it does not fit; the message says what it needs, what is free and what helps.
    """
    from trainer import runtime

    need = needed(config.model, config.dtype_of_base)
    if need is None:
        return
    devices = runtime.visible_devices(device) if config.device_map == "auto" else [device]
    free = sum(runtime.free_memory(each) for each in devices)
    names = ", ".join(map(str, devices))
    log.info("%s in %s: %s; %s has %s free", config.model, config.dtype_of_base, need, names, shown(free))
    if need.total > free:
        raise ModelError(
            f"the model {config.model!r} does not fit: in {config.dtype_of_base} its {need}, but {names} has "
            f"{shown(free)} free; what helps:{_remedies(config, need, device)}"
        )


def shown(number: int) -> str:
    """Bytes in the unit that suits them, GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def _remedies(config: TrainConfig, need: Need, device: torch.device) -> str:
    lines = []
    if config.dtype_of_base == "float32":
        lines.append(f"--set base_dtype=bfloat16, which takes {shown(need.total // 2)}")
    if device.type == "cuda":
        if config.device_map == "single":
            lines.append("several GPUs: --set device_map=auto (in a search with --gpus-per-worker 2)")
        else:
            lines.append("more GPUs for this process (in a search: a higher --gpus-per-worker)")
        lines.append("ending other processes on the GPU (nvidia-smi lists them)")
    else:
        lines.append("ending other processes that use memory (in a search: fewer --workers)")
    return "".join(f"\n  - {line}" for line in lines)


def _elements(file: Path) -> int:
    """Elements of all tensors of a safetensors file, from its header alone."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - no dict


def _kept(config: Mapping[str, Any]) -> int:
    """Elements that the language model's layers keep for one sample.

    A lower bound: of each token and layer the two inputs of the norms, query, key, value, and the two inputs of the
    feed-forward's product, which no frozen layer can do without (a product with frozen weights keeps nothing else).
    """
    text = config.get("text_config", {})
    width = text.get("d_model", text.get("hidden_size"))
    inner = text.get("d_ff", text.get("intermediate_size"))
    layers = text.get("num_layers", text.get("num_hidden_layers"))
    if width is None or inner is None or layers is None:
        return 0
    tokens = int(config.get("num_query_tokens", 32)) + TOKENS
    return int(tokens * layers * (5 * width + 2 * inner))
