"""The hand-run log's next step 4, "compare LoRA configurations systematically": rank x alpha / rank x dropout.

Everything else stays at the log's recommended configuration, so that only the adapter differs.
"""

from search.space import Choice, Multiple
from search.study import Study
from studies.rsicap import STUDY as RSICAP

STUDY = Study(
    name="lora_grid",
    description="rank x alpha/rank x dropout on a grid at one rate: the log's systematic comparison, RSICap",
    base={
        "model": "Salesforce/instructblip-flan-t5-xl",
        "data": "RSICap",
        "num_epochs": 10,
        "learning_rate": 2e-4,
        "batch_size": 4,
        "warmup_steps": 100,
        "max_grad_norm": 1.0,
        "num_workers": 4,
    },
    space={
        "lora_r": Choice((4, 8, 16, 32)),
        "lora_alpha": Multiple("lora_r", (1, 2, 4)),
        "lora_dropout": Choice((0.0, 0.1)),
    },
    sampler="grid",
    n_trials=4 * 3 * 2,
    data_env="RSICAP_ROOT",
    get_data=RSICAP.get_data,
    get_model=RSICAP.get_model,
)
