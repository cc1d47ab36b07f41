"""Iterative deepening: budgets, triggers and probes do what they should and nothing else."""

from types import SimpleNamespace

import pytest

from analyzers.common.answers import vote
from analyzers.context import Context
from analyzers.engine import Engine, Filters
from analyzers.errors import BadParameter
from analyzers.params import build
from analyzers.search import iterative_deepening
from analyzers.search.iterative_deepening import Deepening, Params, budgets, repeats
from analyzers.task import Task, chat
from analyzers.trace import Candidate, Metric, Note, SearchNode, surviving, text_of
from tests import tiny

TASK = Task(chat("Count."))
SMALL = {"chains": 3, "first": 8, "max_new": 32, "trigger": "Wait.", "temperature": 1.0}


def deepen(engine: Engine, seed: int = 1, task: Task = TASK, **knobs) -> list:
    return list(iterative_deepening.run(engine, task, Params(**SMALL | knobs), Context(seed)))


def chains(events) -> dict[str, Candidate]:
    return {e.key: e for e in events if isinstance(e, Candidate) and e.group == "chains"}


def nodes(events, kind: str = "") -> list[SearchNode]:
    found = {e.node: e for e in events if isinstance(e, SearchNode)}.values()
    return [node for node in found if not kind or node.detail["kind"] == kind]


def metrics(events) -> dict[str, float]:
    """The last of each name."""
    return {e.name: e.value for e in events if isinstance(e, Metric)}


def notes(events) -> str:
    return " ".join(e.text for e in events if isinstance(e, Note))


def plain(engine: Engine, n: int, max_new: int, seed: int = 1) -> list[list[int]]:
    """The same generators, without edges."""
    samples = engine.sample(
        engine.encode(TASK), n, rng=Context(seed).rng, max_new=max_new, filters=Filters()
    )
    return [list(s.ids) for s in sorted(samples, key=lambda s: s.index)]


@pytest.fixture
def short(own_engine: Engine) -> Engine:
    """A model whose texts end now and then."""
    own_engine._ends = frozenset(range(60, 75))
    return own_engine


def test_budgets_grow_geometrically():
    assert budgets(64, 2.0, 512) == [64, 128, 256, 512]  # three edges
    assert sum(budgets(64, 2.0, 512)) == 960 == 512 * 2 - 64
    assert budgets(64, 3.0, 500) == [64, 192, 500]
    assert budgets(64, 2.0, 64) == budgets(100, 2.0, 64) == [64]
    assert budgets(1, 1.1, 4) == [1, 2, 3, 4]
    with pytest.raises(BadParameter, match="growth"):
        build(Params, {"growth": 1})


@pytest.mark.parametrize("first", [4, 32, 50])
def test_without_triggers_it_is_plain_sampling(short, first):
    """Edges and probes change nothing."""
    events = deepen(short, first=first, edge="nothing")
    decode = short.vocabulary.decode
    expected = [decode(ids) for ids in plain(short, 3, 32)]
    assert [each.text for each in chains(events).values()] == expected
    assert not nodes(events, "trigger")


def test_with_triggers_it_is_plain_up_to_the_first_edge(own_engine):
    events = deepen(own_engine)
    expected = [own_engine.vocabulary.decode(ids[:8]) for ids in plain(own_engine, 3, 8)]
    first = [n.text for n in nodes(events, "segment") if n.parent == 0]
    assert first == expected


def test_the_last_budget_alone_has_no_edge(own_engine):
    events = deepen(own_engine, first=32)
    decode = own_engine.vocabulary.decode
    assert [c.text for c in chains(events).values()] == [
        decode(x) for x in plain(own_engine, 3, 32)
    ]


@pytest.mark.parametrize("probe", ["The answer is", "It is"])
def test_probes_leave_the_chains_as_they_are(short, probe):
    on, off = deepen(short, probe=probe, select="mean"), deepen(short, probe="", select="mean")
    assert chains(on) == chains(off) and text_of(on) == text_of(off)
    assert nodes(on, "probe") and not nodes(off, "probe")
    assert all(node.status == "pruned" for node in nodes(on, "probe"))


def test_behind_a_trigger_the_cache_is_that_of_the_whole_text(short):
    """The tokens are written from a cursor that read the whole text without a rewind."""
    for seed in range(3):
        events = deepen(short, seed=seed, select="mean")
        written = surviving(events)
        own = sum(token.logprob for token in written if token.origin == "sampled")
        assert any(token.origin == "forced" for token in written)
        (chain,) = [c for c in chains(events).values() if c.text == text_of(events)]
        assert chain.logprob == pytest.approx(own, abs=1e-3)


def test_an_early_end_leaves_no_end_token_before_the_trigger(short):
    early = 0
    for seed in range(4):
        events = deepen(short, seed=seed)
        early += sum(n.detail["reason"] == "ended early" for n in nodes(events, "trigger"))
        for token in surviving(events)[:-1]:
            assert token.origin == "forced" or not short.ends(token.id)
    assert early


@pytest.mark.parametrize(
    ("first", "growth", "most"), [(8, 2.0, 32), (5, 1.1, 40), (3, 4.0, 31), (9, 2.0, 9), (8, 2, 16)]
)
def test_no_chain_has_more_tokens_than_the_last_budget(short, first, growth, most):
    start = len(short.encode(TASK))
    for seed in range(3):
        events = deepen(short, seed=seed, first=first, growth=growth, max_new=most)
        written = surviving(events)
        assert 0 < len(written) <= most
        assert [token.pos for token in written] == list(range(start, start + len(written)))
        most_segments = len(budgets(first, growth, most))
        path = [n for n in nodes(events, "segment") if n.status == "committed"]
        assert len(path) <= most_segments


