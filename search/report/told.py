"""What each trial taught, told in order: against the best before it, in units of the noise, and what follows.

Trials of a search start side by side, so that few of them know of another. The log is read from the first to the last,
and each is told against the best of those that the reader has met.
"""

from __future__ import annotations

from typing import Any

from search import records
from search.diagnosis import Advice
from search.diagnosis import finding as ids
from search.diagnosis.noise import relative
from search.report.experiment import UNFINISHED, Against, Experiment, Learnt, by_loss
from search.report.judged import rate_of
from search.report.measured_noise import Noise
from trainer.config import MACHINE_FIELDS

APART = 1.5
"""Factor by which two effective rates must differ to be named."""
SLOWER = 1.3
"""Factor by which the time of an epoch must differ to be named."""
PACE_FIELDS = ("batch_size", "max_samples", "num_workers", "lora_r", "gradient_accumulation_steps", "torch_dtype")
"""Fields that an epoch's time may depend on."""


class Before:
    """The trials told so far, by what is asked of them: a trial that is told late costs no more than an early one.

    Of 2,000 trials, looking through all that came before took four fifths of the time in which a study was closed.
    """

    def __init__(self) -> None:
        self._last: Experiment | None = None
        """The latest with a loss; without any, the latest."""
        self._with_loss: dict[tuple[Any, ...], Experiment] = {}
        """The latest with a loss on each samples."""
        self._complete: list[Experiment] = []
        self._best: dict[tuple[Any, ...], Experiment] = {}
        self._warned: dict[Any, Experiment] = {}

    def add(self, e: Experiment) -> None:
        """The next one, told."""
        if e.record.config:
            if e.value is not None and not e.record.violated:
                self._last = self._with_loss[e.samples] = e
            elif not self._with_loss:
                self._last = e
            if e.record.state == "COMPLETE" and e.value is not None:
                self._complete.append(e)
                self._best[e.samples] = min(self._best.get(e.samples, e), e, key=by_loss)
        if e.main_finding is not None and e.main_finding.severity != "info":
            self._warned[e.samples[0]] = e

    def reference(self, trial: Experiment) -> Against | None:
        """What a trial is told against: see `Against`; None for the first."""
        if trial.samples in self._best:
            return Against(trial=self._best[trial.samples], kind="best")
        if trial.samples in self._with_loss:
            return Against(trial=self._with_loss[trial.samples], kind="previous")
        if self._complete:
            alike = min(self._complete, key=lambda e: (_distance(e, trial), -e.number))
            return Against(trial=alike, kind="elsewhere")
        return Against(trial=self._last, kind="previous") if self._last else None

    def warned(self, trial: Experiment) -> Experiment | None:
        """The latest one on the same data that went wrong."""
        return self._warned.get(trial.samples[0])


def _distance(a: Experiment, b: Experiment) -> int:
    """Number of fields in which two trials differ."""
    mine, other = a.record.config, b.record.config
    return sum(value != other.get(name) for name, value in mine.items() if name not in MACHINE_FIELDS)


def learnt(e: Experiment, before: Before, noise: Noise) -> tuple[Learnt, ...]:
    """What a trial taught, in the order of telling: what was changed, what that did, what follows.

    Args:
        e: The trial, its reference known.
        before: The trials told before it.
        noise: The study's.
    """
    if e.record.state in UNFINISHED or e.resumed_by is not None:
        return ()
    effect = _effect(e, noise)
    found = [effect]
    if e.against is not None and e.changes:
        found.insert(0, _item("changed", lines=e.changes, reference=e.against.trial.number, rate=_times(e)))
        if effect.kind in ("better", "worse") and len(e.changes) == 1:
            found.append(_item("one_change", name=e.changes[0].name))
    found += [item for item in (_remedy(e, before), _best_before_last(e, noise), _pace(e)) if item is not None]
    return (*found, _follows(e, effect))


def _item(kind: str, **values: Any) -> Learnt:
    return Learnt(kind=kind, values=values)


