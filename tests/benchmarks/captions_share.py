"""What captions take of trials: `python -m tests.benchmarks.captions_share --study rsicap_mini [--runs-dir DIR]`.

Each trial's seconds of captioning against the seconds of its epochs, both as recorded while it ran.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.captions import CUT, SECONDS
from search.options import opened
from search.places import RUNS, Places
from search.reading import read_study


def main(study: Annotated[str, typer.Option()], runs_dir: Annotated[Path, typer.Option()] = RUNS) -> None:
    """Print the share of each trial, and of all."""
    captioned = trained = 0.0
    with opened(study, Places.of(runs_dir)) as (found, tracking):
        for trial in read_study(found, tracking).trials:
            if SECONDS in trial.attrs:
                epochs_s = sum(epoch.epoch_seconds or 0.0 for epoch in trial.epochs)
                cut = sum(str(text).endswith(CUT) for text in trial.attrs["captions"])
                took = float(trial.attrs[SECONDS])
                print(f"trial {trial.number}: {took:.2f} s of {epochs_s:.1f} s, {took / epochs_s:.2%}; {cut} cut")
                captioned, trained = captioned + took, trained + epochs_s
    print(f"all: {captioned:.2f} s of {trained:.1f} s, {captioned / trained:.2%}" if trained else "no trial captioned")


if __name__ == "__main__":
    typer.run(main)
