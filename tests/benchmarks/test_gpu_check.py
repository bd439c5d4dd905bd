"""The check for a GPU, rehearsed: its parts on a small model, its clock, its wheels."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.benchmarks.gpu import equality, scene, steps, wheels
from tests.benchmarks.gpu.check import main
from tests.benchmarks.gpu.report import Report
from tests.benchmarks.gpu.scene import twin
from tests.benchmarks.sides import Bench
from tests.support.tiny import tiny_model


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer of everything; determinism as it was afterwards."""
    fewer = {name: scene.PRECISIONS[name] for name in ("float32", "bfloat16")}
    monkeypatch.setattr(equality, "PRECISIONS", fewer)
    monkeypatch.setattr(equality, "PACKS", (2,))
    monkeypatch.setattr(equality, "STEPS", 2)
    rows = (("ours", "bfloat16", 4, 2), ("HF", "bfloat16", 4, 1), ("attention", "float32", 4, 1))
    rows = (*rows, ("adapters", "bfloat16", 4, 8))
    monkeypatch.setattr(steps, "FIRST", rows)
    monkeypatch.setattr(steps, "FURTHER", ())
    monkeypatch.setattr(steps, "CPU_ROUNDS", 1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.long
def test_what_is_computed_is_rehearsed(short: None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    code = main(["--rehearse", "--parts", "1", "--model", str(tiny_checkpoint), "--json", str(file)])
    found = json.loads(file.read_text())
    assert (code, found["failed"], found["not_reached"]) == (0, [], [])
    rows = {row["name"]: row for row in found["rows"]}
    assert {"float32, pack of 2, against HF + PEFT", "the same bits twice, bfloat16", "out of memory, survived"} <= {
        *rows
    }
    assert all(row["ok"] for row in rows.values())


@pytest.mark.long
def test_steps_are_rehearsed(short: None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    assert main(["--rehearse", "--parts", "2", "--model", str(tiny_checkpoint), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["failed"] == [] and found["machine"]["rehearsal"] is True
    names = [row["name"] for row in found["rows"]]
    assert "adapters together, bfloat16, 8 x 4" in names
    assert "HF Trainer + PEFT, bfloat16, 4" in names and "ours, bfloat16, 2 x 4" in names
    assert [target["reached"] for target in found["targets"]] == [None] * 3  # of a rehearsal they mean nothing


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_there_is_no_time_for_is_said_and_the_rest_goes_on(tmp_path: Path, capsys: Any) -> None:
    clock, file = Clock(), tmp_path / "report.json"
    report = Report(100, file, {"gpu": "made up"}, clock)

    def taking(seconds: float) -> str:
        clock.now += seconds
        return "done"

    def broken() -> None:
        raise RuntimeError("CUDA error: made up\nmore")

    def ends() -> None:
        raise SystemExit("the peer ended with exit code 1")

    report.part("1", 0.5)
    assert report.run("first", 10, lambda: taking(45)) == "done"
    assert report.run("second", 10, lambda: taking(45)) is None
    report.part("2", 1.0)
    assert report.run("broken", 1, broken) is None
    assert report.run("side", 1, ends) is None
    assert report.run("third", 50, lambda: taking(60)) == "done"
    report.say("row", ok=False)
    report.target("speed", 3.0, 4)
    report.target("memory", 0.1, 0.15, at_most=True)
    report.target("unknown", None, 1)
    assert report.run("fourth", 1, lambda: taking(1)) is None
    assert report.end() == 1
    found = json.loads(file.read_text())
    assert [text.partition(":")[0] for text in found["not_reached"]] == ["second", "fourth"]
    ended = "side: SystemExit: the peer ended with exit code 1"
    assert found["failed"] == ["broken: RuntimeError: CUDA error: made up", ended]
    assert [target["reached"] for target in found["targets"]] == [False, True, None]
    said = capsys.readouterr().out
    assert "wrong: row" in said and "targets missed: speed" in said and "not reached: second: 5 s were left" in said


def test_a_twin_shares_its_weights_in_its_own_dtype_alone() -> None:
    model = tiny_model("t5")
    same, lower = twin(model, torch.float32), twin(model, torch.bfloat16)
    assert same.query_tokens is model.query_tokens and same.qformer is not model.qformer
    assert {p.dtype for p in lower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in lower.parameters())


def wheel(folder: Path, name: str, *needs: str) -> None:
    lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as parts:
        parts.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}")


def test_a_wheel_that_needs_what_nobody_brings_is_named(tmp_path: Path) -> None:
    wheel(tmp_path, "one_thing", "Other.Thing>=1", "numpy", 'tomli; python_version < "3.11"', 'x; extra == "more"')
    wheel(tmp_path, "other_thing", "lost (>=2)")
    assert list(wheels.missing(tmp_path)) == [
        "other-thing needs lost>=2, which is neither in the folder nor on the machine"
    ]
    assert not {wheels.plain(name) for name in wheels.WANTED} & wheels.THERE


def test_a_side_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(50)']); "
    child += "time.sleep(50)"
    limited = Bench(folder=tmp_path, trials=1, ours=(), peer=(), limit_s=1.5)
    before = {process.pid for process in psutil.process_iter()}
    with pytest.raises(subprocess.TimeoutExpired):
        limited._start("slow", ["-c", child])
    left = [p for p in psutil.process_iter(["pid", "cmdline"]) if p.pid not in before]
    sleeping = [p for p in left if "time.sleep(50)" in " ".join(p.info["cmdline"] or ())]
    _, alive = psutil.wait_procs(sleeping, timeout=20)  # a signal takes a moment on a busy machine
    assert not alive
