"""Part 3 of the check for a GPU: in which order searches are run, and what is said of those that time cuts off."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.benchmarks import configs
from tests.benchmarks.gpu import whole
from tests.benchmarks.gpu.check import main
from tests.benchmarks.gpu.report import Report
from tests.benchmarks.gpu.scene import Scene
from tests.benchmarks.sides import Bench, Ran, TrialLosses


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, where its database is read in-process
def test_searches_are_rehearsed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    code = main(
        ["--rehearse", "--budget", "850", "--parts", "3", "--model", str(tiny_checkpoint), "--json", str(file)]
    )
    found = json.loads(file.read_text())
    assert (code, found["failed"], found["not_reached"]) == (0, [], [])
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["search, screened", "search, peer", "search, ours", "search, fast"]
    assert all(row["trials"] == row["of"] == 3 and not row["extrapolated"] for row in rows.values())
    assert rows["search, ours"]["named"] and set(rows["search, ours"]["named"]) <= {"c00", "c01", "c02"}
    assert rows["search, screened"]["named"] and all(target["found"] is not None for target in found["targets"])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, kw_only=True)
class MadeUp(Bench):
    """Searches whose trials end one after the other, 20 seconds after the search has begun."""

    clock: Clock
    seconds: dict[str, float]
    """Of a trial, by search."""
    best: dict[str, int]
    """The trial with the lowest loss, by search."""
    begun: list[str]

    def _ran(self, name: str) -> Ran:
        self.begun.append(name)
        began, each = self.clock.now, self.seconds[name]
        assert self.limit_s is not None
        wall_s = min(20 + self.trials * each, self.limit_s)
        self.clock.now += wall_s + 1  # its databases are read
        trials = {}
        for i in range(int((wall_s - 20) / each)):
            times = {"began_at": began + 20 + i * each, "ended_at": began + 20 + (i + 1) * each}
            loss = 1.0 if i == self.best[name] else 2.0
            trials[f"c{i:02d}"] = TrialLosses(val=(loss,), first=(), state="COMPLETE", **times)
        return Ran(wall_s=wall_s, load=0, trials=trials, began_at=began, cut=wall_s == self.limit_s)

    def run_ours(self, name: str, pruner: str, *options: str) -> Ran:
        assert ("--confirm" in options) == (name == "screened")
        return self._ran(name)

    def run_peer(self, name: str, pruner: str, *options: str) -> Ran:
        return self._ran(name)


Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """(seconds that are left, {search: seconds of a trial}, search=its best trial) -> what part 3 finds."""

    def carry_out(left_s: float, seconds: dict[str, float], **best: int) -> dict[str, Any]:
        seconds = {"screened": 5, "peer": 120, "ours": 20, "fast": 3, **seconds}
        best = {"screened": 1, "peer": 1, "ours": 1, "fast": 1, **best}
        more = {"clock": Clock(), "seconds": seconds, "best": best, "begun": []}
        bench = MadeUp(folder=tmp_path, trials=8, ours=(), peer=(), **more)  # type: ignore[arg-type]
        monkeypatch.setattr(whole, "_prepare", lambda _: bench)
        monkeypatch.setattr(whole, "_named", lambda _, name: frozenset({f"c{best[name]:02d}"}))
        report = Report(left_s, None, {}, bench.clock)
        report.part("3", 1.0)
        whole.check(Scene(None, None, tmp_path, False, {}), report, None)  # type: ignore[arg-type]
        assert report.failed == []
        rows = {row["name"].removeprefix("search, "): row for row in report.rows}
        return {"begun": bench.begun, "rows": rows, "targets": report.targets, "not_reached": report.not_reached}

    return carry_out


def target(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [each for each in found["targets"] if each["name"].startswith(name)]
    return dict(one)


GAIN, EXACT_GAIN = "the peer's makespan over ours, screened", "the peer's makespan over ours, float32"
SAME, AS_EXACT = "the screened search names the peer's best", "the screened search names what the one in float32 does"


def test_the_peer_comes_before_what_the_targets_do_not_need(check: Check) -> None:
    found = check(2000, {})
    assert found["begun"] == ["screened", "peer", "ours", "fast"]
    gain = target(found, GAIN)
    assert (gain["name"], gain["limit"], gain["reached"]) == (GAIN, "at least 20", False)
    assert gain["found"] == pytest.approx((20 + 8 * 120) / 60)
    assert target(found, SAME)["reached"] and target(found, AS_EXACT)["reached"]


def test_the_winner_is_compared_with_the_peers_where_float32_is_not_reached(check: Check) -> None:
    found = check(390, {})
    assert found["begun"] == ["screened", "peer", "fast"]
    assert (found["rows"]["peer"]["trials"], found["rows"]["peer"]["extrapolated"]) == (2, True)
    assert found["rows"]["peer"]["makespan_s"] == pytest.approx(20 + 8 * 120)
    gain = target(found, GAIN)
    assert gain["name"].endswith("(the peer's extrapolated)") and gain["found"] == pytest.approx(980 / 60)
    assert target(found, SAME)["name"] == f"{SAME} of 2 trials" and target(found, SAME)["reached"]
    assert target(found, AS_EXACT)["found"] is None


def test_another_winner_misses_the_target(check: Check) -> None:
    assert target(check(2000, {}, peer=3), SAME)["reached"] is False
    assert target(check(390, {}, peer=0), SAME)["reached"] is False
    # Ours names one that the peer did not reach: of those that it did, the lowest.
    assert target(check(390, {}, screened=7, peer=0), SAME)["reached"]


def test_of_one_trial_there_is_no_best(check: Check) -> None:
    assert target(check(260, {}), SAME)["found"] is None


def test_a_search_that_time_cuts_off_leaves_a_row(check: Check) -> None:
    found = check(61 + 981 + 210, {"ours": 30})
    row = found["rows"]["ours"]
    assert (row["trials"], row["of"], row["extrapolated"], row["named"]) == (6, 8, True, [])
    assert row["spent_s"] == 210 and row["makespan_s"] == pytest.approx(20 + 190 * 8 / 6)  # rather too long
    assert found["not_reached"][0] == "search, ours: cut after 210 s, 6 of 8 trials had ended"
    assert target(found, EXACT_GAIN)["name"].endswith("(ours extrapolated)")
    assert target(found, AS_EXACT)["found"] is None


def test_a_peers_trial_that_was_cut_off_does_not_count(check: Check) -> None:
    row = check(61 + 300, {"peer": 150})["rows"]["peer"]
    assert (row["trials"], row["makespan_s"]) == (1, pytest.approx(20 + 8 * 150))


def test_repeats_that_were_not_made_are_not_guessed_at(check: Check) -> None:
    found = check(300, {"screened": 30})
    assert found["begun"][:2] == ["screened", "peer"]  # whose time was kept
    row = found["rows"]["screened"]
    assert (row["makespan_s"], row["extrapolated"], row["trials"]) == (None, False, 4)
    assert target(found, GAIN)["found"] is None


@pytest.mark.parametrize(("side", "study"), [("run_ours", configs.NAME), ("run_peer", "peer")])
def test_of_a_side_that_is_cut_the_trials_that_ended_are_read(
    side: str, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: Bench, name: str, command: Any) -> None:
        (tmp_path / name).mkdir()
        made = optuna.create_study(study_name=study, storage=f"sqlite:///{tmp_path / name / 'optuna.db'}")
        for i in range(4):
            made.enqueue_trial({}, user_attrs={"label": f"c{i:02d}"})
        for value in (0.7, 0.6):
            trial = made.ask()
            trial.report(value, 1)
            made.tell(trial, value)
        made.ask()  # runs; another waits
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(Bench, "_start", start)
    before = time.time()
    ran = getattr(Bench(folder=tmp_path, trials=4, ours=(), peer=(), limit_s=1), side)("cut", "none")
    assert ran.cut and {label: trial.val for label, trial in ran.trials.items()} == {"c00": (0.7,), "c01": (0.6,)}
    assert 0 <= ran.first_s <= ran.last_s <= time.time() - before


def test_a_side_that_is_cut_before_its_study_is_there_has_no_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: Bench, name: str, command: Any) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(Bench, "_start", start)
    ran = Bench(folder=tmp_path, trials=4, ours=(), peer=(), limit_s=1).run_ours("cut", "none")
    assert ran.cut and ran.trials == {}
