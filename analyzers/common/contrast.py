"""Decoding by a difference: one mechanism for every method that contrasts distributions.

Source: Li et al. 2023 (contrastive decoding, arXiv 2210.15097) for the plausibility constraint;
        O'Brien and Lewis 2023 (arXiv 2309.09117) for the form (1 + b) strong - b weak.
Idea:   branches read the same answer, each in its own way (other layers, experts, weights or
        prompt) and each with a cache of its own; a rule fuses their distributions into scores of
        the tokens that the strong branch, always the first, finds plausible; and every branch goes
        on with the one token that was chosen.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters, Options, Step, Tree, draw, token
from analyzers.engine.routing import DEFAULT, Policy
from analyzers.engine.signals import DIGITS, TOP
from analyzers.engine.values import PLAIN
from analyzers.errors import BadInput
from analyzers.trace import Alternative, Event, Lens, Note, Scores, Token

LOGPROB = "log-probability of the written token, nats"
NULL_BELOW = 1e-3
"""Scores whose spread is smaller (nats) say nothing: the branches agree. Two ways of computing the
same (one row or a batch, joined weights or modules) part by up to a tenth of this."""
NEVER = -80.0
"""A log-probability of nothing: its exponential is still a normal float32."""
MASKED = -1000.0
"""What a token that is not plausible counts when continuations are scored."""


@dataclass(eq=False)
class Branch:
    """One way of reading the answer. taps: layers whose states the rule needs. exits: those of them
    that it reads with the final norm, as if they were the last. options: of its next step; a rule
    may change them."""

    name: str
    engine: Engine
    cursor: Cursor
    options: Options = PLAIN
    taps: tuple[int, ...] = ()
    exits: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Exits:
    """What the strong branch would say if its lower layers were its last.

    layers: their numbers, the model's own last one at the end. logits: (layers, vocab), float32.
    scores: one number for each of them; measure: what that number is."""

    layers: tuple[int, ...]
    logits: torch.Tensor
    scores: tuple[float, ...]
    measure: str


@dataclass(frozen=True, eq=False)
class Fused:
    """scores: (vocab,), nats, -inf for what is not plausible. plausible: how many tokens are. null:
    the branches agree so far that their difference says nothing. picked: what the rule chose
    besides (the row of a layer). exits: the layers that were looked at, where a rule looks at
    layers. shown: (name, logits (vocab,)) of what the table shows; None = the branches' own."""

    scores: torch.Tensor
    plausible: int
    null: bool = False
    picked: int | None = None
    exits: Exits | None = None
    shown: tuple[tuple[str, torch.Tensor], ...] | None = None


Rule = Callable[[Sequence[Step]], Fused]


@dataclass(frozen=True, eq=False)
class At:
    """One token of the answer: the step of each branch, what the rule made of them, the token."""

    branches: Sequence[Branch]
    steps: Sequence[Step]
    fused: Fused
    token: Token


def plausible(strong: torch.Tensor, alpha: float) -> torch.Tensor:
    """Which tokens (vocab,) are at least `alpha` times as likely as the likeliest, by the strong
    branch's logits at temperature 1. Never empty: alpha 1 keeps the likeliest (and its equals), 0
    all that are tokens."""
    finite = strong.isfinite()
    return finite if alpha == 0 else finite & (strong >= strong.max() + math.log(alpha))


def fuse(
    strong: torch.Tensor,
    terms: Sequence[tuple[float, torch.Tensor]],
    alpha: float,
    *,
    picked: int | None = None,
) -> Fused:
    """The weighted sum of log-probabilities, from (weight, logits (vocab,)), on the tokens that
    `strong` (vocab,) finds plausible.

    Adding a constant to the logits changes nothing. Weights that sum to 1 leave the strong branch
    as it is when all branches agree; weights that sum to 0 leave nothing, and the result is `null`.
    """
    keep = plausible(strong, alpha)
    total = torch.stack([weight * logits.log_softmax(-1) for weight, logits in terms]).sum(0)
    kept, count = total[keep], int(keep.sum())
    empty = math.isclose(sum(weight for weight, _ in terms), 0, abs_tol=1e-6)
    null = empty and count > 1 and float(kept.max() - kept.min()) < NULL_BELOW
    return Fused(torch.where(keep, total, -torch.inf), count, null, picked)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of the distributions with these logits (..., vocab); 0 = equal."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p > -torch.inf, terms, 0.0).sum(-1).clamp_min(0.0)


