"""A world made of a table of real training runs: what any configuration of its space would have shown, at once.

    world = World(record.load("aerial"))
    world.curve({"learning_rate": 2e-4, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "batch_size": 4,
                 "warmup_steps": 0})

Between the table's runs stands a Gaussian process over the steep direction (log10 of the effective rate, or of it
with other powers of batch and rank), log rank, log alpha / rank, log batch, warmup and dropout; it has one kernel for
the losses of all epochs. On top of its mean comes what is left of the curve of a run nearby, so that curves keep the
shape and the noise of real ones. At a run of the table a world gives that run itself. How well it does where it has
not seen a run, `world_error` says: each configuration is left out once.

What is not of the table's runs and therefore only as good as the surrogate: where the optimum lies between them, and
that noise is alike in a neighbourhood. Test losses that a table has not (those of hopeless runs are not taken) are the
validation loss times the epoch's median of test / validation.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.space import Float, Int, Multiple
from search.study import Study

Array = NDArray[np.float64]

KINDS = ("val", "test", "train")
BEND = 0.1
"""Log losses are calculated with as they are near the best one, and ever more compressed from this far above it on: a
diverging run would otherwise decide the length scales."""
POWERS = (-0.75, -0.25)
"""Of batch and rank in the first coordinate; (-0.5, 0) make it the effective rate. A Gaussian process has a length for
each coordinate and none for a direction between them: on the first 54 runs of `aerial` its error, left out, is 2.5 %
(rms of the best validation loss) with the effective rate, 2.1 % with (-1, -0.25), 1.9 % with these."""
NEIGHBOURS = 5
"""Runs nearby of which one lends its residual; 3 of them decide about divergence."""
FIRST_SEED = 42
"""The seed that a study trains with, and with it the split of the validation loss it sees."""
FEWEST_RUNS = 4
ALPHAS = (1, 2, 4)
SEARCHED = ("learning_rate", "lora_r", "lora_alpha", "lora_dropout", "batch_size", "warmup_steps")


@dataclass(frozen=True)
class Curve:
    """One run: losses by epoch, epoch 1 first."""

    val: Array
    test: Array
    train: Array
    diverged: bool
    """Whether the run ends in NaN in the epoch after its last one."""
    expected: Array
    """The test loss by epoch without this run's luck: what its configuration is worth is judged by it."""
    worth: float
    """The expected test loss at the epoch whose expected validation loss is lowest."""


def effective_rate(values: Mapping[str, Any]) -> float:
    """log10 of learning rate x alpha / sqrt(batch)."""
    return math.log10(values["learning_rate"] * values["lora_alpha"] / math.sqrt(values["batch_size"]))


def features(values: Mapping[str, Any], powers: tuple[float, float]) -> list[float]:
    """What the surrogate knows of a configuration; `powers` are those of batch and rank in the first coordinate."""
    batch, rank = powers
    rate = math.log10(values["learning_rate"] * values["lora_alpha"])
    return [
        rate + batch * math.log10(values["batch_size"]) + rank * math.log10(values["lora_r"]),
        math.log(values["lora_r"]),
        math.log(values["lora_alpha"] / values["lora_r"]),
        math.log(values["batch_size"]),
        float(values["warmup_steps"]),
        float(values["lora_dropout"]),
    ]


