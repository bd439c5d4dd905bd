"""The real thing: InstructBLIP-FlanT5-XL on RSICap, in float32 on a GPU. The ranges are those of the hand-run log."""

from search.space import Float, Int, Multiple
from search.study import Fixed, Study

STUDY = Study(
    name="rsicap",
    description="InstructBLIP-FlanT5-XL on RSICap: the hand-run log's ranges, float32, one GPU",
    base={
        "model": "Salesforce/instructblip-flan-t5-xl",
        "data": "RSICap",
        "num_epochs": 10,
        "max_grad_norm": 1.0,
        "torch_dtype": "float32",
        "num_workers": 4,  # experiment 5b of the log
    },
    space={
        "learning_rate": Float(5e-6, 1e-3, log=True),
        "lora_r": Int(4, 32, log=True),
        "lora_alpha": Multiple("lora_r", (1, 2, 4)),  # "usually twice the rank"
        "lora_dropout": Float(0.0, 0.2),
        "batch_size": Int(2, 16, log=True),
        "warmup_steps": Int(0, 200),
    },
    n_trials=40,
    enqueue=(
        Fixed(
            label="recommended",
            config={
                "learning_rate": 2e-4,
                "lora_r": 8,
                "lora_alpha": 16,
                "lora_dropout": 0.1,
                "batch_size": 4,
                "warmup_steps": 100,
            },
            note="the hand-run log's recommended starting configuration",
        ),
    ),
    data_env="RSICAP_ROOT",
    get_data=(
        "ask the authors of RSGPT for RSICap (github.com/Lavender105/RSGPT), unpack it to a folder with captions.json "
        "and images/, and name that folder: export RSICAP_ROOT=FOLDER, or --set data=FOLDER"
    ),
    get_model=(
        "hf download Salesforce/instructblip-flan-t5-xl (16 GB), or name a checkpoint folder: --set model=FOLDER"
    ),
)
