"""The rsicap study on the embedded model and data: any laptop, nothing to download, about three minutes on two cores.

The space is rsicap's except for the warmup: 160 samples are 8 to 64 steps an epoch, so rsicap's 200 steps would
outlast most trials.
"""

from search.space import Float, Int, Multiple
from search.study import Study

STUDY = Study(
    name="rsicap_mini",
    description="the rsicap study on the embedded model and data: any laptop, nothing to download",
    base={"model": "mini", "data": "mini", "max_samples": 160, "num_epochs": 6, "max_grad_norm": 1.0},
    space={
        "learning_rate": Float(5e-6, 1e-3, log=True),
        "lora_r": Int(4, 32, log=True),
        "lora_alpha": Multiple("lora_r", (1, 2, 4)),
        "lora_dropout": Float(0.0, 0.2),
        "batch_size": Int(2, 16, log=True),
        "warmup_steps": Int(0, 20),
    },
    n_trials=12,
)
