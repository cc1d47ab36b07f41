"""The arithmetic of RAIN's tree search: which child to look at next, and what a visit teaches.

Source: Li et al. 2024 (arXiv:2309.07124) as its code (SafeAILab/RAIN) computes it: PUCT with the
visits of the parent, and a value that is scaled to 0..1.
"""

import math
from collections.abc import Sequence

TINY = 1e-5
ROOT_MIX = 0.25


def exploit(value: float | None, lo: float, hi: float) -> float:
    """How good a child was so far: its mean value between the ends of the scale, as 0..1; 0 for a
    child that was never visited."""
    return 0.0 if value is None else (value - lo) / (hi - lo + TINY)


def explore(prior: float, visits: float, parent_visits: float, c: float) -> float:
    """How much a child deserves a look: more with its prior, less with each visit of its own."""
    return c * prior * math.sqrt(parent_visits) / (1 + visits)


def clamp_greedy(greedy: float, others: Sequence[float]) -> float:
    """The chance of the likeliest text, held near those of the sampled ones: no larger than all of
    them together, no smaller than their largest and smallest together."""
    if not others:
        return greedy
    return max(min(greedy, sum(others)), max(others) + min(others))


def shares(chances: Sequence[float]) -> list[float]:
    """Adding up to 1; all alike where every chance is too small for a float."""
    total = sum(chances)
    return [chance / total if total else 1 / len(chances) for chance in chances]


def mix_root(prior: float, children: int) -> float:
    """The prior of a child of the root, where all `children` deserve some looks."""
    return (1 - ROOT_MIX) * prior + ROOT_MIX / children


def learned(
    value: float, visits: float, heard: float, similarity: float, gamma: float
) -> tuple[float, float]:
    """(value, visits) of a node after a similar sibling was given the value `heard`: a visit that
    counts only `gamma` times their similarity."""
    weight = gamma * similarity
    visits += weight
    return (value * (visits - weight) + weight * heard) / visits, visits


def settled(value: float | None, visits: int, enough: int, good: float) -> bool:
    """Whether a child may be committed before its time: visited more than `enough`, and better
    than `good`."""
    return visits > enough and value is not None and value > good
