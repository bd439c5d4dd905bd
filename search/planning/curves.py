"""`Curves`: what every trial of a study can be expected to reach, from the curves of all of them together.

A Gaussian process over (configuration, epoch) models the logarithm of the validation loss as a sum of

    the mean curve     a constant, a slope in the logarithm of the epoch, and a start that wears off as 1 / epoch
    the rate           a smooth function of log10 z and the epoch, z the effective rate (`coordinates`)
    the rest           a smaller one of all other coordinates and the epoch
    the trial          its own offset, which its configuration does not explain
    drift              of the trial from epoch to epoch: what it gained by chance on a small validation split it loses
                       again, so that it is seen as noise with a memory and not as something to train on for
    the split's drift  the same for all trials: 32 validation samples are not the task, and the more a trial has learnt
                       the further they may lie from it. Many trials together cannot average it out, so without this
                       part a flat or rising loss of them all says that training on is no use, where the test loss
                       still falls by 1.1 % (docs/search-quality.md)
    noise              of each evaluation

so that a trial's first epochs, and those of its neighbours, say what its last will be, and how sure that is. Swersky
et al. 2014 (arXiv 1406.3896) and Rakotoarison et al. 2024 (arXiv 2404.16795) model curves jointly in this manner. The
scale of the losses and the noise are fitted to each study by marginal likelihood; the shape is fixed, and was chosen
on recorded runs (docs/search-quality.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Whole = NDArray[np.int64]

SCALES = (0.03, 0.06, 0.12, 0.24)
"""Of the differences between configurations, in log loss: a tenth of that is a tenth of a percent to a few percent."""
NOISES = (0.0015, 0.003, 0.006, 0.012)
"""Standard deviation of an evaluation, relative: 0.4 to 1 % with 32 validation samples."""
FITTED = 120
"""Most points by which scale and noise are fitted."""
CLIP = 0.3
"""Losses are told apart up to so much above the lowest, in log loss: by how much a diverged trial is worse teaches
nothing."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes relative to the scale, and lengths, of the parts of the model."""

    slope: float = -0.42
    """Mean change of a curve when the epoch grows by a factor e."""
    slope_sd: float = 0.08
    start: float = 1.4
    """Mean height of a curve's first epoch above what the slope says; it falls as 1 / epoch."""
    start_sd: float = 0.34
    rate: float = 0.7
    rate_length: float = 0.5
    """In decades of the effective rate."""
    epoch_length: float = 1.64
    """In natural logarithms of the epoch."""
    rest: float = 0.4
    rest_length: float = 0.8
    """In ranges of a coordinate."""
    own: float = 0.1
    own_drift: float = 0.15
    split_drift: float = 0.35
    split_length: float = 0.7
    drift_length: float = 0.3
    bend: float = 0.15
    """Log losses above the lowest are bent: d becomes bend x log(1 + d / bend)."""
    bowl: float = 0.2
    """Prior mean: how much worse a trial is one prior width away from the prior's effective rate."""


@dataclass(frozen=True)
class Points:
    """m points on the curves of c configurations."""

    z: Array
    """(c,) log10 of the effective rate."""
    rest: Array
    """(c, d) other coordinates, each scaled to about [0, 1] over its range."""
    trial: Whole
    """(c,) number of the trial; -1 for a configuration that is none yet."""
    owner: Whole
    """(m,) the configuration that a point belongs to, 0 to c - 1."""
    epoch: Array
    """(m,) from 1."""

    def take(self, index: Whole) -> Points:
        """Some of the points, of the same configurations."""
        return Points(self.z, self.rest, self.trial, self.owner[index], self.epoch[index])


def _matern(distance: Array) -> Array:
    scaled = np.sqrt(5.0) * distance
    found: Array = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    return found


