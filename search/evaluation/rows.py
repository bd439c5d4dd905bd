"""The rows that a study's trials are judged on: of its own data none that one of them has trained on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from search.leaderboard import own_path
from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data import dataset

if TYPE_CHECKING:
    from search.records import TrialRecord
    from trainer.data.dataset import Row

Rows = Literal["auto", "test", "validation", "all"]
OWN = ("test", "unused", "validation", "all")
"""Names of rows of the study's own data."""
FEWEST = 30
"""Fewest unused rows that are worth judging on: of fewer, intervals are wider than what trials differ by."""
BESIDE = "evaluate fewer of them at once, or name other data with --data"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rows that captions are judged on."""

    name: str
    """For keys of metrics: of the study's own data `test`, `unused`, `validation` or `all`, of others `_named`."""
    where: str
    """In words."""
    rows: tuple[Row, ...]
    fingerprint: str
    warnings: tuple[str, ...] = ()

    def scenes(self) -> list[str] | None:
        """The scene of each row; None where no scene has several."""
        scenes = [row.scene for row in self.rows]
        return scenes if len(set(scenes)) < len(scenes) else None

    @property
    def digest(self) -> str:
        """Of which rows these are: trials of other samples leave others unused."""
        return _digest(self.rows)


def configs_of(trials: Iterable[TrialRecord]) -> dict[int, TrainConfig]:
    """The configuration of each trial. The study's data, whose path differs by host, have one path in all."""
    shared: dict[str, Any] = {}
    found = {}
    for trial in trials:
        config = TrainConfig.parse(trial.config)
        if own_path(trial.attrs, "data") is None:
            shared = shared or {"data": config.data}
            config = config.model_copy(update=shared)
        found[trial.number] = config
    return found


