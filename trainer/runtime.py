"""The machine under a run: device, threads, determinism, seeds, memory."""

from __future__ import annotations

import os
import re
import sys

import torch

from trainer import kernels
from trainer.common.errors import ConfigError, shown
from trainer.config import DEVICE, TrainConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

OUT_OF_MEMORY = (
    # PyTorch's CPU allocator, CUDA outside the caching allocator (an AcceleratorError), cuBLAS, cuDNN and NCCL raise
    # RuntimeErrors, each in words of its own.
    r"DefaultCPUAllocator|can('|no)t allocate memory|(not enough|insufficient) memory|out of memory|"
    r"(?<!\w)std::bad_alloc|STATUS_ALLOC_FAILED|cuda\w*MemoryAllocation|Unable to allocate"
)


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine.

    Raises:
        ConfigError: it is none of these, or a CUDA device that this machine does not have.
    """
    match = re.fullmatch(DEVICE, name)
    if match is None:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, but got {shown(name)}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and int((match[2] or ":0")[1:]) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def visible_devices(device: torch.device) -> list[torch.device]:
    """All devices of this one's kind that the process sees."""
    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def free_memory(device: torch.device) -> int:
    """Free bytes: on a CUDA device, or on the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def prepare(config: TrainConfig) -> torch.device:
    """Make the process deterministic, if it is to be, set its precision, and return the configuration's device."""
    # cuBLAS is deterministic only with a fixed workspace, to be set before its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = resolve_device(config.device)
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.backends.cudnn.allow_tf32 = config.matmul_precision == "high"  # the vision tower's patch convolution
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    # Filling new memory reveals reads before a write; there are none here, and it costs some percent of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        kernels.allow_fused_attention(not config.deterministic)
    return device


def step_seed(seed: int, step: int) -> int:
    """The seed of dropout in one step of a run."""
    return (seed * 2_654_435_761 + step * 40_503 + 1) % 2**63


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory: allocated on a CUDA device, resident for this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def restart_peak_memory(device: torch.device) -> None:
    """Count peak memory anew on a CUDA device; a process's own on CPU cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on CUDA or in the CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE))


def release_memory(device: torch.device) -> None:
    """Return cached blocks to the device after memory ran out."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
