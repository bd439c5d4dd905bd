"""What a study would take, by a step that is measured: a few batches are trained and thrown away, for the dry run."""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from trainer.common import nvidia
from trainer.common.cache import VARIABLE
from trainer.common.files import UNFINISHED
from trainer.data import dataset
from trainer.model import memory

if TYPE_CHECKING:
    from search.planning.budget import Budget
    from search.preflight import Checked
    from search.study import Study
    from trainer.config import TrainConfig
    from trainer.workbench import Workbench

BATCHES = 6
"""That are trained: the first is left out, since it allocates."""
LARGE = 4 * 2**30
"""Bytes of weights from which a step on a CPU takes minutes: it is not measured there."""
CAPTIONED = 8
"""Most images that are captioned to time it."""
KEPT = 2
"""Checkpoints of a trial that stay, at most: the last one and the best."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What the base configuration takes on this machine, trained alone."""

    step_s: float
    samples: int
    """Of a step: the batches that it accumulates together."""
    epoch_s: float
    """Of all training and validation rows."""
    checkpoint_bytes: int
    trials: int
    epochs: int
    """Of the longest trial."""
    most_epochs: int | None = None
    """Of all trials together, where the study has so many and no more."""
    captions_s: float = 0.0
    """Of all validation images once, where trials are ranked by what the captions score."""
    captioned: int = 0
    """Validation images."""
    tokens: int = 0
    """Of a caption, as many as the references have in the middle."""

    @property
    def study_s(self) -> float:
        """All trials in full, or all the study's epochs, one after the other, without repeats."""
        full = self.trials * self.epochs
        epochs = full if self.most_epochs is None else min(full, self.most_epochs)
        # With a budget of epochs no more trials come to their end than it has room for, and only those are captioned.
        return epochs * self.epoch_s + epochs / self.epochs * self.captions_s

    @property
    def disk_bytes(self) -> int:
        """Checkpoints of all trials."""
        return self.trials * KEPT * self.checkpoint_bytes

    def line(self) -> str:
        """In one sentence."""
        what = f"{self.trials} trials of {self.epochs} epochs in full"
        if self.most_epochs is not None and self.most_epochs < self.trials * self.epochs:
            what = f"{self.most_epochs} epochs"
        return (
            f"a step of {self.samples} samples takes {self.step_s:.2g} s here (measured), an epoch some "
            f"{_time(self.epoch_s)}: {what}, one after the other, "
            f"{_time(self.study_s)}; pauses, early stops and packs save of that"
            f"{'' if self.captioned else ', repeats of the leaders add to it'}. "
            f"Checkpoints take up to {memory.shown(self.disk_bytes)}{self._captions()}"
        )

    def _captions(self) -> str:
        if not self.captioned:
            return ""
        return (
            f". Trials are ranked by CIDEr-D: at its end each complete one captions the {self.captioned} validation "
            f"images, which takes some {_time(self.captions_s)} with captions of {self.tokens} tokens (measured; as "
            f"long as {self.captions_s / self.epoch_s:.2g} epochs)"
        )

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "study_s": self.study_s, "disk_bytes": self.disk_bytes}


@dataclass(frozen=True)
class Untrained:
    """The base configuration did not come through its few steps."""

    why: str

    def line(self) -> str:
        """In one sentence."""
        return f"the base configuration does not train: {self.why}; trials like it would be pruned"

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {"untrained": self.why}


def measure(study: Study, budget: Budget, checked: Checked) -> Price | Untrained | None:
    """Train a few batches of the base configuration; None for a model too large to try on a CPU.

    Args:
        study: The definition.
        budget: Of the whole study.
        checked: The model and the data.

    Raises:
        UserError: they cannot be trained.
    """
    config = study.base_config()
    need = memory.needed(config.model, config.dtype_of_base)
    if need is not None and need.weights > LARGE and not (config.device != "cpu" and nvidia.gpus()):
        return None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about files that are odd but readable
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = folder  # vision outputs of a few images are of no use to anyone
        try:
            return _measured(study, budget, checked, Path(folder) / "run")
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def _measured(study: Study, budget: Budget, checked: Checked, out: Path) -> Price | Untrained:
    from search.workers.busy import seconds_of_a_round
    from trainer import runtime
    from trainer.checkpoint import folder_of
    from trainer.events import Diverged, EpochEnded, OutOfMemory, StepEnded
    from trainer.loop import train
    from trainer.model.graphs import RECORDERS
    from trainer.workbench import Workbench

    config = study.base_config()
    split = dataset.split(checked.examined, config)
    wanted = BATCHES * config.batch_size * config.gradient_accumulation_steps / (1 - config.val_fraction)
    few = min(len(split.train) + len(split.val), math.ceil(wanted))
    tried = config.model_copy(
        update={"data": str(checked.examined.folder), "max_samples": few, "num_epochs": 1, "warmup_steps": 0}
    )
    steps: list[StepEnded] = []
    ended: EpochEnded | None = None
    bench = Workbench(checked.examined, tried.data)
    for event in train(tried, bench, out):
        match event:
            case StepEnded():
                steps.append(event)
            case EpochEnded():
                ended = event
            case Diverged():
                cause = event.cause
                return Untrained(f"at step {event.first_bad_step}, {cause.tensor} is {cause.value}; {cause.detail}")
            case OutOfMemory():
                return Untrained(f"out of memory at step {event.step}: {event.detail}")
    assert ended is not None
    counted = steps[1:] or steps
    a_sample_s = median(step.timing.step_s / step.num_samples for step in counted)
    samples = max(step.num_samples for step in counted)
    if runtime.resolve_device(tried.device).type in RECORDERS:
        # They are recorded after some: then a step takes a third, or a tenth.
        recorded = seconds_of_a_round(tried, bench)
        a_sample_s = min(a_sample_s, (recorded or math.inf) / samples)
    validated = len(dataset.split(checked.examined, tried).val)
    captions: dict[str, Any] = {}
    if study.objective == "cider":
        a_caption_s, tokens = _caption(tried, bench, folder_of(out, 1) / "adapter")
        captions = {"captions_s": a_caption_s * len(split.val), "captioned": len(split.val), "tokens": tokens}
    made = [path for path in (out / "checkpoints").rglob("*") if path.is_file() and not path.match(UNFINISHED)]
    return Price(
        step_s=a_sample_s * samples,
        samples=samples,
        epoch_s=a_sample_s * len(split.train)
        + ended.timing.eval_s * len(split.val) / validated
        + ended.timing.checkpoint_s,
        checkpoint_bytes=sum(path.stat().st_size for path in made),
        trials=budget.trials,
        epochs=study.most_epochs(),
        most_epochs=budget.epochs,
        **captions,
    )


def _caption(config: TrainConfig, bench: Workbench, adapter: Path) -> tuple[float, int]:
    """(seconds of a caption, its tokens): of as many images at once as trials caption, to the references' length."""
    from trainer.captions.generate import Decoding
    from trainer.captions.hooked import hooked_captioner
    from trainer.data.images import open_image

    _, val = bench.datasets(config)
    tokens = round(median(len(each.target) for each in val.tokens))
    images = [open_image(row.image) for row in val.rows[: min(CAPTIONED, config.eval_batch_size)]]
    decoding = Decoding(
        max_new_tokens=tokens, min_new_tokens=tokens
    )  # an adapter of a few steps says nothing of length
    with hooked_captioner(bench.base(config), config, adapter, decoding) as captioner:
        began = time.perf_counter()
        captioner(images, val.rows[0].prompt)
    return (time.perf_counter() - began) / len(images), tokens


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