def choose_rows(
    configs: Mapping[int, TrainConfig],
    data: str | None,
    rows: Rows,
    taken: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Chosen:
    """The rows to judge on.

    Trials may have trained on different samples: repeats have other splits, and trials given by hand may have another
    `max_samples`. Of the study's own data, rows are left out that any of them has trained on.

    Args:
        configs: of the trials that are judged, by number; see `configs_of`. The first says which data are the study's.
        data: another folder; None for the study's own.
        rows: `auto` is the given test split where there is one; else, of the study's own data, the rows that the
            trials left out with their whole scenes (`max_samples`), or the validation rows; of another folder all.
        taken: The study's earlier evaluations, by name.

    Raises:
        DataError: the folder cannot be used, or has no such rows.
    """
    first = next(iter(configs.values()))
    if data is not None and _same_folder(data, first.data):
        data = None
    if data is None:
        _check_one_folder(configs)
    folder = data or first.data
    if rows in ("auto", "test"):
        try:
            found = dataset.examine(folder, part="test")
            _refuse_bad(found, first)
            if len(found.rows):
                name = _named(data, rows, "test", found, found.rows, taken)
                where = f"{len(found.rows)} test rows of {found.folder}"
                return Chosen(name=name, where=where, rows=found.rows, fingerprint=found.fingerprint)
        except DataError as error:
            if rows == "test" or "no row is of a given test split" not in str(error):
                raise
    if rows == "all" or (rows == "auto" and data is not None):
        found = dataset.examine(folder, part="all")
        _refuse_bad(found, first)
        name = _named(data, rows, "all", found, found.rows, taken)
        warned = ("the rows that the trials trained on are among these",) if data is None else ()
        where = f"all {len(found.rows)} rows of {found.folder}"
        return Chosen(name=name, where=where, rows=found.rows, fingerprint=found.fingerprint, warnings=warned)
    found = dataset.examine(folder)
    if data is not None:
        held = dataset.split(found, first).val
        name = _named(data, rows, "validation", found, held, taken)
        where = f"{len(held)} validation rows of {found.folder}"
        return Chosen(name=name, where=where, rows=held, fingerprint=found.fingerprint)
    splits = list(dict.fromkeys(dataset.split(found, config) for config in configs.values()))
    if rows == "auto":
        unused = _apart(found, found.rows, [row for split in splits for row in (*split.train, *split.val)])
        if len(unused) >= FEWEST:
            sizes = ", ".join(dict.fromkeys(str(config.max_samples) for config in configs.values()))
            where = f"{len(unused)} rows of {found.folder} that {_listed(configs)} did not use (max_samples={sizes})"
            name = _named(data, rows, "unused", found, unused, taken)
            return Chosen(name=name, where=where, rows=unused, fingerprint=found.fingerprint)
    return _validation(found, configs, splits, taken)


def _validation(
    found: dataset.Examined,
    configs: Mapping[int, TrainConfig],
    splits: Sequence[dataset.Split],
    taken: Mapping[str, Mapping[str, Any]],
) -> Chosen:
    """Validation rows of the first trial, without those that another one trained on.

    Raises:
        DataError: none is left.
    """
    first, *others = splits
    held = first.val
    warnings = [
        "these are the validation rows, by whose loss the search chose its winner: its figures are better here than "
        "on new images; name other data with --data"
    ]
    where = f"{len(held)} validation rows of {found.folder}"
    if others:
        held = _apart(found, held, [row for split in others for row in split.train])
        if not held:
            raise DataError(
                f"{found.folder}: each of the {len(first.val)} validation rows of trial {next(iter(configs))} is of a "
                f"scene that another of {_listed(configs)} trained on; {BESIDE}"
            )
        where = f"{len(held)} rows of {found.folder} that {_listed(configs)} did not train on"
        if len(held) < FEWEST:
            warnings.append(f"only {len(held)} rows are left that none of the trials trained on; {BESIDE}")
    return Chosen(
        name=_named(None, "validation", "validation", found, held, taken),
        where=where,
        rows=held,
        fingerprint=found.fingerprint,
        warnings=tuple(warnings),
    )


def _named(
    data: str | None,
    rows: Rows,
    part: str,
    found: dataset.Examined,
    chosen: Sequence[Row],
    taken: Mapping[str, Mapping[str, Any]],
) -> str:
    """What rows are called in keys of metrics: of another folder by its name, and by their part if it was asked for.

    No two sets of rows share a name, or the second would replace what the first came to.
    """
    name, own = part, _digest(chosen)
    if data is not None:
        folder = Path(data).expanduser().resolve()
        name = folder.name if rows == "auto" else f"{folder.name}-{part}"
        if name in OWN:
            name = f"{folder.parent.name}-{name}"
        name = re.sub(r"[^\w.-]+", "_", name)
    if name not in taken:
        return name
    told = taken[name]
    if told.get("fingerprint") != found.fingerprint:
        return f"{name}-{found.fingerprint[:8]}" if data is not None else name  # the study's data, added to
    # Evaluations of earlier versions have no digest.
    same = told["digest"] == own if "digest" in told else told.get("images") == len(chosen)
    return name if same else f"{name}-{own}"


def _digest(rows: Iterable[Row]) -> str:
    return hashlib.sha256("\n".join(sorted(f"{row.image.name} {row.where}" for row in rows)).encode()).hexdigest()[:8]


def _listed(configs: Mapping[int, TrainConfig]) -> str:
    """The trials in words."""
    if len(configs) > 6:
        return f"these {len(configs)} trials"
    numbers = ", ".join(map(str, configs))
    return f"trial {numbers}" if len(configs) == 1 else f"trials {numbers}"


def _same_folder(one: str, other: str) -> bool:
    return dataset.resolve_folder(one).resolve() == dataset.resolve_folder(other).resolve()


def _check_one_folder(configs: Mapping[int, TrainConfig]) -> None:
    """Raise DataError if a trial was trained on other data than the first: what it has seen of these is not known."""
    number, first = next(iter(configs.items()))
    for other, config in configs.items():
        if config.data != first.data and not _same_folder(config.data, first.data):
            raise DataError(
                f"trial {number} was trained on {first.data}, but trial {other} on {config.data}: whether it has seen "
                f"rows of the first is not known; {BESIDE}"
            )


def _apart(found: dataset.Examined, rows: Iterable[Row], used: Sequence[Row]) -> tuple[Row, ...]:
    """Those of the rows that share neither a scene nor a picture with a used one."""
    scenes, images = {row.scene for row in used}, {row.image for row in used}
    for group in found.copies:
        if images & set(group):
            images |= set(group)
    return tuple(row for row in rows if row.scene not in scenes and row.image not in images)


def _refuse_bad(found: dataset.Examined, config: TrainConfig) -> None:
    if found.bad and not config.skip_bad_rows:
        raise DataError(
            f"{found.folder}: {len(found.bad)} rows cannot be used, the first: {found.bad[0]}\n"
            f"python -m trainer.data.check {found.folder} lists all"
        )
