"""What it costs to close a study as it grows: `python -m tests.benchmarks.closing --trials 200 2000`.

At the end of a search the tuning log is written in both languages with its plots. The records are made up
(tests.support.report_data.many: trials of 8 epochs and 40 steps); reading them back from the databases is measured by
`tests.benchmarks.scale` and `mlflow_scale`. Processor time, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from search.report import plots, write
from search.report.facts import gather
from tests.benchmarks.sides import machine
from tests.support.report_data import many


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--profile", action="store_true", help="print what the largest study spends its time on")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))
    print(f"{'trials':>7} {'facts s':>8} {'plots s':>8} {'text s':>8} {'all s':>8} {'ms a trial':>11} {'log kB':>7}")
    gather(many(20))  # imports
    plots.draw(gather(many(20)))
    for count in options.trials:
        record = many(count)
        with tempfile.TemporaryDirectory() as folder, cProfile.Profile(time.process_time) as profile:
            if not options.profile:
                profile.disable()
            times = [time.process_time()]
            facts = gather(record)
            times.append(time.process_time())
            drawn = plots.draw(facts)
            times.append(time.process_time())
            for lang in write.LANGS:
                written = write.write_markdown(facts, lang, Path(folder) / write.default_name(lang), drawn)
            times.append(time.process_time())
            size = written.stat().st_size / 1000
        parts = [after - before for before, after in pairwise(times)]
        whole = sum(parts)
        row = " ".join(f"{part:8.1f}" for part in (*parts, whole))
        print(f"{count:>7} {row} {1e3 * whole / count:>11.1f} {size:>7.0f}", flush=True)
    if options.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(40)


if __name__ == "__main__":
    main()
