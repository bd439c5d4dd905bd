"""What the check runs on: the real configuration with random weights made on the device, or the embedded model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.benchmarks import xl
from trainer import runtime
from trainer.config import TrainConfig
from trainer.model.base import Base, load_base
from trainer.model.fused import fuse
from trainer.model.peak import Sizes
from trainer.workbench import Workbench

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "TF32": {"matmul_precision": "high"},
    "bfloat16": {"base_dtype": "bfloat16"},
}


def twin(model: Any, dtype: torch.dtype) -> Any:
    """The model again, in this dtype; in its own dtype the weights are shared, so that a copy costs nothing."""
    shared: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        kept = tensor if not tensor.is_floating_point() or tensor.dtype == dtype else tensor.to(dtype)
        if isinstance(tensor, nn.Parameter) and kept is not tensor:
            kept = nn.Parameter(kept, requires_grad=False)
        shared[id(tensor)] = kept
    made = copy.deepcopy(model, shared)
    made.config.dtype = dtype
    return made


class MadeBench(Workbench):
    """A workbench whose bases are made from a model in memory: no checkpoint of 16 GB has to be written and read."""

    def __init__(self, library: Any, processor: Any, device: torch.device) -> None:
        super().__init__()
        self._library = {"float32": library}
        self._processor = processor
        self._device = device
        self._made: dict[str, Base] = {}
        self._last = ""

    def library(self, dtype: str) -> Any:
        """The model with the library's own modules."""
        if dtype not in self._library:
            self._library[dtype] = twin(self._library["float32"], runtime.DTYPES[dtype])
        return self._library[dtype]

    def base(self, config: TrainConfig) -> Base:
        """The base as it would be loaded in the configuration's dtype."""
        dtype = config.dtype_of_base
        if dtype not in self._made:
            model = twin(self.library(dtype), runtime.DTYPES[dtype])
            fuse(model)
            named = (self._processor, config.model, runtime.DTYPES[dtype], self._device, "made")
            self._made[dtype] = Base(model.eval(), *named)
        if dtype != self._last:
            self._features.clear()
            self._last = dtype
        return self._made[dtype]

    def empty(self) -> None:
        """Give the device's memory back: other processes need it."""
        self._made.clear()
        self._library.clear()
        self._features.clear()
        runtime.release_memory(self._device)


@dataclass
class Scene:
    """The model, the data and what differs between a rehearsal and the real check."""

    bench: MadeBench
    device: torch.device
    folder: Path
    rehearsed: bool
    fields: dict[str, Any]
    """Of every configuration."""

    def config(self, precision: str = "float32", **more: Any) -> TrainConfig:
        """A configuration without dropout, so that libraries can be compared with."""
        fixed = {"lora_dropout": 0.0, "warmup_steps": 0, "learning_rate": 1e-4, "num_epochs": 100}
        return TrainConfig.parse({**fixed, **self.fields, **PRECISIONS[precision], **more})

    @property
    def sizes(self) -> Sizes:
        """Of the model."""
        found = Sizes.of(self.bench.library("float32").config.to_dict())
        assert found is not None
        return found


def real(folder: Path, images: int = 256) -> Scene:
    """InstructBLIP-FlanT5-XL with random weights on the GPU; pictures of noise with captions of RSICap's length."""
    device = torch.device("cuda")
    model, processor = xl.make(device)
    model.requires_grad_(False).eval()
    xl.build_data(folder / "data", images)
    fields = {"model": "made", "data": str(folder / "data"), "device": "cuda"}
    return Scene(MadeBench(model, processor, device), device, folder, False, fields)


def rehearsal(folder: Path, model: str = "mini", samples: int = 64) -> Scene:
    """A small model on the CPU."""
    device = torch.device("cpu")
    base = load_base(model, dtype=torch.float32, device=device, fused=False)
    fields = {"model": model, "data": "mini", "max_samples": samples, "device": "cpu"}
    return Scene(MadeBench(base.model, base.processor, device), device, folder, True, fields)
