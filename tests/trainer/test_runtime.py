"""Which errors say that memory ran out, in every wording of PyTorch's."""

from __future__ import annotations

import pytest
import torch

from trainer.common.errors import ConfigError
from trainer.runtime import is_out_of_memory, resolve_device

OUT: tuple[BaseException, ...] = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: cudaErrorMemoryAllocation"),
    RuntimeError("HIP out of memory. Tried to allocate"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("Cannot allocate memory"),
)
NOT: tuple[BaseException, ...] = (
    RuntimeError("view size is not compatible with input tensor's size and stride"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ValueError("out of memory"),
    KeyError("memory"),
)


@pytest.mark.parametrize("error", OUT, ids=repr)
def test_memory_ran_out(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_an_accelerators_error() -> None:
    """As CUDA raises it outside its caching allocator: a RuntimeError of a class of its own."""
    assert issubclass(torch.AcceleratorError, RuntimeError)
    error = torch.AcceleratorError.__new__(torch.AcceleratorError)
    error.args = ("CUDA error: out of memory",)
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", NOT, ids=repr)
def test_it_did_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_cpus_own_allocator() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "name", ["foo", "", "cuda:x", "cuda:-1", "meta", "mps", f"cuda:{'9' * 30}", f"cuda:{'9' * 5000}"]
)
def test_a_device_without_a_name_here_is_refused(name: str) -> None:
    """PyTorch has a RuntimeError for it, or a device that nothing here computes on."""
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="device=cuda:9999: this machine has"):
        resolve_device("cuda:9999")