class World:
    """See the module.

    Args:
        table: As `record.table` makes it, finished or not.
        seed: Of the noise.
        powers: See `features`.

    Raises:
        ValueError: the table has fewer than four runs that came through.
    """

    def __init__(self, table: Mapping[str, Any], seed: int = 0, powers: tuple[float, float] = POWERS) -> None:
        self.name: str = table["task"]
        self.base: dict[str, Any] = {k: v for k, v in table["base"].items() if k not in ("warmup_most", "rates")}
        self.epochs: int = self.base["num_epochs"]
        self.runs: list[Mapping[str, Any]] = list(table["runs"])
        self._rates, self._warmup = table["base"]["rates"], table["base"]["warmup_most"]
        self._seed = seed
        self._whole = np.array([self._came_through(run) for run in self.runs], dtype=bool)
        self.fitted = [run for run, whole in zip(self.runs, self._whole, strict=True) if whole]
        """The runs that the surrogate is made of: those that came through."""
        if self._whole.sum() < FEWEST_RUNS:
            raise ValueError(f"a world needs {FEWEST_RUNS} runs that came through, but got {int(self._whole.sum())}")
        self.powers = powers
        raw = np.array([features(run, self.powers) for run in self.runs])
        self._centre, spread = raw.mean(0), raw.std(0)
        self._spread = np.where(spread > 0, spread, 1.0)
        self._places = (raw - self._centre) / self._spread
        logs, self.imputed = self._logs()
        self._offsets = self._split_offsets(logs)
        logs -= np.array([self._offset(run["seed"]) for run in self.fitted])[:, :, None]
        self._best = logs.min(axis=(0, 2))[:, None]
        bent = self._bend(logs)
        self._fit(bent.reshape(len(bent), -1))
        self._pick_noise(bent)
        self.best = float(self._expected(self.fitted)[:, 1].min())
        """The lowest expected test loss among the table's configurations: what strategies are measured by. Between
        them a surrogate of few runs has dips that no run vouches for."""
        self.optimum, self.named = self._look_for_best()
        """(the lowest expected test loss anywhere, that where the expected validation loss is lowest)"""

    # The definition of a study over the world.

    def definition(self, sampler: str = "tpe", seed: int = 0) -> Study:
        """The table's space as a study of the product."""
        return Study(
            name=f"table_{self.name}",
            description=f"the table {self.name}",
            base={"model": "mini", "data": "mini", "max_grad_norm": 1.0, **self.base},
            space={
                "learning_rate": Float(*self._rates, log=True),
                "lora_r": Int(4, 32, log=True),
                "lora_alpha": Multiple("lora_r", ALPHAS),
                "lora_dropout": Float(0.0, 0.2),
                "batch_size": Int(2, 16, log=True),
                "warmup_steps": Int(0, self._warmup),
            },
            n_trials=10_000,
            sampler=sampler,  # type: ignore[arg-type]
            seed=seed,
        )

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """A configuration at random, as the tables were drawn."""
        rank = _whole_log(rng, 4, 32)
        low, high = np.log(self._rates)
        return {
            "learning_rate": float(np.exp(rng.uniform(low, high))),
            "lora_r": rank,
            "lora_alpha": rank * int(rng.choice(ALPHAS)),
            "lora_dropout": float(rng.uniform(0, 0.2)),
            "batch_size": _whole_log(rng, 2, 16),
            "warmup_steps": int(rng.integers(0, self._warmup + 1)),
        }

    # Curves.

    def curve(self, values: Mapping[str, Any], draw: int = 0) -> Curve:
        """What training with these values shows.

        Args:
            values: The searched fields; `seed` may be among them: another one has other luck and another split.
            draw: Another number, other luck for all configurations: for repeated studies.
        """
        place = (np.array(features(values, self.powers)) - self._centre) / self._spread
        seed = int(values.get("seed", FIRST_SEED))
        mean, offset = self._mean(place[None])[0], np.exp(self._offset(seed))[:, None]
        rng = np.random.default_rng([self._seed, draw, seed, zlib.crc32(repr(place.round(9).tolist()).encode())])
        distance = ((self._places - place) / self._lengths) ** 2
        distance = distance.sum(1)
        noise = self._noise(distance[self._whole], seed, draw, rng)
        val, test, train = self.unbend(mean + noise) * offset
        plain = self.unbend(mean) * offset
        ends = self._end(distance)
        length = self.epochs if ends is None else ends
        worth = float(plain[1][np.argmin(plain[0])])
        return Curve(val[:length], test[:length], train[:length], ends is not None, plain[1][:length], worth)

    def _expected(self, values: Sequence[Mapping[str, Any]]) -> Array:
        """(lowest validation loss, test loss at its epoch) of configurations, without noise."""
        places = (np.array([features(each, self.powers) for each in values]) - self._centre) / self._spread
        val, test = np.moveaxis(self.unbend(self._mean(places)), 1, 0)[:2]
        at = val.argmin(1)[:, None]
        return np.concatenate([np.take_along_axis(losses, at, 1) for losses in (val, test)], axis=1)

    def tie(self) -> float:
        """How far apart two runs of one configuration with other seeds lie in test loss: one standard deviation of
        the difference, a share of the loss; measured on the repeated configurations, else on the residuals."""
        return float(math.sqrt(2) * self.noise_of["test"])

    # How it is made.

    def _came_through(self, run: Mapping[str, Any]) -> bool:
        return len(run["val"]) >= self.epochs and None not in (*run["val"], *run["train"]) and not run["diverged"]

    def _logs(self) -> tuple[Array, float]:
        """(log losses: runs x kinds x epochs, share of the test losses that are not the table's)."""
        found = np.array([[run[kind][: self.epochs] for kind in KINDS] for run in self.fitted], dtype=float)
        missing = np.isnan(found[:, 1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an epoch without any test loss
            ratio = np.nanmedian(found[:, 1] / found[:, 0], axis=0)
        whole = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else 1.0
        ratio = np.where(np.isfinite(ratio), ratio, whole)
        found[:, 1] = np.where(missing, found[:, 0] * ratio, found[:, 1])
        return np.log(found), float(missing.mean())

    def _bend(self, logs: Array) -> Array:
        above = logs - self._best
        return BEND * np.log1p(np.maximum(above / BEND, -0.99))

    def unbend(self, bent: Array) -> Array:
        """Losses from what the surrogate calculates with, of the first seed's split."""
        found: Array = np.exp(self._best + BEND * np.expm1(np.minimum(bent / BEND, 5.0)))
        return found

    def _split_offsets(self, logs: Array) -> dict[int, Array]:
        """By seed, how much higher the log losses of its split are than those of the first seed's, by kind."""
        runs = {(run["configuration"], run["seed"]): each for run, each in zip(self.fitted, logs, strict=True)}
        moves: dict[int, list[Array]] = {}
        for (configuration, seed), each in runs.items():
            first = runs.get((configuration, FIRST_SEED))
            if seed != FIRST_SEED and first is not None:
                moves.setdefault(seed, []).append((each - first).mean(1))
        return {seed: np.median(found, axis=0) for seed, found in moves.items()}

    def _offset(self, seed: int) -> Array:
        if seed == FIRST_SEED or not self._offsets:
            return np.zeros(len(KINDS))
        if seed in self._offsets:
            return self._offsets[seed]
        spread = np.sqrt(np.mean(np.square(list(self._offsets.values())), axis=0))
        return np.random.default_rng([self._seed, seed]).normal(size=len(KINDS)) * spread

    def _fit(self, bent: Array) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        places = self._places[self._whole]
        # The length scales come from a few epochs of validation and test loss, which takes seconds and not minutes.
        told = [0, self.epochs // 4, self.epochs - 1, 2 * self.epochs - 1]
        kernel = ConstantKernel(1.0, (0.1, 100)) * Matern(np.ones(places.shape[1]), (0.2, 30), nu=2.5)
        kernel += WhiteKernel(0.05, (1e-4, 0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound: a flat direction
            model = GaussianProcessRegressor(kernel, normalize_y=True, alpha=1e-8).fit(places, bent[:, told])
        self.kernel = model.kernel_
        self._lengths = np.array(self.kernel.k1.k2.length_scale)
        self.inverse = np.linalg.inv(self.kernel(places) + 1e-8 * np.eye(len(places)))
        self.bent = bent
        self._average = bent.mean(0)
        self._weights = self.inverse @ (bent - self._average)

    def _mean(self, places: Array) -> Array:
        """Bent losses without noise: places x kinds x epochs."""
        smooth = self.kernel.k1(places, self._places[self._whole])
        return (self._average + smooth @ self._weights).reshape(len(places), len(KINDS), self.epochs)

    def _pick_noise(self, bent: Array) -> None:
        """What the mean leaves of each curve, as large as the spread of repeated runs where there are enough."""
        self._own_residuals = bent - self._mean(self._places[self._whole])
        groups: dict[int, list[int]] = {}
        for row, run in enumerate(self.fitted):
            groups.setdefault(run["configuration"], []).append(row)
        repeated = [rows for rows in groups.values() if len(rows) > 1]
        left = np.sqrt(np.square(self._own_residuals[:, :, -1]).mean(0))
        freedom = sum(len(rows) - 1 for rows in repeated)
        self.repeats = len(repeated)
        spread = left
        if len(repeated) >= FEWEST_RUNS:
            squares = sum(np.square(bent[rows] - bent[rows].mean(0)).sum(0) for rows in repeated)
            # Of all epochs, since a dozen repeats of the last one are few.
            spread = np.sqrt((np.asarray(squares) / freedom)[:, self.epochs // 2 :].mean(1))
        scale = np.clip(spread / np.maximum(left, 1e-12), 0.3, 3.0)
        self._residuals = self._own_residuals * scale[:, None]
        self.noise_of = dict(zip(KINDS, map(float, spread), strict=True))

    def _noise(self, distance: Array, seed: int, draw: int, rng: np.random.Generator) -> Array:
        near = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        own = [row for row in near if distance[row] < 1e-12 and self.fitted[row]["seed"] == seed]
        if own and draw == 0:
            return self._own_residuals[own[0]]
        found: Array = self._residuals[rng.choice(near)]
        return found

    def _end(self, distance: Array) -> int | None:
        """Epochs before it is no longer finite, or None: as two of the three nearest runs, or the run itself."""
        near = np.argsort(distance, kind="stable")[:3]
        if distance[near[0]] < 1e-12:
            near = near[:1]
        ended = [len(self.runs[i]["val"]) for i in near if not self._whole[i]]
        return min(ended[0], self.epochs - 1) if 2 * len(ended) > len(near) else None

    def _look_for_best(self) -> tuple[float, float]:
        """(lowest expected test loss anywhere, that of the configuration whose validation loss is lowest), looked for
        among many draws, then around the best of them."""
        rng = np.random.default_rng([self._seed, 1])
        first = [self.draw(rng) for _ in range(1500)] + [{k: run[k] for k in SEARCHED} for run in self.fitted]
        ends = []
        for column in (1, 0):
            found = first
            for _ in range(3):
                found = [found[i] for i in np.argsort(self._expected(found)[:, column])[:15]]
                found = found + [self._nudged(each, rng) for each in found for _ in range(15)]
            losses = self._expected(found)
            ends.append(float(losses[np.argmin(losses[:, column]), 1]))
        return ends[0], ends[1]

    def _nudged(self, values: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        other, moved = self.draw(rng), dict(values)
        moved["learning_rate"] = float(np.clip(values["learning_rate"] * np.exp(rng.normal(0, 0.15)), *self._rates))
        field = str(rng.choice(SEARCHED[1:]))
        ratio = values["lora_alpha"] // values["lora_r"]
        if field == "lora_alpha":
            ratio = int(rng.choice(ALPHAS))
        else:
            moved[field] = other[field]
        return {**moved, "lora_alpha": moved["lora_r"] * ratio}


def _whole_log(rng: np.random.Generator, low: int, high: int) -> int:
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
