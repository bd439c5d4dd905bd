"""What is computed by other kernels on a GPU, as far as a CPU has them too."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5LayerNorm

from trainer import kernels
from trainer.config import TrainConfig
from trainer.model import attention, fused, ragged
from trainer.model.ragged import Ragged

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_norm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    original = T5LayerNorm(16)
    original.weight.data.normal_()
    original.to(dtype).requires_grad_(False)
    x, above = torch.randn(5, 16), torch.randn(5, 16)
    found = []
    for kinds in ((), ("cpu",)):
        monkeypatch.setattr(fused, "FUSED_NORMS", kinds)
        given = x.to(dtype).requires_grad_()
        out = fused.RMSNorm(original)(given)
        found.append((out, *torch.autograd.grad(out, given, above.to(dtype))))
        assert out.dtype == dtype and ("Normed" in type(out.grad_fn).__name__) == (
            not kinds and dtype == torch.float32
        )
    for one, other in zip(*found, strict=True):
        assert (one - other).float().norm() < (1e-6 if dtype == torch.float32 else 5e-3) * one.float().norm()


@pytest.mark.parametrize("heads", [1, 3])
def test_padding_is_zeros_whichever_way(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Ragged.of((3, 1, 2), CPU, longest=5)
    values = torch.randn(6, heads * 4)
    found = []
    for kinds in ((), ("cpu",)):
        monkeypatch.setattr(ragged, "ZEROS_GATHERED", kinds)
        found.append(rows.apart(values, heads, zeros=True))
    assert torch.equal(*found) and found[0].shape == (3 * heads, 5, 4)
    assert torch.equal(rows.together(found[1], heads), values)


def test_attention_written_out_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what rounding to bfloat16 explains."""
    rows = Ragged.of((3, 5, 2), CPU)
    torch.manual_seed(0)
    exact = [torch.randn(10, 8, dtype=torch.float64) for _ in range(4)]
    found = []
    for dtype, written in ((torch.float64, False), (torch.bfloat16, True)):
        monkeypatch.setattr(attention, "_written_out", lambda *_, written=written: written)
        q, k, v = (each.to(dtype).requires_grad_() for each in exact[:3])
        out = attention.attend(
            q, k, v, size=4, rows=rows, keys=rows, scale=0.5, bias=attention.hidden(rows.seen(), dtype)
        )
        found.append((out, *torch.autograd.grad(out, (q, k, v), exact[3].to(dtype))))
    for one, other in zip(*found, strict=True):
        assert (one - other.double()).norm() < 0.02 * one.norm()


def test_no_deterministic_kernel_is_asked_for_on_a_cpu() -> None:
    config = TrainConfig.parse({"base_dtype": "bfloat16"})
    with kernels.strict(config, CPU):
        assert (
            torch.is_deterministic_algorithms_warn_only_enabled() or not torch.are_deterministic_algorithms_enabled()
        )


def test_an_operation_without_one_turns_them_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch's own words; once, and never again; other errors are not taken for it."""
    key = (torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(kernels, "_repeats", {key: True})
    error = RuntimeError(f"cumsum_cuda_kernel {kernels.NOT_DETERMINISTIC}, but you set ...")
    assert not kernels.gave_up(RuntimeError("out of memory"))
    with caplog.at_level(logging.WARNING, "trainer.kernels"):
        assert kernels.gave_up(error)
    assert "cumsum_cuda_kernel" in caplog.text and not kernels._repeats[key]
    assert not kernels.gave_up(error)


def test_pytorch_says_so_in_these_words() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=kernels.NOT_DETERMINISTIC):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    finally:
        torch.use_deterministic_algorithms(False)