def _times(e: Experiment) -> float | None:
    """How many times as high its effective rate is as its reference's; None where they are about the same."""
    assert e.against is not None
    mine, other = rate_of(e.record.config), rate_of(e.against.trial.record.config)
    if mine is None or other is None:
        return None
    times = 10 ** (mine - other)
    return None if 1 / APART < times < APART else float(times)


def _effect(e: Experiment, noise: Noise) -> Learnt:
    """Its loss against the reference's."""
    trial = e.record
    if trial.value is None or trial.violated:
        return _item("no_value", reason=trial.reason)
    if e.against is None or e.against.trial.value is None:
        return _item("first", value=trial.value, epoch=trial.best_epoch)
    other = e.against.trial
    values: dict[str, Any] = {"reference": other.number, "value": trial.value, "before": other.value}
    if e.samples != other.samples:
        return _item("incomparable", **values)
    if trial.reason in records.COMPARED:
        return _when_stopped(e, other, noise)
    if e.against.kind == "previous" and trial.state == "COMPLETE":
        return _first_complete(e, other)
    share = relative(trial.value, other.value or 0.0)
    values |= {"share": abs(share), "sigmas": noise.sigmas(abs(share)), "epoch": trial.best_epoch}
    if abs(share) <= noise.difference:
        return _item("within_noise", **values, higher=share > 0)
    if share > 0:
        return _item("worse", **values)
    return _item("better" if trial.state == "COMPLETE" else "pruned_lower", **values, reason=trial.reason)


def _first_complete(e: Experiment, other: Experiment) -> Learnt:
    """The first on its samples that is complete, and how it did beside the latest that is not, where that ended."""
    last = next((row for row in reversed(other.rows) if row.val_loss is not None), None)
    level = None if last is None else next((row.val_loss for row in e.rows if row.epoch == last.epoch), None)
    there = {} if last is None or level is None else {"at": last.epoch, "before": last.val_loss, "level": level}
    return _item("first_complete", value=e.value, epoch=e.record.best_epoch, reference=other.number, **there)


def _when_stopped(e: Experiment, other: Experiment, noise: Noise) -> Learnt:
    """A trial that was stopped by comparison, against its reference at the same epoch: later ones it did not see."""
    last = next((row for row in reversed(e.rows) if row.val_loss is not None), None)
    level = None if last is None else next((row for row in other.rows if row.epoch == last.epoch), None)
    if last is None or level is None or last.val_loss is None or level.val_loss is None:
        return _item("stopped", reference=other.number, epoch=e.rows[-1].epoch if e.rows else 0)
    share = relative(last.val_loss, level.val_loss)
    kind = "stopped_level" if abs(share) <= noise.difference else "stopped_behind" if share > 0 else "stopped_ahead"
    return _item(
        kind,
        reference=other.number,
        epoch=last.epoch,
        value=last.val_loss,
        before=level.val_loss,
        share=abs(share),
        sigmas=noise.sigmas(abs(share)),
        higher=share > 0,
    )


def _remedy(e: Experiment, before: Before) -> Learnt | None:
    """Whether it did what the trial before it that went wrong had been advised, and whether that helped."""
    earlier = before.warned(e)  # the latest warning is the one that a reader has in mind
    if earlier is None or earlier.main_finding is None or not e.findings:
        return None
    main = earlier.main_finding
    advice = next(iter(main.advice), None)  # and its first advice the one that counts
    now = e.record.config.get(advice.parameter) if advice is not None else None
    if advice is None or not _followed(advice, now):
        return None
    if not e.has(main.id) and not _went_as_far(e, earlier):
        return None
    kind = "remedy_failed" if e.has(main.id) else "remedy_worked"
    return _item(kind, reference=earlier.number, finding=main.id, advice=advice, now=now)


