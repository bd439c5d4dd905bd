"""Memory that really runs out: the address space of a process is limited while it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.search_process import ROOT

SCRIPT = """
import json, resource, sys
from pathlib import Path

import psutil
import torch

from trainer.workbench import Workbench
from trainer.config import TrainConfig
from trainer.events import MicroBatchReduced, StepEnded
from trainer.loop import Pack

torch.set_num_threads(1)
out = Path(sys.argv[1])
base = {"model": "mini", "data": "mini", "max_samples": 160, "num_epochs": 1, "warmup_steps": 0, "device": "cpu"}
bench = Workbench()


def step(name, limit, **fields):
    config = TrainConfig.parse({**base, **fields})
    with Pack(bench) as pack:
        pack.add(config, out / name)
        if limit is not None:
            used = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))
        try:
            events = []
            for _, event in pack.round():
                events.append(event)
                if isinstance(event, StepEnded):
                    break
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    reduced = [event.micro_batch_size for event in events if isinstance(event, MicroBatchReduced)]
    losses = [event.loss for event in events if isinstance(event, StepEnded)]
    return reduced, losses


step("warm", None, batch_size=1)  # threads and buffers that any step needs
_, (whole,) = step("whole", None, batch_size=128)
mib = 512
while mib >= 1:
    reduced, losses = step(f"limited-{mib}", mib << 20, batch_size=128)
    if reduced:
        break
    mib //= 2
print(json.dumps({"mib": mib, "reduced": reduced, "losses": losses, "whole": whole}))
"""


@pytest.mark.slow
def test_an_allocator_that_is_out_of_memory_cuts_the_batch(tmp_path: Path) -> None:
    script = tmp_path / "limited.py"
    script.write_text(SCRIPT, encoding="utf-8")
    # Blocks are taken from the system and given back one by one, so that the limit is met where memory is needed. What
    # the heap has free from loading, some 60 MiB, is used first: the batch must need far more.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["reduced"] and found["reduced"][0] == 64, found
    assert found["losses"] == [pytest.approx(found["whole"], rel=1e-5)], found
