"""The probe for `--slots auto` on a GPU, with a clock of ours: what it measures, keeps and reads back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from search.space import Int
from search.study import Study
from search.workers import busy, slots
from search.workers.slots import Slots
from trainer import runtime
from trainer.config import TrainConfig
from trainer.loop import Pack
from trainer.model import peak
from trainer.model.graphs import USES
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]


class Machine:
    """A clock that each round moves on by what a GPU would take: the launches, or the samples' arithmetic.

    Nothing is trained; a pass of more runs than `most` finds no memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launches_s: float, sample_s: float, most: int = 99) -> None:
        self.now, self.rounds = 0.0, 0
        self.launches_s, self.sample_s = launches_s, sample_s

        def taken(pack: Pack) -> Any:
            self.rounds += 1
            samples = sum(member.config.batch_size for member in pack.members)
            self.now += max(self.launches_s, samples * self.sample_s)
            if len(pack.members) > most:
                pack.passes.at_once = most
            return iter(())

        monkeypatch.setattr(Pack, "round", taken)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("launches_s", "sample_s", "samples"),
    [(0.018, 0.012, 2), (0.018, 0.0016, 16), (0.018, 0.0008, 32)],
    ids=["float32", "TF32", "bfloat16"],
)
def test_packs_grow_until_arithmetic_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
    bench: Workbench,
    small: Small,
    tmp_path: Path,
    launches_s: float,
    sample_s: float,
    samples: int,
) -> None:
    """With an H100's launches and arithmetic as estimated: 2 samples in float32, 32 in bfloat16."""
    machine = Machine(monkeypatch, launches_s, sample_s)
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == samples
    (file,) = tmp_path.glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["samples"] == samples and kept["of"]["batch_size"] == 2 and kept["of"]["gpu"] == "cpu"
    # Read back, whatever the clock says now.
    rounds, machine.launches_s = machine.rounds, 1.0
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == samples
    assert machine.rounds == rounds
    # Another batch size is another question, and a damaged file is none.
    file.write_text("{")
    machine.launches_s = launches_s
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == samples
    assert machine.rounds > rounds


def test_it_takes_some_seconds_at_most(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, 2.0, 0.0)
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == 2
    assert machine.rounds == USES + 1 + busy.TIMES * busy.ROUNDS  # no second pass was begun


def test_a_round_of_one_run(monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small) -> None:
    machine = Machine(monkeypatch, 0.018, 0.0008)
    assert busy.seconds_of_a_round(small(), bench, clock=machine) == pytest.approx(0.018)
    assert busy.seconds_of_a_round(small(batch_size=8), bench, 8, clock=machine) == pytest.approx(64 * 0.0008)


def test_reading_images_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small, tmp_path: Path
) -> None:
    """Vision outputs of all images are computed when the first run is added; on an H200 the probe ended at 4 runs."""
    machine = Machine(monkeypatch, 0.018, 0.0008)
    inputs, asked = bench.inputs, []

    def slow(config: TrainConfig) -> Any:
        machine.now += 0.0 if asked else 100.0
        asked.append(config)
        return inputs(config)

    monkeypatch.setattr(bench, "inputs", slow)
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == 32


def test_what_does_not_fit_is_not_packed(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, 0.018, 0.0008, most=2)
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == 4


def test_what_fits_only_by_other_steps_is_not_packed(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small, tmp_path: Path
) -> None:
    """Steps that are launched since recordings found no memory, or layers that are computed again."""
    machine = Machine(monkeypatch, 0.018, 0.0008)
    taken = Pack.round

    def squeezed(pack: Pack) -> Any:
        pack.passes.squeezed = len(pack.members) > 2
        return taken(pack)

    monkeypatch.setattr(Pack, "round", squeezed)
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == 4


@pytest.mark.parametrize("most", [0, 2])
def test_runs_that_end_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small, tmp_path: Path, most: int
) -> None:
    """In float16 they diverge: a round of no runs takes no time, and was taken for 400,000 samples a second."""
    machine = Machine(monkeypatch, 0.018, 0.0008)
    taken = Pack.round

    def ended(pack: Pack) -> Any:
        found = taken(pack)
        if len(pack.members) > most:
            pack.members.clear()
        return found

    monkeypatch.setattr(Pack, "round", ended)
    assert busy.samples_when_busy(small(), bench, 2, folder=tmp_path, clock=machine) == max(2, 2 * most)
    assert len(list(tmp_path.glob("*.json"))) == (most > 0)  # what says nothing is not kept
    assert (busy.seconds_of_a_round(small(), bench, clock=machine) is None) == (most == 0)


def test_float16_ends_in_the_probe(bench: Workbench, small: Small, tmp_path: Path) -> None:
    """For real: the embedded model's losses are not finite in it, as the hand-run log met."""
    config = small(model="mini", data="mini", torch_dtype="float16")
    assert busy.samples_when_busy(config, bench, 2, folder=tmp_path) == 2
    assert not list(tmp_path.glob("*.json"))


def test_on_a_gpu_the_probe_and_the_estimate_decide(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small
) -> None:
    config = small()
    study = Study(name="s", description="", base=config.model_dump(), space={"batch_size": Int(2, 8)}, n_trials=3)
    base = bench.base(config)
    monkeypatch.setattr(bench, "base", lambda config: base)
    told = slots._told(config.model_copy(update={"batch_size": 8}), bench)
    assert told is not None and told > 0
    sizes = peak.Sizes.of(base.model.config.to_dict())
    assert sizes is not None
    tokens = bench.datasets(config)[0].tokens
    lengths = peak.Lengths.of(tokens)
    assert lengths.longest_labels == max(len(each.target) for each in tokens) > lengths.labels > 0
    alone = peak.estimate(sizes, [config.model_copy(update={"batch_size": 8})], lengths, weights=0)
    assert told == alone.total + alone.kept + alone.passing  # the recordings' own
    monkeypatch.setattr(runtime, "resolve_device", lambda name: torch.device("cuda"))
    asked: list[str] = []

    def free(device: torch.device) -> int:
        asked.append("free")
        return int(5 * told / slots.MEMORY_SHARE) + 1

    monkeypatch.setattr(bench, "inputs", lambda config: asked.append("vision outputs"))
    monkeypatch.setattr(runtime, "release_memory", lambda device: asked.append("released"))
    monkeypatch.setattr(runtime, "free_memory", free)
    monkeypatch.setattr(busy, "samples_when_busy", lambda config, bench, smallest: 16.0)
    assert slots.resolve(None, study, bench) == Slots(5, 16.0)
    # Whether the probe has read all images and left blocks behind, or was read back.
    assert asked == ["vision outputs", "released", "free"]
    monkeypatch.setattr(busy, "samples_when_busy", lambda config, bench, smallest: float(smallest))
    assert slots.resolve(None, study, bench) == Slots(1)


def test_it_trains_for_real_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, small: Small, tmp_path: Path
) -> None:
    monkeypatch.setattr(busy, "RUNS", (1, 2))
    assert busy.samples_when_busy(small(), bench, 8, folder=tmp_path) in (8.0, 16.0)
    assert len(list(tmp_path.iterdir())) == 2