def _went_as_far(e: Experiment, earlier: Experiment) -> bool:
    """Whether a trial would have shown what the earlier one did: it trained as long, or to its end."""
    if e.record.state == "FAIL" or e.record.violated:
        return False
    return e.record.state == "COMPLETE" or len(e.rows) >= max(1, len(earlier.rows))


def _followed(advice: Advice, now: Any) -> bool:
    """Whether a value is what was advised, or as far in that direction."""
    before, after = advice.before, advice.after
    if advice.action == "set":
        return bool(now == after and now != before)
    numbers = [v for v in (before, after, now) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < 3 or advice.action not in ("raise", "lower"):
        return False
    return bool(now >= after if advice.action == "raise" else now <= after)


def _best_before_last(e: Experiment, noise: Noise) -> Learnt | None:
    seen = [row for row in e.rows if row.val_loss is not None]
    if e.value is None or not seen or e.record.violated or e.record.best_epoch == seen[-1].epoch:
        return None
    rise = relative(seen[-1].val_loss or 0.0, e.value)
    if rise <= noise.difference and not e.has(ids.OVERFITTING, ids.DIVERGED):
        return None
    return _item("best_before_last", best=e.record.best_epoch, last=seen[-1].epoch, rise=rise)


def _pace(e: Experiment) -> Learnt | None:
    """An epoch's time against the reference's, where something that it may depend on was changed."""
    if e.against is None or not any(line.name in PACE_FIELDS for line in e.changes):
        return None
    mine, other = e.epoch_seconds, e.against.trial.epoch_seconds
    if not mine or not other or 1 / SLOWER < mine / other < SLOWER:
        return None
    reference = e.against.trial
    a, b = e.tag("num_train_samples"), reference.tag("num_train_samples")
    times = {"seconds": mine, "before": other, "times": mine / other, "samples": a / b if a and b and a != b else None}
    return _item("pace", reference=reference.number, **times)


def _follows(e: Experiment, effect: Learnt) -> Learnt:
    """What follows from a trial: its advice where it has a fault, else what its comparison says."""
    main = e.main_finding
    faulty = main is not None and (main.severity != "info" or e.record.reason == records.OUT_OF_MEMORY)
    if main is not None and faulty and e.record.reason not in records.COMPARED and main.advice:
        return _item("advice", advice=main.advice)
    if e.record.state == "FAIL" or effect.kind == "no_value":
        return _item("nothing_known")
    if effect.kind in ("first", "first_complete", "better"):
        return _item("reference")
    if effect.kind == "worse" and len(e.changes) == 1:
        return _item("keep", line=e.changes[0])
    if effect.kind == "worse":
        times = _times(e) if e.against is not None else None
        return _item("rate_off" if times else "no_field", times=times, reference=effect.values["reference"])
    if effect.kind.startswith("stopped"):
        return _item("by_curves", trial=e.number)
    if effect.kind == "within_noise":
        return _item("either", trial=e.number, reference=effect.values["reference"])
    return _item("elsewhere")


def surprise(e: Experiment) -> float:
    """How much a trial's outcome is worth a reader's time; 0 for what was to be expected."""
    kinds = {item.kind: item.values for item in e.learnt}
    share = {kind: float(values["share"]) for kind, values in kinds.items() if "share" in values}
    if e.record.reason in (records.LOST, records.ERROR):
        return 0.0
    if "better" in kinds:
        return 1.0 + share["better"]
    if "stopped_ahead" in kinds:
        return 2.0 + share["stopped_ahead"]
    if "pruned_lower" in kinds:
        return 2.0 + share["pruned_lower"]
    if "remedy_failed" in kinds:
        return 0.5
    rate = kinds.get("changed", {}).get("rate")
    if "within_noise" in kinds and rate is not None and not 1 / 3 < rate < 3:
        return 0.8  # as good, at a rate far from the best's
    if "worse" in kinds and rate is None and e.has(ids.HEALTHY, ids.TOO_SLOW):
        return share["worse"]  # the same rate, and yet behind
    return 0.0
