"""`Curves`: what every trial of a study can be expected to reach, from the curves of all of them together.

A Gaussian process over (configuration, epoch) models the logarithm of the validation loss as a sum of

    the mean curve     a constant and a slope in the logarithm of the epoch
    the rate           a smooth function of log10 z and the epoch, z the effective rate (`coordinates`)
    the rest           a smaller one of all other coordinates and the epoch
    the trial          its own offset and its own slow drift, which its configuration does not explain
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

SCALES = (0.03, 0.06, 0.12, 0.24)
"""Of the differences between configurations, in log loss: a tenth of that is a tenth of a percent to a few percent."""
NOISES = (0.0015, 0.003, 0.006, 0.012)
"""Standard deviation of an evaluation, relative: 0.4 to 1 % with 32 validation samples."""
CLIP = 0.3
"""Losses are told apart up to so much above the lowest, in log loss: by how much a diverged trial is worse teaches
nothing."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes relative to the scale, and lengths, of the parts of the model."""

    slope: float = -0.4
    """Mean change of a curve when the epoch grows by a factor e."""
    slope_sd: float = 0.15
    rate: float = 0.7
    rate_length: float = 0.5
    """In decades of the effective rate."""
    epoch_length: float = 1.8
    """In natural logarithms of the epoch."""
    rest: float = 0.28
    rest_length: float = 0.8
    """In ranges of a coordinate."""
    own: float = 0.04
    own_drift: float = 0.15
    drift_length: float = 0.3
    bend: float = 0.15
    """Log losses above the lowest are bent: d becomes bend x log(1 + d / bend)."""
    bowl: float = 0.2
    """Prior mean: how much worse a trial is one prior width away from the prior's effective rate."""


@dataclass(frozen=True)
class Points:
    """Points of curves: arrays of equal length n, one row each."""

    z: Array
    """(n,) log10 of the effective rate."""
    rest: Array
    """(n, d) other coordinates, each scaled to about [0, 1] over its range."""
    epoch: Array
    """(n,) from 1."""
    trial: NDArray[np.int64]
    """(n,) number of the trial; -1 for a configuration that is none yet."""

    def take(self, index: Array | NDArray[np.int64] | NDArray[np.bool_]) -> Points:
        """Some of the points."""
        return Points(self.z[index], self.rest[index], self.epoch[index], self.trial[index])


def _matern(distance: Array) -> Array:
    scaled = np.sqrt(5.0) * distance
    found: Array = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    return found


class Curves:
    """The model, fitted to what has been observed.

    Args:
        points: Where losses were observed.
        losses: (n,) validation losses, positive; NaN or infinite ones count as the worst.
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
        gram, drift = self._kernel(points, points), self._mean(points)
        best = (-np.inf, SCALES[0], NOISES[0])
        self._fitted: tuple[Array, Array, float] | None = None
        for scale in SCALES:
            target = self._target(scale) - drift
            for noise in NOISES:
                fitted = self._solve(gram, target, noise / scale)
                # Of log losses: the density of the scaled values times the Jacobian of the scaling.
                evidence = (
                    fitted[2]
                    - len(target) * np.log(scale)
                    - self._prior_cost(scale, noise)
                    - np.log1p(np.minimum(self._raw, CLIP) / self.shape.bend).sum()
                )
                if evidence > best[0]:
                    best = (evidence, scale, noise)
                    self._fitted = fitted
        self.evidence, self.scale, self.noise = best
        assert self._fitted is not None
        self._chol, self._weights, _ = self._fitted

    @staticmethod
    def _prior_cost(scale: float, noise: float) -> float:
        """Weak preference for middling values, which decides while there is little to see."""
        return 0.5 * (math.log(scale / 0.1) / 0.7) ** 2 + 0.5 * (math.log(noise / 0.005) / 0.7) ** 2

    def _target(self, scale: float) -> Array:
        return self.shape.bend * np.log1p(np.minimum(self._raw, CLIP) / self.shape.bend) / scale

    def _solve(self, gram: Array, target: Array, noise: float) -> tuple[Array, Array, float]:
        chol = np.linalg.cholesky(gram + (noise**2 + 1e-8) * np.eye(len(target))).astype(np.float64)
        half = np.linalg.solve(chol, target)
        evidence = -0.5 * half @ half - np.log(np.diag(chol)).sum() - 0.5 * len(target) * np.log(2 * np.pi)
        weights: Array = np.linalg.solve(chol.T, half)
        return chol, weights, float(evidence)

    def _mean(self, at: Points) -> Array:
        away = np.minimum(((at.z - self._centre) / self._width) ** 2, 9.0)
        return self.shape.slope * np.log(at.epoch) + self.shape.bowl * away

    def _kernel(self, a: Points, b: Points) -> Array:
        shape = self.shape
        s, t = np.log(a.epoch)[:, None], np.log(b.epoch)[None, :]
        apart = np.abs(s - t)
        shared = _matern(apart / shape.epoch_length)
        found = 9.0 + shape.slope_sd**2 * s * t
        found = found + shape.rate**2 * _matern(np.abs(a.z[:, None] - b.z[None, :]) / shape.rate_length) * shared
        if a.rest.shape[1]:
            squares = ((a.rest[:, None, :] - b.rest[None, :, :]) ** 2).sum(axis=2) / shape.rest_length**2
            found += shape.rest**2 * np.exp(-0.5 * squares) * shared
        same = (a.trial[:, None] == b.trial[None, :]) & (a.trial[:, None] >= 0)
        if same.any():
            own = shape.own**2 + shape.own_drift**2 * _matern(apart / shape.drift_length)
            found += np.where(same, own, 0.0)
        return found

    def _variance(self, at: Points) -> Array:
        """The diagonal of the kernel of points with themselves; one that is no trial yet will have an offset too."""
        shape = self.shape
        rest = shape.rest**2 if at.rest.shape[1] else 0.0
        return (
            9.0 + (shape.slope_sd * np.log(at.epoch)) ** 2 + shape.rate**2 + rest + shape.own**2 + shape.own_drift**2
        )

    def predict(self, at: Points) -> tuple[Array, Array]:
        """(mean, standard deviation) of the bent log loss without the noise of its evaluation, (n,) each.

        Bent values are in the order of losses, and differ as their logarithms do near the lowest; see `loss`.
        """
        cross = self._kernel(at, self._points)
        mean = self._mean(at) + cross @ self._weights
        half = np.linalg.solve(self._chol, cross.T)
        variance = np.maximum(self._variance(at) - (half**2).sum(axis=0), 1e-8)
        return self.scale * mean, self.scale * np.sqrt(variance)

    def loss(self, bent: float) -> float:
        """The validation loss of a bent value."""
        bend = self.shape.bend
        return math.exp(self._lowest + bend * math.expm1(bent / bend))
