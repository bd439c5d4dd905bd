"""Captions of a study's candidates on rows that its search did not train on, and what they score."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from search import leaderboard
from search.errors import StudyError
from search.evaluation import compare
from search.evaluation.java import METEOR, SPICE, Meteor, why_no_meteor
from search.evaluation.metrics import Scores, score
from search.verdict.leaders import winner
from trainer.common.errors import DataError, shown
from trainer.config import TrainConfig
from trainer.data import dataset

if TYPE_CHECKING:
    from collections.abc import Iterable

    from search.records import TrialRecord
    from search.verdict.race import Verdict
    from trainer.captions.generate import Decoding
    from trainer.data.dataset import Row

BASE = "base"
"""The candidate without an adapter."""
Rows = Literal["auto", "test", "validation", "all"]
OWN = ("test", "unused", "validation", "all")
"""Names of rows of the study's own data."""
FEWEST = 30
"""Fewest unused rows that are worth judging on: of fewer, intervals are wider than what trials differ by."""
ATTRIBUTE = "evaluations"
"""User attribute of a study: by name of the rows, what `Evaluation.to_dict` gives, without the captions."""


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


def choose_rows(
    config: TrainConfig, data: str | None, rows: Rows, taken: Mapping[str, str] = MappingProxyType({})
) -> Chosen:
    """The rows to judge on.

    Args:
        config: of the study's trials: its data and its split.
        data: another folder; None for the study's own.
        rows: `auto` is the given test split where there is one; else, of the study's own data, the rows that the study
            left out with their whole scenes (`max_samples`), or the validation rows; of another folder all.
        taken: Fingerprints of the data of the study's earlier evaluations, by name.

    Raises:
        DataError: the folder cannot be used, or has no such rows.
    """
    folder = data or config.data
    if rows in ("auto", "test"):
        try:
            found = dataset.examine(folder, part="test")
            _refuse_bad(found, config)
            if len(found.rows):
                name = _named(data, rows, "test", found.fingerprint, taken)
                where = f"{len(found.rows)} test rows of {found.folder}"
                return Chosen(name=name, where=where, rows=found.rows, fingerprint=found.fingerprint)
        except DataError as error:
            if rows == "test" or "no row is of a given test split" not in str(error):
                raise
    if rows == "all" or (rows == "auto" and data is not None):
        found = dataset.examine(folder, part="all")
        _refuse_bad(found, config)
        name = _named(data, rows, "all", found.fingerprint, taken)
        warned = ("the rows that the trials trained on are among these",) if data is None else ()
        where = f"all {len(found.rows)} rows of {found.folder}"
        return Chosen(name=name, where=where, rows=found.rows, fingerprint=found.fingerprint, warnings=warned)
    found = dataset.examine(folder)
    split = dataset.split(found, config)
    if rows == "auto":
        unused = _unused(found, split)
        if len(unused) >= FEWEST:
            where = (
                f"{len(unused)} rows of {found.folder} that the study did not use (max_samples={config.max_samples})"
            )
            return Chosen(name="unused", where=where, rows=unused, fingerprint=found.fingerprint)
    warning = (
        "these are the validation rows, by whose loss the search chose its winner: its figures are better here than "
        "on new images; name other data with --data"
    )
    return Chosen(
        name=_named(data, rows, "validation", found.fingerprint, taken),
        where=f"{len(split.val)} validation rows of {found.folder}",
        rows=split.val,
        fingerprint=found.fingerprint,
        warnings=(warning,) if data is None else (),
    )


def _named(data: str | None, rows: Rows, part: str, fingerprint: str, taken: Mapping[str, str]) -> str:
    """What rows are called in keys of metrics: of another folder by its name, and by their part if it was asked for.

    No two data share a name, or the second would replace what the first came to.
    """
    if data is None:
        return part
    folder = Path(data).expanduser().resolve()
    name = folder.name if rows == "auto" else f"{folder.name}-{part}"
    if name in OWN:
        name = f"{folder.parent.name}-{name}"
    name = re.sub(r"[^\w.-]+", "_", name)
    return name if taken.get(name, fingerprint) == fingerprint else f"{name}-{fingerprint[:8]}"


def _unused(found: dataset.Examined, split: dataset.Split) -> tuple[Row, ...]:
    """Rows that neither trained nor validated, nor share a scene or a picture with one that did."""
    used = (*split.train, *split.val)
    scenes, images = {row.scene for row in used}, {row.image for row in used}
    for group in found.copies:
        if images & set(group):
            images |= set(group)
    return tuple(row for row in found.rows if row.scene not in scenes and row.image not in images)


