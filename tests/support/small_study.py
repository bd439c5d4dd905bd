"""A small real study, searched once a session by `python -m search.run`: five trials, each of which ends otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import once, search_process

NAME = "small_real"
LABEL = "too <b>slow</b> | `1e-5`"
"""A label that must be escaped wherever it is shown."""

FILE = """
from search.space import Float, Int
from search.study import Fixed, Study

BASE = {
    "model": MODEL, "data": "mini", "max_samples": 24, "num_epochs": 4, "batch_size": 4, "warmup_steps": 0,
    "lora_dropout": 0.0, "max_nonfinite_steps": 2, "device": "cpu",
}
TRIALS = {
    "good": {"learning_rate": 2e-3, "lora_r": 8},
    "stalls": {"learning_rate": 0.3, "lora_r": 16, "num_epochs": 8},
    LABEL: {"learning_rate": 1e-5, "lora_r": 4},
    "worse": {"learning_rate": 2e-5, "lora_r": 4, "num_epochs": 8},
    "float16": {"learning_rate": 5e-6, "lora_r": 4, "torch_dtype": "float16"},
}
STUDY = Study(
    name="small_real",
    description="five quick trials, each of which ends otherwise",
    base=BASE,
    space={"learning_rate": Float(1e-6, 10.0, log=True), "lora_r": Int(2, 32, log=True)},
    n_trials=len(TRIALS),
    patience=2,
    min_delta=0.05,
    enqueue=tuple(Fixed(label=label, config=config) for label, config in TRIALS.items()),
)
"""

GOOD, STALLS, SLOW, WORSE, FLOAT16 = range(5)


@dataclass(frozen=True)
class Small:
    """The finished study."""

    runs: Path
    output: str
    """What the search printed."""

    @property
    def storage_url(self) -> str:
        return f"sqlite:///{self.runs / 'optuna.db'}"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.runs / 'mlflow.db'}"


def build(factory: pytest.TempPathFactory, model: Path) -> Small:
    """The study on the model of `tiny_checkpoint`, searched at the first call of any process. Its readers must not
    change it."""

    def search(folder: Path) -> None:
        file = folder / "small_real.py"
        file.write_text(f"MODEL = {str(model)!r}\nLABEL = {LABEL!r}\n{FILE}", encoding="utf-8")
        done = search_process.run(
            search_process.command(folder / "runs", "--slots", "1", study=str(file), settings=())
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "output.txt").write_text(done.stdout, encoding="utf-8")

    folder = once.make(factory, "small", search)
    return Small(folder / "runs", (folder / "output.txt").read_text(encoding="utf-8"))
