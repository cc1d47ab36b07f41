"""Which parts of a model can be left out: a search over sets of switches, by trying them.

Source: Xia et al. 2024 (SWIFT, arXiv:2410.06916); hemingkx/SWIFT for the constants. The Gaussian
        process is Rasmussen and Williams 2006, algorithm 2.1, with a Matern kernel (nu 5/2).
Idea:   sets of one size are proposed at random, and every so often the one that looks best by the
        upper confidence bound of a Gaussian process over all that was tried. Whoever asks says how
        good a proposal is; the best one is kept.
Differs from the source: the bound is maximised over random sets and the neighbours of the best ones
        instead of over a cube whose largest coordinates are taken; the kernel's length scale is
        chosen among a few by the marginal likelihood; and no set is tried twice. The set that the
        search begins with is tried first: in the source it counts as worth nothing.
"""

import math
import random
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

Off = frozenset[int]
"""The switches that are off; they are numbered from 0."""
Kind = Literal["start", "random", "bayes"]

KAPPA = 2.5
NOISE = 1e-2
LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the kernel; two sets that differ by one exchanged switch are the square root of 2 apart."""
RANDOM_SETS = 256
NEIGHBOURS_OF = 3
"""Of so many of the best sets all neighbours are looked at: one switch on, another off."""


@dataclass(frozen=True)
class Limits:
    """When the search is over; the source's. good: a set better than this is good enough. patience:
    proposals without a gain. most: proposals. every: one in so many comes from the Gaussian
    process, 0 = none does."""

    good: float = 0.95
    patience: int = 300
    most: int = 1000
    every: int = 25


@dataclass(frozen=True)
class Proposal:
    number: int
    off: Off
    kind: Kind


class Search:
    """Sets of `len(start)` out of `switches`. best, value: the best set so far and how good it is,
    0 to 1, higher is better; `value` is 0 until something was found to be better than that."""

    def __init__(self, switches: int, start: Off, rng: random.Random, limits: Limits) -> None:
        self.best, self.value = start, 0.0
        self.tried: dict[Off, float] = {}
        self._start = start
        self._switches = switches
        self._rng = rng
        self._limits = limits
        self._gained = 0  # how many had been tried when the best one was found

    @property
    def over(self) -> str:
        """Why nothing more is proposed; "" while the search goes on."""
        tried = len(self.tried)
        if self.value > self._limits.good:
            return f"{self.value:.0%} is good enough"
        if tried >= math.comb(self._switches, len(self._start)):
            return "every set has been tried"
        if tried >= self._limits.most:
            return f"{tried:,} sets were tried"
        if tried - self._gained >= self._limits.patience:
            return f"the last {self._limits.patience:,} sets were no better"
        return ""

    def propose(self) -> Proposal:
        """A set that was not tried yet; only while the search is not over."""
        number = len(self.tried) + 1
        if number == 1:
            return Proposal(number, self._start, "start")
        if self._limits.every and number % self._limits.every == 0:
            return Proposal(number, self._promising(), "bayes")
        return Proposal(number, self._random(), "random")

    def register(self, proposal: Proposal, value: float) -> bool:
        """How good it is; whether it is the best one from now on."""
        self.tried[proposal.off] = value
        if value <= self.value:
            return False
        self.best, self.value, self._gained = proposal.off, value, len(self.tried)
        return True

    def _random(self) -> Off:
        while (found := self._any()) in self.tried:
            pass
        return found

    def _any(self) -> Off:
        return random_set(self._switches, len(self._start), self._rng)

    def _promising(self) -> Off:
        """The set that was not tried yet with the highest upper confidence bound."""
        best = sorted(self.tried, key=lambda each: -self.tried[each])[:NEIGHBOURS_OF]
        near = [each for one in best for each in neighbours(one, self._switches)]
        found = dict.fromkeys([*(self._any() for _ in range(RANDOM_SETS)), *near])
        sets = [each for each in found if each not in self.tried] or [self._random()]
        process = GaussianProcess(
            _rows(list(self.tried), self._switches), np.array(list(self.tried.values()))
        )
        mean, deviation = process.at(_rows(sets, self._switches))
        return sets[int((mean + KAPPA * deviation).argmax())]


class GaussianProcess:
    """What is believed of a function of points (n, d) after its values (n,) there: of those the
    mean and the spread are taken out first."""

    def __init__(self, points: np.ndarray, values: np.ndarray) -> None:
        self._points = points
        self._mean, self._spread = values.mean(), values.std() or 1.0
        given = (values - self._mean) / self._spread
        apart = _distances(points, points)
        fits = [_Fit(apart, given, length) for length in LENGTHS]
        self._fit = max(fits, key=lambda fit: fit.likelihood)

    @property
    def length(self) -> float:
        """The kernel's length scale under which the values are likeliest."""
        return self._fit.length

    def at(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at points (m, d): (m,) each."""
        across = matern(_distances(self._points, points), self.length)
        mean = across.T @ self._fit.weights
        known = np.linalg.solve(self._fit.root, across)
        deviation = np.sqrt(np.maximum(1.0 - (known**2).sum(axis=0), 0.0))
        return self._mean + self._spread * mean, self._spread * deviation


class _Fit:
    """root: the lower Cholesky factor of the noisy kernel. likelihood: logarithm, up to a constant,
    of the density of the values."""

    def __init__(self, apart: np.ndarray, given: np.ndarray, length: float) -> None:
        self.length = length
        self.root = np.linalg.cholesky(matern(apart, length) + NOISE * np.eye(len(given)))
        self.weights = np.linalg.solve(self.root.T, np.linalg.solve(self.root, given))
        self.likelihood = float(-given @ self.weights / 2 - np.log(np.diag(self.root)).sum())


def matern(apart: np.ndarray, length: float) -> np.ndarray:
    """The kernel (nu 5/2) of distances, of any shape: 1 at 0, falling to 0."""
    scaled = math.sqrt(5) * apart / length
    return (1 + scaled + scaled**2 / 3) * np.exp(-scaled)


def random_set(switches: int, size: int, rng: random.Random) -> Off:
    return frozenset(rng.sample(range(switches), size))


def neighbours(one: Off, switches: int) -> list[Off]:
    """All sets in which one switch of `one` is exchanged for another."""
    others = [switch for switch in range(switches) if switch not in one]
    return [one - {out} | {into} for out, into in product(sorted(one), others)]


def _rows(sets: list[Off], switches: int) -> np.ndarray:
    """(sets, switches): 1 where a switch is in the set."""
    rows = np.zeros((len(sets), switches))
    for row, each in enumerate(sets):
        rows[row, list(each)] = 1.0
    return rows


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(len(a), len(b)): Euclidean."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0.0))
