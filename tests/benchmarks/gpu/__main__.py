"""`python -m tests.benchmarks.gpu`: install the wheels that came along, where they are needed, and run the check.

On a machine without a network, Optuna, MLflow, SQLAlchemy and pydantic come from `.gpu-wheels` (`make gpu-wheels`) and
are installed into a temporary folder; nothing of the machine's own environment is changed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WHEELS = ROOT / ".gpu-wheels"
INSTALLED = "LORA_SEARCH_GPU_SITE"


def _with_wheels() -> None:
    """Start this process again with the wheels, if something is missing."""
    needed = ("pydantic", "optuna", "mlflow", "sqlalchemy")
    if all(importlib.util.find_spec(name) for name in needed):
        return
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if INSTALLED in os.environ or not wheels:
        raise SystemExit(
            f"{', '.join(needed)} are needed: run `make gpu-wheels` where there is a network, and bring {WHEELS}"
        )
    site = tempfile.mkdtemp(prefix="gpu-site-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--no-cache-dir", "--target", site, *wheels], check=True)
    path = os.pathsep.join([site, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, INSTALLED: site}
    os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.gpu", *sys.argv[1:]], environment)


if __name__ == "__main__":
    _with_wheels()
    from tests.benchmarks.gpu.check import main

    raise SystemExit(main())
