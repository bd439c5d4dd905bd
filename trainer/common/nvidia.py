"""What nvidia-smi says of this machine's GPUs. Needs no torch; a machine without it has none."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "utilization.gpu", "power.draw")


@dataclass(frozen=True)
class Gpu:
    """A GPU, and what it does at this moment."""

    index: str
    name: str
    driver: str
    memory_mib: float | None
    memory_used_mib: float | None
    utilization: float | None
    """Percent of the time in which a kernel ran."""
    power_w: float | None


def gpus() -> list[Gpu]:
    """All GPUs, in nvidia-smi's order; empty where there are none or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if said.returncode else parse(said.stdout)


def parse(text: str) -> list[Gpu]:
    """nvidia-smi's lines; what it does not know ("[N/A]") is None."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(FIELDS):
            index, name, driver, *numbers = cells
            found.append(Gpu(index, name, driver, *map(_number, numbers)))
    return found


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
