"""What must hold at the end of a schedule, as after the fifty kills."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.trial import TrialState

from search import records
from search.storage import lifecycle
from search.verdict.leaders import verdict_of
from tests.simulation import tracking
from tests.simulation.world import whole

if TYPE_CHECKING:
    from tests.simulation.schedule import Simulation


def problems(simulation: Simulation) -> list[str]:
    """All final, nothing doubled, nothing lost, the same bits.

    Args:
        simulation: One that has ended.
    """
    trials = simulation.study.get_trials()
    wrong = [f"trial {t.number} is {t.state.name}" for t in trials if not t.state.is_finished()]
    resumed = [t.user_attrs[records.RESUMES] for t in trials if records.RESUMES in t.user_attrs]
    wrong += [f"trial {n} was taken up twice" for n in set(resumed) if resumed.count(n) > 1]
    for t in trials:
        config = t.user_attrs.get(records.CONFIG)
        if config is not None:
            expected = whole(config, max(t.intermediate_values, default=0))
            if tuple(t.intermediate_values[e] for e in sorted(t.intermediate_values)) != expected:
                wrong.append(f"trial {t.number} has other losses than undisturbed")
        best = t.user_attrs.get(records.BEST_EPOCH)
        if t.state == TrialState.COMPLETE:
            kept = simulation.world.disk.get((simulation.folder / t.user_attrs[records.FOLDER]).as_posix(), {})
            if best not in kept:
                wrong.append(f"trial {t.number} has no adapter of its best epoch, {best}: {sorted(kept)}")
        if t.number in resumed:
            successor = next(s for s in trials if s.user_attrs.get(records.RESUMES) == t.number)
            if not successor.intermediate_values.items() >= t.intermediate_values.items():
                wrong.append(f"trial {successor.number} lost an epoch that {t.number} had reported")
        attempts, first = t.user_attrs.get(records.ATTEMPT, 0), lifecycle.lineage(simulation.study, t.number)[-1]
        if attempts > simulation.blamed.get(first, 0):
            wrong.append(f"trial {t.number} has used {attempts} attempts by deaths that were not its fault")
        if t.state == TrialState.FAIL and t.number not in resumed:
            first = lifecycle.lineage(simulation.study, t.number)[-1]
            if (
                t.user_attrs.get(records.REASON) != records.LOST
                or simulation.blamed.get(first, 0) <= records.MAX_RETRIES
            ):
                wrong.append(
                    f"trial {t.number} failed: {t.user_attrs.get(records.REASON)}, "
                    f"{t.user_attrs.get(records.DETAIL)}; {simulation.blamed.get(first, 0)} deaths to blame it for"
                )
    ended = [t for t in trials if t.number not in resumed and records.REPEAT_OF not in t.user_attrs]
    if len(ended) != simulation.definition.n_trials:
        wrong.append(f"{len(ended)} configurations were searched, not {simulation.definition.n_trials}")
    verdict = verdict_of(lifecycle.read_trials(simulation.study), simulation.study.user_attrs)
    if verdict is not None and verdict.kind == "running":
        wrong.append("repeats are still to be trained")
    # An epoch is trained again only by who died in it, or whose last checkpoint was damaged.
    needed = sum(max(t.intermediate_values, default=0) for t in trials if t.number not in resumed)
    allowed = needed + (simulation.deaths + len(resumed)) * simulation.slots
    if simulation.world.trained > allowed:
        wrong.append(f"{simulation.world.trained} epochs were trained for {needed}, {simulation.deaths} deaths")
    return wrong + tracking.problems(simulation, trials)
