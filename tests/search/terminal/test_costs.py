"""What the dry run says of memory and of other precisions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search.study_file import load
from search.terminal import costs
from tests.benchmarks.xl import QFORMER, TEXT, VISION
from trainer.common import nvidia
from trainer.model import memory, peak
from trainer.model.memory import Need
from trainer.model.peak import Sizes

XL = Sizes.of({"vision_config": VISION, "qformer_config": QFORMER, "text_config": TEXT, "num_query_tokens": 32})


def said(monkeypatch: pytest.MonkeyPatch, gpu: str | None, *settings: str, lengths: Any = ()) -> list[str]:
    """The lines for `rsicap` at the real size, of which nothing is here but the sizes."""
    monkeypatch.setattr(peak, "sizes_of", lambda model: XL)
    monkeypatch.setattr(memory, "needed", lambda model, dtype: Need(3_960_000_000 * memory.BYTES[dtype], 1))
    found = [nvidia.Gpu("0", gpu, "1", 1.0, 1.0, 1.0, 1.0)] if gpu else []
    monkeypatch.setattr(nvidia, "gpus", lambda: found)
    checked: Any = SimpleNamespace(text=SimpleNamespace(lengths=lengths) if lengths else None)
    return list(costs.lines(load("rsicap").with_settings(settings), checked))


def test_the_real_size_says_what_other_precisions_would_save(monkeypatch: pytest.MonkeyPatch) -> None:
    step, others = said(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert step.startswith("a step of 4 samples takes some 17.") and "weights 14.8 GiB" in step
    assert "on a GPU like an H100, by its data sheet: float32 1" in others
    assert (
        "and 47 ms of arithmetic; TF32" in others
        and "and 6.4 ms of arithmetic (--set matmul_precision=high)" in others
    )
    assert "bfloat16 8.7 GiB and 3.2 ms of arithmetic (--set base_dtype=bfloat16)" in others
    assert others.endswith("; an H200 reached 40, 14 and 8 % of its data sheet with one run of 4 (docs/gpu.md)")
    assert said(monkeypatch, None)[1] == others  # nobody would train it on the CPU of this machine


def test_of_an_unknown_gpu_only_the_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _, others = said(monkeypatch, "NVIDIA Something")
    assert others.startswith("the same step: float32 1") and "arithmetic" not in others and "reached" not in others


def test_a_base_in_bfloat16_and_longer_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = said(monkeypatch, None, lengths=(40, 60))
    longer, others = said(monkeypatch, None, "base_dtype=bfloat16", lengths=(200, 400))
    assert "weights 7.4 GiB" in longer and "float32 19" in others and "bfloat16 9.7" in others
    assert peak.sizes_of("x") is XL
    assert plain != longer


def test_a_small_model_on_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    monkeypatch.setattr(nvidia, "gpus", list)
    checked: Any = SimpleNamespace(text=None)
    (line,) = costs.lines(load("rsicap_mini"), checked)
    assert line.startswith("a step of 4 samples takes some") and "MiB" in line
