"""The loop: deterministic, resumable, equal to a plain reference, safe against what is not finite, frugal."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from tests.support import peft_reference
from trainer import runtime
from trainer.common.errors import DataError, UserError
from trainer.config import TrainConfig
from trainer.data import batches
from trainer.events import (
    CheckpointSaved,
    Diverged,
    EpochEnded,
    Event,
    MicroBatchReduced,
    OutOfMemory,
    RunStarted,
    StepEnded,
    epoch_from_dict,
    to_dict,
)
from trainer.loop import ForwardPass, Pack, history_of, train
from trainer.model.base import Forward, forward
from trainer.model.batch import Batch
from trainer.schedule import learning_rate
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]


def run(config: TrainConfig, bench: Workbench, out: Path, forward: ForwardPass = forward) -> list[Event]:
    return list(train(config, bench, out, forward=forward))


def steps(events: list[Event]) -> list[StepEnded]:
    return [e for e in events if isinstance(e, StepEnded)]


def losses(events: list[Event]) -> list[float]:
    return [e.loss for e in steps(events)]


def hooks(bench: Workbench, config: TrainConfig) -> int:
    """The number of linear modules of the base whose forward is replaced or hooked: the adapted ones, during a run."""
    modules = [m for m in bench.base(config).model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(("forward" in vars(m)) + len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_the_order_of_events(bench: Workbench, small: Small, tmp_path: Path) -> None:
    events = run(small(), bench, tmp_path)
    kinds = [type(e).__name__ for e in events]
    epoch = [*["StepEnded"] * 4, "EpochEnded", "CheckpointSaved"]
    assert kinds == ["RunStarted", *epoch, *epoch]
    started = events[0]
    assert isinstance(started, RunStarted)
    assert (started.num_train_samples, started.num_val_samples) == (13, 3)
    assert (started.steps_per_epoch, started.total_steps, started.warmup_steps) == (4, 8, 2)
    # 2 layers: self-attention, its output, the output of both feed-forwards and one cross-attention.
    model = bench.base(small()).model
    assert started.trainable_parameters == peft_reference.lora_parameters(model, started.adapted_modules, 4)
    assert [e.step for e in steps(events)] == list(range(1, 9))
    assert [e.num_samples for e in steps(events)] == [4, 4, 4, 1] * 2
    assert [e.learning_rate for e in steps(events)] == [0.0, 0.005, *[0.01] * 6]
    assert losses(events)[-1] < losses(events)[0]


def test_an_epoch_sums_up_its_steps(bench: Workbench, small: Small, tmp_path: Path) -> None:
    events = run(small(num_epochs=1), bench, tmp_path)
    (epoch,) = [e for e in events if isinstance(e, EpochEnded)]
    done = steps(events)
    tokens = sum(s.num_tokens for s in done)
    assert epoch.train_loss == pytest.approx(sum(s.loss * s.num_tokens for s in done) / tokens, rel=1e-12)
    assert epoch.grad_norm_max == max(s.grad_norm for s in done)
    assert epoch.grad_norm_mean == pytest.approx(sum(s.grad_norm for s in done) / 4)
    timing = epoch.timing
    assert timing.epoch_s >= timing.train_s + timing.eval_s + timing.checkpoint_s > 0
    assert timing.data_wait_s == pytest.approx(sum(s.timing.data_wait_s for s in done))
    assert timing.samples_per_s == pytest.approx(13 / timing.train_s)
    assert 0.05 < timing.peak_memory_gib < 64


def test_validation_loss_is_the_mean_over_all_label_tokens(bench: Workbench, small: Small, tmp_path: Path) -> None:
    """However the evaluation is cut into batches: of 1, or all at once."""
    whole = run(small(num_epochs=1, max_samples=24, val_fraction=0.4), bench, tmp_path / "a")
    single = run(small(num_epochs=1, max_samples=24, val_fraction=0.4, eval_batch_size=1), bench, tmp_path / "b")
    values = [e.val_loss for events in (whole, single) for e in events if isinstance(e, EpochEnded)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_the_same_configuration_gives_the_same_bits(bench: Workbench, small: Small, tmp_path: Path) -> None:
    config = small(lora_dropout=0.3)
    first = run(config, bench, tmp_path / "a")
    torch.manual_seed(999)
    run(small(lora_r=2, num_epochs=1), bench, tmp_path / "between")
    assert run(config, bench, tmp_path / "b") == first
    assert losses(run(small(lora_dropout=0.3, seed=43), bench, tmp_path / "c")) != losses(first)
    assert losses(run(small(), bench, tmp_path / "d")) != losses(first)  # dropout is live


def adapter_bytes(out: Path, epoch: int) -> list[bytes]:
    folder = out / "checkpoints" / f"epoch-{epoch:04d}"
    return [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        (folder / "optimizer.safetensors").read_bytes(),
    ]


@pytest.mark.parametrize("cut", ["after the epoch", "within the next"])
def test_a_run_that_resumes_equals_one_never_interrupted(
    bench: Workbench, small: Small, tmp_path: Path, cut: str
) -> None:
    config = small(num_epochs=3, lora_dropout=0.3, lr_scheduler_type="cosine", learning_rate=3e-2)
    whole = run(config, bench, tmp_path / "whole")
    events = train(config, bench, tmp_path / "cut")
    for event in events:
        if cut == "after the epoch" and isinstance(event, CheckpointSaved):
            break
        if isinstance(event, StepEnded) and event.step == 6:
            break
    events.close()  # type: ignore[attr-defined]
    torch.manual_seed(1)
    history = history_of(config, tmp_path / "cut")
    rest = run(config, bench, tmp_path / "cut")
    assert isinstance(rest[0], RunStarted)
    assert rest[0].resumed_from_epoch == 1
    first_epoch = [e for e in whole if isinstance(e, EpochEnded)][:1]
    assert history == first_epoch
    assert rest[1:] == whole[1 + 4 + 2 :]
    assert adapter_bytes(tmp_path / "cut", 3) == adapter_bytes(tmp_path / "whole", 3)
    assert history_of(config, tmp_path / "cut") == [e for e in whole if isinstance(e, EpochEnded)]


def test_a_complete_run_has_nothing_left_to_do(bench: Workbench, small: Small, tmp_path: Path) -> None:
    run(small(), bench, tmp_path)
    (only,) = run(small(), bench, tmp_path)
    assert isinstance(only, RunStarted)
    assert only.resumed_from_epoch == 2


@pytest.mark.parametrize(
    "fields", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"batch_size": 2, "gradient_accumulation_steps": 2}]
)
def test_however_a_step_is_cut_it_is_the_same_step(
    bench: Workbench, small: Small, tmp_path: Path, fields: dict[str, int]
) -> None:
    whole = steps(run(small(), bench, tmp_path / "whole"))
    cut = steps(run(small(**fields), bench, tmp_path / "cut"))
    assert [s.loss for s in cut] == pytest.approx([s.loss for s in whole], abs=2e-5)
    assert [s.grad_norm for s in cut] == pytest.approx([s.grad_norm for s in whole], rel=2e-4)
    for name in ("num_samples", "num_tokens", "learning_rate"):
        assert [getattr(s, name) for s in cut] == [getattr(s, name) for s in whole]


def library_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The library's own forward, image tokens written out."""
    size, queries = len(batch), model.config.num_query_tokens
    images = torch.full((size, queries), model.config.image_token_index)
    return model(  # type: ignore[no-any-return]
        pixel_values=batch.pixel_values,
        qformer_input_ids=batch.qformer_ids,
        qformer_attention_mask=batch.qformer_mask,
        input_ids=torch.cat([images, batch.text_ids], dim=1),
        attention_mask=torch.cat([torch.ones(size, queries, dtype=torch.long), batch.text_mask], dim=1),
        labels=batch.labels,
    ).loss


