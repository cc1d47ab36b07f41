"""Superposed decoding: the drafts, their weights and scores, and what the text does not pretend."""

import math
from dataclasses import replace

import pytest
import torch

from analyzers.common import superposition
from analyzers.common.ngrams import ngrams_of
from analyzers.common.superposition import Draft, believed, likeliest, shares
from analyzers.context import Context
from analyzers.decoding import sampling, superposed
from analyzers.decoding.superposed import Params
from analyzers.engine import Engine
from analyzers.errors import BadParameter, OutOfContext
from analyzers.params import FileRef
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Lens, Metric, Note, Scores, Token, surviving, text_of
from tests import tiny
from tests.test_sampling import full, soon_ending

TEXT = "The quick brown fox jumps over the lazy dog; twice. The quick brown"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The quick cat sleeps.",
    "brown bread, brown",
]


def write(
    engine: Engine, prompt: str | Task = TEXT, history: list[str] | None = None, **knobs
) -> tuple[list[Event], str]:
    """The events of a run with the texts of earlier runs, and why it ended."""
    task = Task(prompt) if isinstance(prompt, str) else prompt
    ctx = Context(1, history=lambda: iter(history or []))
    events, run = [], superposed.run(engine, task, Params(**knobs), ctx)
    while True:
        try:
            events.append(next(run))
        except StopIteration as end:
            return events, end.value


def named(events: list[Event], kind: type, name: str) -> list:
    return [event for event in events if isinstance(event, kind) and event.name == name]


def believed_scores(events: list[Event]) -> list[float]:
    return [
        event.value
        for event in events
        if isinstance(event, Metric) and event.name.endswith(": believed score")
    ]


def grown(
    engine: Engine, n: int, prompt: str = TEXT, history: list[str] | None = None, **knobs
) -> list[Draft]:
    """The drafts that go on after n steps."""
    params = Params(max_new=n, **knobs)
    ngrams = ngrams_of(engine, history, 10_000) if history else None
    run = superposition.grow(engine, engine.prefill(engine.encode(Task(prompt))), params, ngrams)
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value[0]


# The parts


