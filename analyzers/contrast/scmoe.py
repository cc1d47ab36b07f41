"""SCMoE: a mixture of experts is contrasted with itself under a worse choice of experts.

Source: Shi et al., "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by
        Self-Contrast", NeurIPS 2024, arXiv:2405.14507; reference code DavidFanzz/SCMoE.
Idea:   the text is read twice, under a strong and a weak choice of experts; the next token is the
        best of (1 + beta) strong - beta weak among those that the strong reading finds plausible.
Differs from the source: both readings share one batch, in which every row is routed its own way.
        Temperature is a knob (the paper takes 0, or 1 for self-consistency). The end token is
        allowed at any time, as in the paper's --early_stop. Several random experts are possible
        (the paper draws one), and they depend on the run's seed, the layer and the position. Where
        a family leaves the weights of the chosen as they are, a single expert keeps its own weight
        ("as the family"); the paper's weight of exactly 1 is "yes". Ranks count from 1 as in the
        paper; its code counts from 0. The divergence by rank leaves out what stood there before
        the run. Which weak reading a model gets by itself follows the paper's two examples: the
        second best expert where the model takes up to two, the best third where it takes more.
"""

from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from analyzers.card import Card
from analyzers.common.contrast import At, Branch, Fused, Rule, fuse, kl, number, table, write
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Options, Policy, Step
from analyzers.engine.routing import DEFAULT, dynamic, random, rank, top
from analyzers.engine.signals import DIGITS
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Lens, Metric, Routing, Scores, Token

CARD = Card(
    "SCMoE",
    family="contrast",
    source="Shi et al. 2024, arXiv:2405.14507",
    emits=(Token, Lens, Scores, Routing, Metric),
    needs=("logits", "routing"),
)
RENORMALISE = {"as the family": None, "yes": True, "no": False}


@dataclass(frozen=True)
class Params:
    """Defaults: the paper's (beta and alpha of its code; the weak reading of Mixtral, or that of
    DeepSeekMoE); max_new, threshold (the middle of the paper's .2 to .6) and rank_map are ours."""

    beta: float = knob(0.5, "How strongly the weak reading is subtracted; 0 = not", lo=0, hi=4)
    weak: Literal["paper", "rank", "top", "random", "dynamic"] = knob(
        "paper",
        "Experts of the weak reading: paper = the second best alone, or the best third where the "
        "model takes more than two; rank = the k-th best alone, top = the k best",
    )
    weak_k: int = knob(2, "The k of the weak reading, not for paper", lo=1, hi=256)
    strong: Literal["default", "top", "dynamic"] = knob(
        "default", "Experts of the strong reading: as the model does, the k best, by threshold"
    )
    strong_k: int = knob(2, "The k of the strong reading, where it is top", lo=1, hi=256)
    threshold: float = knob(0.4, "Dynamic: best experts until their share exceeds", lo=0, hi=0.99)
    alpha: float = knob(0.1, "Plausible: at least this times as likely as the best", lo=0, hi=1)
    temperature: float = knob(0.0, "0 = greedy, above 1 flattens", lo=0, hi=2)
    max_new: int = knob(96, "When to stop writing", lo=1, hi=8192, unit="tokens")
    renormalise: Literal["as the family", "yes", "no"] = knob(
        "as the family", "Whether the weights of the chosen experts sum to 1"
    )
    rank_map: int = knob(4, "Afterwards: divergence of ranks 1 to this; 0 = off", lo=0, hi=64)
    together: bool = knob(True, "Both readings in one batch")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a Token per step with both readings, their divergence and their experts; then how the
    experts were used, and for every token how far each single rank is from the strong reading.

    Raises: BadParameter, before the first token, for a k that the model has not enough experts
    for. The keys and values of the two readings are kept apart, the prompt's included.
    """
    _policies(engine, params, ctx)  # what cannot be done is refused before anything is said
    yield from task.written
    branches, rule = contrasted(engine, task, params, ctx)
    start, used = branches[0].cursor.pos, _Used(engine.experts)

    def say(at: At) -> Iterator[Event]:
        strong, weak = at.steps
        pos = at.token.pos
        yield table(at)
        yield number(pos, "KL(strong‖weak)", "nats", float(kl(strong.logits, weak.logits)))
        yield number(pos, "plausible tokens", "tokens", at.fused.plausible)
        for branch, step in zip(branches, at.steps, strict=True):
            yield from _routing(branch.name, step)
        used.add(strong, weak)

    ended = yield from write(
        ctx,
        branches,
        rule,
        max_new=params.max_new,
        temperature=params.temperature,
        together=params.together,
        say=say,
    )
    text = branches[0].cursor.ids
    yield from used.metrics(len(text) - start)
    ranks = min(params.rank_map, engine.experts)
    yield from _by_rank(branches[0], text, start, ranks, RENORMALISE[params.renormalise])
    return ended


def contrasted(
    engine: Engine, task: Task, params: Params, ctx: Context
) -> tuple[list[Branch], Rule]:
    """The strong and the weak reading of the task, and how they are fused.

    Raises: BadParameter for a policy that the model cannot follow."""
    ids, policies = engine.encode(task), _policies(engine, params, ctx)
    branches = [
        Branch(name, engine, _read(engine, ids, policy, ctx), Options(policy=policy, experts=True))
        for name, policy in zip(("strong", "weak"), policies, strict=True)
    ]

    def rule(steps: Sequence[Step]) -> Fused:
        strong, weak = steps
        terms = ((1 + params.beta, strong.raw), (-params.beta, weak.raw))
        return fuse(strong.logits, terms, params.alpha)

    return branches, rule


def _policies(engine: Engine, params: Params, ctx: Context) -> tuple[Policy, Policy]:
    """The strong one and the weak one. Raises: BadParameter where the model cannot follow."""
    strong = _policy(params.strong, params.strong_k, params, ctx)
    asked = (params.weak, params.weak_k) if params.weak != "paper" else papers(engine.experts_used)
    weak = _policy(*asked, params, ctx)
    for policy in (strong, weak):
        policy.check(engine.experts)
    return strong, weak


def papers(used: int) -> tuple[str, int]:
    """The weak reading of a model that takes so many experts: rank 2 as for Mixtral, which takes 2;
    the best third as for DeepSeekMoE, which takes 6 and is searched over 1 to 3."""
    return ("rank", 2) if used <= 2 else ("top", used // 3)


def _policy(kind: str, k: int, params: Params, ctx: Context) -> Policy:
    renormalise = RENORMALISE[params.renormalise]
    if kind == "top":
        return top(k, renormalise)
    if kind == "rank":
        return rank(k, renormalise)
    if kind == "random":
        return random(k, ctx.rng("random experts").getrandbits(32), renormalise)
    if kind == "dynamic":
        return dynamic(params.threshold, renormalise)
    return DEFAULT


def _read(engine: Engine, ids: list[int], policy: Policy, ctx: Context) -> Cursor:
    """Only keys and values of the model's own routing may be shared with other runs."""
    if policy == DEFAULT:
        return ctx.begin(engine, ids)
    return engine.prefill(ids, options=Options(policy=policy))


