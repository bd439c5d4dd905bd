"""Which rows train and which validate: as the data give it, by whole scenes, or image by image."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import DataError, shown
from trainer.config import TrainConfig
from trainer.data.duplicates import Group, merged

if TYPE_CHECKING:
    from trainer.data.dataset import Examined, Row

NAMES = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The names of given splits in use. Karpathy's `restval` of COCO is used for training."""
FEW_SCENES = 5
"""A validation split of fewer scenes measures those scenes rather than the model: that is a warning."""


@dataclass(frozen=True)
class SplitFacts:
    """What a split is made of, as plain values for the dry run, the log and MLflow."""

    rule: str = ""
    """`given`, `scenes` or `random`."""
    why: str = ""
    """The rule as a sentence."""
    rows: int = 0
    """Images used, each once."""
    captions: int = 0
    scenes: int = 0
    """0 where no scenes are known: each image stands for itself."""
    classes: int = 0
    """0 where no classes are known."""
    train: int = 0
    val: int = 0
    val_captions: int = 0
    val_scenes: int = 0
    val_classes: int = 0
    test_rows: int = 0
    """Rows of a given test split, which are not used."""
    left_out: int = 0
    """Rows that `max_samples` leaves out."""
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For a terminal: the counts, what validates, the warnings."""
        return [*self.facts(), *(f"warning: {warning}" for warning in self.warnings)]

    def facts(self) -> list[str]:
        """The counts and what validates, by which rule."""
        known = [f"{self.scenes} scenes" if self.scenes else "no scenes known"]
        known.append(f"{self.classes} classes" if self.classes else "no classes known")
        of = [f"{self.val_scenes} scenes"] * bool(self.scenes) + [f"{self.val_classes} classes"] * bool(self.classes)
        captions = f" with {self.captions} captions" if self.captions != self.rows else ""
        drawn = (
            f"captions: training draws one of an image's an epoch, by (seed, epoch, row); validation is the mean over "
            f"all tokens of all {self.val_captions} of its images"
        )
        test = f"; {self.test_rows} test rows are left alone" if self.test_rows else ""
        return [
            f"rows used: {self.rows}{captions}; {', '.join(known)}{test}",
            f"split by {self.rule}: {self.train} train, {self.val} validate"
            + (f" ({', '.join(of)})" if of else "")
            + f": {self.why}",
            *([drawn] if captions else []),
        ]

    def tags(self) -> dict[str, str]:
        """For MLflow: one value a tag, the warnings as one text."""
        values: dict[str, object] = {
            "split.rule": self.rule,
            "split.rows": self.rows,
            "split.captions": self.captions,
            "split.scenes": self.scenes,
            "split.classes": self.classes,
            "split.train": self.train,
            "split.val": self.val,
            "split.val_captions": self.val_captions,
            "split.val_scenes": self.val_scenes,
            "split.val_classes": self.val_classes,
            "split.test_rows": self.test_rows,
            "split.left_out": self.left_out,
        }
        if self.warnings:
            values["split.warnings"] = "\n".join(self.warnings)
        return {key: str(value) for key, value in values.items()}


def name_of(given: object) -> str | None:
    """`train`, `val` or `test`; None for anything else."""
    return NAMES.get(given.strip().lower()) if isinstance(given, str) else None


def is_test(given: Any) -> bool:
    """Whether a row belongs to a given test split, which a search does not read."""
    return name_of(given) == "test"


def divide(examined: Examined, config: TrainConfig) -> tuple[tuple[Row, ...], tuple[Row, ...], SplitFacts]:
    """(training rows, validation rows, facts) of the configuration's `split`, `split_seed` and `max_samples`.

    Raises:
        DataError: the data give no such splits, or all rows are of one scene.
    """
    rule, why, warnings = _rule(examined, config)
    if rule == "given":
        train, val = _as_given(examined, config)
    else:
        unit = _image if rule == "random" and config.split == "random" else _scene
        train, val = _by_units(examined, config, _with_copies(examined, unit))
    warnings += [
        *_picture_warnings(examined, train, val),
        *_warnings(rule, train, val, examined),
    ]
    if examined.alike and rule == "random" and config.split != "random":
        warnings.append(
            f"most file names begin with {shown(examined.alike)}: if these are tiles of one picture, neighbours are "
            "on both sides of the split; name their scenes in a column 'scene', or say split=random"
        )
    chosen = (*train, *val)
    facts = SplitFacts(
        rule=rule,
        why=why,
        rows=len(chosen),
        captions=sum(len(row.captions) for row in chosen),
        scenes=len({row.scene for row in chosen}) if _has_scenes(examined.rows) else 0,
        classes=len({row.label for row in chosen} - {None}),
        train=len(train),
        val=len(val),
        val_captions=sum(len(row.captions) for row in val),
        val_scenes=len({row.scene for row in val}) if _has_scenes(examined.rows) else 0,
        val_classes=len({row.label for row in val} - {None}),
        test_rows=examined.test_rows,
        left_out=len(examined.rows) - len(chosen),
        warnings=tuple(warnings),
    )
    return tuple(train), tuple(val), facts


def _rule(examined: Examined, config: TrainConfig) -> tuple[str, str, list[str]]:
    """(the rule, why it is this one, warnings)."""
    given = Counter(name_of(row.given) for row in examined.rows)
    unnamed = Counter(row.given for row in examined.rows if row.given is not None and name_of(row.given) is None)
    complete = set(given) == {"train", "val"}
    named = f"{given['train']} train, {given['val']} val, {given[None]} rows without a split known here"
    odd = [f"{count} of {shown(name)}" for name, count in unnamed.most_common(3)]
    if config.split == "given":
        if not complete:
            raise DataError(
                f"{examined.folder}: split=given, but the data do not say of every row whether it trains or validates "
                f"({named}{': ' if odd else ''}{', '.join(odd)}); use split=scenes or split=random"
            )
        return "given", "as the data give it", []
    known = _has_scenes(examined.rows)
    if config.split == "scenes":
        if not known:
            raise DataError(
                f"{examined.folder}: split=scenes, but no scenes are known: each image stands for itself; name "
                "them in a column 'scene', or use split=random"
            )
        by = f" (by {examined.scenes_by})" if examined.scenes_by else ""
        return "scenes", f"whole scenes{by}, as split=scenes says", []
    if config.split == "random":
        return "random", "image by image, as split=random says", []
    if complete:
        return "given", "as the data give it", []
    warnings = []
    if given["train"] or given["val"] or unnamed:
        warnings.append(
            f"the data give splits, but not for training and validation of all rows ({named}); they are not used"
            + (f": {', '.join(odd)}" if odd else "")
        )
        if set(given) == {"train"}:
            warnings = []  # a training split alone: validation is taken from it
    if known:
        by = f" (by {examined.scenes_by})" if examined.scenes_by else ""
        return "scenes", f"whole scenes{by}, since tiles of one scene look alike", warnings
    return "random", "image by image, since no scenes are known", warnings


def _scene(row: Row) -> str:
    return row.scene


def _image(row: Row) -> str:
    return str(row.image)


def _with_copies(examined: Examined, unit_of: Callable[[Row], str]) -> Callable[[Row], str]:
    """The unit of a row where units that share a picture are one: its copies stay on one side of the split."""
    if not examined.copies:
        return unit_of
    numbers: dict[Path, list[int]] = {}
    for number, row in enumerate(examined.rows):
        numbers.setdefault(row.image, []).append(number)
    units = [unit_of(row) for row in examined.rows]
    groups = [Group(tuple(sorted(n for path in paths for n in numbers[path])), False) for paths in examined.copies]
    joined = dict(zip(units, merged(units, groups), strict=True))
    if len(set(joined.values())) < 2:  # all show one picture: nothing could be held out; the warning counts it
        return unit_of
    return lambda row: joined[unit_of(row)]


def _picture_warnings(examined: Examined, train: Sequence[Row], val: Sequence[Row]) -> Iterator[str]:
    """What is to be said of pictures that are there more than once, or show nothing."""
    if examined.plain:
        names = ", ".join(path.name for path in examined.plain[:3])
        yield f"{len(examined.plain)} images are of one colour (for example {names})"
    trains, validates = {row.image for row in train}, {row.image for row in val}
    if both := trains & validates:
        names = ", ".join(sorted(path.name for path in both)[:3])
        yield (
            f"{len(both)} of the {len(validates)} images of validation are in training too (for example {names}), "
            "where they measure memory"
        )
    if not examined.copies:
        return
    leaks = sum(bool(trains & set(paths)) and bool(validates & set(paths)) for paths in examined.copies)
    names = " and ".join(path.name for path in examined.copies[0][:2])
    count, files = len(examined.copies), sum(map(len, examined.copies))
    head = f"{count} pictures are there more than once, in {files} files (for example {names})"
    if leaks:
        yield f"{head}; {leaks} of them are in training and in validation, where they measure memory"
    else:
        yield f"{head}; copies stay on one side of the split"


def _has_scenes(rows: Sequence[Row]) -> bool:
    """Whether any scene has more than one image."""
    return len({row.scene for row in rows}) < len({row.image for row in rows})


def _as_given(examined: Examined, config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """The given splits; of both their share where `max_samples` is less than all."""
    rows = list(examined.rows)
    random.Random(config.split_seed).shuffle(rows)
    train = [row for row in rows if name_of(row.given) == "train"]
    val = [row for row in rows if name_of(row.given) == "val"]
    if config.max_samples is not None and config.max_samples < len(rows):
        held = min(max(1, round(config.max_samples * len(val) / len(rows))), config.max_samples - 1)
        train, val = train[: config.max_samples - held], val[:held]
    return train, val


def _by_units(examined: Examined, config: TrainConfig, unit_of: Callable[[Row], str]) -> tuple[list[Row], list[Row]]:
    """`max_samples` rows chosen, then split by scenes (or images), both by `split_seed` alone.

    Validation gets whole units, as many as come nearest to `val_fraction` of the rows.
    """
    # Choose the rows.
    rows = list(examined.rows)
    rng = random.Random(config.split_seed)
    rng.shuffle(rows)
    chosen = rows[: config.max_samples]
    units: dict[str, list[Row]] = {}
    for row in chosen:
        units.setdefault(unit_of(row), []).append(row)
    if len(units) < 2:
        raise DataError(
            f"{examined.folder}: all {len(chosen)} rows used are of one scene ({chosen[0].scene!r}), "
            "so none can be held out for validation; raise max_samples or add scenes"
        )
    # Take whole units, in random order, as long as each brings validation nearer to its share.
    names = sorted(units)
    rng.shuffle(names)
    val: set[str] = set()
    count, wanted = 0, len(chosen) * config.val_fraction
    for name in names[:-1]:  # the last unit always trains
        size = len(units[name])
        if abs(count + size - wanted) < abs(count - wanted):
            val.add(name)
            count += size
    # A single unit that comes nearer than all of these, whatever its place in the order.
    single = min(names, key=lambda name: abs(len(units[name]) - wanted))
    if not val or abs(len(units[single]) - wanted) < abs(count - wanted):
        val = {single}
    return [row for row in chosen if unit_of(row) not in val], [row for row in chosen if unit_of(row) in val]


def _warnings(rule: str, train: Sequence[Row], val: Sequence[Row], examined: Examined) -> list[str]:
    """What is odd about a split that is possible nevertheless."""
    found = []
    train_labels = Counter(row.label for row in train if row.label is not None)
    unseen = Counter(row.label for row in val if row.label is not None and row.label not in train_labels)
    if unseen:
        listed = ", ".join(f"{label} ({count} rows)" for label, count in unseen.most_common(3))
        found.append(
            f"{len(unseen)} classes are in validation alone, so nothing of them is learnt: {listed}"
            + (", ..." if len(unseen) > 3 else "")
        )
    if not _has_scenes(examined.rows):
        return found
    train_scenes, val_scenes = {row.scene for row in train}, {row.scene for row in val}
    if len(val_scenes) < FEW_SCENES and rule != "random":
        total = len(train_scenes | val_scenes)
        found.append(
            f"validation is {len(val_scenes)} of {total} scenes: losses measure these few places; use more rows, or "
            "split=random if the parts of the file names are not scenes"
        )
    both = train_scenes & val_scenes
    if both:
        listed = ", ".join(sorted(both)[:3])
        found.append(f"{len(both)} scenes are in training and in validation ({listed}), whose tiles may look alike")
    return found