def test_what_is_spent_is_segments_and_probes(own_engine):
    """No end tokens here, so none is thrown away; triggers are read, not written."""
    events = deepen(own_engine, probe="")
    segments = sum(n.detail["tokens"] * n.real_visits for n in nodes(events, "segment"))
    assert metrics(events)["spent tokens"] == segments
    trigger = len(own_engine.tokens("\n\nWait."))
    assert segments == 3 * (32 - 2 * trigger)
    probed = metrics(deepen(own_engine))["spent tokens"]
    assert segments < probed <= segments + 9 * iterative_deepening.PROBE_TOKENS


def test_filler_is_as_long_as_the_trigger(own_engine):
    check, filler = deepen(own_engine), deepen(own_engine, edge="filler")
    pairs = zip(nodes(check, "trigger"), nodes(filler, "trigger"), strict=True)
    for one, other in ((a.text, b.text) for a, b in pairs):
        # A character that the text before left unfinished shows as one more.
        one, other = one.lstrip("\ufffd"), other.lstrip("\ufffd")
        assert len(one) == len(other) and one != other


def test_the_vote_decides(own_engine):
    for seed in range(4):
        events = deepen(own_engine, seed=seed, chains=5, max_new=16)
        last = {c.text: None for c in chains(events).values()}
        finals = [n for n in nodes(events, "segment") if n.detail["iteration"] == 2]
        answers = [n.detail["answer"] or None for n in finals]
        assert len(last) == len(finals) == 5
        (kept,) = [n for n in finals if n.status == "committed"]
        leaders = vote(answers).leaders
        assert not leaders or kept.detail["answer"] in leaders
        assert kept.detail["score"] == pytest.approx(
            answers.count(kept.detail["answer"] or None) / 5 if leaders else 0
        )


def test_the_likeliest_and_the_judged_chain(own_engine):
    events = deepen(own_engine, select="mean", probe="")
    scored = [n for n in nodes(events, "segment") if "score" in n.detail]
    assert len(scored) == 3
    assert max(scored, key=lambda n: n.detail["score"]).status == "committed"
    made = tiny.model("llama", max_position_embeddings=2048)  # the question is long in bytes
    wide = Engine(made, tiny.tokenizer(), {"name": "wide"})
    judged = [n for n in nodes(deepen(wide, select="truthful")) if n.evals]
    assert len(judged) == 3
    assert max(judged, key=lambda n: n.detail["score"]).status == "committed"
    own_engine.context = 100  # no room for the question, which is said
    events = deepen(own_engine, select="truthful")
    assert "shorten the prompt" in notes(events) and surviving(events)


def test_restarts_write_every_budget_from_the_prompt(own_engine):
    events = deepen(own_engine, mode="restart", probe="")
    assert metrics(events)["spent tokens"] == 3 * (8 + 16 + 32)
    assert {n.parent for n in nodes(events, "segment")} == {0} and not nodes(events, "trigger")
    assert len(surviving(events)) == 32
    first = [n.text for n in nodes(events, "segment") if n.detail["iteration"] == 1]
    assert first == [own_engine.vocabulary.decode(ids) for ids in plain(own_engine, 3, 8)]


def test_a_segment_that_says_the_same_again_repeats():
    before = list(range(20))
    assert repeats(before, before) and repeats(before[3:15], before)
    assert not repeats(list(range(30, 50)), before)
    assert not repeats([1, 2], before)  # too short to tell


def test_a_chain_that_repeats_itself_stops(own_engine, monkeypatch):
    monkeypatch.setattr(iterative_deepening, "repeats", lambda now, before: True)
    events = deepen(own_engine, max_new=128)
    assert "3 of 3 chains repeated themselves" in notes(events)
    assert max(n.detail["iteration"] for n in nodes(events, "segment")) == 2


def test_the_budget_cuts_the_chains_and_keeps_what_they_have(own_engine):
    for tokens in range(24, 60, 7):
        events = deepen(own_engine, tokens=tokens)
        assert metrics(events)["spent tokens"] <= tokens
        assert "The chains end where they are" in notes(events)
        written = surviving(events)
        assert len(written) >= 8 and written[-1].origin == "sampled"
    events = deepen(own_engine, mode="restart", tokens=30)
    assert len(surviving(events)) == 8


def test_fixed_and_broken_answers_are_counted(own_engine):
    made = Deepening(own_engine, TASK, Params(truth="4"), Context(1))
    made.chains = [
        SimpleNamespace(answers=answers, over="last budget")
        for answers in (["3", "4", "4"], ["4", "5"], ["4", None], ["1", "1"])
    ]
    events = list(made.tell())
    found = metrics(events)
    assert (found["answers fixed"], found["answers broken"]) == (1, 2)
    assert found["answers changed at an edge"] == 3 and found["chains right"] == 1
    assert "did not benefit: fixed 1, broken 2 of 5" in notes(events)


def test_the_window_ends_the_last_budget(own_engine):
    room = 20
    text = "x" * (own_engine.context - room)
    events = deepen(own_engine, task=Task(text), chains=1, max_new=64)
    assert len(surviving(events)) == room and "window ends the last budget at 20" in notes(events)
    full = deepen(own_engine, task=Task("x" * own_engine.context))
    assert {type(event) for event in full} == {Metric}


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"trigger": " "}, "trigger is empty"),
        ({"trigger": "x" * 40}, "last budget only 32"),
        ({"tokens": 20}, "too small for the first segments of 3 chains"),
    ],
)
def test_what_cannot_be_done_is_said_first(own_engine, knobs, said):
    before = own_engine.forwards
    with pytest.raises(BadParameter, match=said):
        deepen(own_engine, **knobs)
    assert own_engine.forwards == before
