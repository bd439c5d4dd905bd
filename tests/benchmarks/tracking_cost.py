"""What recording costs: `python -m tests.benchmarks.tracking_cost [--runs 1000]`.

Last result: MLflow 3.17.2, SQLite, Python 3.11, 2 cores with a load average of 4 to 6 from other work, November 2026.

    open_tracking, fresh database             5.9 s
    open_tracking, again                     20.3 ms
    start_run                               115.1 ms
    StepEnded  in the training thread        10.5 us median, 204 us worst
    EpochEnded in the training thread        67.9 us median, 122 us worst
    writer thread, 15 epochs x 40 steps      735.8 ms of processor time
    finish                                   71.5 ms
    one batch of 1,000 metrics              301.7 ms
    one run through MLflow's client         159.6 ms
    1001 runs (495000 step records)         21.9 s, 12.6 s of processor time
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa

from search.tracking.client import Tracking, open_tracking
from search.tracking.outbox import Point
from search.tracking.reader import ClientReader
from tests.search.tracking.recorded import whole_run
from trainer.config import TrainConfig
from trainer.events import EpochEnded, StepEnded


def write_one(tracking: Tracking, epochs: int, steps: int) -> str:
    """One run of empty epochs, as fast as the events come; prints what the training thread and the writer paid."""
    experiment = tracking.experiment("cost")
    parent = tracking.parent_run("cost", {})
    began = time.perf_counter()
    run_id = tracking.start_run(experiment, parent, name="run", config=TrainConfig().model_dump(), tags={})
    print(f"start_run                            {1e3 * (time.perf_counter() - began):8.1f} ms")
    recorder = tracking.recorder(run_id)
    spent: dict[type, list[float]] = {StepEnded: [], EpochEnded: []}
    for event in whole_run(epochs, steps):
        began = time.perf_counter()
        recorder(event)
        spent.setdefault(type(event), []).append(time.perf_counter() - began)
        if isinstance(event, EpochEnded):
            time.sleep(0.3)  # so that epochs are written one by one, as in training
    began = time.perf_counter()
    recorder.finish("FINISHED", state="COMPLETE", reason="finished")
    for kind in (StepEnded, EpochEnded):
        median, worst = statistics.median(spent[kind]), max(spent[kind])
        print(
            f"{kind.__name__:10} in the training thread    {1e6 * median:8.1f} us median, {1e6 * worst:.0f} us worst"
        )
    print(f"writer thread, {epochs} epochs x {steps} steps   {1e3 * recorder.writer.cpu_s:8.1f} ms of processor time")
    print(f"finish                               {1e3 * (time.perf_counter() - began):8.1f} ms")
    return run_id


def read_many(tracking: Tracking, path: Path, runs: int) -> None:
    """Read back `runs` runs of 500 steps and 15 epochs, copies of one in the database."""
    experiment = tracking.experiment("many")
    parent = tracking.parent_run("many", {})
    run_id = tracking.start_run(experiment, parent, name="run", config=TrainConfig().model_dump(), tags={})
    recorder = tracking.recorder(run_id)
    for event in whole_run(15, 500 // 15):
        recorder(event)
    recorder.finish("FINISHED", state="COMPLETE", reason="finished")
    began = time.perf_counter()
    ClientReader(tracking._client).curves(tracking._client.get_run(run_id))
    print(f"one run through MLflow's client      {1e3 * (time.perf_counter() - began):8.1f} ms")
    _copy(path, run_id, runs - 1)
    began, cpu = time.perf_counter(), time.process_time()
    found = tracking.runs(experiment)
    rows = sum(len(r.steps) for r in found.values())
    print(
        f"{len(found)} runs ({rows} step records)     {time.perf_counter() - began:8.1f} s"
        f", {time.process_time() - cpu:.1f} s of processor time"
    )


def _copy(path: Path, run_id: str, copies: int) -> None:
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
            columns = [column["name"] for column in sa.inspect(connection).get_columns(table)]
            values = ", ".join(
                "printf('%s%05d', substr(a.run_uuid, 1, 27), n.i)" if c == "run_uuid" else f"a.{c}" for c in columns
            )
            connection.execute(
                sa.text(
                    f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {copies}) "
                    f"INSERT INTO {table} ({', '.join(columns)}) "
                    f"SELECT {values} FROM {table} a, n WHERE a.run_uuid = '{run_id}'"
                )
            )
    engine.dispose()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        began = time.perf_counter()
        tracking = open_tracking(f"sqlite:///{path}", Path(folder) / "artifacts")
        print(f"open_tracking, fresh database        {time.perf_counter() - began:8.1f} s")
        began = time.perf_counter()
        tracking = open_tracking(f"sqlite:///{path}", Path(folder) / "artifacts")
        print(f"open_tracking, again                 {1e3 * (time.perf_counter() - began):8.1f} ms")
        run_id = write_one(tracking, epochs=15, steps=40)
        batch = [Point("extra", float(i), i, 1) for i in range(1_000)]
        began = time.perf_counter()
        tracking.write(run_id, batch, {})
        print(f"one batch of 1,000 metrics           {1e3 * (time.perf_counter() - began):8.1f} ms")
        read_many(tracking, path, runs)


if __name__ == "__main__":
    main()