def test_equals_a_plain_loop_over_the_librarys_forward(bench: Workbench, small: Small, tmp_path: Path) -> None:
    config = small(num_epochs=3, lr_scheduler_type="linear", max_grad_norm=0.1, weight_decay=0.5)
    ours = steps(run(config, bench, tmp_path))
    train_set, _ = bench.datasets(config)
    with peft_reference.attached(bench.base(config).model, config) as (peft_model, _):
        peft_model.train()
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.5, fused=False)
        collate = batches.Collator(bench.tokenizer(config))
        expected = []
        for epoch in (1, 2, 3):
            sampler = batches.EpochSampler(len(train_set), config.seed)
            sampler.epoch = epoch
            order = list(sampler)
            for start in range(0, len(order), 4):
                batch = collate([train_set[i] for i in order[start : start + 4]])
                assert isinstance(batch, Batch)
                optimizer.param_groups[0]["lr"] = learning_rate(config, len(expected) + 1, 12)
                loss = library_loss(peft_model, batch)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
                optimizer.step()
                optimizer.zero_grad()
                expected.append((float(loss.detach()), float(norm)))
    assert len(expected) == len(ours) == 12
    assert max(n for _, n in expected) > 0.1  # clipping took part
    assert [s.loss for s in ours] == pytest.approx([x for x, _ in expected], abs=1e-5)
    assert [s.grad_norm for s in ours] == pytest.approx([n for _, n in expected], rel=1e-3)


