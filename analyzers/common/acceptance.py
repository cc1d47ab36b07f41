"""Which drafts survive: the rules that keep what is written distributed as the target alone writes.

Source: Leviathan et al. 2023 (arXiv:2211.17192) for one draft; SpecInfer (Miao et al. 2024,
        arXiv:2305.09781) for several independent ones; Yang et al. 2024 (MCSD, arXiv:2401.06706)
        and Jeon et al. 2024 (RSD, arXiv:2402.14160) for draws without replacement; Sun et al. 2023
        (SpecTr, arXiv:2310.15141) for k-SEQ.
Idea:   p is the target's processed row at a node, q the row that the node's children were drawn
        from. A rule accepts a child, or rejects all and draws from what they left of p. Each is
        exact only for drafts that came about in the way that it assumes: see RULES.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from analyzers.common.drafts import Coin, Draft, Drawn, Rows, Verdict, siblings
from analyzers.errors import BadParameter

Rule = Callable[[Rows, Draft, Coin], Verdict]
"""All rules throw one coin for each draft they test and one for the token behind the path, in the
order in which they get there; `follow` throws one a node."""
HALVINGS = 40
"""Of the interval in which rho lies; from SpecTr."""
NOTHING_LEFT = 1e-12
"""Probability that is rounding; far below what any number of draws could show."""


def follow(rows: Rows, draft: Draft, coin: Coin) -> Verdict:
    """Draw y ~ p once a node and go to the child that is y; where there is none, write y.

    Exact for every draft, because p alone decides. At temperature 0 p is one-hot, and this is the
    greedy walk. The coin of a node is the one that y was drawn with, the same for all siblings."""
    children, ids = siblings(draft.tree), draft.tree.ids
    trials = Trials(coin)
    path: list[int] = []
    node = -1
    while True:
        p, thrown = rows(node), coin()
        y = pick(p, thrown)
        here = children.get(node, [])
        for child in here:
            trials.chances[child], trials.coins[child] = float(p[ids[child]]), thrown
        node = next((child for child in here if ids[child] == y), -1)
        if node < 0:
            return trials.verdict(path, y, "corrected" if here else "bonus")
        path.append(node)


def recursive(rows: Rows, draft: Draft, coin: Coin) -> Verdict:
    """Recursive rejection: the children of a node were drawn one after the other, none twice.

    Child x_i is accepted with min(1, r(x_i) / d(x_i)), where r is p less what the earlier ones took
    of it and d is q without them. With one child this is the ordinary rule."""
    return _walk(rows, draft, coin, _children(draft), partial(_one_by_one, replace=False))


def recursive_independent(rows: Rows, draft: Draft, coin: Coin) -> Verdict:
    """Recursive rejection of independent sequences (SpecInfer): as `recursive`, but q stays whole.

    The candidates at a node are the next tokens of all sequences that lead there, equal ones as
    often as they were drawn. Of a token that is tested again the first test is recorded: later
    ones cannot succeed."""
    return _walk(rows, draft, coin, _next_of(draft), partial(_one_by_one, replace=True))


def k_seq(rows: Rows, draft: Draft, coin: Coin) -> Verdict:
    """SpecTr's rule for independent sequences: all candidates x at a node have the same chance,
    min(1, p(x) / (rho q(x))), with `rho` for as many as there are.

    Of a token that is tested again the last coin is recorded."""
    return _walk(rows, draft, coin, _next_of(draft), _all_alike)


RULES: Mapping[str, tuple[Rule, tuple[Drawn, ...]]] = {
    "follow": (follow, ("deterministic", "without replacement", "independent")),
    "recursive": (recursive, ("without replacement",)),
    "recursive_independent": (recursive_independent, ("independent",)),
    "k_seq": (k_seq, ("independent",)),
}
"""Name -> the rule, and the ways of drawing for which it is exact."""


def check(rule: Rule, drawn: Drawn) -> None:
    """Raises: BadParameter when sampling by one of RULES would be biased for drafts drawn so. Of a
    rule that is not among them nothing is known."""
    for name, (known, exact) in RULES.items():
        if rule is known and drawn not in exact:
            raise BadParameter(
                f"The rule {name} would bias what is sampled: it is exact for drafts that are "
                f"{' or '.join(exact)}, and these are {drawn}."
            )


# One position


def pick(p: torch.Tensor, coin: float) -> int:
    """The token that a coin of [0, 1) stands for, by inverting the cumulative sum of p (vocab,)."""
    edges = p.cumsum(dim=-1)
    # Times the last edge: the sum is not exactly 1, and the draw must stay inside.
    return int(torch.searchsorted(edges, coin * float(edges[-1]), right=True))


def chance(r: torch.Tensor, d: torch.Tensor, id: int, divisor: float = 1.0) -> float:
    """min(1, r(id) / (divisor d(id))); 0 where d is, which no draw can have given."""
    below = divisor * float(d[id])
    return min(1.0, float(r[id]) / below) if below > 0 else 0.0


def residual(r: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """What a rejected draft from d leaves of r: [r - d]+ made a distribution, (vocab,). r itself
    where nothing is left, which is where nothing is ever rejected."""
    return _normal((r - d).clamp(min=0), otherwise=r)


def without(d: torch.Tensor, id: int) -> torch.Tensor:
    """d (vocab,) once `id` is taken; all zero when that was the last token."""
    rest = d.clone()
    rest[id] = 0
    return rest / total if (total := float(rest.sum())) > 0 else rest


def beta(p: torch.Tensor, q: torch.Tensor, divisor: float = 1.0) -> float:
    """sum min(q, p / divisor): the chance that one draft from q is accepted; 1 at best."""
    return float(torch.minimum(q, p / divisor).sum())


def rho(p: torch.Tensor, q: torch.Tensor, k: int) -> float:
    """k-SEQ's divisor for k drafts: the least in [1, k] with rho beta(rho) >= 1 -
    (1 - beta(rho))^k.

    The upper end of the last interval: a smaller divisor would accept tokens more often than p has
    them. 1 at once where that suffices (one draft, p = q, nothing in common)."""
    common = (p > 0) & (q > 0)
    p, q = p[common], q[common]

    def suffices(divisor: float, slack: float = 0.0) -> bool:
        one = beta(p, q, divisor)
        return divisor * one >= 1 - (1 - one) ** k - slack

    if suffices(1.0, NOTHING_LEFT):
        return 1.0
    low, high = 1.0, float(k)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def leftover(p: torch.Tensor, q: torch.Tensor, divisor: float, k: int) -> torch.Tensor:
    """What k drafts rejected by k-SEQ leave of p, as a distribution (vocab,); p itself where
    nothing is left, or where no draft could have been accepted."""
    taken = torch.minimum(q, p / divisor)
    one = float(taken.sum())
    if one < NOTHING_LEFT:
        return p
    return _normal((p - taken * ((1 - (1 - one) ** k) / one)).clamp(min=0), otherwise=p)


@dataclass(frozen=True)
class Transport:
    """One position with k independent drafts, as probabilities. rho: k-SEQ's divisor. beta: that it
    accepts one draft. k_seq, recursive: that either rule accepts one of the k. optimum: what no
    rule for independent drafts can exceed."""

    k: int
    rho: float
    beta: float
    k_seq: float
    recursive: float
    optimum: float


def transport(p: torch.Tensor, q: torch.Tensor, k: int) -> Transport:
    """The numbers of k independent drafts from q (vocab,) for p (vocab,)."""
    divisor = rho(p, q, k)
    one = beta(p, q, divisor)
    refused, r = 1.0, p
    for _ in range(k):
        refused *= max(0.0, 1 - beta(r, q))
        r = residual(r, q)
    return Transport(
        k=k,
        rho=divisor,
        beta=one,
        k_seq=1 - max(0.0, 1 - one) ** k,
        recursive=1 - refused,
        optimum=float(torch.minimum(p, 1 - (1 - q) ** k).sum()),
    )


# The walk that all but `follow` share

Settled = tuple[int | None, torch.Tensor]
"""The accepted node; or None and the row that the token written instead is drawn from."""


class Trials:
    """Coins, and what was tested with them."""

    def __init__(self, coin: Coin) -> None:
        self.coin = coin
        self.chances: dict[int, float] = {}
        self.coins: dict[int, float] = {}

    def accept(self, node: int, chance: float) -> bool:
        thrown = self.coin()
        if chance > 0 or node not in self.chances:  # a later test that cannot succeed is no news
            self.chances[node], self.coins[node] = chance, thrown
        return thrown < chance

    def verdict(
        self, path: Sequence[int], extra: int, origin: Literal["corrected", "bonus"]
    ) -> Verdict:
        return Verdict(tuple(path), extra, origin, self.chances, self.coins)


Candidates = Callable[[Sequence[int]], Sequence[int]]
"""A path from the root -> the nodes to test behind it, in the order in which they were drawn."""
Settle = Callable[[torch.Tensor, torch.Tensor, Sequence[tuple[int, int]], Trials], Settled]
"""(p, q, (node, token) of each candidate, trials) -> which of them is accepted."""


def _walk(rows: Rows, draft: Draft, coin: Coin, candidates: Candidates, settle: Settle) -> Verdict:
    """From the root to where no candidate is accepted."""
    trials, ids = Trials(coin), draft.tree.ids
    path: list[int] = []
    node = -1
    while here := candidates(path):
        p = rows(node)
        q = draft.rows[node].to(p.device)
        accepted, left = settle(p, q, [(one, ids[one]) for one in here], trials)
        if accepted is None:
            return trials.verdict(path, pick(left, coin()), "corrected")
        path.append(node := accepted)
    return trials.verdict(path, pick(rows(node), coin()), "bonus")


def _children(draft: Draft) -> Candidates:
    children = siblings(draft.tree)
    return lambda path: children.get(path[-1] if path else -1, ())


def _next_of(draft: Draft) -> Candidates:
    """The next nodes of all independent sequences that begin with a path."""

    def candidates(path: Sequence[int]) -> Sequence[int]:
        n = len(path)
        return [one[n] for one in draft.sequences if len(one) > n and one[:n] == tuple(path)]

    return candidates


def _one_by_one(
    p: torch.Tensor,
    q: torch.Tensor,
    here: Sequence[tuple[int, int]],
    trials: Trials,
    *,
    replace: bool,
) -> Settled:
    r, d = p, q
    for node, id in here:
        if trials.accept(node, chance(r, d, id)):
            return node, r
        r = residual(r, d)
        if not replace:
            d = without(d, id)
    return None, r


def _all_alike(
    p: torch.Tensor, q: torch.Tensor, here: Sequence[tuple[int, int]], trials: Trials
) -> Settled:
    k = len(here)
    divisor = rho(p, q, k)
    for node, id in here:
        if trials.accept(node, chance(p, q, id, divisor)):
            return node, p
    return None, leftover(p, q, divisor, k)


def _normal(mass: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    total = float(mass.sum())
    return mass / total if total > NOTHING_LEFT else otherwise
