"""Passes that are recorded once and played again, with a recorder for the CPU.

It keeps the computation and carries it out again at each play: what the host knew when it was recorded stays as it
was, so that whatever should have come through tensors is missed here as it would be in a CUDA graph.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.benchmarks import xl
from tests.support import checkpoints
from tests.support.first_steps import apart, distance
from tests.support.library_run import Ran
from tests.support.spoiling import spoiling
from trainer import runtime
from trainer.config import TrainConfig
from trainer.events import EpochEnded, StepEnded
from trainer.loop import Pack
from trainer.member import Member
from trainer.model import graphs, lora
from trainer.model.base import Forward, forward
from trainer.model.batch import Batch
from trainer.model.rounding import filled_up
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]
RUNS: tuple[dict[str, Any], ...] = (
    {"lora_r": 2, "lora_alpha": 8, "batch_size": 2, "lora_dropout": 0.3, "seed": 1},
    {"lora_r": 4, "batch_size": 4, "max_grad_norm": 0.05},
    {"lora_r": 8, "batch_size": 3, "weight_decay": 0.3, "lora_dropout": 0.1, "seed": 2},
)


class Recorder:
    """Counts what is recorded and played."""

    def __init__(self) -> None:
        self.recorded = self.played = self.trained = 0

    def __call__(
        self, compute: Callable[[], torch.Tensor], generators: Sequence[torch.Generator], where: graphs.Where
    ) -> graphs.Played:
        results = torch.empty(0)  # nothing is computed while a graph is recorded
        self.recorded += 1

        def play() -> None:
            self.played += 1
            self.trained += torch.is_grad_enabled()  # the others are evaluations
            results.data = compute()

        return results, play


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(graphs.RECORDERS, "cpu", made)
    monkeypatch.setattr(lora, "UNIFORM", ("cpu",))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are all asked the same, as RSICap's are: only their captions differ in length. The embedded data's
    questions do too, so that its training passes hardly repeat."""
    out = tmp_path_factory.mktemp("one question") / "data"
    with mock.patch.object(xl, "CAPTION_TOKENS", (8, 40)):
        xl.build_data(out, 40)
    return out


@pytest.fixture
def alike(small: Small, folder: Path) -> Small:
    """A configuration on these."""
    return lambda **fields: small(**{"data": str(folder), "max_samples": 30, **fields})


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setitem(runtime.DTYPES, "float32", torch.float64)
    return Workbench()


def finished(pack: Pack, members: Sequence[Member]) -> tuple[list[Ran], list[list[float]]]:
    """(Losses, norms and weights; validation losses) of each run, to their ends."""
    steps: dict[Member, list[StepEnded]] = {member: [] for member in members}
    epochs: dict[Member, list[float]] = {member: [] for member in members}
    while pack.members:
        for member, event in pack.round():
            if isinstance(event, Exception):
                raise event
            if isinstance(event, StepEnded) and member in steps:
                steps[member].append(event)
            if isinstance(event, EpochEnded) and member in epochs:
                epochs[member].append(event.val_loss)
    ran = [
        Ran(
            [event.loss for event in steps[member]],
            [event.grad_norm for event in steps[member]],
            {name: each.weight.clone() for name, each in member.adapter.named().items()},
        )
        for member in members
    ]
    return ran, [epochs[member] for member in members]


def trained(bench: Workbench, configs: Sequence[TrainConfig], out: Path, *, records: bool) -> Any:
    with Pack(bench) as pack:
        pack.passes.records = records
        return finished(pack, [pack.add(config, out / str(i)) for i, config in enumerate(configs)])


def assert_alike(one: Any, other: Any, most: float) -> None:
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert len(mine.losses) == len(theirs.losses) > 4
        assert apart(mine.losses, theirs.losses) < most and apart(mine.norms, theirs.norms) < most
        assert distance(mine, theirs) < most
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine == pytest.approx(theirs, rel=most) and len(mine) > 1


@pytest.mark.parametrize("runs", [RUNS[:1], RUNS, [{"batch_size": 4, "seed": i} for i in range(3)]])
def test_they_compute_what_passes_compute(
    double: Workbench, alike: Small, tmp_path: Path, recorder: Recorder, runs: Sequence[dict[str, Any]]
) -> None:
    """To 1e-10 in float64, after several epochs in which losses of other runs are as low: alone and in packs."""
    configs = [alike(num_epochs=3, **fields) for fields in runs]
    plain = trained(double, configs, tmp_path / "plain", records=False)
    assert recorder.recorded == recorder.played == 0
    found = trained(double, configs, tmp_path / "recorded", records=True)
    assert recorder.played > recorder.recorded > 0 and recorder.trained > 5
    assert_alike(found, plain, 1e-10)


