"""Which of PyTorch's fused attention kernels may be taken, where the same bits are wanted twice.

Their backward passes add up in any order unless PyTorch is told to raise errors, not only to warn, where an operation
has no deterministic kernel: then they take a deterministic way (`_cudnn_attention_backward` and its siblings in
PyTorch). So that is how passes run, where a try on this GPU has given the same bits each time; elsewhere attention is
written out (`trainer.model.attention`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from trainer.config import TrainConfig

NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""What PyTorch says of an operation that has none."""

FUSED = ("cudnn", "flash", "mem_efficient")

log = logging.getLogger("trainer.kernels")
_repeats: dict[tuple[torch.device, torch.dtype], bool] = {}


def allow_fused_attention(on: bool) -> None:
    """Let attention take whichever fused kernel PyTorch prefers, or none."""
    for name in FUSED:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)


def fused_attention_allowed() -> bool:
    """Whether attention may take a fused kernel now."""
    return any(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in FUSED)


@contextmanager
def strict(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Within, fused kernels are taken in their deterministic form, where that is known to give the same bits.

    In a lower dtype than float32 only: there it saves a third of a round, in float32 2 % (H200).
    """
    dtype = getattr(torch, config.dtype_of_base)
    if device.type != "cuda" or not config.deterministic or dtype.itemsize > 2 or not _repeat(device, dtype):
        yield
        return
    allow_fused_attention(True)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        allow_fused_attention(False)


def gave_up(error: BaseException) -> bool:
    """Whether a pass failed for want of a deterministic kernel; from then on it is not asked for."""
    if NOT_DETERMINISTIC not in str(error) or not any(_repeats.values()):
        return False
    log.warning("attention is written out from now on: %s", str(error).splitlines()[0])
    _repeats.update(dict.fromkeys(_repeats, False))
    return True


def _repeat(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether fused attention gives the same bits three times here, forward and backward; tried once."""
    if (device, dtype) not in _repeats:
        _repeats[device, dtype] = False  # also if it raises something else
        try:
            _repeats[device, dtype] = _try(device, dtype)
        except RuntimeError as error:
            log.info("no deterministic fused attention in %s: %s", dtype, (str(error).splitlines() or [""])[0])
        if not _repeats[device, dtype]:
            log.info("attention in %s is written out: a fused kernel did not give the same bits", dtype)
    return _repeats[device, dtype]


def _try(device: torch.device, dtype: torch.dtype) -> bool:
    """The kernels at sizes of T5's decoder, with and without a bias."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    allow_fused_attention(True)
    torch.use_deterministic_algorithms(True)
    try:
        for queries, keys, biased in ((128, 128, True), (96, 48, True), (32, 257, False)):
            q, k, v = (normal(16, 12, length, 64).requires_grad_() for length in (queries, keys, keys))
            bias = normal(1, 12, queries, keys).expand(16, -1, -1, -1) if biased else None
            above, first = normal(16, 12, queries, 64), None
            for _ in range(3):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
                found = [out, *torch.autograd.grad(out, (q, k, v), above)]
                if first is not None and not all(torch.equal(a, b) for a, b in zip(found, first, strict=True)):
                    return False
                first = found
        return True
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        allow_fused_attention(False)
