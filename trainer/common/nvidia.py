"""What nvidia-smi says of this machine's GPUs, or without it the driver's files. Needs no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

DRIVER, DEVICES = Path("/proc/driver/nvidia"), Path("/dev")
FIELDS = (
    *("index", "name", "driver_version", "memory.total", "memory.used", "utilization.gpu", "power.draw"),
    *("power.limit", "uuid"),
)


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
    power_limit_w: float | None = None
    uuid: str = ""
    part: str | None = None
    """UUID of the part of it (MIG) that is meant: memory and utilisation, which are the whole's, are None then."""


def gpus() -> list[Gpu]:
    """All GPUs, in nvidia-smi's order; where it is missing or does not answer, as the driver's files list them."""
    return parse(_said(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")) or listed()


def listed() -> list[Gpu]:
    """The GPUs that the driver's files list and that have a device file here, along the bus: names and UUIDs alone.

    A container sees the files of all GPUs, and the devices of those that it was given.
    """
    found: list[Gpu] = []
    for file in sorted(DRIVER.glob("gpus/*/information")):  # a folder is named after its place on the bus
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if (DEVICES / f"nvidia{facts.get('Device Minor', '')}").exists():
            uuid = facts.get("GPU UUID", "")
            known = "" if "?" in uuid else uuid  # it says GPU-????????-... until a process has used the GPU
            name = facts.get("Model", "")
            found.append(Gpu(str(len(found)), name, _driver(), None, None, None, None, uuid=known))
    return found


def visible(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA shows a process with this environment, in its order; all without CUDA_VISIBLE_DEVICES.

    It names them by numbers, by (the beginnings of) UUIDs, or as parts of a GPU (MIG) by the parts' UUIDs. The first
    name that fits none ends the list, as with CUDA. Numbers are nvidia-smi's if CUDA_DEVICE_ORDER is PCI_BUS_ID, and
    where all GPUs are alike; else they are not guessed at.
    """
    there = gpus()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None or not there:
        return there
    numbered = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.name for gpu in there}) == 1
    parts = _parts() if "MIG-" in named else {}
    found: list[Gpu] = []
    for name in (each.strip() for each in named.split(",")):
        if name.startswith("MIG-"):
            # Drivers before R470 wrote MIG-<UUID of the GPU>/<numbers>.
            uuid = next((gpu for part, gpu in parts.items() if part.startswith(name)), name[4:].partition("/")[0])
            fits = [_part_of(gpu, name) for gpu in there if gpu.uuid == uuid]
        elif name.startswith("GPU-"):
            fits = [gpu for gpu in there if gpu.uuid.startswith(name)]
        else:
            fits = [gpu for gpu in there if gpu.index == name] if numbered else []
        if len(fits) != 1:
            break
        found += fits
    return found


def parse(text: str) -> list[Gpu]:
    """nvidia-smi's lines; what it does not know ("[N/A]") is None."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(FIELDS):
            index, name, driver, *numbers, uuid = cells
            total, used, busy, power, limit = map(_number, numbers)
            found.append(Gpu(index, name, driver, total, used, busy, power, limit, uuid))
    return found


def _driver() -> str:
    """The driver's version, as its own file has it; "" if that does not say."""
    try:
        said = (DRIVER / "version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    version = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", said)
    return version[1] if version else ""


def _part_of(gpu: Gpu, part: str) -> Gpu:
    return replace(gpu, part=part, memory_mib=None, memory_used_mib=None, utilization=None)


def _parts() -> dict[str, str]:
    """UUID of each part of a GPU -> the GPU's."""
    found: dict[str, str] = {}
    gpu = ""
    for kind, uuid in re.findall(r"^(GPU|\s+MIG).*\(UUID: (\S+)\)", _said("-L"), re.MULTILINE):
        if kind == "GPU":
            gpu = uuid
        else:
            found[uuid] = gpu
    return found


def _said(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        said = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if said.returncode else said.stdout


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