@pytest.mark.parametrize("kind", ["llama-gqa", "t5-untied"])
def test_other_language_models(double: Workbench, alike: Small, tmp_path: Path, recorder: Recorder, kind: str) -> None:
    model = str(checkpoints.write(tmp_path / "checkpoint", kind))
    configs = [alike(model=model, num_epochs=3, **fields) for fields in RUNS[:2]]
    plain = trained(double, configs, tmp_path / "plain", records=False)
    found = trained(double, configs, tmp_path / "recorded", records=True)
    assert recorder.played > recorder.recorded > 0 and recorder.trained > 5
    assert_alike(found, plain, 1e-10)


def test_questions_of_different_lengths(double: Workbench, small: Small, tmp_path: Path, recorder: Recorder) -> None:
    """The embedded data's: evaluations alone repeat."""
    configs = [small(num_epochs=3, **fields) for fields in RUNS]
    plain = trained(double, configs, tmp_path / "plain", records=False)
    assert_alike(trained(double, configs, tmp_path / "recorded", records=True), plain, 1e-10)
    assert recorder.played > 0 and recorder.trained < 3


def test_a_run_that_takes_the_place_of_another_goes_on_with_its_recordings(
    double: Workbench, alike: Small, tmp_path: Path, recorder: Recorder
) -> None:
    """Another rank below the same power of two, rate, alpha, dropout and seed; the same bits as with its own."""
    whole: dict[str, Any] = {"batch_size": 40, "num_epochs": 8}  # all batches have the same shape
    first = alike(lora_r=3, lora_dropout=0.2, **whole)
    second = alike(lora_r=4, lora_alpha=3, lora_dropout=0.4, seed=5, learning_rate=3e-2, **whole)
    alone = trained(double, [second], tmp_path / "alone", records=True)
    with Pack(double) as pack:
        one = pack.add(first, tmp_path / "first")
        while one.state.epoch < 5:
            list(pack.round())
        pack.remove(one)
        recorded, recorder.trained = recorder.recorded, 0
        other = pack.add(second, tmp_path / "second")
        found = finished(pack, [other])
    assert recorder.recorded == recorded > 0 and recorder.trained == 8
    assert found[0][0].losses == alone[0][0].losses and found[1] == alone[1]
    assert all(torch.equal(w, alone[0][0].weights[name]) for name, w in found[0][0].weights.items())


@pytest.mark.parametrize("where", ["weights", "rows"])
def test_what_is_not_finite_in_one_run_changes_no_bit_of_the_others(
    alike: Small, tmp_path: Path, recorder: Recorder, where: str
) -> None:
    configs = [alike(num_epochs=40, max_nonfinite_steps=100, **fields) for fields in RUNS]
    bench = Workbench()

    # Runs lie in the order of their batches' sizes, the second last; only where none is at its epoch's last batch.
    spoil = spoiling(slice(5, None), size=9)
    ends = []
    for spoiled in (False, True):
        with Pack(bench, forward=spoil if spoiled and where == "rows" else forward) as pack:
            members = [pack.add(config, tmp_path / f"{spoiled}{i}") for i, config in enumerate(configs)]
            if spoiled and where == "weights":
                members[1].adapter.weights[3] = float("nan")
            seen: list[tuple[float, float]] = []
            bad = 0
            for _ in range(30):
                for member, event in pack.round():
                    if isinstance(event, StepEnded) and member is not members[1]:
                        seen.append((event.loss, event.grad_norm))
                    elif isinstance(event, StepEnded):
                        bad += not math.isfinite(event.loss)
            assert (bad > 10) == spoiled
            ends.append((seen, [member.adapter.weights.clone() for member in members]))
    assert recorder.trained > 20
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][i], ends[1][1][i]) for i in (0, 2))


