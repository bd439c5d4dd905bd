"""What packing gives: `python -m tests.benchmarks.packing [--set model=FOLDER --set data=FOLDER] [--threads 2]`.

K runs of the same batch size train in one pass; a round is one optimizer step of each. Printed for each K and batch:
the round's time, samples a second, how many times faster than K = 1 that is, and the share of the machine's peak:
the pass's multiply-adds as PyTorch counts them, over what a large product of matrices reaches in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.bare import synchronize
from tests.benchmarks.sides import machine
from trainer import runtime
from trainer.common.errors import UserError
from trainer.config import TrainConfig
from trainer.events import EpochEnded
from trainer.loop import Pack
from trainer.workbench import Workbench

KS = (1, 2, 4, 8, 16)
BATCHES = (2, 4, 8)
PEAK_SIZE = 2_048
"""Side of the square matrices that measure the peak: 34 GFLOP, too large for any cache to matter."""


def peak_flops(device: torch.device, repeat: int = 5) -> float:
    """Floating point operations a second of a large float32 product: the best of `repeat`."""
    size = PEAK_SIZE * (4 if device.type == "cuda" else 1)
    one, other = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    seconds = []
    for _ in range(repeat + 1):
        synchronize()
        began = time.perf_counter()
        one @ other
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


@contextmanager
def packed(bench: Workbench, config: TrainConfig, k: int) -> Iterator[Pack]:
    """A pack of K runs that differ in seed, rank and rate, as a search's trials do."""
    with tempfile.TemporaryDirectory() as folder, Pack(bench) as pack:
        for slot in range(k):
            own = {"seed": slot, "lora_r": 4 + slot % 4 * 4, "learning_rate": 1e-5 * (slot + 1), "num_epochs": 100}
            pack.add(config.model_copy(update=own), Path(folder) / str(slot))
        yield pack


def hold(pack: Pack) -> float:
    """Have each run take its first batches again and again; returns their label tokens a sample.

    Passes are then of one shape, and recorded after the second: what a step takes once its shape has been.
    """
    tokens = samples = 0
    for member in pack.members:
        group = member.hold()
        tokens += sum(batch.num_tokens() for batch in group)
        samples += sum(len(batch) for batch in group)
    return tokens / samples


def step(pack: Pack) -> float | None:
    """Seconds of a round: one optimizer step of every run. None for a round in which an epoch ended."""
    synchronize()
    began = time.perf_counter()
    ended = False
    for _, happening in pack.round():
        if isinstance(happening, UserError | OSError):
            raise happening
        ended = ended or isinstance(happening, EpochEnded)
    synchronize()
    return None if ended else time.perf_counter() - began


def flops_of(pack: Pack) -> int:
    """Of one round, forward and backward, as PyTorch's counter has them: products of matrices and attention."""
    with FlopCounterMode(display=False) as counter:
        step(pack)
    return int(counter.get_total_flops())


def measure(
    bench: Workbench, config: TrainConfig, ks: Sequence[int], rounds: int, peak: float
) -> list[dict[str, Any]]:
    """The rows for one batch size; the Ks take turns, so that a busy machine is busy for all of them."""
    found: dict[int, list[float]] = {k: [] for k in ks}
    flops: dict[int, int] = {}
    blocks = 3
    for _ in range(blocks):
        for k in ks:
            with packed(bench, config, k) as pack:
                step(pack)  # the first warms up, and its events open the runs
                flops[k] = flops.get(k) or flops_of(pack)
                wanted = len(found[k]) + max(2, rounds // blocks)
                while len(found[k]) < wanted:
                    seconds = step(pack)
                    if seconds is not None:
                        found[k].append(seconds)
    alone = config.batch_size / statistics.median(found[ks[0]]) * ks[0]
    rows = []
    for k in ks:
        seconds = statistics.median(found[k])
        rate = k * config.batch_size / seconds
        share = flops[k] / seconds / peak
        rows.append({"batch": config.batch_size, "k": k, "ms": 1e3 * seconds, "samples_per_s": rate, "share": share})
        print(
            f"  batch {config.batch_size:2d}  K {k:2d}  {1e3 * seconds:9.2f} ms  {rate:8.1f} samples/s"
            f"  {rate / alone:5.2f} x  {share:6.1%} of peak",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, help="BLAS threads; PyTorch's choice without")
    parser.add_argument("--k", type=int, nargs="+", default=KS)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = TrainConfig.parse_settings(options.set, {"max_samples": 160, "lora_dropout": 0.0})
    bench = Workbench()
    device = runtime.prepare(config)
    peak = peak_flops(device)
    print(json.dumps({**machine(), "threads": torch.get_num_threads(), "device": str(device)}))
    print(
        f"peak {peak / 1e9:.1f} GFLOP/s in float32, matmul_precision {config.matmul_precision}; "
        f"median of {options.rounds} rounds"
    )
    rows = []
    for batch in options.batch:
        rows += measure(bench, config.model_copy(update={"batch_size": batch}), options.k, options.rounds, peak)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(), "peak": peak, "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
