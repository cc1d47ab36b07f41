"""What choosing among N answers can bring, computed instead of tried out.

Source: Chen et al. 2021 (arXiv:2107.03374) for pass@k; Huang et al. 2024 (Sharpening,
        arXiv:2412.01951) for the rule that says when enough was drawn; Beirami et al. 2024
        (arXiv:2401.01879) for the bound on the divergence. Order statistics: textbook.
"""

from collections.abc import Sequence
from math import ceil, comb, exp, log


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that one of k is right, unbiased from n answers of which `right` are; 1 <= k <= n."""
    return 1 - comb(n - right, k) / comb(n, k)


def best_weights(k: int, n: int) -> list[float]:
    """Chance of each rank, best first, to be the best of k that are taken from n at random."""
    return [comb(n - rank, k - 1) / comb(n, k) for rank in range(1, n + 1)]


def best_of(k: int, ranked: Sequence[float]) -> float:
    """Mean over all choices of k of the value that belongs to the best of them.

    ranked: a value of each, the best first; the value may be what they were ranked by or another,
    such as whether they are right."""
    weights = best_weights(k, len(ranked))
    return sum(weight * value for weight, value in zip(weights, ranked, strict=True))


def divergence_at_most(n: int) -> float:
    """Nats between the model and the best of n of its samples, whatever they are chosen by."""
    return log(n) - (n - 1) / n


def missed(p: float, n: int) -> float:
    """Chance that n draws never give an answer of probability p."""
    return (1 - p) ** n


def draws_for(p: float, rho: float) -> int:
    """So many draws miss an answer of probability p with a chance of at most rho."""
    return ceil(log(1 / rho) / p)


def enough(drawn: int, best: float, delta: float) -> bool:
    """Whether drawn * p >= ln(2 / delta), p being the highest probability among the drawn answers;
    best: its logarithm, nats. By then an answer that is likelier than that was seen, with a chance
    of 1 - delta."""
    return drawn * exp(best) >= log(2 / delta)