def test_modules_of_the_language_model_can_be_trained(bench: Workbench, small: Small, tmp_path: Path) -> None:
    config = small(target_modules=("q", "v", "query"))
    events = run(config, bench, tmp_path)
    assert isinstance(events[0], RunStarted)
    assert {m.partition(".")[0] for m in events[0].adapted_modules} == {"language_model", "qformer"}
    assert losses(events)[-1] < losses(events)[0]


class Faulty:
    """Our forward, with a fault in chosen passes that train (counted from 1)."""

    def __init__(self, fault: Callable[[Forward], Forward], passes: set[int]) -> None:
        self.fault, self.passes, self.count = fault, passes, 0

    def __call__(self, model: Any, batch: Batch) -> Forward:
        out = forward(model, batch)
        if torch.is_grad_enabled():
            self.count += 1
            if self.count in self.passes:
                return self.fault(out)
        return out


def nan_loss(out: Forward) -> Forward:
    return Forward(out.token_losses * float("nan"), out.query_output)


def infinite_query(out: Forward) -> Forward:
    return Forward(out.token_losses, out.query_output + float("inf"))


def test_a_step_that_is_not_finite_updates_nothing(bench: Workbench, small: Small, tmp_path: Path) -> None:
    events: list[Any] = []
    with Pack(bench, forward=Faulty(nan_loss, {3, 4, 6, 7})) as pack:
        member = pack.add(small(), tmp_path)
        before = member.adapter.weights.clone()
        while pack.members:
            for _, event in pack.round():
                events.append(event)
                if isinstance(event, StepEnded):
                    now = member.adapter.weights.clone()
                    # The first step of a warmup has rate 0.
                    assert torch.equal(before, now) == (event.nonfinite is not None or event.step == 1)
                    before = now
    assert [s.step for s in steps(events) if s.nonfinite] == [3, 4, 6, 7]
    cause = steps(events)[2].nonfinite
    assert cause is not None
    assert (cause.tensor, cause.value, cause.after_update) == ("loss", "nan", False)
    epochs = [e for e in events if isinstance(e, EpochEnded)]
    assert [e.nonfinite_steps for e in epochs] == [2, 2]
    good = [s for s in steps(events)[:4] if s.nonfinite is None]
    tokens = sum(s.num_tokens for s in good)
    assert epochs[0].train_loss == pytest.approx(sum(s.loss * s.num_tokens for s in good) / tokens)
    assert not any(isinstance(e, Diverged) for e in events)  # never three in a row


def test_three_in_a_row_end_the_run(bench: Workbench, small: Small, tmp_path: Path) -> None:
    def other_later(out: Forward) -> Forward:
        return infinite_query(out) if faulty.count == 3 else nan_loss(out)

    faulty = Faulty(other_later, {3, 4, 5, 6})
    events = run(small(), bench, tmp_path, faulty)
    last = events[-1]
    assert isinstance(last, Diverged)
    # Across the end of an epoch, and with what went bad first.
    assert (last.first_bad_step, last.step, last.epoch) == (3, 5, 2)
    assert (last.cause.tensor, last.cause.value) == ("query_output", "inf")
    assert len(steps(events)) == 5
    assert all(p.isfinite().all() for p in bench.base(small()).model.parameters())
    two = run(small(max_nonfinite_steps=2), bench, tmp_path / "two", Faulty(nan_loss, {1, 2}))
    assert isinstance(two[-1], Diverged)


def test_a_series_is_remembered_by_the_checkpoint(bench: Workbench, small: Small, tmp_path: Path) -> None:
    events = train(small(), bench, tmp_path, forward=Faulty(nan_loss, {3, 4}))
    while not isinstance(next(events), CheckpointSaved):
        pass
    events.close()  # type: ignore[attr-defined]
    last = run(small(), bench, tmp_path, Faulty(infinite_query, {1}))[-1]
    assert isinstance(last, Diverged)
    assert (last.first_bad_step, last.step, last.cause.tensor) == (3, 5, "loss")


