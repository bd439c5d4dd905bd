"""Captions of a study's candidates on rows that its search did not train on, and what they score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import leaderboard
from search.errors import StudyError
from search.evaluation import compare
from search.evaluation.java import METEOR, SPICE, Meteor, why_no_meteor
from search.evaluation.metrics import Scores, score
from search.leaderboard import sample_key
from search.verdict.leaders import winner
from trainer.common.errors import shown
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from search.evaluation.rows import Chosen
    from search.records import TrialRecord
    from search.verdict.race import Verdict
    from trainer.captions.generate import Decoding
    from trainer.data.dataset import Row

BASE = "base"
"""The candidate without an adapter."""
ATTRIBUTE = "evaluations"
"""User attribute of a study: by name of the rows, what `Evaluation.to_dict` gives, without the captions."""


def choose_trials(
    trials: Sequence[TrialRecord], which: str, folder: Path, verdict: Verdict | None = None
) -> list[TrialRecord]:
    """The trials of `--trials`: `best` is the winner and the best other that completed on its samples, `all` every one
    of the search with an adapter. Repeats, which trained on other splits, are judged where they are named.

    Raises:
        StudyError: a trial that there is not, or whose adapter is gone.
    """
    if which == "best":
        first = winner(trials, verdict)
        complete = [t for t in leaderboard.ranked(trials) if t.state == "COMPLETE" and t is not first]
        chosen = [] if first is None else [first, *(t for t in complete if sample_key(t) == sample_key(first))][:2]
    elif which == "all":
        chosen = [t for t in leaderboard.ranked(leaderboard.searched(trials)) if has_adapter(t, folder)]
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
    comparable: bool = True
    """Whether these losses are of the same samples."""
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
        """Whether CIDEr-D would choose another trial than the validation loss.

        None where both choose the same, and where losses of different samples say nothing.
        """
        trials = [name for name in self.scores if name != BASE and self.losses.get(name) is not None]
        if len(trials) < 2 or not self.comparable:
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
            "digest": self.rows.digest,
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
    samples = set()
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
        samples.add(sample_key(trial))
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
        rows=rows,
        captions=captions,
        scores=scores,
        losses=losses,
        comparable=len(samples) == 1,
        meteor=estimates,
        not_computed=reasons,
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
