"""How many kernels a round has on a GPU, counted on the CPU: `python -m tests.benchmarks.launches`.

InstructBLIP-FlanT5-XL has all its layers here, but narrow ones: the number of operations depends on no width. Counted
are ATen's operations that compute (views and allocations are none), each as one kernel, with the branches of a GPU
(tanh GELU as one operation, attention by PyTorch's math kernel, which is several). Vision outputs are kept. `stacked`:
adapters of all runs together (`trainer.model.stacked`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks import packing, xl
from tests.benchmarks.gpu.scene import MadeBench
from trainer.config import TrainConfig
from trainer.model import attention, fused, stacked

NARROW = {
    "VISION": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "QFORMER": {"hidden_size": 24, "intermediate_size": 16, "encoder_hidden_size": 16},
    "TEXT": {"d_model": 32, "d_kv": 4, "d_ff": 16, "num_heads": 4},
}
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes"),
    *("unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "empty", "empty_like", "new_empty", "chunk"),
    *("unfold", "narrow", "empty_strided", "_reshape_alias", "lift_fresh", "reshape", "is_same_size"),
}
MATH_ATTENTION = {"forward": 6, "backward": 9}
"""Kernels of PyTorch's math attention: scalings, products, bias and softmax, and their derivatives (by its source, not
measured), for the one operation that it is on a CPU."""


class Counting(TorchDispatchMode):
    """Counts operations by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.by_part: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            part = _part(name)
            kernels = MATH_ATTENTION["backward" if "backward" in name else "forward"] if part == "attention" else 1
            self.by_part[part] += kernels
        return func(*args, **(kwargs or {}))


def _part(name: str) -> str:
    """Which part of a round the operation is of, by who called it."""
    if "scaled_dot_product" in name:
        return "attention"
    stack = traceback.extract_stack(limit=14)
    for frame in reversed(stack):
        file = Path(frame.filename).name
        if file in ("lora.py", "stacked.py") and frame.name not in ("_apply", "apply"):
            return "adapters"
        if frame.name in ("update", "norms", "zero_gradients"):
            return "updates"
        if file == "passes.py" and frame.name == "_pass":
            return "losses and norms" if not any(f.name == "backward" for f in stack) else "base"
    return "base"


def counted(k: int, batch: int, dropout: float, *, together: bool) -> dict[str, int]:
    """Kernels of a round of k runs, by part."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        xl.build_data(Path(folder) / "data", 4 * batch)
        narrow = {name: {**getattr(xl, name), **fields} for name, fields in NARROW.items()}
        with mock.patch.multiple(xl, TEXT_WIDTH=NARROW["TEXT"]["d_model"], **narrow):
            model, processor = xl.make(torch.device("cpu"))
        model.requires_grad_(False).eval()
        bench = MadeBench(model, processor, torch.device("cpu"))
        fields = {"model": "made", "data": str(Path(folder) / "data"), "device": "cpu", "batch_size": batch}
        config = TrainConfig.parse({**fields, "warmup_steps": 0, "lora_dropout": dropout})
        counting = Counting()
        with (
            mock.patch.object(attention, "_written_out", lambda *_: False),
            mock.patch.object(stacked, "STACKED", ("cpu",) if together else ()),
            mock.patch.object(fused._TanhGELU, "apply", partial(nn.functional.gelu, approximate="tanh")),
            packing.packed(bench, config, k) as pack,
        ):
            list(pack.round())
            with counting:
                list(pack.round())
    return dict(counting.by_part)


def main() -> None:
    """Count, and print a line of JSON for each number of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.05)
    asked = parser.parse_args()
    for k in asked.runs:
        for together in (False, True)[: 1 if k == 1 else 2]:
            parts = counted(k, asked.batch, asked.dropout, together=together)
            facts = {"runs": k, "batch": asked.batch, "stacked": together, **parts, "all": sum(parts.values())}
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
