"""`python -m tests.simulation --seeds 1000`: play schedules; the seed of one that breaks a promise is printed."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import optuna

from tests.simulation.schedule import Simulation, Wrong


def play(seed: int) -> str | None:
    """What a schedule broke; None if it kept all."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        try:
            Simulation(seed, Path(folder) / "runs").run()
        except Wrong as wrong:
            return str(wrong)
    return None


def main() -> int:
    """Play them; exit code 1 if one broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.disable(logging.CRITICAL)
    began, broken = time.monotonic(), 0
    for seed in range(args.first, args.first + args.seeds):
        problem = play(seed)
        if problem is not None:
            broken += 1
            print(f"seed {seed}: {problem}", flush=True)
    print(f"{args.seeds} schedules in {time.monotonic() - began:.0f} s, {broken} broke a promise", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
