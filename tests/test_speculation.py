"""The loop of speculative decoding: whoever drafts, the text is the model's own."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from analyzers.common.acceptance import follow, recursive
from analyzers.common.drafts import Draft, Outcome
from analyzers.common.speculation import PAUSE, WINDOW, Drafted, Gauge, raw_logprobs, write
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Engine, Tree
from analyzers.engine.cost import Cost
from analyzers.errors import BadParameter
from analyzers.task import Task, chat
from analyzers.trace import Event, Note, Token, surviving
from tests import tiny
from tests.events import ids_of, mean_length, trees_of

PROMPT = Task("The quick brown fox")
CHAIN_COST = Cost(10.0, ((1, 1.0), (8, 4.0)), 1000.0, 1)


@dataclass
class Guessing:
    """Drafts random trees; with `answer`, the right token is among the children now and then."""

    size: int
    answer: Sequence[int] = ()
    start: int = 0
    seed: int = 0
    drawn: str = "deterministic"
    heard: list[Outcome] = field(default_factory=list)

    def propose(self, text: Sequence[int], depth: int) -> Draft:
        rng = random.Random(repr((self.seed, tuple(text))))
        ids: list[int] = []
        parents: list[int] = []
        levels: list[int] = []
        seen: set[tuple[int, int]] = set()
        for _ in range(rng.randint(0, 9)):
            parent = rng.randint(-1, len(ids) - 1)
            level = 1 + (levels[parent] if parent >= 0 else 0)
            place = len(text) - self.start + level - 1
            right = place < len(self.answer) and rng.random() < 0.7
            id = self.answer[place] if right else rng.randrange(self.size)
            if level > depth or (parent, id) in seen:
                continue
            seen.add((parent, id))
            ids.append(id)
            parents.append(parent)
            levels.append(level)
        return Draft(Tree(tuple(ids), tuple(parents)), cost=0.5)

    def learn(self, outcome: Outcome) -> None:
        self.heard.append(outcome)


def drafted(
    engine: Engine, drafter, task: Task = PROMPT, rule=follow, cost=None, **knobs
) -> tuple[list[Event], str]:
    """The events, and why the text ended; the cursor is left behind what was written."""
    ctx, before = Context(1, cost=cost), engine.encode(task)
    cursor = ctx.begin(engine, before)
    going = write(engine, cursor, task, Drafted(**knobs), ctx, drafter, rule)
    events = []
    while True:
        try:
            events.append(next(going))
        except StopIteration as end:
            assert cursor.ids == [*before, *ids_of(events)]
            return events, end.value


def plain(engine: Engine, task: Task = PROMPT, **knobs) -> tuple[list[Token], str]:
    params = sampling.Params(temperature=0.0, **knobs)
    going, tokens = sampling.run(engine, task, params, Context(1)), []
    while True:
        try:
            tokens.append(next(going))
        except StopIteration as end:
            return tokens, end.value


def readable(tokens: Sequence[Token]) -> int:
    """One that can be a stop text, and not the first."""
    return next(i for i, token in enumerate(tokens) if i > 3 and token.text.strip().isprintable())


def guessing(engine: Engine, tokens: Sequence[Token], **more) -> Guessing:
    return Guessing(engine.vocabulary.size, ids_of(tokens), tokens[0].pos, **more)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_kind_of_model_writes_its_greedy_text(family):
    """Dense and mixed, windowed and not: drafts change the number of passes, never the text; and
    every number of every token is that of plain decoding."""
    engine = tiny.engine(family)
    assert "tree" in engine.can
    tokens, why = plain(engine, max_new=12)
    events, said = drafted(engine, guessing(engine, tokens), max_new=12)
    written = [event for event in events if isinstance(event, Token)]
    assert ids_of(written) == ids_of(tokens)
    assert said == why
    assert {token.origin for token in written} >= {"drafted"}
    for found, expected in zip(written, tokens, strict=True):
        assert found.text == expected.text
        assert found.rank == expected.rank
        assert found.p_sampled == 1.0
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert found.entropy == pytest.approx(expected.entropy, abs=1e-4)


def test_thirty_prompts_with_drafters_that_guess(tiny_engine):
    """Chat and text, whatever the trees look like."""
    for n in range(30):
        words = f"Prompt number {n}: " + "abc " * (n % 5)
        task = Task(chat(words)) if n % 2 else Task(words)
        tokens, why = plain(tiny_engine, task, max_new=12)
        answer = guessing(tiny_engine, tokens, seed=n) if n % 3 else Guessing(256, seed=n)
        events, said = drafted(tiny_engine, answer, task, max_new=12)
        assert ids_of(events) == ids_of(tokens), n
        assert said == why


def test_a_step_is_told_whole(tiny_engine):
    """Rejected drafts stay in the tree, with the target's own opinion of each."""
    tokens, _ = plain(tiny_engine, max_new=30)
    drafter = guessing(tiny_engine, tokens)
    events, _ = drafted(tiny_engine, drafter, max_new=30)
    trees = trees_of(events)
    assert any(len(tree.ids) > len(tree.accepted) > 0 for tree in trees)
    at = {token.pos: token for token in events if isinstance(token, Token)}
    for tree in trees:
        path = [at[tree.pos + depth] for depth in range(len(tree.accepted))]
        assert [tree.ids[node] for node in tree.accepted] == ids_of(path)
        assert [token.origin for token in path] == ["drafted"] * len(path)
        for node, token in zip(tree.accepted, path, strict=True):
            assert tree.target_logprobs[node] == pytest.approx(token.logprob, abs=1e-4)
        if tree.extra is not None:
            extra = at[tree.pos + len(path)]
            assert (extra.id, extra.origin) == (tree.extra, tree.origin)
        assert tree.draft_ms >= 0 and tree.verify_ms > 0 and tree.rest_ms > 0
    for outcome in drafter.heard:
        rows = outcome.checked.raw.double().log_softmax(-1)
        slow = [
            float(rows[parent + 1, id])
            for id, parent in zip(outcome.draft.tree.ids, outcome.draft.tree.parents, strict=True)
        ]
        if slow:
            assert raw_logprobs(outcome.checked) == pytest.approx(slow, abs=1e-4)


