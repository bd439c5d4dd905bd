"""Training checkpoints: atomic, checked by hash, free of pickle.

    <run folder>/checkpoints/epoch-0003/
        adapter/         in PEFT's format, loads with PeftModel.from_pretrained; and how to caption with it
        optimizer.safetensors   AdamW's moments, flat, and its count of updates
        state.json       config, position, history of epochs, hashes of the other files

There is no generator state to save: data order is a function of (seed, epoch), dropout of (seed, step) and the
learning rate of the step. A checkpoint appears whole or not at all (`trainer.common.files`). The last two and the
best are kept: should the last be damaged on the disk, one epoch is trained again, not all since the best. Once a run
has had all its epochs and its last checkpoint, read back, is sound, the one before it goes too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.common.disk import out_of_room
from trainer.common.errors import CheckpointError
from trainer.common.files import UNFINISHED, flush_folder, whole_folder
from trainer.config import MACHINE_FIELDS, TrainConfig, identity_of
from trainer.events import EpochEnded, NonFinite, epoch_from_dict, to_dict
from trainer.model.lora import Adapter

FORMAT = 1
USE = "captioning.json"
"""File beside an adapter's own: the instruction it was trained with, the longest caption in tokens, the dtype."""


@dataclass
class State:
    """Where a run stands after a whole epoch."""

    epoch: int = 0
    step: int = 0
    micro_batch_size: int | None = None
    """Set if memory ran out: smaller than the configuration's."""
    nonfinite_in_a_row: int = 0
    first_bad: NonFinite | None = None
    """The cause at the first of these steps."""
    history: list[EpochEnded] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of `data` and `model`: a run is continued only with those that it began with."""
    owner: str | None = None
    """Whose run it is, in the words of whoever trains it; None for nobody's, and for an earlier version's."""

    def best_epoch(self) -> int | None:
        """The epoch with the lowest validation loss, the first of equals; None without a finite one."""
        finite = [e for e in self.history if e.val_loss == e.val_loss and abs(e.val_loss) != float("inf")]
        return min(finite, key=lambda e: (e.val_loss, e.epoch)).epoch if finite else None


@dataclass(frozen=True)
class Found:
    """The newest sound checkpoint of an output folder."""

    state: State
    """Its state; a fresh one if there is none."""
    folder: Path | None
    problems: tuple[str, ...]
    """Newer checkpoints that are damaged, each with the reason: the run goes back behind them."""


def claim(out_dir: Path) -> None:
    """Make the output folder, before a run spends an epoch on something that it could not save.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the output folder {str(out_dir)!r} cannot be made: {error}") from None
    if not os.access(out_dir / "checkpoints", os.W_OK | os.X_OK):
        raise CheckpointError(f"the output folder {str(out_dir)!r} may not be written (permission denied)")


def folder_of(out_dir: Path, epoch: int) -> Path:
    """The checkpoint folder of an epoch."""
    return out_dir / "checkpoints" / f"epoch-{epoch:04d}"


def save(
    out_dir: Path,
    state: State,
    config: TrainConfig,
    adapter: Adapter,
    instruction: str | None = None,
) -> Path:
    """Write the checkpoint of `state.epoch` and drop all but the last two and the best; see the module.

    `instruction` is kept beside the adapter (`USE`), for whoever captions with it.

    Raises:
        OSError: the disk is full or gone; the earlier checkpoints are intact then.
    """
    from safetensors.torch import save_file

    folder = folder_of(out_dir, state.epoch)
    try:
        # One that is there is replaced: an epoch trained again after a damaged checkpoint.
        with whole_folder(folder, replace=True) as unfinished:
            adapter.save(unfinished / "adapter", config.model)
            if instruction is not None:
                use = {"instruction": instruction, "max_new_tokens": config.max_target_length}
                use["torch_dtype"] = config.dtype_of_base
                (unfinished / "adapter" / USE).write_text(json.dumps(use, ensure_ascii=False, indent=1), "utf-8")
            save_file(adapter.optimizer_tensors(), str(unfinished / "optimizer.safetensors"))
            _write_state(unfinished, state, config)
        flush_folder(out_dir)
    except BaseException as error:
        if out_of_room(error) and not isinstance(error, OSError):  # safetensors has an exception of its own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    there = dict(_epochs(out_dir))
    final = state.epoch >= config.num_epochs and _is_sound(folder)
    gone = [there[epoch] for epoch in superseded(there, state.epoch, state.best_epoch(), final=final)]
    for path in (*gone, *folder.parent.glob(UNFINISHED)):  # the latter: of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    return folder


