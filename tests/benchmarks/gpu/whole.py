"""Part 3: a whole search against the peer's, in one run: makespan, and whether both name the same winner."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

from tests.benchmarks import configs
from tests.benchmarks.gpu.report import Report
from tests.benchmarks.gpu.scene import Scene
from tests.benchmarks.sides import ROOT, Bench, Ran

TRIALS, EPOCHS = 8, 2
START_S = 40
"""Seconds that a trial of the peer takes before its first step: imports and 16 GB of weights. An assumption, which
decides how many of its trials are run in the time that is left."""


def begin_checkpoint(scene: Scene) -> subprocess.Popen[bytes] | None:
    """Write the checkpoint that the searches load, on the CPU beside everything else; None for the embedded model."""
    if scene.rehearsed:
        return None
    code = (
        "import sys; from pathlib import Path; from tests.benchmarks import xl; "
        "xl.build_checkpoint(Path(sys.argv[1]), None)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "8"}
    return subprocess.Popen([sys.executable, "-c", code, str(scene.folder / "checkpoint")], cwd=ROOT, env=environment)


def check(scene: Scene, report: Report, checkpoint: subprocess.Popen[bytes] | None) -> None:
    """Ours screened in bfloat16, as many of the peer's trials as there is time for, ours in bfloat16 and float32."""
    if checkpoint is not None and not report.run("the checkpoint is written", 60, lambda: _wait(checkpoint, report)):
        return
    bench = _prepare(scene)
    # The makespan's target first: on an H200 a search in float32 takes more than two minutes, of three that are left.
    screened = report.run(
        "ours, screened in bfloat16",
        90 if not scene.rehearsed else 5,
        lambda: _ours(scene, bench, report, "screened", "--set", "screen=bfloat16"),
    )
    peer = report.run("the peer", START_S + 30 if not scene.rehearsed else 5, lambda: _peer(scene, bench, report))
    report.run(
        "ours, bfloat16",
        45 if not scene.rehearsed else 5,
        lambda: _ours(scene, bench, report, "fast", "--set", "base_dtype=bfloat16", confirm=False),
    )
    exact = report.run("ours, float32", 140 if not scene.rehearsed else 5, lambda: _ours(scene, bench, report, "ours"))
    report.run("targets of searches", 0, lambda: _targets(report, exact, screened, peer))


def _wait(process: subprocess.Popen[bytes], report: Report) -> bool:
    if process.wait(report.left() - 30):
        raise RuntimeError("the checkpoint was not written")
    return True


def _prepare(scene: Scene) -> Bench:
    """The study file, with `rsicap`'s ranges."""
    folder = scene.folder / "whole"
    folder.mkdir()
    if scene.rehearsed:
        scale, trials = configs.SCALES["mini"], 3
        base: dict[str, Any] = {**scene.fields, "num_epochs": 1}
    else:
        scale, trials = configs.SCALES["xl"], TRIALS
        base = {"model": str(scene.folder / "checkpoint"), "data": scene.fields["data"], "max_samples": 256}
        base |= {"num_epochs": EPOCHS, "device": "cuda"}
    bench = Bench(folder=folder, trials=trials, ours=("--slots", "auto", "--workers", "1"), peer=("--jobs", "1"))
    text = configs.study_text(scale, trials, 0, base, max_rate=3e-4)
    bench.study_file.write_text(text, encoding="utf-8")
    configs.write_rows(bench.definition().base_config(), bench.rows)
    return bench


def _ours(scene: Scene, bench: Bench, report: Report, name: str, *options: str, confirm: bool | None = None) -> Ran:
    confirm = ("--confirm",) if confirm is None and options else ()
    ran = replace(bench, limit_s=report.left()).run_ours(name, "none", *confirm, *options)
    facts = {"makespan_s": ran.wall_s, "trials": bench.trials, "best": ran.best, "named": _named(bench, name)}
    report.say(f"search, {name}", **facts)
    return ran


def _named(bench: Bench, name: str) -> set[int]:
    """The trials that the search names: those that its verdict cannot tell apart, else the lowest loss."""
    from search.storage import lifecycle, studies
    from search.storage.database import close_storage, open_storage
    from search.verdict.leaders import verdict_of, winner

    storage = open_storage(f"sqlite:///{bench.folder / name / 'optuna.db'}")
    try:
        study = studies.find_study(storage, configs.NAME)
        trials = lifecycle.read_trials(study)
        verdict = verdict_of(trials, study.user_attrs)
        named = winner(trials, verdict)
        return {*(verdict.tied if verdict else ()), *([named.number] if named else [])}
    finally:
        close_storage(storage)


def _peer(scene: Scene, bench: Bench, report: Report) -> tuple[float, int, Ran]:
    """(makespan, trials that were run, what they came to); the makespan is extrapolated where not all were."""
    known = next((row for row in report.rows if row["name"] == "HF Trainer + PEFT, float32, 4"), None)
    a_trial = START_S + (EPOCHS * 256 / known["samples_per_s"] if known else 30)
    number = bench.trials if scene.rehearsed else max(1, min(bench.trials, int(report.left() / a_trial)))
    few = replace(bench, trials=number, limit_s=report.left())
    began = time.perf_counter()
    ran = few.run_peer("peer", "none")
    spent = time.perf_counter() - began
    whole = spent * bench.trials / number
    report.say("search, peer", makespan_s=whole, trials=number, best=ran.best, extrapolated=number < bench.trials)
    return whole, number, ran


def _targets(report: Report, exact: Ran | None, screened: Ran | None, peer: tuple[float, int, Ran] | None) -> None:
    for name, ran in (("float32", exact), ("screened", screened)):
        gain = peer[0] / ran.wall_s if ran is not None and peer is not None else None
        wanted = 20.0 if name == "screened" else 1.0
        report.target(f"the peer's makespan over ours, {name}", gain, wanted)
    named = [row["named"] for row in report.rows if row["name"] in ("search, ours", "search, screened")]
    if len(named) == 2:
        report.target("the screened search names what the one in float32 does", float(named[0] <= named[1]), 1)
