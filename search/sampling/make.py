"""The sampler of a study and its `--strategy`."""

from __future__ import annotations

from optuna.samplers import BaseSampler

from search.errors import StudyError
from search.planning.laddered import Laddered
from search.planning.prior import Prior
from search.planning.thaw import FreezeThaw
from search.sampling.aimed import AimedSampler
from search.sampling.samplers import GridInOrder, SeededByTrial, Untried, base_sampler
from search.space import size
from search.study import Study
from trainer.common.errors import nearest

FREEZE_THAW, RUNGS = "freeze-thaw", "rungs"
STRATEGIES = (RUNGS, FREEZE_THAW, "joint")
"""Values of `--strategy`."""


def default_strategy(study: Study) -> str:
    """The strategy of a study for which none is given: what its sampler can do."""
    return RUNGS if study.sampler == "tpe" and study.space and study.objective == "loss" else "joint"


def make_sampler(study: Study, strategy: str = "joint", prior: Prior | None = None) -> BaseSampler:
    """Make the sampler of a study.

    Args:
        study: Its space, kind of sampler and seed.
        strategy: `rungs` begins in turns a rung of a ladder of effective rates and a variant of the best,
            `freeze-thaw` what is most worth an epoch by the curves of all trials, `joint` samples all params
            from the first trial on by Optuna's sampler.
        prior: What is known of good effective rates, for `freeze-thaw` and `rungs`.

    Raises:
        StudyError: the strategy is unknown, or the study's sampler or space does not allow it.
    """
    if strategy not in STRATEGIES:
        raise StudyError(
            f"{strategy!r} is not a strategy{nearest(strategy, STRATEGIES)}; known: {', '.join(STRATEGIES)}"
        )
    if study.sampler == "grid":
        study.check_way(strategy, None, repeats=False)
        return GridInOrder(study)
    if strategy == FREEZE_THAW:
        return AimedSampler(study, FreezeThaw(study, prior or Prior()))
    if strategy == RUNGS:
        return AimedSampler(study, Laddered(study, prior or Prior()))
    if size(study.space) is not None:
        return Untried(lambda seed: base_sampler(study, seed), study)
    return SeededByTrial(lambda seed: base_sampler(study, seed), study.seed)
