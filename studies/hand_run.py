"""The hand-run log's six experiments, exactly as written there, on the real model and data.

The log contradicts itself in experiment 5: its configuration has 100 samples, its text 312 batches of 8, which are
2,500. Both readings are run: `5` as configured and `5-text`.

Values that the log leaves out are TrainConfig's defaults, except for warmup: experiments 1 to 3 name none, and the log
describes warmup as a later addition, so they run without it.
"""

from search.study import Fixed, Study
from studies.rsicap import STUDY as RSICAP

EXPERIMENTS = (
    Fixed(
        label="hand-run 1",
        config={
            "num_epochs": 10,
            "batch_size": 2,
            "learning_rate": 5e-6,
            "max_samples": 20,
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "torch_dtype": "float16",
            "warmup_steps": 0,
        },
    ),
    Fixed(
        label="hand-run 2",
        config={
            "num_epochs": 10,
            "batch_size": 8,
            "learning_rate": 5e-6,
            "max_samples": 400,
            "lora_r": 8,
            "lora_alpha": 16,
            "torch_dtype": "float32",
            "warmup_steps": 0,
        },
    ),
    Fixed(
        label="hand-run 3",
        config={
            "num_epochs": 15,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "max_samples": 400,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "torch_dtype": "float32",
            "warmup_steps": 0,
        },
    ),
    Fixed(
        label="hand-run 4",
        config={
            "num_epochs": 15,
            "batch_size": 4,
            "learning_rate": 2e-4,
            "max_samples": 400,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "warmup_steps": 200,
            "max_grad_norm": 1.0,
            "torch_dtype": "float32",
        },
    ),
    Fixed(
        label="hand-run 5",
        config={
            "num_epochs": 15,
            "batch_size": 8,
            "learning_rate": 2e-4,
            "max_samples": 100,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "warmup_steps": 200,
            "max_grad_norm": 1.0,
            "torch_dtype": "float32",
        },
        note=(
            "The log contradicts itself here: max_samples is 100 in its configuration, while its text counts 312 "
            "batches of 8, which are 2,500 samples. This is the configuration; 5-text is the text. "
            "原记录自相矛盾：配置中 max_samples 为 100，正文却写 312 个 batch，每个 8 个样本，即 2500 个。"
            "本实验按配置，5-text 按正文。"
        ),
    ),
    Fixed(
        label="hand-run 5-text",
        config={
            "num_epochs": 15,
            "batch_size": 8,
            "learning_rate": 2e-4,
            "max_samples": 2500,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "warmup_steps": 200,
            "max_grad_norm": 1.0,
            "torch_dtype": "float32",
        },
        note=(
            "Experiment 5 as its text has it: 312 batches of 8, which are 2,500 samples, not the configured 100. "
            "实验 5 按正文：312 个 batch × 8 = 2500 个样本，而不是配置中的 100。"
        ),
    ),
    Fixed(
        label="hand-run 5b",
        config={
            "num_epochs": 15,
            "batch_size": 16,
            "learning_rate": 2e-4,
            "max_samples": 2500,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "warmup_steps": 200,
            "max_grad_norm": 1.0,
            "torch_dtype": "float32",
            "num_workers": 4,
        },
    ),
)

STUDY = Study(
    name="hand_run",
    description="the hand-run log's six experiments exactly as written, on RSICap",
    base={"model": "Salesforce/instructblip-flan-t5-xl", "data": "RSICap"},
    space={},
    n_trials=len(EXPERIMENTS),
    enqueue=EXPERIMENTS,
    data_env=RSICAP.data_env,
    get_data=RSICAP.get_data,
    get_model=RSICAP.get_model,
)
