"""Checkpoints: atomic, verified, free of pickle, bound to their configuration, data and model."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.support import template
from trainer import checkpoint
from trainer.common.errors import CheckpointError
from trainer.config import MACHINE_FIELDS, TrainConfig
from trainer.events import CheckpointSaved, EpochEnded, EpochTiming, Event, NonFinite, RunStarted
from trainer.loop import Pack, history_of, train
from trainer.model.base import forward
from trainer.model.lora import Adapter
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]


def epoch_of(number: int, val_loss: float) -> EpochEnded:
    timing = dict.fromkeys(EpochTiming.__dataclass_fields__, 0.5)
    numbers = dict.fromkeys(("train_loss", "learning_rate", "grad_norm_mean", "grad_norm_max"), 0.1)
    return EpochEnded(
        epoch=number, step=number * 4, val_loss=val_loss, nonfinite_steps=0, timing=EpochTiming(**timing), **numbers
    )


@pytest.fixture(scope="module")
def saved(bench: Workbench, small: Small) -> Callable[..., checkpoint.State]:
    """`saved(folder, 1.0, 0.9)`: checkpoints of epochs with these validation losses, one after the other."""

    def save(out: Path, *val_losses: float) -> checkpoint.State:
        state = checkpoint.State(fingerprints={"data": "d", "model": "m"})
        config = small(num_epochs=99)
        adapter = Adapter(bench.base(config).model, config)
        for number, loss in enumerate(val_losses, start=1):
            state.epoch, state.step = number, number * 4
            state.history.append(epoch_of(number, loss))
            checkpoint.save(out, state, config, adapter)
        return state

    return save


def kept(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("val_losses", "expected"),
    [
        ((1.0,), [1]),
        ((1.0, 0.9, 0.8), [2, 3]),
        ((1.0, 0.7, 0.8, 0.9, 0.9), [2, 4, 5]),
        ((1.0, 0.7, 0.7), [2, 3]),
        ((1.0, 0.7, 0.8, 0.7, 0.9), [2, 4, 5]),  # the first of equals is the best
        ((float("nan"), 0.9, float("nan"), float("inf")), [2, 3, 4]),
        ((float("nan"), float("nan")), [1, 2]),
    ],
)
def test_the_last_two_and_the_best_are_kept(
    saved: Callable[..., checkpoint.State], tmp_path: Path, val_losses: tuple[float, ...], expected: list[int]
) -> None:
    saved(tmp_path, *val_losses)
    assert kept(tmp_path) == [f"epoch-{n:04d}" for n in expected]


@pytest.mark.parametrize("last_is_sound", [True, False])
def test_the_one_before_the_last_goes_once_the_last_of_all_is_sound(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_is_sound: bool
) -> None:
    """A disk may keep other bits than it was given."""
    write = checkpoint._write_state

    def damaging(folder: Path, state: checkpoint.State, config: TrainConfig) -> None:
        write(folder, state, config)
        if state.epoch == 3 and not last_is_sound:
            flip(folder / "optimizer.safetensors")

    monkeypatch.setattr(checkpoint, "_write_state", damaging)
    config = small(num_epochs=3, learning_rate=1e-12)  # so small a rate leaves the first epoch the best
    list(train(config, bench, tmp_path))
    assert kept(tmp_path) == [f"epoch-{n:04d}" for n in ([1, 3] if last_is_sound else [1, 2, 3])]
    if not last_is_sound:
        assert checkpoint.load(tmp_path, config).state.epoch == 2, "one epoch is lost, not two"


def test_what_is_loaded_is_what_was_saved(
    saved: Callable[..., checkpoint.State], small: Small, tmp_path: Path
) -> None:
    state = saved(tmp_path, 0.3, float("nan"))
    found = checkpoint.load(tmp_path, small(num_epochs=99))
    assert found.state == state
    assert found.folder == checkpoint.folder_of(tmp_path, 2)
    assert found.problems == ()
    assert checkpoint.load(tmp_path / "empty", small()) == checkpoint.Found(checkpoint.State(), None, ())


def test_the_order_of_epochs_is_that_of_numbers(
    saved: Callable[..., checkpoint.State], small: Small, tmp_path: Path
) -> None:
    saved(tmp_path, 0.1, 0.2)
    folder = tmp_path / "checkpoints"
    (folder / "epoch-0002").rename(folder / "epoch-10000")
    (folder / "epoch-0001").rename(folder / "epoch-9999")
    (folder / "epoch-mine").mkdir()
    (folder / "notes.txt").write_text("")
    assert checkpoint.load(tmp_path, small(num_epochs=99)).folder == folder / "epoch-10000"
    shutil.rmtree(folder / "epoch-10000")
    shutil.rmtree(folder / "epoch-9999")
    saved(tmp_path, 0.1)
    assert kept(tmp_path) == ["epoch-0001", "epoch-mine", "notes.txt"]  # what is not ours stays


@pytest.mark.parametrize("where", ["rename", "fsync"])
def test_a_failed_save_leaves_the_one_before_intact(
    saved: Callable[..., checkpoint.State],
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    saved(tmp_path, 0.5)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "rename") if where == "rename" else (os, "fsync")), fail)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 0.4)  # the same epoch again, too
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path / "new", 0.4, 0.3)
    monkeypatch.undo()
    assert kept(tmp_path / "new") == []
    if where == "fsync":
        assert checkpoint.load(tmp_path, small(num_epochs=99)).state.epoch == 1


KILLED = """
import os, sys
from pathlib import Path
from trainer.workbench import Workbench
from trainer.config import TrainConfig
from trainer.loop import train

