"""`python -m trainer.run`: its output and exit codes; wrong input writes nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import called
from tests.support.called import Outcome
from trainer import run

EPOCH = r"Epoch {}: Train=\d+\.\d{{4}}, Val=\d+\.\d{{4}}  \(rate \d\.\d\de-\d\d, gradient norm [\d.]+, \d+\.\d s\)"


Call = Callable[..., Outcome]


@pytest.fixture
def call() -> Call:
    """`call(*arguments, out=folder)`: the command within this process."""

    def call(*arguments: str, out: Path) -> Outcome:
        return called.call(run.app, [*arguments, "--out", str(out)])

    return call


def small(**fields: object) -> list[str]:
    values = {"max_samples": 12, "num_epochs": 2, "device": "cpu", **fields}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.long
def test_a_run_of_the_embedded_model_and_its_continuation(tmp_path: Path, call: Call) -> None:
    command = [sys.executable, "-W", "error", "-m", "trainer.run", *small(), "--out", str(tmp_path / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert (first.returncode, first.stderr) == (0, "")
    lines = of_the_run(first.stdout)
    assert re.fullmatch(r"\d+ training and \d validation samples, \d+ steps; LoRA on 40 modules, .* cpu", lines[0])
    for number in (1, 2):
        assert re.fullmatch(EPOCH.format(number), lines[number])
    best = re.fullmatch(r"Best: epoch \d, Val=(\S+); adapter in (.*)", lines[3])
    assert best
    assert (Path(best[2]) / "adapter_config.json").is_file()
    assert f"Val={best[1]}" in first.stdout
    assert len(lines) == 4
    again = call(*small(), out=tmp_path / "out")
    assert again.code == 0
    told = of_the_run(again.out)
    assert told[:2] == [f"{line}  (from the checkpoint)" for line in without_seconds(told[:2], lines[1:3])]
    assert told[3] == lines[3]
    other = call(*small(lora_r=2), out=tmp_path / "out")
    assert (other.code, other.out) == (2, "")
    assert "another configuration (lora_r: 8 there, 2 now)" in other.err


def of_the_run(printed: str) -> list[str]:
    """The lines printed, without those about data and split, which come before."""
    return [
        line for line in printed.splitlines() if not re.match("rows used|split by|captions: |prompts: |warning", line)
    ]


def without_seconds(told: list[str], printed: list[str]) -> list[str]:
    """The printed lines with the seconds of those told: the checkpoint is written before its own time is known."""
    seconds = [re.search(r"[\d.]+ s\)", line) for line in told]
    return [re.sub(r"[\d.]+ s\)", s[0] if s else "", line) for line, s in zip(printed, seconds, strict=True)]


def test_float16_fails_as_in_the_hand_run(tmp_path: Path, call: Call) -> None:
    ended = call(
        *small(torch_dtype="float16", batch_size=2, learning_rate="5e-6", lora_r=4, lora_alpha=8), out=tmp_path
    )
    assert ended.code == 3
    lines = of_the_run(ended.out)
    assert lines[1].startswith("Step 2: param: ")
    assert "exactly 0" in lines[1]
    assert lines[-1] == "Ended at step 4: not finite since step 2"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            small(model="/nowhere/model", data="/nowhere/data"),
            ["'/nowhere/model' does not", "'/nowhere/data' does not"],
        ),
        (small(learnin_rate=1, batch_size=0), ["2 errors", "did you mean 'learning_rate'?", "batch_size"]),
        (small(target_modules="query,quary"), ["no linear module is named 'quary'; did you mean 'query'?"]),
        (["--set", "lora_r"], ["'lora_r' is not of the form key=value"]),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(
    tmp_path: Path, call: Call, arguments: list[str], messages: list[str]
) -> None:
    ended = call(*arguments, out=tmp_path / "out")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for message in messages:
        assert message in ended.err
    assert list(tmp_path.iterdir()) == []


def test_show_prints_the_resolved_configuration(tmp_path: Path, call: Call) -> None:
    ended = call("--set", "lora_r=16", "--show", out=tmp_path / "out")
    assert ended.code == 0
    assert '"lora_r": 16' in ended.out
    assert not (tmp_path / "out").exists()
