"""From how many samples in a pass a GPU is busy: a probe of some seconds, kept for the GPU, the model and versions.

A data sheet does not say it: below it a step waits for kernels to be launched and for weights to be read, which
depends on the host, the driver and how many operations the model takes. So runs of the study's smallest batch train in
passes of one, two, four, eight and sixteen, until twice the samples give hardly more of them a second. What was found
is kept in the cache, since the clock is not: the same machine gives the same packs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from trainer.common.cache import cache_folder
from trainer.common.files import write_whole

if TYPE_CHECKING:
    import torch

    from trainer.config import TrainConfig
    from trainer.loop import Pack
    from trainer.workbench import Workbench

GAIN = 1.1
"""Samples a second of a pass with twice the runs, over those of one without, from which it is worth having."""
LIMIT_S = 15.0
"""The probe begins no larger pass after this."""
ROUNDS = 4
"""Timed together. The best of `TIMES`: another process may have the host for a while."""
TIMES = 2
TRIES = 6
RUNS = (1, 2, 4, 8, 16)

Clock = Callable[[], float]

log = logging.getLogger("search.workers.busy")


def samples_when_busy(
    config: TrainConfig,
    bench: Workbench,
    batch_size: int,
    *,
    folder: Path | None = None,
    clock: Clock = time.perf_counter,
) -> float:
    """Samples in a pass from which this machine's GPU is busy: read back, or probed.

    Args:
        config: What the study's trials have in common.
        bench: Its base is loaded already.
        batch_size: The smallest that trials may have.
        folder: Where results are kept; by default the cache.
        clock: Seconds.
    """
    key = _key(config, bench, batch_size)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = (folder or cache_folder() / "busy") / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # workers that start together measure once
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(file.read_text(encoding="utf-8"))["samples"])
        rates = _probe(config.model_copy(update={"batch_size": batch_size}), bench, clock)
        if not rates:
            log.warning("slots: no run came through the probe, so trials train one by one; --slots N packs them")
            return float(batch_size)
        samples = batch_size * _runs_worth_having(rates)
        told = ", ".join(f"{runs}: {rate:.1f}" for runs, rate in rates.items())
        log.info("slots: probed samples a second by runs of %d in a pass: %s", batch_size, told)
        content = {"samples": samples, "rates": {str(k): v for k, v in rates.items()}, "of": key}
        write_whole(file, json.dumps(content, indent=1))
    return samples


def _runs_worth_having(rates: Mapping[int, float]) -> int:
    """The runs of the last pass that was worth its doubling."""
    best = min(rates)
    for runs in sorted(rates)[1:]:
        if rates[runs] < GAIN * rates[best]:
            break
        best = runs
    return best


def _probe(config: TrainConfig, bench: Workbench, clock: Clock) -> dict[int, float]:
    """Samples a second by the number of runs in a pass; a pass that memory does not hold ends it.

    Empty if not even one run trained: it diverged, as runs do in float16, or memory does not hold one sample.
    """
    bench.inputs(config)  # vision outputs of all images are no part of the time
    began = clock()
    rates: dict[int, float] = {}
    for runs in RUNS:
        if rates and (clock() - began > LIMIT_S or _runs_worth_having(rates) < max(rates)):
            break
        seconds = seconds_of_a_round(config, bench, runs, clock)
        if seconds is None:
            break
        rates[runs] = runs * config.batch_size / max(seconds, 1e-9)
    return rates


def seconds_of_a_round(
    config: TrainConfig, bench: Workbench, runs: int = 1, clock: Clock = time.perf_counter
) -> float | None:
    """Seconds of one step of so many runs in a pass, recorded where passes are; None if memory does not hold them.

    Nor where it holds them only since steps are launched instead of recorded, or layers computed again; and None if a
    run ended: rounds of fewer runs would be timed, or of none.
    """
    from trainer import runtime
    from trainer.loop import Pack

    device = runtime.resolve_device(config.device)
    with tempfile.TemporaryDirectory() as folder, Pack(bench) as pack:
        for number in range(runs):
            # At a rate that lets no run diverge: a step takes as long.
            own = config.model_copy(update={"seed": number, "num_epochs": 1000, "learning_rate": 1e-9})
            pack.add(own, Path(folder) / str(number))
        seconds = _best_round(pack, device, clock)
        squeezed = pack.passes.squeezed or pack.passes.at_once is not None
        ended = len(pack.members) < runs
    return None if ended or (squeezed and runs > 1) else seconds


def _best_round(pack: Pack, device: torch.device, clock: Clock) -> float:
    """Seconds of a round: one step of every run. Rounds in which an epoch ended are timed once more."""
    from trainer.model.graphs import USES

    # The same batches each time, and first as often as it takes until their pass has been recorded, where passes are.
    for member in pack.members:
        member.hold()
    _rounds(pack, USES + 1, device)
    found: list[float] = []
    for _ in range(TRIES):
        began = clock()
        whole = _rounds(pack, ROUNDS, device)
        seconds = (clock() - began) / ROUNDS
        if whole:
            found.append(seconds)
        if len(found) == TIMES:
            break
    return min(found, default=seconds)


def _rounds(pack: Pack, number: int, device: torch.device) -> bool:
    """Make rounds and wait for the device; whether they were steps alone, without an evaluation."""
    import torch

    from trainer.events import EpochEnded

    steps_alone = True
    for _ in range(number):
        for _, event in pack.round():
            if isinstance(event, Exception):
                raise event
            steps_alone = steps_alone and not isinstance(event, EpochEnded)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return steps_alone


def _key(config: TrainConfig, bench: Workbench, batch_size: int) -> dict[str, Any]:
    """All that decides how busy the GPU is."""
    import torch
    import transformers

    from trainer import runtime

    device = runtime.resolve_device(config.device)
    base = bench.base(config)
    train_set, _ = bench.datasets(config)
    lengths = [len(t.qformer) + len(t.prompt) + len(t.target) for t in train_set.tokens]
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": base.fingerprint,
        "dtypes": [config.torch_dtype, config.dtype_of_base, config.matmul_precision],
        "deterministic": config.deterministic,  # which decides the kernels
        "adapted": sorted(config.target_modules),
        "rank": config.lora_r,
        "batch_size": batch_size,
        "vision": bench.uses_features(config),
        "tokens": round(sum(lengths) / len(lengths) / 10),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