def _routing(label: str, step: Step) -> Iterator[Event]:
    """Which experts of every layer a reading used at one token, and how undecided their routers
    were."""
    for layer, (experts, weights) in step.experts.items():
        shown = tuple(round(weight, DIGITS) for weight in weights)
        yield Routing(step.pos, layer, experts, shown, label)
    yield Scores(
        step.pos,
        f"router entropy ({label})",
        "nats",
        tuple(map(str, step.router_entropy)),
        tuple(round(value, DIGITS) for value in step.router_entropy.values()),
    )


def _by_rank(
    strong: Branch, text: list[int], start: int, ranks: int, renormalise: bool | None
) -> Iterator[Event]:
    """KL of the strong reading from each rank alone, for the tokens from `start` on: the finished
    text read again, under all of them side by side, which holds only a few rows of logits."""
    if not ranks or start == len(text):
        return
    engine = strong.engine
    readings = [(engine.fork(strong.cursor, start), replace(strong.options, experts=False))]
    for k in range(1, ranks + 1):
        options = Options(policy=rank(k, renormalise))
        readings.append((engine.prefill(text[:start], options=options), options))
    reads = [engine.read(cursor, text[start:], options=options) for cursor, options in readings]
    for places in zip(*reads, strict=True):
        own, *others = [step for _, step in places if step is not None]
        yield Scores(
            own.pos,
            "KL by rank",
            "nats",
            tuple(str(k) for k in range(1, ranks + 1)),
            tuple(round(float(kl(own.logits, other.logits)), DIGITS) for other in others),
        )


@dataclass
class _Used:
    """What the routers did over a run. load: layer -> expert -> how often the strong reading chose
    it. weak, unchosen: choices of the weak reading, and those the strong one had left out."""

    experts: int
    load: dict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    weak: int = 0
    unchosen: int = 0
    entropies: list[float] = field(default_factory=list)

    def add(self, strong: Step, weak: Step) -> None:
        for layer, (experts, _) in strong.experts.items():
            self.load[layer].update(experts)
            others = weak.experts[layer][0]
            self.weak += len(others)
            self.unchosen += len(set(others) - set(experts))
        self.entropies += strong.router_entropy.values()

    def metrics(self, tokens: int) -> Iterator[Event]:
        """Unchosen use: 0 = the weak reading only uses what the strong one does. Router entropy:
        0 = sure, ln of the number of experts = undecided. Load: 1 = all experts alike."""
        if not self.load:
            return
        busiest = [max(load.values()) * self.experts / load.total() for load in self.load.values()]
        for name, value, unit in (
            ("unchosen use", self.unchosen / self.weak, "of the weak choices"),
            ("router entropy", fmean(self.entropies), "nats"),
            ("load of the busiest expert", fmean(busiest), "× the mean"),
        ):
            yield Metric(name, tokens, round(value, DIGITS), unit)