def _refuse_bad(found: dataset.Examined, config: TrainConfig) -> None:
    if found.bad and not config.skip_bad_rows:
        raise DataError(
            f"{found.folder}: {len(found.bad)} rows cannot be used, the first: {found.bad[0]}\n"
            f"python -m trainer.data.check {found.folder} lists all"
        )


def choose_trials(
    trials: Sequence[TrialRecord], which: str, folder: Path, verdict: Verdict | None = None
) -> list[TrialRecord]:
    """The trials of `--trials`: `best` is the study's winner and the best other one that completed, `all` every one
    with an adapter.

    Raises:
        StudyError: a trial that there is not, or whose adapter is gone.
    """
    if which == "best":
        first = winner(trials, verdict)
        complete = [trial for trial in leaderboard.ranked(trials) if trial.state == "COMPLETE" and trial is not first]
        chosen = [] if first is None else [first, *complete][:2]
    elif which == "all":
        chosen = [trial for trial in leaderboard.ranked(trials) if has_adapter(trial, folder)]
    else:
        known = {trial.number: trial for trial in trials}
        try:
            numbers = list(dict.fromkeys(int(part) for part in which.split(",")))
        except ValueError:
            raise StudyError(f"--trials must be best, all, or numbers such as 3,7, but got {shown(which)}") from None
        unknown = [number for number in numbers if number not in known]
        if unknown:
            has = f"it has {min(known)} to {max(known)}" if known else "it has none yet"
            raise StudyError(f"the study has no trial {unknown[0]}; {has}")
        chosen = [known[number] for number in numbers]
    if not chosen:
        raise StudyError("no trial of the study has completed, so there is no adapter to evaluate")
    for trial in chosen:
        check_adapter(trial, folder)
    return chosen


def has_adapter(trial: TrialRecord, folder: Path) -> bool:
    """Whether the trial's best checkpoint is there."""
    if trial.best_epoch is None or "folder" not in trial.attrs:
        return False
    return (leaderboard.adapter(folder, trial) / "adapter_config.json").is_file()


