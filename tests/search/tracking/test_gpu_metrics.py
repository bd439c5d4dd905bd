"""What nvidia-smi says of a worker's GPUs, as metrics and tags of its runs. The program is one of ours."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from search.errors import Unavailable
from search.tracking import environment
from search.tracking.gpu_metrics import GpuMetrics, GpuWatch, values
from search.tracking.outbox import Outbox, Write
from search.tracking.recorder import Logged, RunRecorder
from search.workers import pool
from search.workers.executor import Executor
from tests.support import nvidia as program
from tests.support.made_up_events import started, step
from trainer.common import nvidia


@pytest.fixture(autouse=True)
def _on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program.put_on_path(tmp_path, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(nvidia, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(nvidia, "DEVICES", tmp_path)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("GPU-2222", ["1"]),
        (program.FIRST, ["0"]),
        ("0,7,1", ["0"]),
        ("", []),
        ("-1", []),
        (program.OTHER_PART, ["1"]),
        (f"MIG-{program.FIRST}/1/0", ["0"]),
    ],
)
def test_the_gpus_that_a_process_sees(visible: str | None, seen: list[str]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = nvidia.visible(environment)
    assert [gpu.index for gpu in found] == seen
    assert [gpu.part for gpu in found if gpu.part] == [v for v in (visible,) if v and v.startswith("MIG-")]


def test_numbers_of_unlike_gpus_are_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [nvidia.Gpu("0", "A100", "1", *[None] * 4, uuid="GPU-a"), nvidia.Gpu("1", "H100", "1", *[None] * 4)]
    monkeypatch.setattr(nvidia, "gpus", lambda: mixed)
    assert nvidia.visible({"CUDA_VISIBLE_DEVICES": "0"}) == []
    assert nvidia.visible({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == mixed[:1]
    assert nvidia.visible({"CUDA_VISIBLE_DEVICES": "GPU-a"}) == mixed[:1]


def test_workers_get_gpus_by_uuid_where_nobody_chose_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.gpus() == [program.FIRST, program.SECOND]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert pool.gpus() == ["1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("NVIDIA_SMI_FAILS", "1")
    assert pool.gpus() == []


def test_without_nvidia_smi_the_drivers_files_tell_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_SMI_FAILS", "1")
    program.list_by_driver(tmp_path / "driver", tmp_path, program.FIRST, program.SECOND)
    assert pool.gpus() == [program.FIRST, program.SECOND]
    assert Executor().workers_here() == 2
    workers = pool.WorkerPool(2, 1)
    assert workers._devices == [program.FIRST, program.SECOND] and not workers._forks
    (gpu,) = nvidia.visible({"CUDA_VISIBLE_DEVICES": program.SECOND})
    assert (gpu.index, gpu.name, gpu.driver) == ("1", "NVIDIA H100 80GB HBM3", "580.159.03")
    assert values([gpu]) == {}
    # A container was given the first alone, whose device is the second.
    (tmp_path / "nvidia0").unlink()
    assert pool.gpus() == [program.FIRST]
    # As with nvidia-smi, who has chosen is not overruled.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pool.gpus() == []


def test_gpus_that_nobody_has_used_have_no_uuid_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_SMI_FAILS", "1")
    unknown = "GPU-????????-????-????-????-????????????"
    program.list_by_driver(tmp_path / "driver", tmp_path, unknown, program.SECOND)
    assert pool.gpus() == ["0", "1"]


def test_metrics_have_mlflows_names() -> None:
    found = values(nvidia.visible({"CUDA_VISIBLE_DEVICES": "0"}))
    assert found == pytest.approx(
        {
            "system/gpu_0_utilization_percentage": 37,
            "system/gpu_0_power_usage_watts": 350.5,
            "system/gpu_0_power_usage_percentage": 50.0714,
            "system/gpu_0_memory_usage_percentage": 25.0003,
            "system/gpu_0_memory_usage_megabytes": 21380.5,
        },
        rel=1e-4,
    )
    source = (Path(mlflow.__file__).parent / "system_metrics/metrics/gpu_monitor.py").read_text()
    assert all(key.replace("system/gpu_0", "gpu_{i}") in source for key in found)
    # Of a part (MIG), nvidia-smi knows the whole GPU's power alone.
    part = values(nvidia.visible({"CUDA_VISIBLE_DEVICES": program.PART}))
    assert set(part) == {"system/gpu_1_power_usage_watts", "system/gpu_1_power_usage_percentage"}


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _gpu(utilization: float) -> nvidia.Gpu:
    return nvidia.Gpu("0", "H100", "1", None, None, utilization, None)


def test_a_run_takes_means_at_growing_intervals() -> None:
    clock, watch = _Clock(), GpuWatch(lambda: [])
    key = "system/gpu_0_utilization_percentage"
    watch.sums = {key: (5, 100.0)}  # of the time before this run
    metrics = GpuMetrics(watch, clock)
    clock.now = 9.9
    assert metrics.due() == {}
    watch.sums = {key: (7, 260.0)}
    clock.now = 10.0
    assert metrics.due() == {key: 80.0} and metrics.due() == {}
    clock.now = 25.0  # nvidia-smi has not answered since
    assert metrics.due() == {}
    points = 0
    for second in range(26, 36_000):
        watch.sums = {key: (second, float(second))}
        clock.now = second
        points += bool(metrics.due())
    assert 200 < points < 300


def test_the_thread_looks_until_it_is_closed() -> None:
    looks: list[float] = [10.0, 30.0]
    watch = GpuWatch(lambda: [_gpu(looks.pop())] if looks else [], every_s=0.001)
    watch.start()
    for _ in range(2000):
        if not looks:
            break
        watch.join(0.001)
    watch.close()
    watch.join(5)
    assert not watch.is_alive() and watch.sums == {"system/gpu_0_utilization_percentage": (2, 40.0)}


class _Away:
    def write(self, *_: Any) -> None:
        raise Unavailable("away")

    def end_run(self, *_: Any, **__: Any) -> None:
        raise Unavailable("away")

    log_text = write


def test_they_go_the_way_of_all_metrics_and_a_resumed_run_doubles_none(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "spool")
    key = "system/gpu_0_utilization_percentage"
    clock, watch = _Clock(), GpuWatch(lambda: [])
    recorder = RunRecorder(_Away(), "r", Logged(steps={key: 2}), outbox=outbox)  # type: ignore[arg-type]
    recorder.gpus = GpuMetrics(watch, clock)
    recorder(started())
    for number in range(1, 5):
        clock.now += 10
        watch.sums = {key: (number, 10.0 * number * (number + 1))}
        recorder(step(number))
    recorder.finish("FINISHED", state="COMPLETE")
    kept = [each.entry for each in outbox.read("r")]
    points = [point for entry in kept if isinstance(entry, Write) for point in entry.points if point.key == key]
    assert [(point.step, point.value) for point in points] == [(3, 60.0), (4, 80.0)]


def test_tags_name_driver_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.gpus_by_driver.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", program.PART)
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    cuda = SimpleNamespace(
        is_available=lambda: True, current_device=lambda: 0, get_device_properties=lambda _: properties
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))
    wanted = {"gpu": "NVIDIA H100", "gpu_driver": "580.159.03", "gpu_id": program.PART}
    assert wanted.items() <= environment.environment().items()
    assert wanted.items() <= environment.here().items()
    environment.gpus_by_driver.cache_clear()