def test_the_gradient_that_went_bad_is_named(bench: Workbench, small: Small, tmp_path: Path) -> None:
    """Clipping by a norm that is NaN makes all gradients NaN: the one that was first must be found before."""
    name = "qformer.encoder.layer.0.attention.attention.value"
    module = bench.base(small()).model.get_submodule(name)
    handles = []

    def poisoned(model: Any, batch: Batch) -> Forward:
        if torch.is_grad_enabled() and not handles:

            def poison(_module: Any, _args: Any, output: torch.Tensor) -> None:
                output.register_hook(lambda grad: grad * float("nan"))

            handles.append(module.register_forward_hook(poison))
        return forward(model, batch)

    events = train(small(), bench, tmp_path, forward=poisoned)
    first = next(event for event in events if isinstance(event, StepEnded))
    events.close()  # type: ignore[attr-defined]
    handles[0].remove()
    assert first.nonfinite is not None
    assert (first.nonfinite.tensor, first.nonfinite.value) == (f"grad: {name}.lora_A.default.weight", "nan")
    assert math.isfinite(first.loss)
    assert math.isnan(first.grad_norm)


def test_experiment_1_float16_gives_one_good_batch_then_nan(bench: Workbench, small: Small, tmp_path: Path) -> None:
    fields = {"learning_rate": 5e-6, "lora_r": 4, "lora_alpha": 8, "batch_size": 2, "max_samples": 20}
    config = small(**fields, warmup_steps=0, torch_dtype="float16", lora_dropout=0.1)
    events = run(config, bench, tmp_path / "half")
    done = steps(events)
    assert done[0].nonfinite is None
    assert math.isfinite(done[0].loss)
    assert [s.nonfinite is not None for s in done] == [False, True, True, True]
    last = events[-1]
    assert isinstance(last, Diverged)
    assert last.first_bad_step == 2
    assert last.cause.tensor.startswith("param: ")
    assert ".lora_A." in last.cause.tensor
    assert last.cause.after_update
    assert last.cause.value == "nan"
    for part in ("exactly 0", "eps 1e-08 is 0 in float16", "divided by 0"):
        assert part in last.cause.detail
    # NaN is the same as NaN when runs are compared.
    assert run(config, bench, tmp_path / "again") == events
    # The remedy that the detail points at: an eps that float16 can hold.
    mended = run(small(**fields, num_epochs=1, torch_dtype="float16", adam_epsilon=1e-4), bench, tmp_path / "eps")
    assert all(s.nonfinite is None for s in steps(mended))
    full = run(small(**fields, num_epochs=1, warmup_steps=0), bench, tmp_path / "full")
    assert all(s.nonfinite is None for s in steps(full))


class Hungry:
    """Our forward, out of memory above a number of samples in a pass that trains."""

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError, evaluation: bool = False) -> None:
        self.most, self.error, self.evaluation = most, error, evaluation
        self.sizes: list[int] = []

    def __call__(self, model: Any, batch: Batch) -> Forward:
        if torch.is_grad_enabled() != self.evaluation:
            self.sizes.append(len(batch))
            if len(batch) > self.most:
                raise self.error()
        return forward(model, batch)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_micro_batch(
    bench: Workbench, small: Small, tmp_path: Path, error: type[Exception]
) -> None:
    expected = run(small(lora_dropout=0.3, micro_batch_size=1), bench, tmp_path / "expected")
    events = run(small(lora_dropout=0.3), bench, tmp_path / "reduced", Hungry(1, error))
    reduced = [e for e in events if isinstance(e, MicroBatchReduced)]
    assert reduced == [MicroBatchReduced(step=1, micro_batch_size=2), MicroBatchReduced(step=1, micro_batch_size=1)]
    assert [e for e in events if not isinstance(e, MicroBatchReduced)] == expected
    events = run(small(), bench, tmp_path / "none", Hungry(0, error))
    assert [type(e) for e in events] == [RunStarted, MicroBatchReduced, MicroBatchReduced, OutOfMemory]
    assert events[-1].step == 1  # type: ignore[union-attr]


def test_the_reduced_micro_batch_is_resumed_with(bench: Workbench, small: Small, tmp_path: Path) -> None:
    whole = run(small(), bench, tmp_path / "whole", Hungry(2))
    events = train(small(), bench, tmp_path / "cut", forward=Hungry(2))
    while not isinstance(next(events), CheckpointSaved):
        pass
    events.close()  # type: ignore[attr-defined]
    hungry = Hungry(2)
    rest = run(small(), bench, tmp_path / "cut", hungry)
    assert max(hungry.sizes) == 2
    assert rest[1:] == whole[-len(rest[1:]) :]