rename = Path.rename
def killed(self, target):
    if "epoch-0002" in str(target):
        os._exit(9)
    return rename(self, target)
Path.rename = killed
config = TrainConfig.parse_settings(sys.argv[2:])
list(train(config, Workbench(), Path(sys.argv[1])))
"""


def test_a_process_killed_between_write_and_rename(bench: Workbench, small: Small, tmp_path: Path) -> None:
    config = small(num_epochs=3)
    settings = [
        f"{key}={','.join(value) if isinstance(value, tuple) else value}" for key, value in config.model_dump().items()
    ]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), *settings]
    ended = template.run(command)
    assert ended.returncode == 9, ended.stderr
    names = kept(tmp_path / "killed")
    assert len(names) == 2
    assert names[0].startswith(".epoch-0002.")
    assert names[1] == "epoch-0001"
    rest = list(train(config, bench, tmp_path / "killed"))
    whole = list(train(config, bench, tmp_path / "whole"))
    assert rest[1:] == whole[-len(rest[1:]) :]
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")


def until_epoch(config: TrainConfig, bench: Workbench, out: Path, epoch: int) -> None:
    events = train(config, bench, out)
    for event in events:
        if isinstance(event, CheckpointSaved) and event.epoch == epoch:
            break
    events.close()  # type: ignore[attr-defined]


def flip(path: Path, at: int = -2) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter": (lambda f: flip(f / "adapter" / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "optimizer": (lambda f: flip(f / "optimizer.safetensors"), "optimizer.safetensors is damaged"),
    "missing": (lambda f: (f / "optimizer.safetensors").unlink(), "No such file"),
    "no state": (lambda f: (f / "state.json").unlink(), "No such file"),
    "cut": (lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:400]), "epoch-0002: "),
    "digit": (
        lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('"step": 8', '"step": 9')),
        "state.json is damaged",
    ),
    "no object": (lambda f: (f / "state.json").write_text("[]"), "epoch-0002: "),
    "old": (lambda f: (f / "state.json").write_text('{"format": 0}'), "has format 0"),
    "empty": (
        lambda f: (f / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT})),
        "state.json lacks 'checksum'",
    ),
}


@pytest.fixture(scope="module")
def two_epochs(
    bench: Workbench, small: Small, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path, list[Event]]:
    """A run whose first epoch is its best, cut off after the second: (configuration, folder, events of the whole)."""
    # So small a rate leaves the validation loss as it is, and of equals the first is the best.
    config = small(num_epochs=3, learning_rate=1e-12)
    out = tmp_path_factory.mktemp("two")
    until_epoch(config, bench, out / "cut", 2)
    assert kept(out / "cut") == ["epoch-0001", "epoch-0002"]
    return config, out / "cut", list(train(config, bench, out / "whole"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_told(
    small: Small, tmp_path: Path, two_epochs: tuple[TrainConfig, Path, list[Event]], kind: str
) -> None:
    config, source, _ = two_epochs
    shutil.copytree(source, tmp_path / "out")
    damage, message = DAMAGE[kind]
    damage(checkpoint.folder_of(tmp_path / "out", 2))
    found = checkpoint.load(tmp_path / "out", config)
    assert found.folder == checkpoint.folder_of(tmp_path / "out", 1)
    (problem,) = found.problems
    assert "epoch-0002" in problem
    assert message in problem


def test_the_run_goes_on_from_the_sound_one(
    bench: Workbench, tmp_path: Path, two_epochs: tuple[TrainConfig, Path, list[Event]]
) -> None:
    config, source, whole = two_epochs
    shutil.copytree(source, tmp_path / "out")
    flip(checkpoint.folder_of(tmp_path / "out", 2) / "optimizer.safetensors")
    assert len(history_of(config, tmp_path / "out")) == 1
    rest = list(train(config, bench, tmp_path / "out"))
    assert isinstance(rest[0], RunStarted)
    assert rest[0].resumed_from_epoch == 1
    assert "optimizer.safetensors is damaged" in rest[0].damaged_checkpoints[0]
    assert rest[1:] == whole[-len(rest[1:]) :]
    assert len(rest) == 1 + 2 * 6
    flip(checkpoint.folder_of(tmp_path / "out", 1) / "optimizer.safetensors")
    flip(checkpoint.folder_of(tmp_path / "out", 3) / "optimizer.safetensors")
    again = list(train(config, bench, tmp_path / "out"))
    assert isinstance(again[0], RunStarted)
    assert (again[0].resumed_from_epoch, len(again[0].damaged_checkpoints)) == (0, 2)
    assert again[1:] == whole[1:]


def test_another_configuration_is_refused_with_the_difference(
    bench: Workbench, small: Small, tmp_path: Path, two_epochs: tuple[TrainConfig, Path, list[Event]]
) -> None:
    config, source, _ = two_epochs
    other = config.model_copy(update={"lora_alpha": 32.0, "prefetch_factor": 7})
    with pytest.raises(CheckpointError) as caught:
        history_of(other, source)
    assert "another configuration (lora_alpha: 16.0 there, 32.0 now);" in str(caught.value)
    with pytest.raises(CheckpointError, match="lora_alpha"):
        next(iter(train(other, bench, source)))
    machine = config.model_copy(update={"num_workers": 2, "prefetch_factor": 7})
    assert len(history_of(machine, source)) == 2


def test_another_owners_is_refused_and_nobodys_is_taken_up(bench: Workbench, small: Small, tmp_path: Path) -> None:
    """Nobody's is an earlier version's, or that of a run of its own; whoever has no name of its own takes up any."""
    config = small(num_epochs=2)
    adapter = Adapter(bench.base(config).model, config)
    for epoch, owner in ((1, None), (2, "mine")):
        state = checkpoint.State(epoch=epoch, fingerprints={"data": "d", "model": "m"}, owner=owner)
        checkpoint.save(tmp_path, state, config, adapter)
        assert checkpoint.load(tmp_path, config, "mine").state.epoch == epoch
        assert checkpoint.load(tmp_path, config).state.owner == owner
        if owner is None:
            assert checkpoint.load(tmp_path, config, "theirs").state.owner is None
    with pytest.raises(
        CheckpointError, match=r"belongs to another study \(its id is mine there, theirs now\); choose"
    ):
        checkpoint.load(tmp_path, config, "theirs")
    file = checkpoint.folder_of(tmp_path, 2) / "state.json"
    data = json.loads(file.read_text())
    del data["owner"], data["checksum"]  # as earlier versions wrote it
    file.write_text(json.dumps({**data, "checksum": checkpoint._checksum(data)}))
    assert checkpoint.load(tmp_path, config, "theirs").state.owner is None


def test_a_run_keeps_its_owner(bench: Workbench, small: Small, tmp_path: Path) -> None:
    config = small(num_epochs=2)
    with Pack(bench, owner="mine") as pack:
        pack.add(config, tmp_path)
        while checkpoint.load(tmp_path, config).state.epoch < 1:
            list(pack.round())
    with Pack(bench, owner="theirs") as pack, pytest.raises(CheckpointError, match="another study"):
        pack.add(config, tmp_path)
    list(train(config, bench, tmp_path))  # the second epoch, by somebody without a name
    found = checkpoint.load(tmp_path, config, "mine").state
    assert (found.epoch, found.owner) == (2, "mine")


def test_a_checkpoint_of_an_older_version_is_taken_up_whatever_its_patience(
    tmp_path: Path, two_epochs: tuple[TrainConfig, Path, list[Event]]
) -> None:
    """Patience and min_delta were fields of the configuration and part of the identity stored with it."""
    config, source, _ = two_epochs
    shutil.copytree(source, tmp_path / "out")
    for epoch in (1, 2):
        file = checkpoint.folder_of(tmp_path / "out", epoch) / "state.json"
        data = json.loads(file.read_text())
        del data["checksum"]
        data["config"] |= {"patience": 7, "min_delta": 0.5}
        decisive = {name: value for name, value in data["config"].items() if name not in MACHINE_FIELDS}
        data["identity"] = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
        assert data["identity"] != config.identity()
        data["checksum"] = checkpoint._checksum(data)
        file.write_text(json.dumps(data, indent=1))
    assert checkpoint.load(tmp_path / "out", config).state == checkpoint.load(source, config).state
    other = config.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(CheckpointError, match=r"another configuration \(learning_rate: 1e-12 there, 0\.001 now\);"):
        checkpoint.load(tmp_path / "out", other)


@pytest.mark.parametrize("what", ["data", "model"])
def test_changed_data_or_model_is_refused(
    bench: Workbench,
    tmp_path: Path,
    two_epochs: tuple[TrainConfig, Path, list[Event]],
    what: str,
) -> None:
    config, source, _ = two_epochs
    found = checkpoint.load(source, config)
    now = dict(found.state.fingerprints)
    checkpoint.check_fingerprints(found, now)
    with pytest.raises(CheckpointError, match=f"the {what} changed since"):
        checkpoint.check_fingerprints(found, {**now, what: "other"})
    assert now["data"] == bench.examined(config).fingerprint
    assert now["model"] == bench.base(config).fingerprint


def test_the_loop_checks_the_data(
    small: Small, bench: Workbench, tmp_path: Path, two_epochs: tuple[TrainConfig, Path, list[Event]]
) -> None:
    from dataclasses import replace

    config, source, _ = two_epochs
    changed = Workbench(replace(bench.examined(config), fingerprint="other"), config.data)
    with pytest.raises(CheckpointError, match="the data changed"):
        next(iter(train(config, changed, source)))


def test_no_pickle_is_written_or_read(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dump")):
        monkeypatch.setattr(module, name, forbidden)
    config = small(num_epochs=2)
    until_epoch(config, bench, tmp_path, 1)
    list(train(config, bench, tmp_path))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    assert not any(p.read_bytes().startswith((b"\x80", b"PK")) for p in files)


def test_the_adapter_loads_with_peft(bench: Workbench, small: Small, tmp_path: Path) -> None:
    from transformers import InstructBlipForConditionalGeneration

    config = small()
    events = list(train(config, bench, tmp_path))
    base = InstructBlipForConditionalGeneration.from_pretrained(config.model)
    _, val_set = bench.datasets(config)
    from trainer.data.batches import Batch, Collator

    batch: Any = Collator(bench.tokenizer(config))([val_set[i] for i in range(len(val_set))])
    assert isinstance(batch, Batch)
    plain = float(forward(base, batch).loss_sum.detach()) / batch.num_tokens()
    adapter = checkpoint.folder_of(tmp_path, 2) / "adapter"
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        loss = float(forward(loaded.get_base_model(), batch).loss_sum) / batch.num_tokens()
    (last,) = [e for e in events if isinstance(e, EpochEnded) and e.epoch == 2]
    assert loss == pytest.approx(last.val_loss, abs=1e-6)
    assert abs(plain - loss) > 1e-3


def test_a_series_of_bad_steps_is_stored(
    bench: Workbench, small: Small, tmp_path: Path, saved: Callable[..., checkpoint.State]
) -> None:
    state = saved(tmp_path, 0.5)
    state.nonfinite_in_a_row, state.micro_batch_size = 2, 3
    state.first_bad = NonFinite(tensor="loss", value="nan", after_update=False, detail="d")
    config = small(num_epochs=99)
    checkpoint.save(tmp_path, state, config, Adapter(bench.base(config).model, config))
    assert checkpoint.load(tmp_path, config).state == state
    text = (checkpoint.folder_of(tmp_path, 1) / "state.json").read_text()
    assert json.loads(text)["first_bad"]["tensor"] == "loss"


@pytest.mark.parametrize(
    ("there", "epoch", "best", "final", "gone"),
    [
        ([1, 2, 3, 4], 4, 2, False, [1]),
        ([1, 2, 3, 4], 4, 4, False, [1, 2]),
        ([1, 2, 3, 4], 4, 2, True, [1, 3]),
        ([1, 2, 3, 4, 5], 3, 3, False, [1]),  # 4 and 5 are another's, who has taken over while this one slept
        ([3], 3, None, False, []),
    ],
)
def test_of_checkpoints_the_last_two_the_best_and_later_ones_stay(
    there: list[int], epoch: int, best: int | None, final: bool, gone: list[int]
) -> None:
    assert checkpoint.superseded(there, epoch, best, final=final) == gone
