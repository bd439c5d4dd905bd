"""A table as `tests.benchmarks.record` makes them, of runs that nobody trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.benchmarks.world import effective_rate

EPOCHS = 6
BEST_Z = -2.6
CLIFF = -1.3
"""log10 of the effective rate from which on a toy run diverges after two epochs."""


def toy_table(configurations: int = 40, repeated: int = 8) -> dict[str, Any]:
    """A table whose losses are a bowl in log z, with an offset by seed and noise."""
    rng = np.random.default_rng(7)
    runs = []
    for number in range(configurations):
        rank = int(rng.integers(4, 33))
        values = {
            "configuration": number,
            "learning_rate": float(10 ** rng.uniform(-5, -2.5)),
            "lora_r": rank,
            "lora_alpha": rank * int(rng.choice((1, 2, 4))),
            "lora_dropout": float(rng.uniform(0, 0.2)),
            "batch_size": int(rng.integers(2, 17)),
            "warmup_steps": int(rng.integers(0, 21)),
        }
        for seed in (42, 43, 44)[: 3 if number < repeated else 1]:
            falling = 0.2 / np.arange(1, EPOCHS + 1)
            level = 0.4 * (1 + 0.1 * (effective_rate(values) - BEST_Z) ** 2)
            luck = rng.normal(0, 0.001) + 0.02 * (seed - 42)
            val = (level + falling) * np.exp(luck + rng.normal(0, 0.002, EPOCHS))
            length = 2 if effective_rate(values) > CLIFF else EPOCHS
            test = [float(0.9 * loss) if loss < 0.5 else None for loss in val[:length]]
            curves = {"val": val[:length].tolist(), "test": test, "train": (val[:length] * 0.8).tolist()}
            runs.append({**values, "seed": seed, "diverged": length < EPOCHS, **curves})
    base = {"max_samples": 160, "num_epochs": EPOCHS, "warmup_most": 20, "rates": (1e-5, 3e-3)}
    return {"task": "toy", "base": base, "runs": runs}