def test_out_of_memory_in_the_evaluation(bench: Workbench, small: Small, tmp_path: Path) -> None:
    halved = run(small(num_epochs=1), bench, tmp_path / "a", Hungry(1, evaluation=True))
    expected = run(small(num_epochs=1), bench, tmp_path / "b")
    assert losses(halved) == losses(expected)
    assert halved[-2].val_loss == pytest.approx(expected[-2].val_loss, abs=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of range"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, known: bool) -> None:
    assert runtime.is_out_of_memory(error) == known


def test_other_faults_are_not_taken_for_it(bench: Workbench, small: Small, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(small(), bench, tmp_path, Hungry(0, RuntimeError))
    assert not hooks(bench, small())


def test_a_closed_run_leaves_the_base_as_it_was(bench: Workbench, small: Small, tmp_path: Path) -> None:
    config = small(num_workers=1, cache_features=False)
    model = bench.base(config).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]
    children = set(psutil.Process().children())
    events = train(config, bench, tmp_path)
    for event in events:
        if isinstance(event, StepEnded) and event.step == 2:
            break
    assert hooks(bench, config)
    assert set(psutil.Process().children()) - children
    events.close()  # type: ignore[attr-defined]
    del event
    assert not set(psutil.Process().children()) - children  # the DataLoader's workers ended
    assert [type(m) for m in model.modules()] == modules
    assert not hooks(bench, config)
    assert not hasattr(model, "peft_config")
    assert not model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def count_tensors() -> int:
    # By type, not isinstance: that would wake lazy and deprecated objects of libraries.
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.slow
def test_memory_does_not_grow_from_run_to_run(bench: Workbench, small: Small, tmp_path: Path) -> None:
    process = psutil.Process()

    def one(i: int) -> int:
        run(small(num_epochs=1, max_samples=8, lora_r=64, seed=i), bench, tmp_path / str(i))
        gc.collect()
        return int(process.memory_info().rss)

    for i in range(5):  # allocators settle
        one(i)
    tensors = count_tensors()
    sizes = [one(i) for i in range(5, 25)]
    # An adapter of rank 64 with its moments takes 1.9 MiB here: 20 that leak would be 38 MiB. Noise is some 100 KiB.
    assert sizes[-1] - sizes[0] < 8 * 2**20, sizes
    assert abs(count_tensors() - tensors) < 20


def data_folder(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(8):
        name = f"P{i:04d}_0001.png"
        Image.new("RGB", (64, 64), (20 * i, 90, 10)).save(folder / "images" / name)
        rows.append({"filename": name, "text_input": "Describe it.", "text_output": f"A pier. {i} ships."})
    rows.append({"filename": "gone.png", "text_output": "A field."})
    (folder / "captions.json").write_text(json.dumps({"annotations": rows}))
    return folder


def test_an_image_that_goes_bad_while_training_is_named(small: Small, tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data")
    config = small(data=str(folder), skip_bad_rows=True, batch_size=1, num_epochs=1, cache_features=False)
    bench = Workbench()
    events: Iterator[Event] = train(config, bench, tmp_path / "out")
    started = next(events)
    assert isinstance(started, RunStarted)
    assert started.skipped_rows == ("captions.json, annotation 8: gone.png: the image is missing",)
    assert started.num_train_samples + started.num_val_samples == 8
    next(events)
    for path in (folder / "images").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"P000\d_0001.png: the image is truncated"):
        list(events)
    assert not hooks(bench, config)
    with pytest.raises(DataError, match="1 of 9 rows"):  # the same bench, asked to be strict
        next(iter(train(small(data=str(folder)), bench, tmp_path / "strict")))


def test_wrong_input_writes_nothing(bench: Workbench, small: Small, tmp_path: Path) -> None:
    for fields in ({"target_modules": ("quary",)}, {"model": str(tmp_path / "none")}, {"data": "/none"}):
        with pytest.raises(UserError):
            run(small(**fields), bench, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the output folder .* cannot be made"):
        run(small(), bench, tmp_path / "file")


def test_epochs_survive_json(bench: Workbench, small: Small, tmp_path: Path) -> None:
    for event in run(small(num_epochs=1), bench, tmp_path):
        text = json.dumps(to_dict(event))
        if isinstance(event, EpochEnded):
            again = epoch_from_dict(json.loads(text))
            assert again == event
            assert again.timing == event.timing
