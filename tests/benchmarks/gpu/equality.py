"""Part 1: what is computed. Against HF and PEFT in each precision, alone and in packs; the same bits twice; faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import packing
from tests.benchmarks.bare import ready_batches
from tests.benchmarks.gpu.report import Report
from tests.benchmarks.gpu.scene import PRECISIONS, Scene
from tests.support import library_run
from tests.support.first_steps import apart, distance, first_steps
from trainer import runtime
from trainer.config import TrainConfig
from trainer.events import Event, StepEnded
from trainer.loop import Pack, train
from trainer.model import graphs, peak, stacked
from trainer.model.base import Forward, forward
from trainer.model.batch import Batch

STEPS = 3
BOUNDS = {"float32": (1e-5, 1e-3), "TF32": (5e-3, 5e-2), "bfloat16": (2e-2, 1e-1)}
"""(loss, gradient norm): largest relative difference from HF and PEFT in the same precision. TF32 has 10 bits behind
the point, bfloat16 7, and the libraries round the loss itself to bfloat16."""
PACKS = (1, 4, 8)


def check(scene: Scene, report: Report) -> None:
    """All of it, the most important first."""
    for precision in PRECISIONS:
        report.run(f"equality, {precision}", 18, lambda precision=precision: _equal(scene, report, precision))  # type: ignore[misc]
    report.run("determinism", 16, lambda: _deterministic(scene, report))
    for precision in ("bfloat16", "float32"):
        report.run(f"recorded, {precision}", 20, lambda precision=precision: _recorded(scene, report, precision))  # type: ignore[misc]
    report.run("NaN in one of a pack", 8, lambda: _nan(scene, report))
    report.run("out of memory", 12, lambda: _full(scene, report))
    report.run("adapters together", 14, lambda: _together(scene, report))


def _equal(scene: Scene, report: Report, precision: str) -> None:
    config = scene.config(precision, cache_features=False)
    runtime.prepare(config)
    batches = ready_batches(scene.bench, config)[:STEPS]
    theirs = library_run.run(scene.bench.library(config.dtype_of_base), config, batches)
    loss_bound, norm_bound = BOUNDS[precision]
    for k in PACKS:
        others = [scene.config(precision, cache_features=False, seed=i, lora_r=4 * (i % 4 + 1)) for i in range(1, k)]
        ours = first_steps(scene.bench, [config, *others], STEPS, scene.folder / f"equal-{precision}-{k}")[0]
        loss, norm = apart(ours.losses, theirs.losses), apart(ours.norms, theirs.norms)
        ok = loss <= loss_bound and norm <= norm_bound
        facts = {"loss": loss, "norm": norm, "adapter": distance(ours, theirs), "bound": loss_bound, "ok": ok}
        report.say(f"{precision}, pack of {k}, against HF + PEFT", **facts)


def _together(scene: Scene, report: Report) -> None:
    """Adapters of a pack computed together, and run by run: trainer.model.stacked."""
    configs = [scene.config(seed=i, lora_r=4 * (i % 4 + 1)) for i in range(8)]
    kept = stacked.STACKED
    try:
        stacked.STACKED = ("cpu", "cuda")
        together = first_steps(scene.bench, configs, STEPS, scene.folder / "together")
        stacked.STACKED = ()
        apiece = first_steps(scene.bench, configs, STEPS, scene.folder / "apiece")
    finally:
        stacked.STACKED = kept
    loss = max(apart(a.losses, b.losses) for a, b in zip(together, apiece, strict=True))
    norm = max(apart(a.norms, b.norms) for a, b in zip(together, apiece, strict=True))
    bound, norm_bound = BOUNDS["float32"]
    report.say(
        "adapters together and run by run", loss=loss, norm=norm, bound=bound, ok=loss <= bound and norm <= norm_bound
    )


def _recorded(scene: Scene, report: Report, precision: str) -> None:
    """Passes played from recordings: the bits of the same passes carried out, and the losses of passes without."""
    on_gpu = scene.device.type == "cuda"
    bound, _ = BOUNDS[precision]
    for sizes in ((4,), (2, 4, 8, 4)):
        configs = [
            scene.config(precision, batch_size=size, seed=i, lora_r=4 * (i + 1), lora_dropout=0.1 * (i % 2))
            for i, size in enumerate(sizes)
        ]
        found = {}
        for name, recorder in (("played", graphs.record_cuda), ("carried out", _carried_out), ("without", None)):
            kept = dict(graphs.RECORDERS)
            if recorder is not None and (on_gpu or recorder is _carried_out):
                graphs.RECORDERS[scene.device.type] = recorder
            try:
                out = scene.folder / f"recorded-{precision}-{len(sizes)}-{name}"
                found[name] = _held_steps(scene, configs, out, records=recorder is not None)
            finally:
                graphs.RECORDERS.clear()
                graphs.RECORDERS.update(kept)
        same = found["played"][:2] == found["carried out"][:2]
        loss = max(apart(a, b) for a, b in zip(found["played"][0], found["without"][0], strict=True))
        played = found["played"][2]
        report.say(
            f"recorded, {precision}, batches of {'+'.join(map(str, sizes))}",
            same_bits=same,
            recordings=played,
            loss=loss,
            bound=bound,
            ok=(same or not on_gpu) and loss <= bound and (played > 0) == on_gpu,
        )


def _carried_out(compute: Callable[[], torch.Tensor], *_: Any) -> graphs.Played:
    """In place of a recording: the computation itself at each play."""
    results = torch.empty(0)

    def play() -> None:
        results.data = compute()

    return results, play


def _held_steps(
    scene: Scene, configs: list[TrainConfig], out: Path, *, records: bool
) -> tuple[list[list[float]], list[list[float]], int]:
    """(Losses, sums of the weights of each run, recordings) after five steps of the same batches."""
    with Pack(scene.bench) as pack:
        pack.passes.records, pack.window = records, 1
        members = [pack.add(config, out / str(i)) for i, config in enumerate(configs)]
        packing.hold(pack)
        losses: list[list[float]] = [[] for _ in members]
        for _ in range(5):
            for member, event in pack.round():
                if isinstance(event, StepEnded):
                    losses[members.index(member)].append(event.loss)
        recordings = pack.passes.recordings if records else 0
        return losses, [member.adapter.weights.double().cumsum(0)[::997].tolist() for member in members], recordings


def _deterministic(scene: Scene, report: Report) -> None:
    for precision in ("float32", "bfloat16"):
        configs = [scene.config(precision, lora_dropout=0.1, seed=i) for i in range(2)]
        one, other = (
            first_steps(scene.bench, configs, STEPS, scene.folder / f"bits-{precision}-{i}") for i in range(2)
        )
        same = all(
            a.losses == b.losses and all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
            for a, b in zip(one, other, strict=True)
        )
        report.say(f"the same bits twice, {precision}", ok=same)


def _nan(scene: Scene, report: Report) -> None:
    kept, ended, rounds = _beside_nan(scene, "poisoned", poison=True)
    # A sound neighbour leaves after as many rounds: with another company, matrices have other numbers of rows, which
    # some processors (an AMD EPYC) sum in another order.
    healthy, _, _ = _beside_nan(scene, "sound", poison=False, leaves_after=rounds)
    report.say("NaN in one of a pack", others_unchanged=healthy == kept, ends_as=ended, ok=healthy == kept != [])
    report.say("what went NaN first is named", ok=ended.startswith("Diverged"), event=ended)


def _beside_nan(
    scene: Scene, name: str, *, poison: bool, leaves_after: int = 0
) -> tuple[list[tuple[float, float]], str, int]:
    """(loss and norm of a run's steps, the end of its neighbour, the rounds that this one was there), whose weights
    become NaN, or who is dropped after so many rounds."""
    configs = [scene.config(seed=1), scene.config(seed=2)]
    found, end, rounds = [], "", 0
    with Pack(scene.bench) as pack:
        members = [pack.add(config, scene.folder / name / str(i)) for i, config in enumerate(configs)]
        if poison:
            members[1].adapter.weights[0] = float("nan")
        for _ in range(8):  # a window on a GPU
            rounds += members[1] in pack.members
            for member, event in pack.round():
                if member is members[0] and isinstance(event, StepEnded):
                    found.append((event.loss, event.grad_norm))
                elif member is members[1] and type(event).__name__ == "Diverged":
                    end = str(event)[:200]
            if rounds == leaves_after:
                pack.remove(members[1])
    return found, end, rounds


def _full(scene: Scene, report: Report) -> None:
    config = scene.config(batch_size=16, num_epochs=1)
    fits = _steps(scene, config, "fits")
    limited, events = _with_little_memory(scene, config)
    agree = bool(fits) and len(fits) == len(limited) and apart(limited, fits) < 1e-4
    report.say("out of memory, survived", events=", ".join(dict.fromkeys(events)) or "layers again", ok=agree)


def _steps(scene: Scene, config: TrainConfig, name: str, **more: Any) -> list[float]:
    return [e.loss for e in _events(scene, config, scene.folder / name, **more) if isinstance(e, StepEnded)][:STEPS]


def _events(scene: Scene, config: TrainConfig, out: Path, **more: Any) -> list[Event]:
    """The events of a run until it has made some steps."""
    found: list[Event] = []
    run = train(config, scene.bench, out, **more)
    for event in run:
        found.append(event)
        if sum(isinstance(each, StepEnded) for each in found) >= STEPS:
            break
    run.close()  # type: ignore[attr-defined]
    return found


def _with_little_memory(scene: Scene, config: TrainConfig) -> tuple[list[float], list[str]]:
    """(losses, other events) with room for half of what the step keeps; a CPU's memory is only said to be full."""
    seen: list[Event] = []
    if scene.device.type == "cuda":
        kept = peak.estimate(scene.sizes, [config], peak.TYPICAL, weights=0).kept
        total = torch.cuda.get_device_properties(scene.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + kept / 2) / total)
        try:
            seen = _events(scene, config, scene.folder / "limited")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        seen = _events(scene, config, scene.folder / "limited", forward=_hungry(8))
    names = [type(event).__name__ for event in seen if not isinstance(event, StepEnded)]
    return [event.loss for event in seen if isinstance(event, StepEnded)][:STEPS], names


def _hungry(most: int) -> Callable[[Any, Batch], Forward]:
    def full(model: Any, batch: Batch) -> Forward:
        if torch.is_grad_enabled() and len(batch) > most:
            raise torch.OutOfMemoryError("said to be full")
        return forward(model, batch)

    return full