def test_worked_by_hand():
    """The card's own numbers: alpha .54, P (.5, .3, .2), G (.1, 0, .05)."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    seen = torch.tensor([0.1, 0.0, 0.05], dtype=torch.float64)
    found = believed(p.log(), seen, 0.54).tolist()
    assert found[0] == pytest.approx(-1.5622, abs=1e-4) and found[1] == -math.inf
    assert found[2] == pytest.approx(-2.3580, abs=1e-4)
    unseen = believed(p.log(), torch.zeros(3, dtype=torch.float64), 0.54)
    torch.testing.assert_close(unseen, 0.46 * p.log() - 200)
    torch.testing.assert_close(believed(p.log(), None, 0.54), p.log())


def test_weights_are_the_softmax_of_the_scores():
    found = shares([math.log(0.6), math.log(0.3), math.log(0.1)])
    assert found.tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert float(found.sum()) == pytest.approx(1)
    assert shares([-5000.0]).tolist() == [1.0]
    assert shares([-1.0, -1001.0]).isfinite().all()


def test_only_the_likeliest_share_the_sharpened_distribution():
    logits = torch.tensor([0.0, 2.0, 1.0, -3.0])
    ids, logp = likeliest(logits, 0.5, 2)
    assert ids.tolist() == [1, 2]
    assert logp.exp().tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    assert len(likeliest(logits, 0.06, 99)[0]) == 4


@pytest.mark.parametrize(
    ("k", "alpha", "temperature"),
    [(1, 0.62, 0.06), (2, 0.62, 0.06), (3, 0.54, 0.06), (5, 0.54, 0.06), (6, 0.52, 0.06),
     (9, 0.52, 0.06), (10, 0.54, 0.12)],
)  # fmt: skip
def test_the_paper_s_settings_by_k(k, alpha, temperature):
    assert superposition.tuned(Params(k=k)) == (alpha, temperature)
    assert superposition.tuned(Params(k=k, alpha=0.3, temperature=0.9)) == (0.3, 0.9)


@pytest.mark.parametrize("family", ["llama", "gemma3", "granitemoe", "gpt2", "opt", "mixtral"])
def test_one_hot_weights_are_an_ordinary_step(family):
    """Through the embeddings, also where the family multiplies them; and its row in the cache."""
    engine = tiny.engine(family)
    ids, then = engine.encode(Task(TEXT)), (70, 71, 72)
    common, plain = engine.prefill(ids), engine.prefill(ids)
    engine.step(common)
    for id in then:
        one_hot = superposition.superposition(
            engine, [Draft((id,), 0.0), Draft((65,), -1e6), Draft((66,), -1e6)]
        )
        state = engine.forward(one_hot, (0, engine.layers), cursor=common)
        engine.push(plain, id)
        raw = engine.step(plain).raw
        torch.testing.assert_close(engine.unembed(state)[0], raw, atol=1e-4, rtol=1e-5)
    engine.rewind(common, len(ids))  # as if nothing had been superposed
    again = engine.step(common).raw
    torch.testing.assert_close(again, engine.step(engine.prefill(ids)).raw)


def test_one_hot_weights_in_the_smallest_model_to_the_last_digits(tiny_engine):
    ids = tiny_engine.encode(Task(TEXT))
    common = tiny_engine.prefill(ids)
    tiny_engine.step(common)
    state = tiny_engine.forward(
        superposition.superposition(tiny_engine, [Draft((70,), 0.0)]), (0, 3), cursor=common
    )
    found = tiny_engine.unembed(state)[0]
    off = float((found - full_logits(tiny_engine, [*ids, 70])).abs().max())
    assert off < 1e-5


def full_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def test_equal_tokens_add_up(tiny_engine):
    """The cosine at the embeddings is 1 by construction."""
    drafts = [
        Draft((65, 70), math.log(0.5)),
        Draft((66, 70), math.log(0.3)),
        Draft((71,), math.log(0.2)),
    ]
    found = superposition.superposition(tiny_engine, drafts)
    expected = 0.8 * tiny_engine.embeddings([70]) + 0.2 * tiny_engine.embeddings([71])
    torch.testing.assert_close(found, expected)


# The whole


def slowly(engine: Engine, prompt: list[int], k: int, n: int, temperature: float):
    """The algorithm without n-grams, without a cache, in one piece: (ids, score) of each draft."""
    table = engine.model.get_input_embeddings()
    inputs = table(torch.tensor([prompt]))
    drafts: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(n):
        with torch.no_grad():
            logits = engine.model(inputs_embeds=inputs, use_cache=False).logits[0, -1]
        best, ids = logits[: engine.vocabulary.size].topk(3 * k)
        logp = (best.double() / temperature).log_softmax(0)
        candidates = [
            ((*own, int(id)), score + float(p))
            for own, score in drafts
            for id, p in zip(ids, logp, strict=True)
        ]
        drafts = sorted(candidates, key=lambda each: -each[1])[:k]
        weights = torch.tensor([score for _, score in drafts]).softmax(0)
        mixture = sum(
            w * table.weight[own[-1]] for w, (own, _) in zip(weights, drafts, strict=True)
        )
        inputs = torch.cat([inputs, mixture[None, None]], dim=1)
    return drafts


@pytest.mark.parametrize("temperature", [0.06, 1.0])
@pytest.mark.parametrize("k", [2, 4])
def test_equals_the_slow_version(own_engine, k, temperature):
    prompt = own_engine.encode(Task(TEXT))
    expected = slowly(own_engine, prompt, k, 8, temperature)
    events, why = write(own_engine, k=k, max_new=8, temperature=temperature)
    assert why == "max_new reached"
    drafts = grown(own_engine, 8, k=k, temperature=temperature)
    assert [draft.ids for draft in drafts] == [ids for ids, _ in expected]
    assert believed_scores(events) == pytest.approx([score for _, score in expected], abs=1e-3)
    assert [token.id for token in surviving(events)] == list(expected[0][0])


@pytest.mark.parametrize("temperature", [0.06, 0.5, 2.0])
def test_one_draft_without_ngrams_is_greedy(own_engine, temperature):
    greedy = list(
        sampling.run(
            own_engine,
            Task(TEXT),
            sampling.Params(temperature=0.0, top_p=1.0, max_new=15),
            Context(1),
        )
    )
    events, _ = write(own_engine, k=1, corpus="none", temperature=temperature)
    written = surviving(events)
    assert [token.id for token in written] == [token.id for token in greedy]
    for mine, theirs in zip(written, greedy, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert (mine.pos, mine.origin, mine.p_sampled) == (theirs.pos, "drafted", None)
    assert all(scores.values == (1.0,) for scores in named(events, Scores, "weights"))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_step_is_one_pass_whatever_k_is(own_engine, k):
    own_engine.forwards = 0
    events, _ = write(own_engine, k=k, max_new=10, history=CORPUS)
    # The prompt, ten steps, the true scores of all drafts, the answer read again.
    assert own_engine.forwards == 1 + 10 + 1 + 1
    assert len(named(events, Lens, "drafts")) == 10


@pytest.mark.parametrize("history", [[], CORPUS])
def test_what_holds_at_every_step(own_engine, history):
    events, _ = write(own_engine, k=4, max_new=12, history=history, temperature=0.8)
    weights = named(events, Scores, "weights")
    lenses = named(events, Lens, "drafts")
    assert len(weights) == len(lenses) == 12
    start = len(own_engine.encode(Task(TEXT)))
    assert [scores.pos for scores in weights] == list(range(start, start + 12))
    last = 0.0
    for scores, lens in zip(weights, lenses, strict=True):
        assert scores.over == lens.rows == tuple(f"draft {i}" for i in range(1, 5))
        assert sum(scores.values) == pytest.approx(1, abs=1e-5)
        assert list(lens.scores) == sorted(lens.scores, reverse=True)
        assert lens.scores[0] <= last  # never increases
        last = lens.scores[0]
        assert scores.values == pytest.approx(shares(lens.scores).tolist(), abs=1e-4)
    drafts = grown(own_engine, 12, history=history, k=4, temperature=0.8)
    assert len({draft.ids for draft in drafts}) == 4
    assert [top[0][0] for top in lenses[-1].top] == [draft.ids[-1] for draft in drafts]
    assert bool(named(events, Scores, "n-gram score")) == bool(history)


def test_the_words_and_their_weights_grow_with_the_drafts(own_engine):
    events, _ = write(own_engine, k=3, max_new=6, temperature=1.0)
    start = len(own_engine.encode(Task(TEXT)))
    texts = [event for event in events if isinstance(event, Candidate)]
    for row in range(1, 4):
        growing = named(events, Scores, f"draft {row}: words")
        assert [len(scores.over) for scores in growing] == [1, 2, 3, 4, 5, 6, 6]
        assert [scores.pos - start for scores in growing] == [0, 1, 2, 3, 4, 5, 5]
        shown = [text for text in texts if text.key == f"draft {row}"]
        assert len(shown) == 7 and {text.group for text in shown} == {"drafts"}
        for scores, text, weights in zip(
            growing[:-1], shown[:-1], named(events, Scores, "weights"), strict=True
        ):
            assert "".join(map(str, scores.over)).startswith(text.text)
            assert scores.values[-1] == weights.values[row - 1]


@pytest.mark.parametrize("history", [[], CORPUS])
def test_the_end_tells_the_true_log_probabilities(own_engine, history):
    events, _ = write(own_engine, k=3, max_new=7, history=history, temperature=1.0)
    prompt = own_engine.encode(Task(TEXT))
    final = {event.key: event for event in events if isinstance(event, Candidate)}
    drafts = grown(own_engine, 7, history=history, k=3, temperature=1.0)
    for row, ids in enumerate([draft.ids for draft in drafts], start=1):
        raw = full(own_engine, [*prompt, *ids])
        true = sum(float(raw[len(prompt) + i - 1, id]) for i, id in enumerate(ids))
        assert final[f"draft {row}"].logprob == pytest.approx(true, abs=1e-3)
        (believed_one,) = named(events, Metric, f"draft {row}: believed score")
        assert abs(believed_one.value - true) > 0.1  # they are not the same thing
    growing = [event for event in events if isinstance(event, Candidate)][: 3 * 7]
    assert all(event.logprob is None for event in growing)
    written = surviving(events)
    assert sum(token.logprob for token in written) == pytest.approx(
        final["draft 1"].logprob, abs=1e-3
    )
    assert text_of(events) == final["draft 1"].text
    assert all(token.origin == "drafted" for token in written)


def test_ngrams_choose_what_was_seen(own_engine):
    """A strong memory with one way on: the first draft follows it where the model lets it."""
    alone, _ = write(own_engine, k=3, max_new=1, m=50, corpus="none")
    (lens,) = named(alone, Lens, "one pass")
    second = lens.top[0][1][0]  # not the likeliest
    seen = TEXT + own_engine.vocabulary.raw(second).decode("latin-1")
    if own_engine.tokens(seen)[-1] != second:
        second = next(
            id for id, text, _ in lens.top[0][1:] if text.isascii() and text.isprintable()
        )
        seen = TEXT + own_engine.vocabulary.display(second)
    events, _ = write(own_engine, k=3, max_new=1, m=50, history=[seen], alpha=0.9)
    assert named(events, Lens, "drafts")[0].top[0][0][0] == second
    counts = named(events, Scores, "n-gram score")[0].values
    assert 0 < counts[0] <= 0.5 and counts[1:] == (0.0, 0.0)  # still three drafts
    scores = named(events, Lens, "drafts")[0].scores
    assert scores[0] > -30 and -400 < scores[1] < -199


def test_drafts_end_with_an_end_token_and_never_hold_one():
    engine = soon_ending("llama")
    ended = 0
    for prompt in (TEXT, "Once upon", "1, 2, 3,"):
        events, why = write(engine, prompt, k=3, max_new=20, corpus="none", temperature=2.0)
        for lens in named(events, Lens, "drafts"):
            assert all(top[0][0] != 256 for top in lens.top)
        done = [
            event for event in events if isinstance(event, Candidate) and event.group == "finished"
        ]
        assert len({event.key for event in done}) <= 3
        written = surviving(events)
        assert 256 not in [token.id for token in written[:-1]]
        if written[-1].id == 256:
            ended += 1
            assert why == "end token" and done
        # The order is that of the believed score a token.
        lengths = [
            event.step for event in events if isinstance(event, Metric) and "believed" in event.name
        ]
        means = [s / n for s, n in zip(believed_scores(events), lengths, strict=True)]
        assert means == sorted(means, reverse=True) and len(means) == 3
    assert ended


def test_a_final_draft_that_ended_shows_its_end():
    engine = soon_ending("llama")
    for prompt in (TEXT, "Once upon", "1, 2, 3,"):
        events, _ = write(engine, prompt, k=3, max_new=20, corpus="none", temperature=2.0)
        for row in (1, 2, 3):
            words = named(events, Scores, f"draft {row}: words")[-1]
            if "<|end|>" in words.over:
                assert words.over[-1] == "<|end|>" and words.values[-1] == 0
                return
    raise AssertionError("no draft ended")


# Corpora, limits, forks


def test_it_says_which_corpus_was_used(own_engine, tmp_path):
    def said(**knobs) -> str:
        events, _ = write(own_engine, max_new=2, **knobs)
        return next(event.text for event in events if isinstance(event, Note))

    assert said(corpus="none").startswith("No n-grams are used")
    assert said().startswith("There are no earlier runs")
    tokens = sum(len(own_engine.tokens(text)) for text in CORPUS)
    assert f"n-grams of earlier runs, {tokens} tokens" in said(history=CORPUS)
    path = tmp_path / "corpus.txt"
    path.write_text("abc def")
    assert "the chosen file, 7 tokens" in said(corpus="file", file=FileRef(path))
    assert str(tmp_path) not in said(corpus="file", file=FileRef(path))


def test_a_file_counts_like_earlier_runs(own_engine, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS[0])
    one, _ = write(own_engine, max_new=8, corpus="file", file=FileRef(path))
    other, _ = write(own_engine, max_new=8, history=[CORPUS[0]])
    assert [e for e in one if not isinstance(e, Note)] == [
        e for e in other if not isinstance(e, Note)
    ]


def test_a_file_that_cannot_be_read_is_refused_before_the_first_pass(own_engine, tmp_path):
    own_engine.forwards = 0
    for file in ("", str(tmp_path / "none.txt")):
        with pytest.raises(BadParameter):
            write(own_engine, corpus="file", file=FileRef(file))
    assert own_engine.forwards == 0


def test_it_never_pretends(own_engine):
    events, _ = write(own_engine, history=CORPUS)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 3
    assert "sharpened to temperature 0.06 and mixed with n-grams" in notes[1]
    assert "no log-probabilities" in notes[1] and "cannot be continued" in notes[2]
    alone, _ = write(own_engine, temperature=0.5)
    assert "temperature 0.5, behind" in [e.text for e in alone if isinstance(e, Note)][1]


def test_the_window_ends_the_drafts(own_engine):
    events, why = write(own_engine, "a" * (tiny.CONTEXT - 4), max_new=15)
    assert why == "context full" and len(surviving(events)) == 4
    assert surviving(events)[-1].pos == tiny.CONTEXT - 1
    assert write(own_engine, "a" * tiny.CONTEXT) == ([], "context full")
    with pytest.raises(OutOfContext, match=r"513 tokens.* 512"):
        write(own_engine, "a" * (tiny.CONTEXT + 1))


def test_few_candidates_make_few_drafts(own_engine):
    events, _ = write(own_engine, k=4, m=2, max_new=3, corpus="none", temperature=1.0)
    assert [len(lens.rows) for lens in named(events, Lens, "drafts")] == [2, 4, 4]


def test_the_text_can_be_gone_on_from(own_engine):
    """The runner keeps a cursor with the answer's own cache, not the drafts'."""
    ctx = Context(1)
    events = list(superposed.run(own_engine, Task(TEXT), Params(max_new=6), ctx))
    written = surviving(events)
    (cursor,) = ctx.cursors
    assert cursor.ids == [*own_engine.encode(Task(TEXT)), *(token.id for token in written)]
    own_engine.rewind(cursor, cursor.pos - 2)
    raw = own_engine.step(cursor).raw
    torch.testing.assert_close(raw, full_logits(own_engine, cursor.ids), atol=1e-4, rtol=1e-4)
    kept = replace(Task(TEXT), written=tuple(written[:3]))
    forked, _ = write(own_engine, kept, max_new=4)
    assert forked[:3] == written[:3]
    assert [token.pos for token in surviving(forked)] == list(
        range(written[0].pos, written[0].pos + 7)
    )


# How linear it is


def test_linearity_compares_with_the_drafts_one_by_one(own_engine):
    plain, _ = write(own_engine, k=3, max_new=7, temperature=1.0)
    own_engine.forwards = 0
    events, _ = write(own_engine, k=3, max_new=7, temperature=1.0, linearity=True)
    assert own_engine.forwards == 1 + 7 + 2 + 2
    found = named(events, Metric, "cosine, last layer")
    assert [metric.step for metric in found] == [1, 5]
    assert [event for event in events if event not in found] == plain
    prompt = own_engine.encode(Task(TEXT))
    layers = own_engine.layers

    def own_state(ids: tuple[int, ...]) -> torch.Tensor:
        cursor = own_engine.prefill([*prompt, *ids])
        return own_engine.step(cursor, taps=(layers,)).hidden[layers]

    steps = [
        [draft.ids for draft in grown(own_engine, n, k=3, temperature=1.0)] for n in range(1, 8)
    ]
    weights = [torch.tensor(s.values) for s in named(events, Scores, "weights")]
    mixture = [
        (w[:, None] * own_engine.embeddings([ids[-1] for ids in drafts])).sum(0)
        for w, drafts in zip(weights, steps, strict=True)
    ]
    for metric in found:
        n = metric.step
        rows = torch.cat([own_engine.embeddings(prompt), torch.stack(mixture[:n])])
        state = own_engine.forward(rows, (0, layers))[-1]
        apart = weights[n - 1] @ torch.stack([own_state(ids) for ids in steps[n - 1]])
        expected = torch.cosine_similarity(state, apart, dim=0)
        assert metric.value == pytest.approx(float(expected), abs=1e-3)


def test_one_draft_is_perfectly_linear(own_engine):
    events, _ = write(own_engine, k=1, max_new=12, linearity=True)
    values = [metric.value for metric in named(events, Metric, "cosine, last layer")]
    assert values == pytest.approx([1, 1, 1], abs=1e-4)


def test_the_default_model_drafts_at_the_first_click(smollm):
    events, why = write(smollm, "The best way to learn a new language is to", max_new=8)
    assert why == "max_new reached" and len(surviving(events)) == 8
    drafts = {event.key: event for event in events if isinstance(event, Candidate)}
    assert len({event.text for event in drafts.values()}) == 3
    assert all(event.logprob < 0 for event in drafts.values())
    assert {type(event) for event in events} <= set(superposed.CARD.emits)
    assert isinstance(events[-1], Token)
