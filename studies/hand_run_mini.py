"""The hand-run log's experiments on the embedded model and data, their sample counts divided by four.

Everything else is as written there. Divided by four, experiment 5's 2,500 samples (625 here) fit the embedded data,
and the whole study ends within ten minutes on two cores.
"""

from dataclasses import replace

from search.study import Study
from studies.hand_run import EXPERIMENTS

FACTOR = 4
"""The log's sample counts are divided by this."""

STUDY = Study(
    name="hand_run_mini",
    description="the hand-run log's experiments on the embedded model, sample counts divided by four",
    base={"model": "mini", "data": "mini"},
    space={},
    n_trials=len(EXPERIMENTS),
    enqueue=tuple(
        replace(
            each,
            config={**each.config, "max_samples": each.config["max_samples"] // FACTOR},
            note=(each.note + " " if each.note else "")
            + f"Sample counts are the log's divided by {FACTOR}. 样本数为原记录的 1/{FACTOR}。",
        )
        for each in EXPERIMENTS
    ),
)
