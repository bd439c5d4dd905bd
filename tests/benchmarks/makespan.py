"""A whole study, ours against the peer: `python -m tests.benchmarks.makespan --scale mini --trials 32`.

    --scale mini                      the embedded model, 160 samples, 6 epochs, batches of 2 to 16
    --scale real --model M --data D   a checkpoint and a data folder, 48 samples, 2 epochs, batches of 4
    --scale xl --model M --data D     see tests.benchmarks.xl, 64 samples, 3 epochs, batches of 2 to 8

Both sides train the same configurations on the same rows in the same order, from the start of the command to its
end: creating the databases, loading, vision features and reports included. They run in turn, `--repeat` times; the
figures are medians. A figure counts only if every trial's validation loss is the peer's (tests.benchmarks.gate).
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.pruning import PRUNERS
from tests.benchmarks import configs, gate
from tests.benchmarks.sides import Bench, Ran, machine, save
from trainer.config import read_settings
from trainer.data.dataset import resolve_folder

BEST_TOLERANCE = 0.01
"""With a pruner both sides must find an equally good trial, as far as this."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    runs: tuple[Ran, ...]

    @property
    def wall_s(self) -> float:
        """Median."""
        return statistics.median(ran.wall_s for ran in self.runs)

    def text(self, reference_s: float | None) -> str:
        """The line; `reference_s` over its time is its ratio."""
        ratio = "" if reference_s is None else f"{reference_s / self.wall_s:6.2f} x"
        walls = " ".join(f"{ran.wall_s:.1f}" for ran in self.runs)
        epochs = f"{self.runs[0].epochs:5d}" if self.runs[0].trials else "    -"
        best = f"{self.runs[0].best:.4f}" if self.runs[0].trials else "     -"
        load = max(ran.load for ran in self.runs)
        return f"{self.name:<44} {self.wall_s:8.1f} s {ratio:>9} {epochs} {best}  [{walls}; load {load:.1f}]"


def in_turn(repeat: int, sides: dict[str, Callable[[str], Ran]]) -> dict[str, Row]:
    """Every side once, then again, so that a busy machine is busy for all of them."""
    runs: dict[str, list[Ran]] = {name: [] for name in sides}
    for turn in range(repeat):
        for name, side in sides.items():
            ran = side(f"{name.replace(' ', '-').replace(',', '')}-{turn}")
            runs[name].append(ran)
            print(f"  {name}, {turn + 1} of {repeat}: {ran.wall_s:.1f} s", flush=True)
    return {name: Row(name, tuple(found)) for name, found in runs.items()}


def makespan(bench: Bench, pruner: str, repeat: int, tolerance: float, *, skip_peer: bool) -> tuple[list[Row], str]:
    """(rows, what the gate says)."""
    sides: dict[str, Callable[[str], Ran]] = {f"ours, pruner {pruner}": lambda name: bench.run_ours(name, pruner)}
    if not skip_peer:
        sides[f"peer, pruner {pruner}"] = lambda name: bench.run_peer(name, pruner)
    rows = list(in_turn(repeat, sides).values())
    if skip_peer:
        return rows, "no peer: the figure does not count"
    ours, peer = rows[0].runs[0], rows[1].runs[0]

    def nudged(labels: Sequence[str], nudge: float) -> Any:
        return bench.nudge_peer(f"nudged-{pruner}-{gate.NUDGES.index(nudge)}", labels, nudge)

    counts, text = gate.report(gate.compare(ours.trials, peer.trials, tolerance, nudged), tolerance)
    if pruner != "none":
        apart = ours.best / peer.best - 1
        text += f"\nbest validation loss: ours {ours.best:.4f}, peer {peer.best:.4f} ({apart:+.2%})"
        if counts and apart > BEST_TOLERANCE:
            text += "\nTHE FIGURE DOES NOT COUNT: ours found no equally good trial"
    return rows, text


def ablation(bench: Bench, jobs: int, pruner: str) -> list[Row]:
    """Ours once more, and ours with one thing taken away at a time."""
    sides: dict[str, Callable[[str], Ran]] = {
        "all of it": lambda name: bench.run_ours(name, "none"),
        "no packing (--slots 1)": lambda name: bench.run_ours(name, "none", "--slots", "1"),
        "no feature cache": lambda name: bench.run_ours(name, "none", "--set", "cache_features=false"),
        "neither": lambda name: bench.run_ours(name, "none", "--slots", "1", "--set", "cache_features=false"),
        "a process a trial, no search, no tracking": lambda name: bench.run_each(name, jobs),
        "the same without feature cache": lambda name: bench.run_each(name, jobs, "cache_features=false"),
        f"pruner {pruner}": lambda name: bench.run_ours(name, pruner),
    }
    return list(in_turn(1, sides).values())


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """The study file and the rows; nothing of it is timed."""
    scale = configs.SCALES[options.scale]
    base: dict[str, Any] = {"model": options.model, "data": str(resolve_folder(options.data).resolve())}
    base |= read_settings(options.set)
    ours = tuple(shlex.split(options.ours))
    peer = ("--jobs", str(options.jobs), "--threads", str(options.threads), "--workers", str(options.loader_workers))
    bench = Bench(folder=folder, trials=options.trials, ours=ours, peer=peer)
    text = configs.study_text(scale, options.trials, options.seed, base, max_rate=options.max_rate)
    bench.study_file.write_text(text, encoding="utf-8")
    configs.write_rows(bench.definition().base_config(), bench.rows)
    return bench


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=configs.SCALES, default="mini")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pruning", choices=("off", "on", "both"), default="off")
    parser.add_argument("--pruner", choices=[p for p in PRUNERS if p != "none"], default="rising")
    parser.add_argument("--seed", type=int, default=0, help="of the configurations")
    parser.add_argument("--max-rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", default="mini")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of every trial")
    parser.add_argument("--ours", default="--slots auto", help="further options of search.run")
    parser.add_argument("--jobs", type=int, default=2, help="the peer's trials at a time")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads of each of them")
    parser.add_argument("--loader-workers", type=int, default=0, help="DataLoader processes of each of them")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it, for a look at the outputs")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="makespan-"))
    folder.mkdir(exist_ok=options.keep is None)
    bench = prepare(options, folder)
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))
    tolerance = configs.SCALES[options.scale].tolerance
    pruners = {"off": ("none",), "on": (options.pruner,), "both": ("none", options.pruner)}[options.pruning]
    rows: list[Row] = []
    said = []
    for pruner in pruners:
        found, text = makespan(bench, pruner, options.repeat, tolerance, skip_peer=options.skip_peer)
        rows += found
        said.append(f"pruner {pruner}: {text}")
    reference = next((row.wall_s for row in rows if row.name.startswith("peer")), None)
    print(
        f"\n{options.trials} trials of {options.scale}: makespan, median of {options.repeat}; ratio to the first peer"
    )
    for row in rows:
        print(row.text(reference))
    print("\n".join(said))
    if options.ablation:
        taken = ablation(bench, options.jobs, options.pruner)
        print("\nours, with one thing taken away; ratio to all of it")
        for row in taken:
            print(row.text(taken[0].wall_s))
        rows += taken
    if options.json:
        figures = [
            {"name": row.name, "wall_s": [ran.wall_s for ran in row.runs], "epochs": row.runs[0].epochs}
            for row in rows
        ]
        save(options.json, {"rows": figures, "gate": said})
    if options.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