def test_what_cannot_be_recorded_trains_all_the_same(
    bench: Workbench, small: Small, tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapters in the language model, small batches of a step; and a recorder that gives up."""
    for more in ({"target_modules": ("query", "v")}, {"micro_batch_size": 2}, {"gradient_checkpointing": "always"}):
        with Pack(bench) as pack:
            pack.add(small(num_epochs=9, **more), tmp_path / next(iter(more)))
            for _ in range(3):  # an epoch has four steps
                assert not [error for _, error in pack.round() if isinstance(error, Exception)]
    assert recorder.recorded == 0
    config = small(num_epochs=6, lora_dropout=0.3)
    plain = trained(bench, [config], tmp_path / "plain", records=True)

    def refuses(_: Any, generators: Sequence[torch.Generator], where: graphs.Where) -> graphs.Played:
        for each in generators:  # those of a recording that did not end well cannot be drawn from any more
            each.manual_seed(13)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphs.RECORDERS["cpu"] = refuses
    with caplog.at_level(logging.WARNING, "trainer.graphs"):
        found = trained(bench, [config], tmp_path / "refused", records=True)
    assert caplog.messages == [
        "steps are not recorded as CUDA graphs from now on: operation not permitted when stream is capturing"
    ]
    assert found[0][0].losses == pytest.approx(plain[0][0].losses, rel=1e-5)


@pytest.mark.parametrize(
    "why", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted")], ids=type
)
def test_a_recording_that_found_no_memory_is_told(
    bench: Workbench, small: Small, tmp_path: Path, recorder: Recorder, why: RuntimeError
) -> None:
    """So that a probe does not take launched steps for what fits; what cannot be recorded at all is the usual step."""
    graphs.RECORDERS["cpu"] = mock.Mock(side_effect=why)
    with Pack(bench) as pack:
        pack.add(small(num_epochs=4), tmp_path / "run")
        while pack.members:
            assert not [error for _, error in pack.round() if isinstance(error, Exception)]
        assert pack.passes.squeezed == isinstance(why, torch.OutOfMemoryError)


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_that_is_not_the_current_one_is_recorded_on(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """All recordings of a device on one stream of its own, and the stream and device of before afterwards."""
    current, streams, recorded = ["cuda:0"], ["of the process"], []

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(str(of))
        try:
            yield
        finally:
            current.pop()

    @contextmanager
    def graph(_: object, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        recorded.append((current[-1], stream, pool))
        streams[-1] = stream
        yield
        if fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        streams[-1] = "of the process"

    cuda = SimpleNamespace(
        CUDAGraph=mock.Mock,
        Stream=lambda of: f"stream of {of}",
        current_stream=lambda: streams[-1],
        device=device,
        empty_cache=lambda: None,
        graph=graph,
        graph_pool_handle=lambda: (0, 1),
        set_stream=lambda stream: streams.__setitem__(-1, stream),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    kept = graphs.Graphs(torch.device("cuda:1"))
    images, whole = mock.Mock(), mock.Mock()
    for key in "aaabbb"[: 3 if fails else 6]:
        with pytest.raises(graphs.NotRecorded) if fails and kept._kept.get(key) == graphs.USES else nullcontext():
            kept.run(key, whole, images, lambda whole, images: torch.ones(1))
    assert recorded == [("cuda:1", "stream of cuda:1", (0, 1))] * (1 if fails else 2)
    assert current == ["cuda:0"] and streams == ["of the process"]


def test_memory_that_runs_out_frees_recordings_first(
    bench: Workbench, small: Small, tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the same batches go on without: a recording keeps the memory of its pass."""
    full = False

    def sometimes(model: Any, batch: Batch) -> Forward:
        nonlocal full
        if full:
            full = False
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    with Pack(bench, forward=sometimes) as pack, caplog.at_level(logging.WARNING):
        member = pack.add(small(num_epochs=9), tmp_path / "run")
        while not recorder.played:
            list(pack.round())
        full, recorded = True, recorder.recorded
        ran, _ = finished(pack, [member])
    assert caplog.messages == ["steps are not recorded as CUDA graphs from now on: out of memory"]
    assert recorder.recorded == recorded and len(ran[0].losses) > 4


def test_the_recordings_used_last_are_kept(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    kept = graphs.Graphs(torch.device("cpu"))
    one = torch.ones(1, dtype=torch.long)

    def run(key: str) -> float:
        return float(kept.run(key, one, torch.ones(1), lambda whole, images: whole + images))

    for key in "aaabbbaacccd":
        assert run(key) == 2
    assert recorder.recorded == 3 and len(kept) == 2
    run("a")
    assert recorder.recorded == 3
    for _ in range(3):  # it had gone
        run("b")
    assert recorder.recorded == 4


def test_recordings_share_the_memory_of_their_images(recorder: Recorder) -> None:
    """By shape, and for as long as one of them is kept."""
    kept = graphs.Graphs(torch.device("cpu"))
    whole = torch.ones(1, dtype=torch.long)
    for turn in range(4):
        for key, size in (("a", 2), ("b", 2), ("c", 3)):
            images = torch.full((size,), 10.0 * turn + size)
            found = kept.run(key, whole, images, lambda whole, images: images + whole)
            assert found.tolist() == [images[0] + 1] * size
    read = [each.images.data_ptr() for each in kept._kept.values() if not isinstance(each, int)]
    assert len(read) == recorder.recorded == 3 and len(set(read)) == len(kept._images) == 2
    kept.clear()
    gc.collect()  # this recorder's keep themselves
    assert not len(kept._images)


def test_no_more_recordings_are_kept_where_each_pass_makes_one(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    """Shapes of an epoch come in the same order in each: all are recorded in the third, no other pass in between."""
    monkeypatch.setattr(graphs, "MOST", 2)
    kept = graphs.Graphs(torch.device("cpu"))
    one = torch.ones(1, dtype=torch.long)
    most = 0
    for _ in range(3):
        for shape in range(6):
            kept.run(shape, one, torch.ones(1), lambda whole, images: whole + images)
            most = max(most, len(kept))
    assert recorder.recorded == 6 and most == 2


def test_few_shapes() -> None:
    """Label tokens grow by at most an eighth, or to 32."""
    for number in range(1, 5000):
        assert number <= filled_up(number) < max(number * 1.125, number + 32) + 1
    assert len({filled_up(number) for number in range(1600, 2200)}) <= 5
