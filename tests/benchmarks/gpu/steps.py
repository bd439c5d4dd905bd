"""Part 2: what a step costs, ours and HF Trainer + PEFT, in each precision: batches, packs, kernels, memory."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from tests.benchmarks import packing, peer
from tests.benchmarks.bare import synchronize
from tests.benchmarks.gpu.report import Report
from tests.benchmarks.gpu.scene import PRECISIONS, Scene
from tests.support import peft_reference
from trainer import kernels, runtime
from trainer.config import TrainConfig
from trainer.loop import Pack
from trainer.model import graphs, peak, stacked
from trainer.model.arithmetic import card_of, step_flops

ROUNDS = 8
"""Timed together: a window on a GPU, after which figures are fetched."""
CPU_ROUNDS = 2
LONGEST, PRINTED = 25, 6
"""Kernels that the file names, and that are printed."""


FIRST = (
    ("ours", "float32", 4, 1),
    ("HF", "float32", 4, 1),
    ("ours", "bfloat16", 4, 8),
    ("HF", "bfloat16", 4, 1),
    ("ours", "bfloat16", 4, 1),
    ("ours", "TF32", 4, 1),
    ("ours", "TF32", 4, 8),
    ("ours", "float32", 4, 8),
    ("kernels", "float32", 4, 1),
    ("kernels", "bfloat16", 4, 1),
    ("kernels", "bfloat16", 4, 8),
    ("adapters", "bfloat16", 4, 8),
    ("attention", "float32", 4, 1),
    ("attention", "bfloat16", 4, 8),
)
"""What decides the targets, and what to build next: (side, precision, batch, runs in the pass)."""
FURTHER = (
    *(("ours", precision, batch, 1) for batch in (2, 8, 16) for precision in PRECISIONS),
    *(("ours", precision, 4, 4) for precision in PRECISIONS),
    *(("HF", precision, batch, 1) for batch in (16, 8, 2) for precision in PRECISIONS),
    ("HF", "TF32", 4, 1),
)
"""The rest of the table."""


@dataclass(frozen=True)
class Row:
    """A configuration that was measured."""

    seconds: float
    """A round: one step of each run."""
    samples_per_s: float


class Rows:
    """What has been measured, by (side, precision, batch, runs in the pass)."""

    def __init__(self, scene: Scene, report: Report) -> None:
        self.scene, self.report = scene, report
        self.found: dict[tuple[str, str, int, int], Row] = {}
        self.peaks: dict[str, float] = {}
        sheet = card_of(torch.cuda.get_device_name()) if scene.device.type == "cuda" else None
        self.sheet = {name: 1e12 * sheet.of(scene.config(name)) for name in PRECISIONS} if sheet else {}

    def rate(self, *key: Any) -> float | None:
        """Samples a second, where that was measured."""
        return self.found[key].samples_per_s if key in self.found else None

    def peak_flops(self, precision: str) -> float:
        """What a large product of matrices reaches in this precision."""
        if precision not in self.peaks:
            runtime.prepare(self.scene.config(precision))
            dtype = runtime.DTYPES[self.scene.config(precision).dtype_of_base]
            size = 8192 if self.scene.device.type == "cuda" else 512
            one, other = torch.randn(2, size, size, device=self.scene.device).to(dtype)
            seconds = []
            for _ in range(6):
                synchronize()
                began = time.perf_counter()
                one @ other
                synchronize()
                seconds.append(time.perf_counter() - began)
            self.peaks[precision] = 2 * size**3 / min(seconds[1:])
        return self.peaks[precision]

    def ours(self, precision: str, batch: int, k: int) -> None:
        """Measure a pack of our runs."""
        config = self.scene.config(precision, batch_size=batch)
        on_gpu = self.scene.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        with packing.packed(self.scene.bench, config, k) as pack:
            configs = [member.config for member in pack.members]
            lengths = replace(_lengths(self.scene, config), labels=packing.hold(pack))
            pack.passes.records = False
            launched, highest = self._timed(pack)
            with FlopCounterMode(display=False) as counter:
                _round(pack)
            pack.passes.records = True
            seconds, recorded = self._timed(pack)
            reserved = torch.cuda.memory_reserved() if on_gpu else None
        self.found["ours", precision, batch, k] = Row(seconds, k * batch / seconds)
        flops = counter.get_total_flops()
        told = peak.estimate(self.scene.sizes, configs, lengths, weights=0, on_cpu=not on_gpu)
        facts: dict[str, Any] = {"ms": 1e3 * seconds, "samples_per_s": k * batch / seconds}
        facts["launched_ms"] = 1e3 * launched if on_gpu else None
        facts["of_product"] = flops / seconds / self.peak_flops(precision)
        facts["of_sheet"] = flops / seconds / self.sheet[precision] if self.sheet else None
        facts["told_gib"] = told.total / 2**30
        facts["taken_gib"] = None if highest is None else (highest - before) / 2**30
        # A recording's memory stays: with it, and with all that PyTorch's allocator holds.
        facts["recorded_gib"] = None if recorded is None else (recorded - before) / 2**30
        facts["reserved_gib"] = None if reserved is None else reserved / 2**30
        facts["flops_told"] = k * batch * step_flops(self.scene.sizes, lengths) / flops
        self.report.say(f"ours, {precision}, {k} x {batch}", **facts)

    def variants(self, precision: str, k: int) -> None:
        """Attention written out, by fused kernels that are deterministic, and by any."""
        for name in ("written out", "fused, deterministic", "any"):
            config = self.scene.config(precision, batch_size=4, deterministic=name != "any")
            before = torch.cuda.memory_allocated() if self.scene.device.type == "cuda" else 0
            with packing.packed(self.scene.bench, config, k) as pack, _attention(name == "fused, deterministic"):
                packing.hold(pack)
                pack.passes.records = False
                _, taken = self._timed(pack)
                pack.passes.records = True
                seconds, _ = self._timed(pack)
            facts = {"ms": 1e3 * seconds, "taken_gib": None if taken is None else (taken - before) / 2**30}
            self.report.say(f"attention {name}, {precision}, {k} x 4", **facts)

    def adapters(self, precision: str) -> None:
        """Adapters of 8 runs together, and run by run."""
        for name, kinds in (("together", ("cpu", "cuda")), ("run by run", ())):
            config = self.scene.config(precision, batch_size=4, lora_dropout=0.05)
            kept, stacked.STACKED = stacked.STACKED, kinds
            try:
                before = torch.cuda.memory_allocated() if self.scene.device.type == "cuda" else 0
                with packing.packed(self.scene.bench, config, 8) as pack:
                    packing.hold(pack)
                    pack.passes.records = False
                    seconds, taken = self._timed(pack)
            finally:
                stacked.STACKED = kept
            facts = {"ms": 1e3 * seconds, "taken_gib": None if taken is None else (taken - before) / 2**30}
            self.report.say(f"adapters {name}, {precision}, 8 x 4", **facts)

    def _timed(self, pack: Pack) -> tuple[float, int | None]:
        """(seconds of a round, most bytes in use) of a pack, after rounds that warm up and record its pass."""
        on_gpu = self.scene.device.type == "cuda"
        for _ in range(graphs.USES + 1):
            _round(pack)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        rounds = ROUNDS if on_gpu else CPU_ROUNDS
        began = time.perf_counter()
        for _ in range(rounds):
            _round(pack)
        synchronize()
        seconds = (time.perf_counter() - began) / rounds
        return seconds, torch.cuda.max_memory_allocated() if on_gpu else None

    def library(self, precision: str, batch: int) -> None:
        """Measure HF Trainer + PEFT, with the vision tower in each step, as it trains by default."""
        seconds = trainer_step(self.scene, self.scene.config(precision, batch_size=batch))
        self.found["HF", precision, batch, 1] = Row(seconds, batch / seconds)
        self.report.say(f"HF Trainer + PEFT, {precision}, {batch}", ms=1e3 * seconds, samples_per_s=batch / seconds)

    def kernels(self, precision: str, batch: int, k: int) -> None:
        """Count the kernels of a round, how long they run, and name those that take longest."""
        from torch.profiler import ProfilerActivity, profile

        config = self.scene.config(precision, batch_size=batch)
        on_gpu = self.scene.device.type == "cuda"
        with packing.packed(self.scene.bench, config, k) as pack:
            pack.passes.records = False
            _round(pack)
            _round(pack)
            synchronize()
            began = time.perf_counter()
            with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
                _round(pack)
                synchronize()
            wall = time.perf_counter() - began
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        ran = [event for event in profiled.events() if event.device_type == kind]
        by_name: dict[str, list[float]] = {}
        for event in ran:
            spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
            by_name.setdefault(event.name[:90], []).append(spent)
        busy = sum(map(sum, by_name.values()))
        facts = {"kernels": len(ran), "busy_ms": busy, "wall_ms": 1e3 * wall}
        self.report.say(f"kernels of a round, {precision}, {k} x {batch}", **facts)
        longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
        self.report.rows[-1]["longest"] = [[name, len(times), round(sum(times), 3)] for name, times in longest]
        for name, times in longest[:PRINTED]:
            print(f"      {sum(times):7.2f} ms {len(times):5d} x  {name}", flush=True)


def check(scene: Scene, report: Report) -> None:
    """The rows that decide the targets first, then the rest of the table."""
    rows = Rows(scene, report)
    for side, precision, batch, k in [*FIRST, *FURTHER]:
        name = f"{side}, {precision}, {k} x {batch}"
        if side == "attention":
            report.run(name, 20, lambda p=precision, k=k: rows.variants(p, k))  # type: ignore[misc]
        elif side == "kernels":
            report.run(name, 6, lambda p=precision, b=batch, k=k: rows.kernels(p, b, k))  # type: ignore[misc]
        elif side == "adapters":
            report.run(name, 12, lambda p=precision: rows.adapters(p))  # type: ignore[misc]
        elif side == "ours":
            report.run(name, 6, lambda p=precision, b=batch, k=k: rows.ours(p, b, k))  # type: ignore[misc]
        else:
            report.run(name, 9, lambda p=precision, b=batch: rows.library(p, b))  # type: ignore[misc]
    report.run("targets of steps", 0, lambda: _targets(rows))


def _targets(rows: Rows) -> None:
    report, packed = rows.report, rows.rate("ours", "bfloat16", 4, 8)
    alone = rows.found.get(("ours", "float32", 4, 1))
    floor = None
    if alone is not None and rows.sheet:
        config = rows.scene.config(batch_size=4)
        floor = 4 * step_flops(rows.scene.sizes, _lengths(rows.scene, config)) / rows.sheet["float32"]
    over = None if floor is None or alone is None else alone.seconds / floor
    report.target("a float32 step of 4 over its arithmetic by the data sheet", over, 1.25, at_most=True)
    for precision, wanted in (("bfloat16", 4.0), ("float32", 20.0)):
        theirs = rows.rate("HF", precision, 4, 1)
        gain = packed / theirs if packed and theirs else None
        report.target(f"8 packed runs of 4 in bfloat16 over HF Trainer in {precision}, samples a second", gain, wanted)
    for row in report.rows:
        taken, told = row.get("taken_gib"), row.get("told_gib")
        if taken and told:
            report.target(f"memory told, {row['name']}: relative error", abs(told / taken - 1), 0.15, at_most=True)


def _round(pack: Pack) -> None:
    for _, happening in pack.round():
        if isinstance(happening, Exception):
            raise happening


def _lengths(scene: Scene, config: TrainConfig) -> peak.Lengths:
    train_set, _ = scene.bench.datasets(config)
    return peak.Lengths.of(train_set.tokens)


# --- HF Trainer ---------------------------------------------------------------------------------------------------


class _StepClock(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """When each step has ended, the device waited for at the first and the last alone."""

    def __init__(self, warm: int, steps: int) -> None:
        self.warm, self.steps, self.began, self.ended = warm, steps, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (self.warm, self.warm + self.steps):
            synchronize()
            self.began, self.ended = self.ended or time.perf_counter(), time.perf_counter()


def trainer_step(scene: Scene, config: TrainConfig) -> float:
    """Seconds of a step of HF Trainer: the library's forward, PEFT's adapters, the peer's settings."""
    runtime.prepare(config)
    transformers_logging.set_verbosity_error()
    warm, steps = (2, ROUNDS) if scene.device.type == "cuda" else (1, 1)
    model = scene.bench.library(config.dtype_of_base)
    tokenizer = scene.bench.tokenizer(config)
    train_set, _ = scene.bench.datasets(config)
    clock = _StepClock(warm, steps)
    with (
        tempfile.TemporaryDirectory() as folder,
        _deterministic_off(),
        warnings.catch_warnings(),
        peft_reference.attached(model, config, autocast=True) as (peft_model, _),
    ):
        warnings.simplefilter("ignore")
        arguments = peer.arguments(config, Path(folder), trial=0, logging_steps=1000, track=False)
        arguments.max_steps = warm + steps
        arguments.eval_strategy = arguments.save_strategy = "no"
        made = peer.CaptionTrainer(
            model=peft_model,
            args=arguments,
            data_collator=peer.LibraryCollator(tokenizer, model.config),
            train_dataset=train_set,
            callbacks=[clock],
        )
        made.remove_callback(PrinterCallback)
        made.train()
    return (clock.ended - clock.began) / steps


def _deterministic_off() -> ExitStack:
    """The libraries at their best: whatever kernels they would take by themselves."""
    stack = ExitStack()
    torch.use_deterministic_algorithms(False)
    kernels.allow_fused_attention(True)
    stack.callback(torch.use_deterministic_algorithms, True, warn_only=True)
    return stack


@contextmanager
def _attention(fused: bool) -> Iterator[None]:
    """Within, deterministic passes take fused kernels, or none."""
    with mock.patch.object(kernels, "_repeat", lambda *_: fused):
        yield