def test_the_text_ends_inside_an_accepted_path(tiny_engine):
    """At the end token, at a stop text, and after max_new tokens; what follows is not written."""
    tokens, _ = plain(tiny_engine, max_new=20)
    stop = tokens[readable(tokens)].text
    cut = 0
    for n in range(5):
        drafter = guessing(tiny_engine, tokens, seed=n)
        for knobs in ({"stop": stop, "max_new": 20}, {"max_new": 7}, {"max_new": 1}):
            expected, why = plain(tiny_engine, **knobs)
            events, said = drafted(tiny_engine, drafter, **knobs)
            assert (ids_of(events), said) == (ids_of(expected), why)
            alone = sum(isinstance(e, Token) and e.origin == "sampled" for e in events)
            wrote = [len(tree.accepted) + (tree.extra is not None) for tree in trees_of(events)]
            assert sum(wrote) + alone == len(expected)
            for tree in trees_of(events):
                if tree.extra is None:
                    assert (tree.origin, tree.extra_text) == ("", "")
                    assert tree.ended == f"the text is over: {why}"
                    cut += 1
    assert cut > 0


def test_an_end_token_in_a_draft_ends_the_text(own_engine):
    tokens, _ = plain(own_engine, max_new=20)
    own_engine._ends = frozenset({tokens[11].id})
    first = ids_of(tokens).index(tokens[11].id)
    drafter = Guessing(256, ids_of(tokens), tokens[0].pos, seed=3)
    events, said = drafted(own_engine, drafter, max_new=20)
    assert said == "end token"
    assert ids_of(events) == ids_of(tokens)[: first + 1]


def test_drafts_stop_at_the_end_of_the_context(tiny_engine):
    task = Task("x" * (tiny_engine.context - 11))
    tokens, why = plain(tiny_engine, task, max_new=40)
    events, said = drafted(tiny_engine, guessing(tiny_engine, tokens), task, max_new=40)
    assert why == said == "context full"
    assert ids_of(events) == ids_of(tokens)


def test_a_text_goes_on_from_an_earlier_one(tiny_engine):
    """What was written stays, and stop texts count across the seam."""
    tokens, _ = plain(tiny_engine, max_new=20)
    task = Task(PROMPT.prompt, written=tuple(tokens[:6]))
    events, _ = drafted(tiny_engine, guessing(tiny_engine, tokens), task, max_new=14)
    assert ids_of(events) == ids_of(tokens[6:])
    passes = len(trees_of(events)) + [e.origin for e in surviving(events)].count("sampled")
    assert mean_length(events) == pytest.approx(14 / passes)
    at = readable(tokens)
    done = Task(PROMPT.prompt, written=tuple(tokens[: at + 1]))
    assert drafted(tiny_engine, Guessing(256), done, stop=tokens[at].text)[0] == []


def test_sampled_text_is_distributed_as_the_target(tiny_engine):
    """The first token of 600 continuations, drafted at random, against the exact row."""
    filters = Drafted(temperature=1.0, top_k=3).filters
    cursor = tiny_engine.prefill(tiny_engine.encode(PROMPT))
    first = tiny_engine.step(cursor, filters=filters).logits.double().softmax(-1)
    counts: dict[tuple[int, ...], int] = {}
    n = 600
    for seed in range(n):
        ctx = Context(seed)
        own = tiny_engine.fork(cursor)
        likely = first.topk(3).indices.tolist()
        drafter = Guessing(
            tiny_engine.vocabulary.size, [likely[seed % 3]] * 3, cursor.pos, seed=seed
        )
        params = Drafted(temperature=1.0, top_k=3, max_new=2)
        tokens = ids_of(write(tiny_engine, own, PROMPT, params, ctx, drafter, follow))
        counts[tokens[0],] = counts.get((tokens[0],), 0) + 1
    expected = {(int(id),): n * float(first[id]) for id in likely}
    assert set(counts) <= set(expected)
    chi = sum((counts.get(key, 0) - mean) ** 2 / mean for key, mean in expected.items())
    assert chi < 9.21  # 2 degrees of freedom, p = 0.01


