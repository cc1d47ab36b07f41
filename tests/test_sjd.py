"""Speculative Jacobi decoding: every token is tested once against the row it was drawn from."""

import random
from types import SimpleNamespace

import pytest
import torch

from analyzers import registry
from analyzers.common.acceptance import recursive
from analyzers.common.drafts import Outcome, Verdict
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import sjd
from analyzers.engine import Filters
from analyzers.params import build
from analyzers.task import Task
from analyzers.trace import Token
from tests.events import ids_of, trees_of

SIZE = 4
TABLE = torch.rand(SIZE + 1, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TABLE = TABLE**2 / (TABLE**2).sum(-1, keepdim=True)
PROMPT = Task("one two one two one")


def made(**knobs) -> sjd.Params:
    return build(sjd.Params, knobs)


def written(engine, **knobs) -> list:
    return list(sjd.run(engine, PROMPT, made(**knobs), Context(4)))


def drawn(window: sjd.Window, coin, length: int) -> tuple[list[int], int]:
    """Tokens from the table (the row of a token follows it), and how many passes they took."""
    text, passes = [SIZE], 0
    while len(text) <= length:
        draft = window.propose(text, 9)
        ids = draft.tree.ids

        def rows(node, ids=ids, last=text[-1]):
            return TABLE[ids[node] if node >= 0 else last]

        verdict = recursive(rows, draft, coin)
        window.learn(Outcome(tuple(text), draft, SimpleNamespace(), verdict, rows))
        text += [*(ids[node] for node in verdict.path), verdict.extra]
        passes += 1
    return text[1 : length + 1], passes


@pytest.mark.parametrize("redraw", [True, False])
def test_what_is_drawn_is_distributed_as_the_target(redraw):
    """The joint law of three tokens on four, 63 degrees of freedom: below the 1 % value."""
    rng, n = random.Random(11), 6_000
    counts = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.float64)
    params = made(window=3, redraw=redraw, begin="random", temperature=1.0)
    for _ in range(n):
        window = sjd.Window(params, SIZE, rng)
        (a, b, c), _ = drawn(window, rng.random, 3)
        counts[a, b, c] += 1
    expected = n * TABLE[SIZE][:, None, None] * TABLE[:SIZE, :, None] * TABLE[None, :SIZE, :]
    assert float(((counts - expected) ** 2 / expected).sum()) < 92.0


def test_what_was_drawn_anew_is_accepted_more_often():
    """Drawing untested tokens again from the newest pass needs fewer passes than keeping them."""
    passes = {}
    for redraw in (True, False):
        rng = random.Random(5)
        params = made(window=3, redraw=redraw, begin="random", temperature=1.0)
        taken = [drawn(sjd.Window(params, SIZE, rng), rng.random, 4)[1] for _ in range(800)]
        passes[redraw] = sum(taken) / len(taken)
    assert passes[True] < passes[False] < 4


def test_a_beginning_is_accepted_as_often_as_it_is_likely():
    """One-hot q: the chance is p of the token; q = p: it is always accepted."""
    window = sjd.Window(made(window=2, begin="random"), SIZE, random.Random(0))
    draft = window.propose([SIZE], 9)

    def rows(node):
        return TABLE[draft.tree.ids[node] if node >= 0 else SIZE]

    verdict = recursive(rows, draft, lambda: 0.0)
    for node in range(2):
        assert verdict.chances[node] == pytest.approx(float(rows(node - 1)[draft.tree.ids[node]]))
    window.learn(
        Outcome((SIZE,), draft, SimpleNamespace(), recursive(rows, draft, lambda: 0.99), rows)
    )
    again = window.propose([SIZE, 0], 9)
    place = window.places[0]
    assert place.row is not None and again.values == (1.0, 1.0)
    assert recursive(lambda node: place.row, again, lambda: 0.999).chances[0] == 1.0


def test_without_drawing_again_the_places_behind_stay_as_they_were():
    window = sjd.Window(made(window=4, redraw=False, begin="random"), 256, random.Random(0))
    draft = window.propose([1], 9)
    verdict = Verdict((0,), 7, "corrected")  # 7 stands where the second place was
    window.learn(Outcome((1,), draft, SimpleNamespace(), verdict, lambda node: TABLE[0]))
    assert [place.id for place in window.places] == [*draft.tree.ids[2:]]


def test_rows_are_kept_for_one_pass():
    window = sjd.Window(made(window=5, begin="random"), SIZE, random.Random(0))
    for n in range(6):
        draft = window.propose([SIZE] * (n + 1), 9)

        def rows(node, row=TABLE[n % SIZE]):
            return row

        verdict = recursive(rows, draft, lambda: 0.5)
        window.learn(Outcome((), draft, SimpleNamespace(), verdict, rows))
        assert len(window.places) <= 5
        assert len(draft.rows) == 5


@pytest.mark.parametrize("begin", ["lookup", "repeat", "random"])
def test_greedy_is_plain_greedy(tiny_engine, begin):
    plain = ids_of(
        sampling.run(tiny_engine, PROMPT, sampling.Params(temperature=0.0, max_new=24), Context(4))
    )
    events = written(tiny_engine, temperature=0.0, begin=begin, max_new=24)
    assert ids_of(events) == plain
    assert 0 < len(trees_of(events)) <= 24


def test_no_window_is_plain_sampling(tiny_engine):
    events = written(tiny_engine, window=0, temperature=1.0, max_new=8)
    assert not trees_of(events)
    assert {event.origin for event in events if isinstance(event, Token)} == {"sampled"}


def test_text_begins_as_it_did_before(tiny_engine):
    """The lookup copies what followed the same two tokens."""
    window = sjd.Window(made(window=3), 256, random.Random(0))
    assert window.propose([5, 6, 7, 8, 5, 6], 9).tree.ids == (7, 8, 5)
    assert window.propose([1, 2, 3], 2).tree.ids == (7, 8)  # places stay until they are tested
    fresh = sjd.Window(made(window=2), 256, random.Random(0))
    assert fresh.propose([1, 2, 3], 9).tree.ids == (3, 3)
    twice = sjd.Window(made(window=1), 256, random.Random(0))
    assert twice.propose([5, 6, 7, 5, 6, 8, 5, 6], 9).tree.ids == (8,)  # the last time


def test_filters_are_those_of_the_target(tiny_engine):
    """Only tokens that top-k leaves are ever drawn."""
    events = written(tiny_engine, temperature=1.0, top_k=2, max_new=20)
    for token in (event for event in events if isinstance(event, Token)):
        assert token.rank <= 2
    assert Filters(temperature=1.0, top_k=2) == made(temperature=1.0, top_k=2).filters


def test_it_is_offered():
    assert registry.method("sjd").card.family == "drafting"
