"""The grid of `lora_grid` on the embedded model and data, with fewer points: four ranks, two ratios, two dropouts."""

from search.space import Choice, Multiple
from search.study import Study

STUDY = Study(
    name="lora_grid_mini",
    description="rank x alpha/rank x dropout on a grid at one rate, on the embedded model and data",
    base={
        "model": "mini",
        "data": "mini",
        "max_samples": 160,
        "num_epochs": 4,
        "learning_rate": 4e-4,
        "batch_size": 4,
        "warmup_steps": 10,
    },
    space={
        "lora_r": Choice((4, 8, 16, 32)),
        "lora_alpha": Multiple("lora_r", (1, 2)),
        "lora_dropout": Choice((0.0, 0.1)),
    },
    sampler="grid",
    n_trials=4 * 2 * 2,
)
