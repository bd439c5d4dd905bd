"""Whether this code computes what another version of it does, to the last bit, and continues what that one began.

    git worktree add /tmp/before COMMIT
    python -m tests.benchmarks.same_results /tmp/before

Both versions run a study of six trials of the embedded model, one at a time and in packs; the other version's runs
folder is then replayed by this code, and a study that the other version was interrupted in is continued. Compared are
all validation losses in Optuna's database and the bytes of all checkpoints' weights. Takes some eight minutes on two
cores; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
STUDY = "rsicap_mini"
SIX = ("search.run", "--study", STUDY, "--trials", "6")


def run(code: Path, folder: Path, *words: str, interrupt_after_s: float | None = None) -> int:
    """Run a module of a checkout in a folder of its own; its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(code), "OMP_WAIT_POLICY": "PASSIVE"}
    if code == HERE and words[0] == "search.run":  # what earlier versions do, of which these are no options
        words = (*words, "--strategy", "joint", "--no-confirm", "--captions", "0")
    with (folder / "output.txt").open("a") as output:
        process = subprocess.Popen([sys.executable, "-m", *words], cwd=folder, env=env, stdout=output, stderr=output)
        try:
            return process.wait(interrupt_after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return process.wait()


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """(trial, epoch, validation loss) and (trial, state, value), from Optuna's database."""
    query = "SELECT t.number, {} FROM trials t JOIN {} v ON v.trial_id = t.trial_id ORDER BY 1, 2"
    with sqlite3.connect(folder / "runs" / "optuna.db") as database:
        by_epoch = database.execute(query.format("v.step, v.intermediate_value", "trial_intermediate_values"))
        ends = database.execute(query.format("t.state, v.value", "trial_values"))
        return [*by_epoch, *ends]


def weights(folder: Path) -> dict[str, str]:
    """Hashes of checkpoints' weights and moments by path."""
    trials = folder / "runs" / STUDY / "trials"
    return {
        str(path.relative_to(trials)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(trials.rglob("*.safetensors"))
    }


def main() -> int:
    """Run both, compare, print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of another version")
    other = parser.parse_args().other.resolve()
    failed = 0

    def tell(what: str, same: bool) -> None:
        nonlocal failed
        failed += not same
        print(f"{what:<60} {'the same' if same else 'DIFFERENT'}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        for kind, slots in (("alone", "1"), ("packs", "4")):
            codes = [run(code, base / kind / side, *SIX, "--slots", slots) for side, code in versions(other)]
            old, new = base / kind / "other", base / kind / "ours"
            tell(f"{kind}: exit codes {codes}", codes == [0, 0])
            tell(f"{kind}: {len(losses(old))} losses and values", losses(old) == losses(new))
            tell(f"{kind}: {len(weights(old))} files of checkpoints", weights(old) == weights(new))
            code = run(HERE, old, "search.replay", "--study", STUDY, "--trial", "1")
            tell(f"{kind}: the other's trial 1 replayed by this code", code == 0)
        cut = base / "cut"
        code = run(other, cut, *SIX, "--slots", "1", interrupt_after_s=25)
        tell(f"interrupted with exit code {code} (130 if the machine was not too fast)", code in (0, 130))
        code = run(HERE, cut, *SIX, "--slots", "1")
        tell(
            "begun by the other, continued by this code", code == 0 and losses(cut) == losses(base / "alone" / "ours")
        )
    return 1 if failed else 0


def versions(other: Path) -> tuple[tuple[str, Path], tuple[str, Path]]:
    """(name, checkout) of both."""
    return ("other", other), ("ours", HERE)


if __name__ == "__main__":
    sys.exit(main())