def superseded(there: Iterable[int], epoch: int, best: int | None, *, final: bool) -> list[int]:
    """Epochs whose checkpoints go once this epoch's is written.

    Later ones stay: they are of a process that has taken the trial over from this one, which was asleep and does not
    know yet. Its best adapter would be gone.

    Args:
        there: Epochs with a checkpoint.
        epoch: The one just written.
        best: That of the lowest validation loss so far.
        final: It is the last, and sound: the one before it is not needed to go on from.
    """
    earlier = sorted(each for each in there if each < epoch)
    return [each for each in earlier if each != best and (final or each != earlier[-1])]


def _epochs(out_dir: Path) -> list[tuple[int, Path]]:
    """(epoch, folder) of all checkpoints, the newest first."""
    named = [(re.fullmatch(r"epoch-(\d+)", path.name), path) for path in (out_dir / "checkpoints").glob("epoch-*")]
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def load(out_dir: Path, config: TrainConfig, owner: str | None = None) -> Found:
    """The newest sound checkpoint of an output folder, and the reasons against newer ones.

    Args:
        out_dir: The folder.
        config: Of the run that goes on from it.
        owner: Whose run that is; None takes up anybody's.

    Raises:
        CheckpointError: the checkpoint belongs to another configuration, or to another owner.
    """
    problems: list[str] = []
    for _, folder in _epochs(out_dir):
        try:
            data = _verified(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{folder}: {f'state.json lacks {error}' if isinstance(error, KeyError) else error}")
            continue
        # Of the configuration rather than data["identity"]: an older version's hash includes fields retired since.
        if identity_of(data["config"]) != config.identity():
            raise CheckpointError(
                f"{folder} belongs to another configuration ({_difference(data['config'], config)}); "
                "choose another output folder or delete it"
            )
        theirs = data.get("owner")  # earlier versions wrote none
        if owner is not None and theirs not in (None, owner):
            raise CheckpointError(
                f"{folder} belongs to another study (its id is {theirs} there, {owner} now); "
                "choose another output folder or delete it"
            )
        history = [epoch_from_dict(e) for e in data["history"]]
        state = State(
            epoch=data["epoch"],
            step=data["step"],
            micro_batch_size=data["micro_batch_size"],
            nonfinite_in_a_row=data["nonfinite_in_a_row"],
            first_bad=NonFinite(**data["first_bad"]) if data["first_bad"] else None,
            history=history,
            fingerprints=data["fingerprints"],
            owner=theirs,
        )
        return Found(state, folder, tuple(problems))
    return Found(State(), None, tuple(problems))


def check_fingerprints(found: Found, now: dict[str, str]) -> None:
    """Raise CheckpointError if the checkpoint was made with other data or another model than there are now."""
    changed = [what for what, value in now.items() if found.state.fingerprints.get(what) != value]
    if found.folder is not None and changed:
        raise CheckpointError(
            f"{found.folder}: the {' and the '.join(changed)} changed since this checkpoint was made; "
            "choose another output folder or delete it"
        )


def restore(folder: Path, adapter: Adapter) -> None:
    """Set the adapter's weights and AdamW's state from a checkpoint, bit for bit."""
    from safetensors.torch import load_file

    adapter.load(folder / "adapter")
    adapter.restore_optimizer(load_file(str(folder / "optimizer.safetensors")))


def _write_state(folder: Path, state: State, config: TrainConfig) -> None:
    files = {str(p.relative_to(folder)): _hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    data = {
        "format": FORMAT,
        "identity": config.identity(),
        "config": config.model_dump(mode="json"),
        "epoch": state.epoch,
        "step": state.step,
        "micro_batch_size": state.micro_batch_size,
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
        "first_bad": asdict(state.first_bad) if state.first_bad else None,
        "history": [to_dict(e) for e in state.history],
        "fingerprints": state.fingerprints,
        "owner": state.owner,
        "files": files,
    }
    data["checksum"] = _checksum(data)
    (folder / "state.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def _verified(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files all have the hashes it lists."""
    data: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if data["format"] != FORMAT:
        raise ValueError(f"has format {data['format']}, but this version reads {FORMAT}")
    if data.pop("checksum") != _checksum(data):
        raise ValueError("state.json is damaged: its checksum does not match")
    for name, digest in data["files"].items():
        if _hash(folder / name) != digest:
            raise ValueError(f"{name} is damaged: its hash does not match")
    return data


def _is_sound(folder: Path) -> bool:
    try:
        _verified(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _checksum(data: dict[str, Any]) -> str:
    """Checksum of the state itself; JSON keeps floats exactly."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _difference(stored: dict[str, Any], config: TrainConfig) -> str:
    now = config.model_dump(mode="json", exclude=set(MACHINE_FIELDS))
    changed = [f"{k}: {stored.get(k)!r} there, {now.get(k)!r} now" for k in now if stored.get(k) != now.get(k)]
    return "; ".join(changed) or "written by another version"


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
