"""How well a world does where its table has no run: each configuration is left out once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.benchmarks.world import KINDS, Array, World


@dataclass(frozen=True)
class Error:
    """How far the surrogate is off where it has not seen the configuration."""

    name: str
    relative: float
    """Median of |predicted / real - 1|."""
    log: float
    """Root mean square of log(predicted / real)."""
    rank: float
    """Spearman's correlation, over all runs."""
    rank_best_half: float


def left_out(world: World) -> list[Error]:
    """The leave-one-configuration-out error of the best validation loss, and of the test loss at its epoch.

    In closed form, from the inverse of the kernel matrix; the length scales are those of all runs.
    """
    weights = world.inverse @ (world.bent - world.bent.mean(0))
    guesses = np.empty_like(world.bent)
    configurations = np.array([run["configuration"] for run in world.fitted])
    for number in np.unique(configurations):
        rows = np.flatnonzero(configurations == number)
        block = world.inverse[np.ix_(rows, rows)]
        guesses[rows] = world.bent[rows] - np.linalg.solve(block, weights[rows])
    shape = (len(world.bent), len(KINDS), world.epochs)
    losses = [world.unbend(each.reshape(shape)) for each in (world.bent, guesses)]
    at = [each[:, 0].argmin(1)[:, None] for each in losses]
    found = []
    for kind, name in ((0, "validation"), (1, "test")):
        real, guessed = (np.take_along_axis(x[:, kind], i, 1)[:, 0] for x, i in zip(losses, at, strict=True))
        found.append(_error(name, real, guessed))
    return found


def _error(name: str, real: Array, guessed: Array) -> Error:
    from scipy.stats import spearmanr

    half = np.argsort(real)[: max(3, len(real) // 2)]
    off = np.log(guessed / real)
    ranks = [float(spearmanr(real[part], guessed[part]).statistic) for part in (slice(None), half)]
    return Error(name, float(np.median(np.abs(np.expm1(off)))), float(np.sqrt(np.mean(off**2))), *ranks)


def describe(world: World) -> list[str]:
    """A world's facts as lines of text."""
    diverged = sum(run["diverged"] for run in world.runs)
    noise = ", ".join(f"{kind} {world.noise_of[kind]:.2%}" for kind in ("val", "test"))
    return [
        f"{world.name}: {len(world.runs)} runs of {world.epochs} epochs, {world.repeats} configurations with several"
        f" seeds; {diverged} diverged; {world.imputed:.0%} of the test losses are imputed",
        f"  coordinate: rate x alpha x batch^{world.powers[0]:g} x r^{world.powers[1]:g}; lowest test loss of a run "
        f"{min(loss for run in world.runs for loss in run['test'] if loss is not None):.4f}",
        f"  best expected test loss of its configurations {world.best:.4f}; anywhere "
        f"{world.optimum / world.best - 1:+.2%}, where the expected validation loss is lowest "
        f"{world.named / world.best - 1:+.2%}",
        f"  noise of an epoch's loss: {noise}",
        *(
            f"  left out, best {each.name} loss: off by {each.relative:.1%} (median), log {each.log:.3f} (rms), "
            f"rank correlation {each.rank:.2f}, among the best half {each.rank_best_half:.2f}"
            for each in left_out(world)
        ),
    ]
