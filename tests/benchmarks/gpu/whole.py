"""Part 3: whole searches against the peer's: makespan, and whether both name the same winner."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks import configs
from tests.benchmarks.gpu.report import Report
from tests.benchmarks.gpu.scene import Scene
from tests.benchmarks.sides import ROOT, Bench, Ran, TrialLosses

TRIALS, EPOCHS, IMAGES = 8, 2, 256
START_S, PEERS_RATE = 40, 5.5
"""Seconds that a trial of the peer takes before its first step (imports and 16 GB of weights: an assumption), and the
samples a second that it then trains, where part 2 has not measured them (an H200's): by these it is decided how many
of its trials are run in the time that is left."""
SCREENED_S, EXACT_S, FAST_S = 90, 140, 45
"""Seconds that our searches take at least, on an H200 by the times of steps."""


@dataclass(frozen=True)
class Search:
    """What a search has come to."""

    ran: Ran
    makespan_s: float | None
    """None where it was cut and cannot be extrapolated."""
    extrapolated: bool
    named: frozenset[str] = frozenset()
    """Labels of the trials that it names, if it came to its end."""


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
    """Ours screened in bfloat16, and the peer: the targets are theirs; then ours in float32, and in bfloat16 alone."""
    if checkpoint is not None and not report.run("the checkpoint is written", 60, lambda: _wait(checkpoint, report)):
        return
    bench = _prepare(scene)
    a_trial, *ours_s = (5, 5, 5, 5) if scene.rehearsed else (_peers_trial_s(report), SCREENED_S, EXACT_S, FAST_S)
    # The peer keeps the time of a trial, and some for the ending of ours: one without the other says nothing.
    screened = report.run(
        "ours, screened in bfloat16",
        ours_s[0],
        lambda: _ours(bench, report, "screened", "--confirm", "--set", "screen=bfloat16", keep_s=a_trial + 10),
    )
    peer = report.run("the peer", a_trial, lambda: _peer(bench, report, a_trial))
    exact = report.run("ours, float32", ours_s[1], lambda: _ours(bench, report, "ours"))
    report.run("ours, bfloat16", ours_s[2], lambda: _ours(bench, report, "fast", "--set", "base_dtype=bfloat16"))
    # Also when the last search was cut where the time ended.
    report.run("targets of searches", -math.inf, lambda: _targets(report, bench.trials, screened, peer, exact))


def _peers_trial_s(report: Report) -> float:
    known = next((row for row in report.rows if row["name"] == "HF Trainer + PEFT, float32, 4"), {})
    return float(START_S + EPOCHS * IMAGES / known.get("samples_per_s", PEERS_RATE))


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
        base = {"model": str(scene.folder / "checkpoint"), "data": scene.fields["data"], "max_samples": IMAGES}
        base |= {"num_epochs": EPOCHS, "device": "cuda"}
    bench = Bench(folder=folder, trials=trials, ours=("--slots", "auto", "--workers", "1"), peer=("--jobs", "1"))
    text = configs.study_text(scale, trials, 0, base, max_rate=3e-4)
    bench.study_file.write_text(text, encoding="utf-8")
    configs.write_rows(bench.definition().base_config(), bench.rows)
    return bench


def _ours(bench: Bench, report: Report, name: str, *options: str, keep_s: float = 0.0) -> Search:
    """Our search; cut where the time ends, less what is to be kept. With repeats a cut one is not extrapolated."""
    limit_s = max(report.left() - keep_s, min(report.left(), SCREENED_S))
    ran = replace(bench, limit_s=limit_s).run_ours(name, "none", *options)
    makespan_s: float | None = ran.wall_s
    if ran.cut:  # what the others had done until then counts for nothing: rather too long than too short
        makespan_s = None if "--confirm" in options else _extrapolated(ran, ran.wall_s, bench.trials)
    named = frozenset[str]() if ran.cut else _named(bench, name)
    return _say(report, name, bench.trials, Search(ran, makespan_s, ran.cut and makespan_s is not None, named))


def _peer(bench: Bench, report: Report, a_trial: float) -> Search:
    """As many of the peer's trials as there is time for; the makespan is extrapolated where not all have ended."""
    number = max(1, min(bench.trials, int(report.left() / a_trial)))
    ran = replace(bench, trials=number, limit_s=report.left()).run_peer("peer", "none")
    if len(ran.trials) == bench.trials and not ran.cut:
        return _say(report, "peer", bench.trials, Search(ran, ran.wall_s, False))
    makespan_s = _extrapolated(ran, ran.last_s, bench.trials) if ran.trials else None
    return _say(report, "peer", bench.trials, Search(ran, makespan_s, makespan_s is not None))


def _extrapolated(ran: Ran, until_s: float, trials: int) -> float | None:
    """Seconds of so many trials, if all come at the pace of those that have ended until then; None if none has."""
    if not ran.trials:
        return None
    return ran.first_s + (until_s - ran.first_s) * trials / len(ran.trials)


def _say(report: Report, name: str, trials: int, found: Search) -> Search:
    ran = found.ran
    facts = {"makespan_s": found.makespan_s, "extrapolated": found.extrapolated, "spent_s": ran.wall_s}
    facts |= {"trials": len(ran.trials), "of": trials, "best": ran.best if ran.trials else None}
    report.say(f"search, {name}", **facts, named=sorted(found.named))
    if ran.cut:
        ended = f"{len(ran.trials)} of {trials} trials had ended"
        report.not_reached.append(f"search, {name}: cut after {ran.wall_s:.0f} s, {ended}")
    return found


def _named(bench: Bench, name: str) -> frozenset[str]:
    """The trials that the search names: those that its verdict cannot tell apart, else the lowest loss."""
    from search import records
    from search.storage import lifecycle, studies
    from search.storage.database import close_storage, open_storage
    from search.verdict.leaders import verdict_of, winner

    storage = open_storage(f"sqlite:///{bench.folder / name / 'optuna.db'}")
    try:
        study = studies.find_study(storage, configs.NAME)
        trials = lifecycle.read_trials(study)
        verdict = verdict_of(trials, study.user_attrs)
        named = winner(trials, verdict)
        numbers = {*(verdict.tied if verdict else ()), *([named.number] if named else [])}
        return frozenset(trial.attrs[records.LABEL] for trial in trials if trial.number in numbers)
    finally:
        close_storage(storage)


def _targets(report: Report, trials: int, screened: Search | None, peer: Search | None, exact: Search | None) -> None:
    for name, ours, wanted in (("screened", screened, 20.0), ("float32", exact, 1.0)):
        gain, said = None, ""
        if ours and peer and ours.makespan_s and peer.makespan_s:
            gain = peer.makespan_s / ours.makespan_s
            guessed = [who for who, found in (("the peer's", peer), ("ours", ours)) if found.extrapolated]
            said = f" ({' and '.join(guessed)} extrapolated)" if guessed else ""
        report.target(f"the peer's makespan over ours, {name}{said}", gain, wanted)
    same, of = None, ""
    if screened and peer and screened.named and len(peer.ran.trials) > 1:
        theirs = peer.ran.trials
        # Of fewer than all, those that ours names may be missing: then the lowest of the same trials is asked for.
        named = screened.named & set(theirs) or {_lowest({label: screened.ran.trials[label] for label in theirs})}
        same, of = float(_lowest(theirs) in named), f" of {len(theirs)} trials" if len(theirs) < trials else ""
    report.target(f"the screened search names the peer's best{of}", same, 1)
    same = float(exact.named <= screened.named) if exact and screened and exact.named and screened.named else None
    report.target("the screened search names what the one in float32 does", same, 1)


def _lowest(trials: Mapping[str, TrialLosses]) -> str:
    return min(trials, key=lambda label: trials[label].best)
