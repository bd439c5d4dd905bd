"""Study records for the tests of the report: recorded real runs, the hand-run log's, and many made up."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search import records
from search import study_file as studies
from search.diagnosis import Curve, NonFiniteFacts, diagnose
from search.records import EpochRecord, StepRecord, StudyRecord, TrialRecord
from trainer.config import TrainConfig

RECORDED = Path(__file__).parents[1] / "data" / "recorded-runs.json"
START_S = 1_700_000_000.0
LOG = {"max_samples": 400, "num_epochs": 15, "max_grad_norm": 1.0, "torch_dtype": "float32"}

Losses = Sequence[tuple[float | None, float | None]]
"""(training loss, validation loss) by epoch."""


def config(**values: Any) -> dict[str, Any]:
    return TrainConfig.parse(values).model_dump(mode="json")


def trial(
    number: int,
    losses: Losses,
    *,
    state: str = "COMPLETE",
    reason: str = records.FINISHED,
    detail: str = "",
    values: Mapping[str, Any] | None = None,
    label: str | None = None,
    note: str | None = None,
    violated: tuple[str, ...] = (),
    nonfinite: NonFiniteFacts | None = None,
    epoch_s: float = 75.0,
    attrs: Mapping[str, Any] | None = None,
    norms: Sequence[float] = (),
    tags: Mapping[str, str] | None = None,
) -> TrialRecord:
    """One trial as it would be read back, its findings by the diagnosis."""
    resolved = config(**{**LOG, **(values or {})})
    rate = resolved["learning_rate"]
    epochs = tuple(
        EpochRecord(
            epoch=i, train_loss=train, val_loss=val, learning_rate=rate, grad_norm_mean=0.8, grad_norm_max=1.9,
            epoch_seconds=epoch_s, eval_seconds=0.1 * epoch_s, samples_per_second=4.2, data_wait_fraction=0.03,
            peak_memory_gib=17.5,
        )
        for i, (train, val) in enumerate(losses, start=1)
    )  # fmt: skip
    steps = tuple(
        StepRecord(step=i, loss=2.4 / i, grad_norm=norm, learning_rate=rate) for i, norm in enumerate(norms, start=1)
    )
    train_samples = int((resolved["max_samples"] or 2068) * 0.8)
    per_epoch = math.ceil(train_samples / resolved["batch_size"])
    total = per_epoch * resolved["num_epochs"]
    curve = Curve(
        config=resolved, epochs=epochs, steps=steps, nonfinite=nonfinite, reason=reason, detail=detail or None,
        total_steps=total,
    )  # fmt: skip
    finite = [(val, i) for i, (_, val) in enumerate(losses, start=1) if val is not None]
    best = min(finite, default=None)
    ended = state in ("COMPLETE", "PRUNED")
    found = [f.to_dict() for f in diagnose(curve)] if ended else []
    start = START_S + 1_000 * number
    facts = {"num_train_samples": train_samples, "num_val_samples": (resolved["max_samples"] or 2585) - train_samples}
    facts |= {"steps_per_epoch": per_epoch, "total_steps": total, "trainable_parameters": 1_234_567}
    facts |= {"num_adapted_modules": 120, "step_window": 1}
    every = {
        records.CONFIG: resolved,
        **({records.FINDINGS: found} if found else {}),
        **({records.LABEL: label} if label else {}),
        **({"note": note} if note else {}),
        **(attrs or {}),
    }
    return TrialRecord(
        number=number, state=state, value=best[0] if best and ended else None,
        params=_params(resolved), config=resolved, reason=reason if ended or state == "FAIL" else None,
        detail=detail or None, best_epoch=best[1] if best and ended else None,
        stopped_early=reason == records.RISING and state == "COMPLETE", attrs=every, violated=violated,
        start_s=start, end_s=start + max(20.0, epoch_s * len(losses)) if state != "RUNNING" else None,
        run_id=f"{number:032x}", epochs=epochs, steps=steps,
        tags={**{k: str(v) for k, v in facts.items()}, "device": "cuda", **(tags or {})},
    )  # fmt: skip


def _params(resolved: Mapping[str, Any]) -> dict[str, Any]:
    names = ("learning_rate", "lora_r", "lora_dropout", "batch_size", "warmup_steps")
    ratio = resolved["lora_alpha"] / resolved["lora_r"]
    return {name: resolved[name] for name in names} | {"lora_alpha_per_lora_r": ratio}


def study(trials: Sequence[TrialRecord], name: str = "rsicap", **values: Any) -> StudyRecord:
    return StudyRecord(
        name=name,
        definition=json.loads(json.dumps(studies.load("rsicap").definition())),
        attrs={"study": name, "generation": 1, "strategy": {"strategy": "joint"}},
        trials=tuple(trials),
        experiment_id="1",
        parent_run_id="f" * 32,
        **values,
    )


def falling(first: float, last: float, epochs: int, gap: float = -0.3) -> list[tuple[float, float]]:
    """Losses that fall by the logarithm of the epoch, validation below training as on the real runs."""
    share = [math.log(i) / math.log(max(epochs, 2)) for i in range(1, epochs + 1)]
    return [(first + (last - first) * s, first + gap + (last - first) * 0.6 * s) for s in share]


EXPERIMENT_3 = [(1.89, 1.63), (1.71, 1.57), (1.69, 1.60), (1.87, 1.71)]
"""The hand-run log's, its last validation loss (it says `?`) as it must have been: risen further."""

