"""A program that answers as nvidia-smi does: two GPUs, the second in two parts (MIG)."""

from __future__ import annotations

from pathlib import Path

import pytest

FIRST, SECOND = "GPU-11111111-aaaa-bbbb-cccc-000000000001", "GPU-22222222-aaaa-bbbb-cccc-000000000002"
PART, OTHER_PART = "MIG-33333333-aaaa-bbbb-cccc-000000000003", "MIG-44444444-aaaa-bbbb-cccc-000000000004"

PROGRAM = f"""#!/bin/sh
[ -n "$NVIDIA_SMI_FAILS" ] && exit 9
case "$1" in
-L) cat <<'END'
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {FIRST})
GPU 1: NVIDIA H100 80GB HBM3 (UUID: {SECOND})
  MIG 3g.40gb     Device  0: (UUID: {PART})
  MIG 3g.40gb     Device  1: (UUID: {OTHER_PART})
END
;;
*) cat <<'END'
0, NVIDIA H100 80GB HBM3, 580.159.03, 81559, 20390, 37, 350.50, 700.00, {FIRST}
1, NVIDIA H100 80GB HBM3, 580.159.03, 81559, 100, [N/A], 70.00, 700.00, {SECOND}
END
;;
esac
"""


INFORMATION = """Model: \t\t {model}
IRQ:   \t\t 16
GPU UUID: \t {uuid}
Video BIOS: \t ??.??.??.??.??
Bus Type: \t PCIe
Bus Location: \t {place}
Device Minor: \t {minor}
GPU Excluded:\t No
"""


def list_by_driver(driver: Path, devices: Path, *uuids: str) -> None:
    """The files of a driver with GPUs of these UUIDs, and a device file of each."""
    for number, uuid in enumerate(uuids):
        place, minor = f"0000:{0x17 + number:02x}:00.0", len(uuids) - 1 - number  # minors have an order of their own
        folder = driver / "gpus" / place
        folder.mkdir(parents=True)
        text = INFORMATION.format(model="NVIDIA H100 80GB HBM3", uuid=uuid, place=place, minor=minor)
        (folder / "information").write_text(text, encoding="utf-8")
        (devices / f"nvidia{minor}").touch()
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue Oct  7 18:00:00 UTC 2025\n"
    (driver / "version").write_text(version, encoding="utf-8")


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the program into a folder, which becomes the first of PATH."""
    program = folder / "nvidia-smi"
    program.write_text(PROGRAM, encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
