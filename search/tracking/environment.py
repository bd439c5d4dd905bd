"""Facts about the machine and the code a run was made with, as flat text: the tags of an MLflow run."""

from __future__ import annotations

import functools
import getpass
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from search import processes
from search.tracking.mlflow_private import GIT_COMMIT, SOURCE_NAME, USER
from trainer.common import nvidia

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = (
    "lora-search",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "optuna",
    "mlflow",
)
"""Packages whose version can change a result or how it is recorded."""

HERE = ("gpu", "gpu_driver", "gpu_id")


def run_tags() -> dict[str, str]:
    """The tags of a run that this process creates: `environment`, and what columns of MLflow's pages show."""
    facts = environment()
    columns = {USER: _user(), SOURCE_NAME: "search.run"}
    if "git_commit" in facts:
        columns[GIT_COMMIT] = facts["git_commit"]
    return {**columns, **facts}


def here() -> dict[str, str]:
    """The tags that say where a run continues."""
    return {**processes.tags(), **{key: value for key, value in _gpu().items() if key in HERE}}


def environment() -> dict[str, str]:
    """What can be known without importing anything heavy; a fact that cannot be known is left out.

    Keys: those of `search.processes.tags`, `python`, `platform`, `cpu`, `cpu_count`, `version.<package>`,
    `git_commit` and `git_dirty` (in a checkout), and `gpu`, `gpu_memory_gib`, `cuda`, `gpu_driver`, `gpu_id` (where
    torch is already imported and sees one; the last two by nvidia-smi).
    """
    facts = {
        **processes.tags(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": str(os.cpu_count() or ""),
        **_gpu(),
        **versions(),
        **git(),
    }
    return {key: value for key, value in facts.items() if value}


@functools.cache
def versions() -> dict[str, str]:
    """`version.<package>` for each of PACKAGES that is installed, from package metadata."""
    found = {}
    for name in PACKAGES:
        try:
            found[f"version.{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git(root: Path = ROOT) -> dict[str, str]:
    """`git_commit` and `git_dirty` (`true` if a tracked file was changed), or nothing outside a checkout.

    This file must itself be tracked there: an installed copy below someone else's repository
    (a virtual environment in a checkout, say) must not report that repository's commit.
    """
    if _git_output(root, "ls-files", "--error-unmatch", f"search/tracking/{Path(__file__).name}") is None:
        return {}
    commit = _git_output(root, "rev-parse", "HEAD")
    changes = _git_output(root, "status", "--porcelain", "--untracked-files=no")
    if not commit or changes is None:
        return {}
    return {"git_commit": commit, "git_dirty": "true" if changes else "false"}


def _git_output(root: Path, *arguments: str) -> str | None:
    """Standard output of a git command, or None where git is missing, slow or says no."""
    # An inherited GIT_DIR (we may run inside a git hook) would point git at another repository.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _cpu() -> str:
    """The processor's name; Linux keeps it in /proc/cpuinfo, where `platform.processor` is often empty."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> dict[str, str]:
    """The current CUDA device, if torch is already there: importing it would cost a second and tell no more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory_gib": f"{properties.total_memory / 2**30:.1f}",
        "cuda": str(torch.version.cuda or ""),
        **gpus_by_driver(),
    }


@functools.cache
def gpus_by_driver() -> dict[str, str]:
    """`gpu_driver`, and `gpu_id`: the UUIDs of the GPUs that this process sees, or of the parts (MIG)."""
    seen = nvidia.visible()
    if not seen:
        return {}
    return {"gpu_driver": seen[0].driver, "gpu_id": ", ".join(gpu.part or gpu.uuid for gpu in seen)}


def _user() -> str:
    """The user's name, or `unknown` in a container that has no entry for the user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