CONTRADICTION = "the log says 100 samples here and 312 batches of 8 (2,500 samples) in its text"


def hand_run() -> StudyRecord:
    """The hand-run log's experiments 1, 2, 3, 4, 5 and 5b, where the log gives numbers with those numbers."""
    nan = NonFiniteFacts(
        step=2, epoch=1, tensor="param: qformer.layer.0.query.lora_A.default.weight", value="nan", after_update=True,
        measured="float16; eps 1e-08 rounds to 0; the gradient of lora_A was exactly 0 at step 1", bad_steps=3,
        ended=True, last_finite_step=1, last_finite_loss=2.386719,
    )  # fmt: skip
    low = {"batch_size": 8, "learning_rate": 5e-6, "num_epochs": 10, "lora_r": 8, "lora_alpha": 16, "warmup_steps": 0}
    bold = {"batch_size": 4, "learning_rate": 1e-3, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    calm = {**bold, "learning_rate": 2e-4, "warmup_steps": 200}
    first = {**low, "batch_size": 2, "max_samples": 20, "lora_r": 4, "lora_alpha": 8, "torch_dtype": "float16"}
    slow = {**calm, "batch_size": 8, "max_samples": 100}
    wide = {**calm, "batch_size": 16, "max_samples": 2500, "num_workers": 4}
    return study(
        [
            trial(0, [], state="PRUNED", reason=records.NON_FINITE, violated=(records.NON_FINITE,), label="1",
                  values=first, nonfinite=nan, norms=[0.4], detail="step 2: lora_A is nan",
                  tags={"nonfinite.step": "2"}),
            trial(1, [(2.06, 1.74), (1.78, 1.61), *falling(1.70, 1.55, 8, -0.12)[:7], (1.55, 1.50)], label="2",
                  values=low, norms=[0.9, 0.8, 1.4, 0.7]),
            trial(2, EXPERIMENT_3, state="COMPLETE", reason=records.RISING, label="3", values=bold,
                  detail="validation loss rising since epoch 3", norms=[1.2, 3.4, 8.8, 20.0]),
            trial(3, falling(1.80, 1.42, 15), label="4", values=calm, norms=[0.5, 0.9, 1.1, 0.8]),
            trial(4, falling(2.0, 1.7, 15), label="5", values=slow, note=CONTRADICTION),
            trial(5, falling(1.85, 1.40, 15), label="5b", values=wide, epoch_s=640.0),
        ],
        name="hand_run",
    )  # fmt: skip


def recorded() -> StudyRecord:
    """The recorded real runs as a study."""
    runs = json.loads(RECORDED.read_text())["runs"]
    known = set(TrainConfig.model_fields)
    found = []
    for number, run in enumerate(runs):
        values = {k: v for k, v in run["config"].items() if k in known}
        losses = [(e["train_loss"], e["val_loss"]) for e in run["epochs"]]
        seconds = run["epochs"][0].get("elapsed_s") or 100.0
        found.append(trial(number, losses, values=values, label=run["name"], epoch_s=seconds))
    return study(found)


def many(n: int, seed: int = 0) -> StudyRecord:
    """A study with a known truth: the rate decides (best at 2e-4), above 6e-4 trials break, rank does nothing."""
    rng = random.Random(seed)
    found = []
    for number in range(n):
        rate = math.exp(rng.uniform(math.log(5e-6), math.log(1e-3)))
        rank = rng.choice([4, 6, 8, 12, 16, 24, 32])
        values = {"learning_rate": rate, "lora_r": rank, "lora_alpha": rank * rng.choice([1, 2, 4]),
                  "lora_dropout": rng.uniform(0, 0.2), "batch_size": rng.choice([2, 4, 8, 16]),
                  "warmup_steps": rng.randrange(200), "num_epochs": 8}  # fmt: skip
        depth = 1.45 + 0.05 * math.log10(rate / 2e-4) ** 2 + rng.gauss(0, 0.004)
        curve = falling(depth + 0.5, depth, 8)
        norms = [math.exp(rng.gauss(-0.3, 0.5)) for _ in range(40)]
        if rate > 6e-4:
            broken = [*curve[:3], (curve[2][0] * 1.4, curve[2][1] * 1.3)]
            found.append(trial(number, broken, state="PRUNED", reason=records.DIVERGED, values=values,
                               norms=[x * 4 for x in norms], detail="both losses jumped at epoch 4"))  # fmt: skip
        elif rng.random() < 0.05:
            found.append(trial(number, curve[:2], state="FAIL", reason=records.LOST, values=values, detail="gone"))
        else:
            found.append(trial(number, curve, values=values, norms=norms))
    return study(found, name="many")