def jsd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in nats of the distributions with these logits (..., vocab):
    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; 0 = equal, ln 2 = nothing in common."""
    # The sum of p log p and q log q less that of m log m. In place, and without products of whole
    # rows: new temporaries of this size are what takes the time.
    log_p, log_q = p.log_softmax(-1).clamp_(min=NEVER), q.log_softmax(-1).clamp_(min=NEVER)
    p, q = torch.broadcast_tensors(log_p.exp(), log_q.exp())
    own = torch.linalg.vecdot(p, log_p) + torch.linalg.vecdot(q, log_q)
    m = (p + q).div_(2)
    return (own / 2 - torch.linalg.vecdot(m, m.log())).clamp_min(0.0)


def early(engine: Engine, step: Step, layers: Sequence[int], *, norm: bool = True) -> torch.Tensor:
    """Logits (layers + 1, vocab) of a step that tapped `layers`, as if each were the last one; the
    last row is the model's own. norm: whether the final norm comes before the head."""
    if norm and step.exits:
        return torch.stack([*(step.exits[layer] for layer in layers), step.raw])
    hidden = torch.stack([step.hidden[layer] for layer in layers])
    return torch.cat([engine.unembed(hidden, norm=norm), step.raw[None]])


def write(
    ctx: Context,
    branches: Sequence[Branch],
    rule: Rule,
    *,
    max_new: int,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    together: bool = True,
    say: Callable[[At], Iterable[Event]] = lambda at: (),
) -> Generator[Event, None, str]:
    """Write the answer; return why it ended. Yields each Token with the strong branch's own
    numbers, then what `say` adds to it, and a Note the first time the branches agree.

    At temperature 0 the best score wins; of equal ones the strong branch's likelier. together: one
    batch for branches that one engine can step at once. Ends early when a context is full.
    Raises: BadInput for branches with different vocabularies.
    """
    filters = Filters(temperature=temperature, repetition_penalty=repetition_penalty)
    rng, strong, told = ctx.rng("contrast"), branches[0], False
    for _ in range(max_new):
        if any(branch.cursor.pos == branch.engine.context for branch in branches):
            return "context full"
        steps = step_all(branches, together)
        fused = rule(steps)
        chosen_by = fused.scores
        if fused.null:
            chosen_by = steps[0].logits.masked_fill(fused.scores == -torch.inf, -torch.inf)
        scores = filters.apply(strong.cursor.ids, chosen_by)
        if temperature == 0:
            written = token(strong.engine, steps[0], _best(scores, steps[0].raw))
        else:
            id, p = draw(replace(steps[0], logits=scores), rng)
            written = token(strong.engine, steps[0], id, p_sampled=p)
        for branch in branches:
            branch.engine.push(branch.cursor, written.id)
        yield written
        yield from say(At(branches, steps, fused, written))
        if fused.null and not told:
            told = True
            yield Note(
                "info",
                f"The branches agree at position {written.pos}, so their difference says nothing "
                "there: the strong branch's own choice is taken, here and wherever else they do.",
            )
        if strong.engine.ends(written.id):
            return "end token"
    return "max_new reached"


def step_all(branches: Sequence[Branch], together: bool = True) -> list[Step]:
    """The step of every branch, in one batch where one engine serves all with the same options
    (routing policies may differ).

    Raises: BadInput for branches with different vocabularies."""
    first = branches[0]
    alike = all(
        branch.engine is first.engine
        and replace(branch.options, policy=None) == replace(first.options, policy=None)
        for branch in branches
    )
    if together and alike and len(branches) > 1:
        policies = tuple(_policy(branch) for branch in branches)
        routed = any(policy != DEFAULT for policy in policies)
        options = replace(first.options, policy=policies if routed else None)
        taps = sorted({layer for branch in branches for layer in branch.taps})
        steps = first.engine.step(
            [branch.cursor for branch in branches], taps=taps, options=options
        )
    else:
        steps = [
            branch.engine.step(
                branch.cursor, taps=branch.taps, exits=branch.exits, options=branch.options
            )
            for branch in branches
        ]
    _check_vocabularies(branches, [len(step.raw) for step in steps])
    return steps


