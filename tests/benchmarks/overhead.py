"""What ours adds to the arithmetic: `python -m tests.benchmarks.overhead [step forward tracking start trials]`.

    step       our training loop against the least PyTorch loop of the same arithmetic
    forward    a training pass: ours, ours without kept vision features, the library's own, that with eager attention
    tracking   a run recorded in full against the same run not recorded
    start      from the start of a process to its first optimizer step
    trials     search and tracking alone, trial 10 against trial 1,000

Sides are measured in turn, epoch by epoch or run by run; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from search.tracking.client import Tracking, open_tracking
from tests.benchmarks import configs
from tests.benchmarks.bare import Bare, bare_loop, ready_batches, synchronize
from tests.benchmarks.peer import load_model
from tests.benchmarks.sides import ROOT, machine
from tests.benchmarks.trial_cost import measure_trials
from tests.support.library_run import library_inputs
from trainer.config import TrainConfig
from trainer.events import CheckpointSaved, Event, StepEnded
from trainer.loop import train
from trainer.model.base import forward
from trainer.model.batch import Batch
from trainer.workbench import Workbench

SECTIONS = ("step", "forward", "tracking", "start", "trials")


def measure_step(config: TrainConfig, epochs: int) -> None:
    """Our loop and the bare one, an epoch each in turn, on the same batches in the same order."""
    ours_bench, bare_bench = Workbench(), Workbench()  # a base each: an adapter on one is none on the other
    ready = [ready_batches(bare_bench, config, epoch) for epoch in range(1, epochs + 2)]
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder, bare_loop(bare_bench, config) as loop:
        run = train(config.model_copy(update={"num_epochs": epochs + 1}), ours_bench, Path(folder))
        for number in range(epochs + 1):
            seconds = _our_epoch(run)
            other = loop.epoch(ready[number])
            if number:  # the first warms up
                ours.append(seconds)
                bare.append(other)
    steps = len(ready[0])
    ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
    per_step = [1e3 * statistics.median(each) / steps for each in (ours, bare)]
    print(f"step, batch {config.batch_size}, {steps} steps an epoch, {epochs} epochs each in turn")
    print(f"  ours {per_step[0]:8.2f} ms   bare {per_step[1]:8.2f} ms")
    print(f"  ratio {statistics.median(ratios):.3f} (by epoch {ratios[0]:.3f} to {ratios[-1]:.3f})")


def _our_epoch(run: Iterator[Event]) -> float:
    """Seconds from where the run was left to its next epoch's last step; then evaluation and checkpoint, untimed."""
    began = last = time.perf_counter()
    for event in run:
        if isinstance(event, StepEnded):
            last = time.perf_counter()
        if isinstance(event, CheckpointSaved):
            break
    return last - began


def measure_forward(config: TrainConfig, rounds: int) -> None:
    """A forward and backward pass, with one saving taken away after the other; no optimizer."""
    bench = Workbench()
    kept = ready_batches(bench, config)
    pixels = ready_batches(Workbench(), config.model_copy(update={"cache_features": False}))
    device = bench.base(config).device
    with ExitStack() as stack:
        loop = stack.enter_context(bare_loop(bench, config))
        sides: dict[str, Callable[[int], torch.Tensor]] = {
            "ours": lambda i: _loss(loop, kept[i]),
            "ours, vision tower in each pass": lambda i: _loss(loop, pixels[i]),
        }
        for name, attention in (("library, all logits", None), ("library, all logits, eager attention", "eager")):
            model = load_model(config)[0].to(device)
            if attention is not None:
                model.get_base_model().set_attn_implementation(attention)
            sides[name] = _library_pass(model, pixels)
        found: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, float] = {}
        for turn in range(rounds + 1):
            for name, side in sides.items():
                synchronize()
                began = time.perf_counter()
                loss = side(turn % len(kept))
                loss.backward()
                synchronize()
                if turn:
                    found[name].append(time.perf_counter() - began)
                else:
                    losses[name] = float(loss.detach())
    print(f"forward and backward, batch {config.batch_size}, median of {rounds} in turn")
    first = statistics.median(found["ours"])
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        print(f"  {name:<40} {1e3 * middle:9.2f} ms  {middle / first:5.2f}   loss {losses[name]:.6f}")


def _loss(loop: Bare, batch: Batch) -> torch.Tensor:
    return forward(loop.model, batch).loss_sum / batch.num_tokens()


def _library_pass(model: Any, ready: Sequence[Batch]) -> Callable[[int], torch.Tensor]:
    config = model.get_base_model().config
    tokens, queries = int(config.image_token_index), int(config.num_query_tokens)

    def run(number: int) -> torch.Tensor:
        inputs = library_inputs(ready[number], image_token=tokens, num_query_tokens=queries)
        return model.train()(**inputs).loss  # type: ignore[no-any-return]

    return run


