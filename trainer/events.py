"""Events: the facts that the trainer reports, in order, as frozen values.

One clock runs through all of them: `step` is the number of optimizer steps attempted so far (a step whose
gradients were not finite counts as attempted, but updates nothing); `epoch` counts from 1, as in the hand-run log.

Timings are facts of the machine rather than of the configuration. They live in `Timing` fields that do not
take part in comparison, so `==` between two runs' events asks exactly "were the numbers bit-identical?" (a NaN is
equal to a NaN here).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


def _same(one: Any, other: Any) -> bool:
    """Whether two events of one type hold the same facts."""
    pairs = ((getattr(one, f.name), getattr(other, f.name)) for f in fields(one) if f.compare)
    return all(a == b or (a != a and b != b) for a, b in pairs)


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Seconds spent in one optimizer step."""

    step_s: float
    """Wall time of the step, waiting for data included."""
    data_wait_s: float
    """Part of it spent waiting for the next batch."""


@dataclass(frozen=True, kw_only=True)
class EpochTiming:
    """Where an epoch's time went, and the memory it took."""

    epoch_s: float
    """Wall time of the whole epoch: training, evaluation and checkpoint."""
    train_s: float
    data_wait_s: float
    """Part of `train_s` spent waiting for data."""
    eval_s: float
    checkpoint_s: float
    samples_per_s: float
    """Training samples per second of `train_s`."""
    peak_memory_gib: float
    """Peak device memory on CUDA, peak resident memory of the process on CPU."""


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """Facts known before the first step."""

    num_train_samples: int
    num_val_samples: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    trainable_parameters: int
    adapted_modules: tuple[str, ...]
    """Full names of the modules that got an adapter, sorted."""
    skipped_rows: tuple[str, ...]
    """Rows left out because of `skip_bad_rows`, each with its reason."""
    data_fingerprint: str
    model_fingerprint: str
    device: str
    num_threads: int
    resumed_from_epoch: int
    """0 for a fresh run, else the last epoch whose checkpoint was loaded."""
    data: str = field(default="", compare=False)
    """The configuration's `data`."""
    split: dict[str, str] = field(default_factory=dict, compare=False)
    """How training and validation rows were told apart: `trainer.data.splits.SplitFacts.tags()`."""
    data_lines: tuple[str, ...] = field(default=(), compare=False)
    """The same for a terminal, warnings included."""
    damaged_checkpoints: tuple[str, ...] = field(default=(), compare=False)
    """Newer checkpoints that could not be used, each with the reason; their epochs are trained again."""


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """A step that was not finite: the first tensor that was not, and what is known of the cause."""

    tensor: str
    """For example `loss`, `query_output`, `grad: ...query.lora_A.default.weight` or `param: ...`."""
    value: str
    """`nan`, `inf` or `-inf`."""
    after_update: bool
    """True if an update made a parameter not finite; False if the forward or backward pass produced it."""
    detail: str
    """Measured circumstances in words, e.g. dtype, eps as that dtype rounds it, AdamW's moments."""


@dataclass(frozen=True, kw_only=True)
class StepEnded:
    """One optimizer step: `loss` is the mean over the step's label tokens, before the update."""

    step: int
    epoch: int
    loss: float
    grad_norm: float
    """Global L2 norm of the adapter's gradient before clipping; may be nan or inf when `nonfinite` is set."""
    learning_rate: float
    """The rate this step used."""
    num_samples: int
    num_tokens: int
    nonfinite: NonFinite | None = None
    """Set if the step updated nothing because something was not finite."""
    timing: StepTiming = field(compare=False)

    def __eq__(self, other: object) -> bool:
        return _same(self, other) if isinstance(other, StepEnded) else NotImplemented


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """One pass over the training data, and the evaluation after it. The checkpoint is on disk when this is yielded."""

    epoch: int
    step: int
    train_loss: float
    """Mean over the epoch's label tokens in finite steps (nan if there was none)."""
    val_loss: float
    """Mean over all label tokens of the validation split."""
    learning_rate: float
    """The rate of the epoch's last step."""
    grad_norm_mean: float
    grad_norm_max: float
    """Over the epoch's finite steps, before clipping (nan if there was none)."""
    nonfinite_steps: int
    timing: EpochTiming = field(compare=False)

    def __eq__(self, other: object) -> bool:
        return _same(self, other) if isinstance(other, EpochEnded) else NotImplemented


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint became durable."""

    epoch: int
    step: int
    path: str = field(compare=False)
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class MicroBatchReduced:
    """Memory ran out; the same step is repeated with a smaller micro-batch. The effective batch is unchanged."""

    step: int
    micro_batch_size: int


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """Memory ran out even with a micro-batch of one sample. The run has ended."""

    step: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class Diverged:
    """`max_nonfinite_steps` steps in a row were not finite. The run has ended."""

    step: int
    epoch: int
    first_bad_step: int
    """The first step of the series."""
    cause: NonFinite
    """The cause at `first_bad_step`."""


Event = RunStarted | StepEnded | EpochEnded | CheckpointSaved | MicroBatchReduced | OutOfMemory | Diverged


def to_dict(event: Event) -> dict[str, Any]:
    """The event as plain data, with its type under `event`."""
    return {"event": type(event).__name__, **asdict(event)}


def epoch_from_dict(data: dict[str, Any]) -> EpochEnded:
    """The inverse of `to_dict` for EpochEnded (checkpoints carry their run's history)."""
    fields = {k: v for k, v in data.items() if k not in ("event", "timing")}
    return EpochEnded(**fields, timing=EpochTiming(**data["timing"]))