def test_the_same_seed_gives_the_same_events(tiny_engine):
    tokens, _ = plain(tiny_engine, max_new=10)
    one, two = (
        drafted(tiny_engine, guessing(tiny_engine, tokens), temperature=0.9, max_new=16)[0]
        for _ in range(2)
    )
    assert one == two


def test_at_temperature_0_a_sampling_rule_follows_the_likeliest(tiny_engine):
    tokens, _ = plain(tiny_engine, max_new=8)
    drafter = guessing(tiny_engine, tokens, drawn="without replacement")
    events, _ = drafted(tiny_engine, drafter, rule=recursive, max_new=8)
    assert ids_of(events) == ids_of(tokens)
    assert any(isinstance(event, Note) and "temperature 0" in event.text for event in events)


def test_a_rule_that_would_bias_is_refused(tiny_engine):
    with pytest.raises(BadParameter, match="deterministic"):
        drafted(tiny_engine, Guessing(256), rule=recursive, temperature=1.0)


def test_drafting_pauses_where_it_loses(tiny_engine):
    """By the cost table: after WINDOW losing steps, PAUSE plain ones; said once each time."""
    drafter = Guessing(256, seed=5)
    events, _ = drafted(tiny_engine, drafter, cost=CHAIN_COST, pause=True, max_new=90)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes[0].startswith(f"Drafting pauses for {PAUSE} tokens: the last {WINDOW} drafted")
    assert notes[-1].startswith("Drafting lost here")
    assert ids_of(events) == ids_of(plain(tiny_engine, max_new=90)[0])
    at = next(i for i, event in enumerate(events) if isinstance(event, Note))
    behind = events[at + 1 :]
    # The tokens of the step that lost, then the pause.
    origins = [event.origin for event in behind if isinstance(event, Token)]
    first = origins.index("sampled")
    assert origins[first : first + PAUSE] == ["sampled"] * PAUSE
    going_on = drafted(tiny_engine, drafter, cost=CHAIN_COST, max_new=90)[0]
    assert [event.text[:13] for event in going_on if isinstance(event, Note)] == ["Drafting lost"]


def test_each_pause_is_twice_as_long_and_only_a_loss_begins_one():
    gauge = Gauge(CHAIN_COST, pauses=True)
    for _ in range(2 * WINDOW):
        assert gauge.drafts() and gauge.hear(2, 2.0) is None  # as long as plain steps
    assert gauge.summed_up() is None
    gauge = Gauge(CHAIN_COST, pauses=True)
    for pause in (PAUSE, 2 * PAUSE, 4 * PAUSE):
        for _ in range(WINDOW - 1):
            assert gauge.drafts() and gauge.hear(1, 2.0) is None
        assert f"for {pause} tokens" in gauge.hear(1, 2.0).text
        assert [gauge.drafts() for _ in range(pause + 1)] == [False] * pause + [True]


def test_no_two_draws_share_a_generator(tiny_engine, monkeypatch):
    """Neither in drafted steps nor in the plain ones of a pause."""
    made, rng = [], Context.rng
    monkeypatch.setattr(Context, "rng", lambda ctx, *of: made.append(of) or rng(ctx, *of))
    lossy = {"cost": CHAIN_COST, "pause": True, "temperature": 1.0, "max_new": 60}
    drafted(tiny_engine, Guessing(256, seed=5), **lossy)
    assert len(made) > PAUSE and len(set(made)) == len(made)


def test_a_step_costs_what_the_table_says(tiny_engine):
    tokens, _ = plain(tiny_engine, max_new=12)
    events, _ = drafted(tiny_engine, guessing(tiny_engine, tokens), cost=CHAIN_COST, max_new=12)
    for tree in trees_of(events):
        assert tree.cost == pytest.approx(CHAIN_COST.v(1 + len(tree.ids)) + 0.5)


def test_rows_are_the_processed_distribution(tiny_engine):
    """One-hot when greedy; with temperature and filters what plain sampling draws from."""
    drafter = Guessing(256, seed=1)
    drafted(tiny_engine, drafter, temperature=0.5, top_k=4, max_new=6)
    outcome = next(each for each in drafter.heard if len(each.draft.tree))
    ids = [*outcome.text, *(outcome.draft.tree.ids[n] for n in outcome.draft.tree.path(0))]
    step = tiny_engine.step(
        tiny_engine.prefill(ids), filters=Drafted(temperature=0.5, top_k=4).filters
    )
    expected = step.logits.double().softmax(-1)[: tiny_engine.vocabulary.size]
    assert torch.allclose(outcome.rows(0), expected, atol=1e-5)
    assert int((outcome.rows(0) > 0).sum()) == 4