def measure_tracking(config: TrainConfig, repeat: int) -> None:
    """Whole runs with a recorder and without, in turn, on SQLite."""
    bench = Workbench()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracking = open_tracking(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts")
        _run_once(config, bench, folder / "warm", None)
        off, on, rest = [], [], []
        for turn in range(repeat):
            off.append(_run_once(config, bench, folder / f"off-{turn}", None)[0])
            seconds, around = _run_once(config, bench, folder / f"on-{turn}", tracking)
            on.append(seconds)
            rest.append(around)
    ratio = statistics.median(a / b for a, b in zip(on, off, strict=True))
    print(f"tracking, batch {config.batch_size}, {config.num_epochs} epochs, {repeat} runs each in turn")
    print(f"  off {statistics.median(off):8.3f} s   on {statistics.median(on):8.3f} s   ratio {ratio:.3f}")
    print(f"  beside it, once a run: opening and ending it {1e3 * statistics.median(rest):.0f} ms")


def _run_once(config: TrainConfig, bench: Workbench, out: Path, tracking: Tracking | None) -> tuple[float, float]:
    """(seconds of training, seconds to open and end the record) of one run."""
    around = time.perf_counter()
    recorder: Any = lambda event: None  # noqa: E731 - the sink of a run that is not recorded
    if tracking is not None:
        experiment = tracking.experiment("overhead")
        parent = tracking.parent_run("overhead", {})
        run_id = tracking.start_run(experiment, parent, name=out.name, config=config.model_dump(), tags={})
        recorder = tracking.recorder(run_id)
    began = time.perf_counter()
    for event in train(config, bench, out):
        recorder(event)
    ended = time.perf_counter()
    if tracking is not None:
        recorder.finish("FINISHED", state="COMPLETE")
    return ended - began, time.perf_counter() - ended + began - around


ONE_STEP = """
import json, sys
from pathlib import Path
from trainer.workbench import Workbench
from trainer.config import TrainConfig
from trainer.events import StepEnded
from trainer.loop import train
for event in train(TrainConfig.parse(json.loads(Path(sys.argv[1]).read_text())), Workbench(), Path(sys.argv[2])):
    if isinstance(event, StepEnded):
        print("first step", flush=True)
        break
"""


def measure_start(config: TrainConfig, repeat: int) -> None:
    """Processes of both sides until their first step. An epoch is made one step, so that its line tells of it.

    The first search of ours finds no vision features and computes them; the others find them.
    """
    config = config.model_copy(update={"max_samples": 10, "batch_size": 16, "num_epochs": 1})
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "bench.py"
        scale = configs.Scale(base={}, batch=(16, 16), warmup=0, tolerance=0)
        fixed = {key: getattr(config, key) for key in ("model", "data", "max_samples", "batch_size", "num_epochs")}
        file.write_text(configs.study_text(scale, 1, 0, fixed), encoding="utf-8")
        (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        configs.write_rows(config, folder / "rows.json")
        for turn in range(repeat):
            for side, seconds in _starts(folder, file, turn).items():
                found.setdefault(side, []).append(seconds)
    print(f"start of the process to the end of the first step, median of {repeat} in turn")
    for side, each in found.items():
        print(f"  {side:<44} {statistics.median(each):6.2f} s   [{' '.join(f'{s:.2f}' for s in each)}]")


def _starts(folder: Path, file: Path, turn: int) -> dict[str, float]:
    rows = ["--rows", folder / "rows.json"]
    config = ["--config", folder / "config.json"]
    peer_out, search_out = folder / f"peer-{turn}", folder / f"search-{turn}"
    shared = ["--study", file, "--trials", 1, "--runs-dir"]
    tracked = ["--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    return {
        "our trainer": _until(["-c", ONE_STEP, folder / "config.json", folder / f"out-{turn}"], "first step"),
        "our search, fresh databases": _until(["-m", "search.run", *shared, search_out], "Val="),
        "peer, one trial, database there": _until(
            ["-m", "tests.benchmarks.peer", *config, *rows, "--trial", 0, "--out", peer_out, *tracked], "'loss'"
        ),
        "peer's search, fresh databases": _until(
            ["-m", "tests.benchmarks.peer_study", *shared, folder / f"peers-{turn}", *rows],
            "'loss'",
            folder / f"peers-{turn}" / "trial-000" / "output.txt",
        ),
    }


def _until(arguments: Sequence[Any], text: str, file: Path | None = None) -> float:
    """Seconds until a process has written `text` to its output, or to `file`; it is then left to end.

    Raises:
        SystemExit: it ended without.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile() as own:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, stdout=own, stderr=subprocess.STDOUT
        )
        watched = file or Path(own.name)
        while not (watched.is_file() and text in watched.read_text(encoding="utf-8", errors="replace")):
            if process.poll() is not None and text not in watched.read_text(encoding="utf-8", errors="replace"):
                raise SystemExit(f"no {text!r} in the output of {arguments}:\n{Path(own.name).read_text()[-2000:]}")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.wait()
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}; all without")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads")
    parser.add_argument("--epochs", type=int, default=9, help="of `step`, on each side")
    parser.add_argument("--repeat", type=int, default=3, help="of `tracking` and `start`")
    parser.add_argument("--rounds", type=int, default=30, help="of `forward`")
    parser.add_argument("--trials", type=int, default=1_000, help="of `trials`")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(options.threads)
    base = {"max_samples": 160, "num_epochs": 3, "lora_dropout": 0.0, "warmup_steps": 0}
    config = TrainConfig.parse_settings(options.set, base)
    print(json.dumps(machine()))
    wanted = options.sections or SECTIONS
    if "step" in wanted:
        measure_step(config, options.epochs)
    if "forward" in wanted:
        measure_forward(config, options.rounds)
    if "tracking" in wanted:
        measure_tracking(config, options.repeat)
    if "start" in wanted:
        measure_start(config, options.repeat)
    if "trials" in wanted:
        measure_trials(options.trials)


if __name__ == "__main__":
    main()
