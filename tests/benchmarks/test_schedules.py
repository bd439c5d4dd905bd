"""The comparison of schedules, on made-up recordings."""

from __future__ import annotations

import pytest

from tests.benchmarks import schedules
from trainer.config import TrainConfig


def made_up() -> list[dict[str, float]]:
    """Lines of a recording in which the loss is the distance to the best rate, 0.3 higher where the rate falls, and
    falls by epoch; linear is 1 % lower than the others."""
    lines = []
    for number, (schedule, epochs, power) in enumerate(schedules.cells()):
        best = -2.8 + 0.3 * (schedule != schedules.CONSTANT)
        for seed in schedules.SEEDS:
            for epoch in range(1, epochs + 1):
                loss = (1 + abs(power - best)) * (1 + 1 / epoch) * (0.99 if schedule == "linear" else 1)
                line = {"configuration": number, "seed": seed, "epoch": epoch, "val": loss + seed / 1000, "test": loss}
                lines.append(line)
            lines.append({"configuration": number, "seed": seed, "end": 1})
    return lines


def test_every_rate_is_trained_by_every_schedule() -> None:
    jobs = schedules.task().jobs()
    assert len(jobs) == len(schedules.cells()) * len(schedules.SEEDS)
    configs = [TrainConfig.parse({k: v for k, v in job.items() if k != "configuration"}) for job in jobs]
    assert {config.lr_scheduler_type for config in configs} == set(schedules.SCHEDULES)
    assert [config.seed for config in configs] == sorted(config.seed for config in configs)


def test_each_schedule_is_compared_at_its_best_rate(capsys: pytest.CaptureFixture[str]) -> None:
    losses = schedules.recorded(made_up())
    long, short = schedules.EPOCHS[-1], schedules.EPOCHS[0]
    assert [schedules.best(losses, schedule, long) for schedule in schedules.SCHEDULES] == [
        (-2.8, pytest.approx(1 + 1 / long)),
        (-2.5, pytest.approx(0.99 * (1 + 1 / long))),
        (-2.5, pytest.approx(1 + 1 / long)),
    ]
    cut = schedules.delivered(losses, schedules.CONSTANT, short, -2.8, schedules.SEEDS[0])
    assert cut == pytest.approx(1 + 1 / short), "the beginning of the long training"
    schedules.show(losses)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| linear")]
    assert len(shown) == len(schedules.EPOCHS) and all("-1.00 ± 0.00" in line for line in shown)


def test_what_is_not_trained_to_its_end_is_left_out() -> None:
    lines = [line for line in made_up() if line.get("epoch") != schedules.EPOCHS[-1]]
    losses = schedules.recorded(lines)
    assert schedules.best(losses, "cosine", schedules.EPOCHS[-1]) is None
    assert schedules.best(losses, "cosine", schedules.EPOCHS[0]) is not None
