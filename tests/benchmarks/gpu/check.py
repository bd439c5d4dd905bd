"""The check of the product on a GPU, at the real size with random weights: `make gpu-check`.

Three parts, each with a share of the time: what is computed (equality with HF and PEFT, determinism, faults), what a
step costs (ours and HF Trainer, kernels, peak, memory), and a whole search against the peer's. What is not reached
within the time is said. Without a GPU the embedded model goes through the same code: a rehearsal, whose figures mean
nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BUDGET_S = 465
SHARES = {1: 0.25, 2: 0.45, 3: 1.0}
"""By when each part has to end, of the whole time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if everything that was reached is right."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="written after each finding")
    parser.add_argument("--rehearse", action="store_true", help="the embedded model on the CPU, also beside a GPU")
    parser.add_argument("--parts", type=int, nargs="+", choices=sorted(SHARES), default=sorted(SHARES))
    parser.add_argument("--only", default="", metavar="REGEX", help="pieces whose name has this")
    parser.add_argument("--model", default="mini", help="of a rehearsal")
    parser.add_argument("--folder", type=Path, help="a new folder to work in and to keep: 34 GB at the real size")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    folder.mkdir(exist_ok=True, parents=True)
    kept = {name: os.environ.get(name) for name in ("LORA_SEARCH_CACHE", "HF_HUB_OFFLINE")}
    os.environ |= {"LORA_SEARCH_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        return _run(options, folder, began)
    finally:
        os.environ |= {name: value for name, value in kept.items() if value is not None}
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def _run(options: argparse.Namespace, folder: Path, began: float) -> int:
    import torch

    from tests.benchmarks.gpu import equality, scene, steps, whole
    from tests.benchmarks.gpu.report import Report
    from tests.benchmarks.sides import machine

    rehearsed = options.rehearse or not torch.cuda.is_available()
    report = Report(
        options.budget, options.json, {**machine(), "rehearsal": rehearsed}, began=began, only=options.only
    )
    print(", ".join(f"{key} {value}" for key, value in report.machine.items() if value is not None))
    made = scene.rehearsal(folder, options.model) if rehearsed else scene.real(folder)
    checkpoint = whole.begin_checkpoint(made) if 3 in options.parts else None
    try:
        if 1 in options.parts:
            report.part("1: what is computed", SHARES[1])
            equality.check(made, report)
        if 2 in options.parts:
            report.part("2: what a step costs", SHARES[2])
            steps.check(made, report)
        if 3 in options.parts:
            report.part("3: a whole search", SHARES[3])
            made.bench.empty()
            whole.check(made, report, checkpoint)
    finally:
        if checkpoint is not None and checkpoint.poll() is None:
            checkpoint.kill()
    return report.end()