class Curves:
    """The model, fitted to what has been observed.

    Args:
        points: Where losses were observed.
        losses: (m,) validation losses, positive; NaN or infinite ones count as the worst.
        centre: The prior's log10 effective rate.
        width: Its standard deviation in decades.
        shape: Of the model.
    """

    def __init__(
        self, points: Points, losses: Array, *, centre: float, width: float, shape: Shape | None = None
    ) -> None:
        self._points, self._centre, self._width = points, centre, width
        self.shape = shape or Shape()
        finite = np.isfinite(losses) & (losses > 0)
        self._lowest = float(np.log(losses[finite].min())) if finite.any() else 0.0
        self._raw = np.where(finite, np.log(np.where(finite, losses, 1.0)) - self._lowest, np.inf)
        # Scale and noise are fitted to at most FITTED of the points, evenly spread: a fit costs their number cubed.
        some = np.unique(np.linspace(0, len(losses) - 1, min(FITTED, len(losses))).astype(np.int64))
        part = points.take(some)
        gram, drift = self._kernel(part, part), self._mean(part)
        bent_away = float(np.log1p(np.minimum(self._raw[some], CLIP) / self.shape.bend).sum())
        best = (-math.inf, SCALES[0], NOISES[0])
        for scale in SCALES:
            target = self._target(scale)[some] - drift
            for noise in NOISES:
                # Of log losses: the density of the scaled and bent values times the Jacobian of both.
                density = self._evidence(gram, target, noise / scale) - len(target) * math.log(scale) - bent_away
                best = max(best, (density - self._prior_cost(scale, noise), scale, noise))
        self.evidence, self.scale, self.noise = best
        target = self._target(self.scale) - self._mean(points)
        # The inverse of the Cholesky factor: a forecast multiplies by it, where solving costs as much as a fit.
        self._half = np.linalg.inv(self._factor(self._kernel(points, points), self.noise / self.scale))
        self._weights = self._half.T @ (self._half @ target)

    @staticmethod
    def _prior_cost(scale: float, noise: float) -> float:
        """Weak preference for middling values, which decides while there is little to see."""
        return 0.5 * (math.log(scale / 0.1) / 0.7) ** 2 + 0.5 * (math.log(noise / 0.005) / 0.7) ** 2

    def _target(self, scale: float) -> Array:
        return self.shape.bend * np.log1p(np.minimum(self._raw, CLIP) / self.shape.bend) / scale

    @staticmethod
    def _factor(gram: Array, noise: float) -> Array:
        """The Cholesky factor of what is observed with this noise."""
        return np.linalg.cholesky(gram + (noise**2 + 1e-8) * np.eye(len(gram))).astype(np.float64)

    def _evidence(self, gram: Array, target: Array, noise: float) -> float:
        """The logarithm of the density of observed values."""
        chol = self._factor(gram, noise)
        half = np.linalg.solve(chol, target)
        return float(-0.5 * half @ half - np.log(np.diag(chol)).sum() - 0.5 * len(target) * np.log(2 * np.pi))

    def _mean(self, at: Points) -> Array:
        away = np.minimum(((at.z - self._centre) / self._width) ** 2, 9.0)
        shape = self.shape
        found: Array = shape.slope * np.log(at.epoch) + shape.start / at.epoch + shape.bowl * away[at.owner]
        return found

    def _kernel(self, a: Points, b: Points, *, drift: bool = True) -> Array:
        """(m of a, m of b). What depends on configurations or on epochs alone is calculated once for each of them.

        Args:
            a: Points.
            b: Others.
            drift: Whether a trial's own drift and the split's are part of it.
        """
        shape = self.shape
        # By configuration.
        rate = shape.rate**2 * _matern(np.abs(a.z[:, None] - b.z[None, :]) / shape.rate_length)
        if a.rest.shape[1]:
            squares = (a.rest**2).sum(1)[:, None] + (b.rest**2).sum(1)[None, :] - 2 * a.rest @ b.rest.T
            rate += shape.rest**2 * np.exp(-0.5 * np.maximum(squares, 0.0) / shape.rest_length**2)
        same = ((a.trial[:, None] == b.trial[None, :]) & (a.trial[:, None] >= 0)).astype(np.float64)
        # By epoch.
        (s, i), (t, j) = (np.unique(np.log(each.epoch), return_inverse=True) for each in (a, b))
        apart = np.abs(s[:, None] - t[None, :])
        shared = _matern(apart / shape.epoch_length)
        own = shape.own**2 + (shape.own_drift**2 * _matern(apart / shape.drift_length) if drift else 0.0 * apart)
        mean = 9.0 + shape.slope_sd**2 * s[:, None] * t[None, :]
        mean += shape.start_sd**2 * np.exp(-s)[:, None] * np.exp(-t)[None, :]
        if drift:
            mean += shape.split_drift**2 * _matern(apart / shape.split_length)
        # By point.
        points, epochs = np.ix_(a.owner, b.owner), np.ix_(i, j)
        found: Array = mean[epochs] + rate[points] * shared[epochs]
        if same.any():
            found += same[points] * own[epochs]
        return found

    def _variance(self, at: Points) -> Array:
        """The kernel of each point with itself; a configuration that is no trial yet will have an offset too."""
        shape = self.shape
        rest = shape.rest**2 if at.rest.shape[1] else 0.0
        found: Array = 9.0 + (shape.slope_sd * np.log(at.epoch)) ** 2 + shape.rate**2 + rest + shape.own**2
        found += (shape.start_sd / at.epoch) ** 2
        return found

    def predict(self, at: Points) -> tuple[Array, Array]:
        """(mean, standard deviation) of the bent log loss without noise and drift, the split's included, (m,) each.

        Bent values are in the order of losses, and differ as their logarithms do near the lowest; see `loss`.
        """
        cross = self._kernel(at, self._points, drift=False)
        mean = self._mean(at) + cross @ self._weights
        half = self._half @ cross.T
        variance = np.maximum(self._variance(at) - (half**2).sum(axis=0), 1e-8)
        return self.scale * mean, self.scale * np.sqrt(variance)

    def loss(self, bent: float) -> float:
        """The validation loss of a bent value."""
        bend = self.shape.bend
        return math.exp(self._lowest + bend * math.expm1(bent / bend))
