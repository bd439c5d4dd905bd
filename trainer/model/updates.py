"""The updates of all runs of a pack at once: clipping, and PyTorch's fused AdamW, each run with its own settings.

The same bits as `clip_grad_norm_` and `torch.optim.AdamW(fused=True)` of each run by itself. Whatever is one number
for a run is computed for all in one operation, and the fused kernel is called directly: on a GPU a run's update is two
kernels and some for the whole pack, not 19 a run, and nothing is fetched from the device.

Not by operations on lists (foreach) over all runs: that AdamW is nine operations instead of one kernel, rounds
otherwise, and needs each run's count of updates on the host, where it is not known before the figures are fetched: a
step that was not finite counts none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from trainer.model.library_private import foreach_norm, foreach_zero, fused_adamw
from trainer.model.lora import Adapter


def norms(adapters: Sequence[Adapter]) -> Sequence[torch.Tensor]:
    """The norm of each run's gradients, a scalar on its device."""
    return foreach_norm([adapter.grads for adapter in adapters])


def zero_gradients(adapters: Sequence[Adapter]) -> None:
    """Set all gradients to 0."""
    foreach_zero([adapter.grads for adapter in adapters])


@torch.no_grad()
def update(adapters: Sequence[Adapter], rates: Sequence[float], figures: torch.Tensor) -> None:
    """Clip and apply the gradients of each run, unless one of its figures is not finite.

    Args:
        adapters: k of one dtype on one device.
        rates: learning rate of each.
        figures: (k, 3), loss, norm of the gradients before clipping and query peak. A run with one that is not finite
            keeps weights, moments and count of updates, and its gradients as they are: they are inspected afterwards.
    """
    bad = ~torch.isfinite(figures).all(1)
    # As in torch.nn.utils.clip_grad_norm_.
    most = _row(tuple(adapter.config.max_grad_norm for adapter in adapters), figures.dtype, figures.device)
    keep = ((figures[:, 1] + 1e-6).reciprocal() * most).clamp_(max=1.0).masked_fill_(bad, 1.0)
    for adapter, factor in zip(adapters, keep.unbind(), strict=True):
        adapter.grads.mul_(factor)
    for adapter, rate in zip(adapters, rates, strict=True):
        adapter.optimizer.param_groups[0]["lr"] = rate
    if adapters[0].fused:
        fused_adamw([adapter.optimizer for adapter in adapters], bad.float().unbind())
    else:
        for adapter, is_bad in zip(adapters, bad.tolist(), strict=True):
            if not is_bad:
                adapter.optimizer.step()


@lru_cache(maxsize=16)
def _row(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values on the device, copied there once."""
    return torch.tensor(values, dtype=dtype, device=device)