def score(
    branches: Sequence[Branch], continuations: Sequence[Sequence[int]], rule: Rule
) -> list[float]:
    """The sum of the rule's scores over the tokens of each continuation, as multiple-choice
    evaluation takes them; compare only continuations of the same branches. A token that is not
    plausible counts -1000. The cursors stay.

    Raises: BadInput for branches with different vocabularies; ModelLacks for models without trees.
    """
    tree, paths = Tree.merged(continuations)
    checked = [
        branch.engine.verify(branch.cursor, tree, taps=branch.taps, options=branch.options)
        for branch in branches
    ]
    _check_vocabularies(branches, [each.raw.shape[-1] for each in checked])
    values = torch.zeros(len(tree))
    for parent in sorted(set(tree.parents)):
        scores = rule([each.step(parent) for each in checked]).scores
        for node, above in enumerate(tree.parents):
            if above == parent:
                values[node] = scores[tree.ids[node]].clamp_min(MASKED)
    return [float(values[list(path)].sum()) for path in paths]


def table(at: At) -> Lens:
    """The ten likeliest tokens of every branch (or of what the rule shows instead) and of their
    contrast, and the log-probability of the written token in each."""
    shown = at.fused.shown
    if shown is None:
        shown = tuple(
            (branch.name, step.raw) for branch, step in zip(at.branches, at.steps, strict=True)
        )
    names, logits = zip(*shown, ("contrast", at.fused.scores), strict=True)
    rows = torch.stack(logits).log_softmax(-1)
    return Lens(
        pos=at.token.pos,
        rows=names,
        top=alternatives(at.branches[0].engine, rows),
        scores=tuple(round(value, DIGITS) for value in rows[:, at.token.id].tolist()),
        name="branches",
        measure=LOGPROB,
    )


def layers(at: At) -> Lens:
    """What the layers that the rule looked at would have written, and its number for each."""
    exits = at.fused.exits
    assert exits is not None  # the caller's rule looks at layers
    return Lens(
        pos=at.token.pos,
        rows=tuple(map(str, exits.layers)),
        top=alternatives(at.branches[0].engine, exits.logits.log_softmax(-1)),
        scores=tuple(round(value, DIGITS) for value in exits.scores),
        picked=at.fused.picked,
        measure=exits.measure,
    )


def number(pos: int, name: str, unit: str, value: float) -> Scores:
    """One number that belongs to the token at `pos`."""
    return Scores(pos, name, unit, (pos,), (round(value, DIGITS),))


def alternatives(engine: Engine, logprobs: torch.Tensor) -> tuple[tuple[Alternative, ...], ...]:
    """The ten likeliest tokens of each distribution (rows, vocab), those possible at all."""
    size = engine.vocabulary.size
    found = logprobs[:, :size].topk(min(TOP, size))
    return tuple(
        tuple(
            (id, engine.vocabulary.display(id), round(value, DIGITS))
            for id, value in zip(ids, values, strict=True)
            if math.isfinite(value)
        )
        for ids, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    )


def _check_vocabularies(branches: Sequence[Branch], sizes: Sequence[int]) -> None:
    for branch, size in zip(branches, sizes, strict=True):
        if size != sizes[0]:
            raise BadInput(
                f"{branch.engine.identity['name']} cannot be contrasted with "
                f"{branches[0].engine.identity['name']}: they have different vocabularies."
            )


def _policy(branch: Branch) -> Policy:
    policy = branch.options.policy or DEFAULT
    assert isinstance(policy, Policy)  # one cursor, one policy
    return policy


def _best(scores: torch.Tensor, strong: torch.Tensor) -> int:
    """The id with the best score; of equal ones that with the largest of the strong logits."""
    return int(torch.where(scores == scores.max(), strong, -torch.inf).argmax())