def check_adapter(trial: TrialRecord, folder: Path) -> None:
    """Raise StudyError unless the trial's best checkpoint is there."""
    if trial.best_epoch is None:
        raise StudyError(f"trial {trial.number} is {trial.state} and has no best epoch: there is no adapter")
    if not has_adapter(trial, folder):
        raise StudyError(
            f"the adapter of trial {trial.number} is not in {leaderboard.adapter(folder, trial)}; if the runs folder "
            "was moved, name it with --runs-dir; if its checkpoints were removed, `python -m trainer.run --from-study "
            f"{folder.name} --trial {trial.number}` trains it again, and says where its adapter then is"
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the candidates' captions score on the same rows."""

    rows: Chosen
    captions: Mapping[str, tuple[str, ...]]
    """By candidate: `base`, or the trial's number."""
    scores: Mapping[str, Scores]
    losses: Mapping[str, float | None] = field(default_factory=dict)
    """Lowest validation loss of each trial."""
    meteor: Mapping[str, compare.Estimate] = field(default_factory=dict)
    """By candidate; empty where it was not computed."""
    not_computed: Mapping[str, str] = field(default_factory=dict)
    """Metric -> why."""

    def estimates(self) -> dict[str, dict[str, compare.Estimate]]:
        """By candidate and metric, with intervals."""
        return {
            name: {
                **compare.estimates(found, self.rows.scenes()),
                **({METEOR: self.meteor[name]} if name in self.meteor else {}),
            }
            for name, found in self.scores.items()
        }

    def differences(self) -> dict[tuple[str, str], dict[str, compare.Difference]]:
        """(candidate, other) -> other minus candidate: each against the base, and the first trial against others."""
        trials = [name for name in self.scores if name != BASE]
        pairs = [(BASE, name) for name in trials if BASE in self.scores]
        pairs += [(trials[0], name) for name in trials[1:]]
        scenes = self.rows.scenes()
        return {(a, b): compare.differences(self.scores[a], self.scores[b], scenes) for a, b in pairs}

    def disagreement(self) -> str | None:
        """Whether CIDEr-D would choose another trial than the validation loss; None where both choose the same."""
        trials = [name for name in self.scores if name != BASE and self.losses.get(name) is not None]
        if len(trials) < 2:
            return None
        by_loss = min(trials, key=lambda name: self.losses[name] or 0.0)
        cider = {name: self.scores[name].values()["cider_d"] for name in trials}
        by_cider = max(trials, key=lambda name: cider[name])
        if by_loss == by_cider:
            return None
        found = compare.differences(self.scores[by_loss], self.scores[by_cider], self.rows.scenes())["cider_d"]
        certain = "a difference that chance does not explain" if found.differs else "which may be chance"
        return (
            f"by validation loss trial {by_loss} is best, by CIDEr-D trial {by_cider} ({cider[by_cider]:.3f} against "
            f"{cider[by_loss]:.3f}, p = {found.p:.3f}: {certain})"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the captions."""
        return {
            "rows": self.rows.name,
            "where": self.rows.where,
            "images": len(self.rows.rows),
            "fingerprint": self.rows.fingerprint,
            "warnings": list(self.rows.warnings),
            "candidates": {
                name: {metric: asdict(value) for metric, value in found.items()}
                for name, found in self.estimates().items()
            },
            "differences": [
                {"of": b, "against": a, **{metric: asdict(d) for metric, d in found.items()}}
                for (a, b), found in self.differences().items()
            ],
            "disagreement": self.disagreement(),
            "not_computed": dict(self.not_computed),
        }


def evaluate(
    trials: Iterable[TrialRecord],
    folder: Path,
    rows: Chosen,
    decoding: Decoding,
    *,
    with_base: bool = True,
    batch_size: int = 8,
    device: str = "auto",
    model: str | None = None,
    meteor: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Evaluation:
    """Caption the rows with the base and with each trial's best adapter, and score them.

    Args:
        trials: with adapters; their bases may differ in dtype, and each is loaded once.
        folder: of the study.
        rows: to caption.
        decoding: the same for all candidates.
        with_base: whether the base without an adapter is a candidate.
        batch_size: images at once.
        device: as the configuration's.
        model: where the base is now; None for where the trials had it.
        meteor: whether METEOR is computed, too, see `java.why_no_meteor`.
        progress: called with (candidate, images done, images).

    Raises:
        UserError: a model, adapter or image that cannot be used.
    """
    from trainer import runtime
    from trainer.captions.adapter import attach, detach, use_of
    from trainer.captions.generate import Captioner
    from trainer.model.base import load_base

    place = runtime.resolve_device(device)
    captions: dict[str, tuple[str, ...]] = {}
    losses: dict[str, float | None] = {}
    base, kind = None, None
    for trial in trials:
        config = TrainConfig.parse(trial.config)
        wanted = (model or config.model, config.dtype_of_base)
        if base is None or kind != wanted:
            base = None
            base = load_base(wanted[0], dtype=runtime.DTYPES[wanted[1]], device=place, fused=False)
            kind = wanted
        instruction = use_of(leaderboard.adapter(folder, trial)).instruction
        if with_base and BASE not in captions:
            captioner = Captioner(base.model, base.processor, place, base.dtype, decoding)
            captions[BASE] = _captions(captioner, rows.rows, instruction, batch_size, partial(progress, BASE))
        adapted = attach(base, leaderboard.adapter(folder, trial))
        name = str(trial.number)
        captioner = Captioner(adapted, base.processor, place, base.dtype, decoding)
        captions[name] = _captions(captioner, rows.rows, instruction, batch_size, partial(progress, f"trial {name}"))
        losses[name] = trial.value
        detach(base, adapted)
    references = [row.captions for row in rows.rows]
    scores = {name: score(found, references) for name, found in captions.items()}
    reasons = {"spice": SPICE}
    estimates: dict[str, compare.Estimate] = {}
    if meteor:
        with Meteor() as program:
            for name, found in captions.items():
                counts = program.statistics(found, references)
                estimates[name] = compare.estimate_of_sums(counts, program.values, rows.scenes())
    else:
        reasons = {METEOR: why_no_meteor() or "not asked for", **reasons}
    return Evaluation(
        rows=rows, captions=captions, scores=scores, losses=losses, meteor=estimates, not_computed=reasons
    )


def _captions(
    captioner: Any, rows: Sequence[Row], instruction: str, batch_size: int, progress: Callable[[int, int], None]
) -> tuple[str, ...]:
    """A caption of each row; `instruction`, what the adapter learnt, is asked of rows without one of their own."""
    from trainer.captions.generate import in_batches
    from trainer.data.images import open_image

    found: dict[int, str] = {}
    items = [(partial(open_image, row.image), row.prompt if row.asked else instruction) for row in rows]
    for number, text in in_batches(captioner, items, batch_size):
        if isinstance(text, Exception):
            raise text
        found[number] = text
        progress(len(found), len(rows))
    return tuple(found[number] for number in range(len(rows)))


def points(estimates: Mapping[str, compare.Estimate], prefix: str) -> dict[str, float]:
    """An evaluation as metrics of an MLflow run: `caption/test/cider_d`, and its interval."""
    found = {}
    for name, estimate in estimates.items():
        found[f"{prefix}/{name}"] = estimate.value
        found[f"{prefix}/{name}_low"] = estimate.low
        found[f"{prefix}/{name}_high"] = estimate.high
    return found
