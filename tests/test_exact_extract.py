"""Exact extraction: what it finds is what trying every span finds, and it says what greedy is."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from analyzers.context import Context
from analyzers.decoding import exact_extract
from analyzers.decoding.exact_extract import (
    Params,
    Span,
    Suffix,
    apart,
    ending,
    search,
    suffixes_of,
)
from analyzers.engine import Cursor, Engine, Tree
from analyzers.errors import BadInput, OutOfContext
from analyzers.task import Task, chat
from analyzers.trace import Candidate, Metric, Scores, surviving, text_of
from app.bench import extract as bench

PASSAGE = "Ada met Bob in Rome. Bob met Ada in Oslo (1912)."
QUESTION = "Who met Bob?"
DEFAULTS = Params()
SHORT = "Mira wrote it in Lagos in May."


def extract(engine: Engine, passage: str = PASSAGE, raw: bool = False, **knobs) -> list:
    prompt = QUESTION if raw else chat(QUESTION)
    task = Task(prompt, inputs={"passage": passage})
    return list(exact_extract.run(engine, task, Params(**knobs), Context(1)))


def group(events, name: str) -> list[Candidate]:
    return [e for e in events if isinstance(e, Candidate) and e.group == name]


def metrics(events) -> dict[str, float]:
    return {event.name: event.value for event in events if isinstance(event, Metric)}


def prompt_ids(engine: Engine, passage: str) -> list[int]:
    asked = exact_extract.ASKED
    user = f"{asked}\n\nText: {passage}\n\nQuestion: {QUESTION}"
    return engine.encode(Task(chat(user), prefix="Answer:"))


def worth(engine: Engine, ids: list[int], span: tuple[int, ...], ends: list[int]) -> float:
    """The slow obvious S: one reading of prompt and span from the beginning."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*ids, *span]]), use_cache=False).logits[0].float()
    rows = logits[len(ids) - 1 :].log_softmax(-1)
    tokens = sum(float(row[id]) for row, id in zip(rows, span, strict=False))
    return tokens + float(rows[-1, ends].logsumexp(-1))


def brute(engine: Engine, passage: str, longest: int, how: str = "line") -> dict[tuple, float]:
    """S of every span behind the raw prompt, each by itself."""
    ends = ending(engine, how)
    ids = engine.encode(Task(f"Text: {passage}\nQuestion: {QUESTION}\nAnswer:"))
    spans = {
        suffix.ids[: last + 1]
        for suffix in suffixes_of(engine, passage, longest, ends)
        for last, end in enumerate(suffix.ends)
        if end is not None
    }
    return {span: worth(engine, ids, span, ends) for span in spans}


# The card's toy


END = 4
L = {(1,): -1, (1, 2): -0.2, (1, 2, 3): -0.3, (2,): -0.5, (2, 3): -2, (3,): -4}
E = {(1,): -2, (1, 2): -1, (1, 2, 3): -0.1, (2,): -3, (2, 3): -0.2, (3,): -0.1}


@dataclass
class Toy:
    """Stands for an engine: log-probabilities as given; a token of no use takes the rest."""

    passes: int = 0

    def row(self, before: tuple[int, ...]) -> torch.Tensor:
        p = torch.zeros(6)
        for ids, value in L.items():
            if ids[:-1] == before:
                p[ids[-1]] = math.exp(value)
        p[END] = math.exp(E[before]) if before in E else 0.0
        # The toy's numbers are no distribution, so its rows are scaled; see `spans`.
        p[5] = max(1 - float(p.sum()), 0.0)
        return p.log()

    def verify(self, cursor: Cursor, tree: Tree) -> SimpleNamespace:
        self.passes += 1

        def step(node: int) -> SimpleNamespace:
            return SimpleNamespace(raw=self.row(tuple(tree.ids[i] for i in tree.path(node))))

        return SimpleNamespace(step=step)


def toy_scale(before: tuple[int, ...]) -> float:
    return float(Toy().row(before).logsumexp(-1))


@pytest.mark.parametrize("chunk", [1, 2, 16])
@pytest.mark.parametrize("prune", [True, False])
def test_the_worked_case(chunk, prune, monkeypatch):
    """S(1,1)=-3, S(1,2)=-2.2, S(1,3)=-1.6, S(2,2)=-3.5, S(2,3)=-2.7, S(3,3)=-4.1."""
    # Log-probabilities as they stand: normalising would change the card's numbers.
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda self, dim: self)
    suffixes = [
        Suffix(1, (1, 2, 3), (2, 3, 4)),
        Suffix(2, (2, 3), (3, 4)),
        Suffix(3, (3,), (4,)),
    ]
    toy = Toy()
    first = SimpleNamespace(raw=toy.row(()))
    run = search(toy, None, first, suffixes, [END], Params(spans=1, chunk=chunk, prune=prune))
    with pytest.raises(StopIteration) as end:
        while True:
            next(run)
    found = end.value.value
    best = found.spans[0]
    assert best.places == ((1, 4),) and best.logprob == pytest.approx(-1.6, abs=1e-5)
    values = {span.ids: span.logprob for span in found.spans}
    expected = {(1,): -3, (1, 2): -2.2, (1, 2, 3): -1.6, (2,): -3.5, (2, 3): -2.7, (3,): -4.1}
    if not prune:
        assert values == pytest.approx(expected, abs=1e-5) and found.tried == 6
    elif chunk < 16:
        # l(3, 1) = -4 alone is worse than the best span.
        assert (3,) not in values and found.starts == {1, 2}
        # One by one, so are l(2, 1) and l(2, 2) together before they are tried.
        assert ((2, 3) in values) == (chunk == 2)


# Tiny models


@pytest.mark.parametrize("how", ["line", "sentence", "end token"])
def test_exact_is_what_trying_every_span_finds(tiny_engine, how):
    passage = "Ada met Bob. Eve"
    expected = brute(tiny_engine, passage, 6, how)
    events = extract(tiny_engine, passage, raw=True, longest=6, end=how)
    best = max(expected, key=expected.__getitem__)
    assert tuple(token.id for token in surviving(events)) == best
    assert group(events, "spans")[0].logprob == pytest.approx(expected[best], abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9, 64])
def test_neither_chunks_nor_pruning_change_what_is_listed(tiny_engine, chunk):
    whole = extract(tiny_engine, longest=8, prune=False)
    pruned = extract(tiny_engine, longest=8, chunk=chunk)
    for expected, found in zip(group(whole, "spans"), group(pruned, "spans"), strict=True):
        assert found.key == expected.key and found.text == expected.text
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert metrics(whole)["starts read"] == metrics(whole)["starts"]
    assert metrics(pruned)["tokens read"] < metrics(whole)["tokens read"]


def test_a_tree_that_is_begun_anew_changes_nothing(tiny_engine, monkeypatch):
    whole = extract(tiny_engine, longest=8, prune=False)
    monkeypatch.setattr(exact_extract, "MOST_NODES", 20)
    again = extract(tiny_engine, longest=8, prune=False)
    assert [c.key for c in group(again, "spans")] == [c.key for c in group(whole, "spans")]


def test_spans_are_pieces_of_the_passage_that_overlap_nowhere(tiny_engine):
    spans = group(extract(tiny_engine, spans=8, longest=6), "spans")
    taken: list[tuple[int, int]] = []
    assert [s.logprob for s in spans] == sorted((s.logprob for s in spans), reverse=True)
    for span in spans:
        places = [tuple(map(int, p.split("-"))) for p in span.key.removeprefix("c:").split(",")]
        for start, end in places:
            assert PASSAGE[start:end] == span.text
            assert not any(start < b and a < end for a, b in taken)
        taken += places


def test_equal_spans_are_one_with_all_its_places(tiny_engine):
    found = suffixes_of(tiny_engine, PASSAGE, 4, [])
    assert [suffix.start for suffix in found if suffix.ids[1:] == tuple(b"Bob")] == [8, 21]
    events = extract(tiny_engine, "no no no", longest=3, spans=2)
    assert group(events, "spans")[0].key in ("c:0-2,3-5,6-8", "c:0-5,3-8")


def test_spans_are_whole_words_behind_a_space(tiny_engine):
    found = {s.start: s for s in suffixes_of(tiny_engine, "né (a)", 9, [])}
    assert sorted(found) == [0, 3, 4]
    assert bytes(found[0].ids) == " né (a)".encode()
    # Behind the space, n, half of é: inside a word; then é, a space, the bracket, ...
    assert found[0].ends == (None, None, None, 2, None, 4, 5, 6)
    assert bytes(found[4].ids) == b" a)"


def test_what_ends_an_answer_is_in_no_span(tiny_engine):
    ends = ending(tiny_engine, "sentence")
    assert set(ends) == {256, *b"\n."}
    assert ending(tiny_engine, "end token") == [256] and set(ending(tiny_engine, "line")) < set(
        ends
    )
    suffixes = suffixes_of(tiny_engine, PASSAGE, 60, ends)
    assert not any(set(suffix.ids) & set(ends) for suffix in suffixes)


def test_apart_keeps_the_best_of_those_that_overlap():
    spans = [Span((i,), -i, 0.0, (place,)) for i, place in enumerate([(3, 6), (5, 9), (6, 8)])]
    assert apart(spans, 5) == [spans[0], spans[2]] and apart(spans, 1) == [spans[0]]


def test_the_text_is_the_best_span_with_the_numbers_of_reading_it(tiny_engine):
    events = extract(tiny_engine)
    best = group(events, "spans")[0]
    tokens = surviving(events)
    assert text_of(events).strip() == best.text
    assert tokens[0].pos == len(prompt_ids(tiny_engine, PASSAGE))
    (over,) = [e for e in events if isinstance(e, Scores) and e.name == "ending here"]
    assert over.over == (over.pos,) == (tokens[-1].pos,)
    total = sum(token.logprob for token in tokens) + over.values[0]
    assert total == pytest.approx(best.logprob, abs=1e-4)
    ids = tuple(token.id for token in tokens)
    alone = worth(tiny_engine, prompt_ids(tiny_engine, PASSAGE), ids, ending(tiny_engine, "line"))
    assert alone == pytest.approx(best.logprob, abs=1e-4)
    assert {(token.origin, token.p_sampled) for token in tokens} == {("read", None)}
    assert group(events, "passage")[0].text == PASSAGE


def test_greedy_is_judged(own_engine):
    """An engine that ends everywhere: greedy says what it likes best, or nothing."""
    events = extract(own_engine, longest=4)
    (greedy,), numbers = group(events, "greedy"), metrics(events)
    tokens = surviving(events, "greedy")
    assert len(tokens) <= 4 and all(token.rank == 1 for token in tokens)
    assert numbers["extractive"] == 0 and numbers["optimal"] == 0
    best = group(events, "spans")[0]
    assert numbers["gap"] == pytest.approx(best.logprob - greedy.logprob, abs=1e-5)
    second = group(events, "spans")[1]
    assert numbers["margin"] == pytest.approx(best.logprob - second.logprob, abs=1e-5)


@pytest.mark.parametrize("alone", [True, False])
def test_greedy_that_is_a_span_is_never_better(own_engine, alone, monkeypatch):
    """The passage is given what greedy writes, and what comes fourth ends the answer."""
    cursor = own_engine.prefill(prompt_ids(own_engine, PASSAGE))
    for _ in range(4):
        own_engine.push(cursor, int(own_engine.step(cursor).logits.argmax()))
    *said, end = cursor.ids[-4:]
    ends = [end, *range(200, 250)]
    assert end not in said and not set(said) & set(ends)
    others = [] if alone else suffixes_of(own_engine, PASSAGE, 6, ends)
    monkeypatch.setattr(exact_extract, "ending", lambda *given: ends)
    monkeypatch.setattr(
        exact_extract,
        "suffixes_of",
        lambda *given: [*others, Suffix(0, tuple(said), (1, 2, 3))],
    )
    events = extract(own_engine)
    numbers, (greedy,) = metrics(events), group(events, "greedy")
    assert [token.id for token in surviving(events, "greedy")] == said
    assert numbers["extractive"] == 1 and numbers["gap"] >= 0
    assert group(events, "spans")[0].logprob >= greedy.logprob - 1e-4
    best = [token.id for token in surviving(events)]
    assert numbers["optimal"] == (best == said)


@pytest.mark.parametrize("raw", [True, False])
def test_the_prompt_holds_passage_and_question(own_engine, raw, monkeypatch):
    seen = []
    encode = own_engine.encode
    monkeypatch.setattr(own_engine, "encode", lambda task: seen.append(task) or encode(task))
    extract(own_engine, "One\n  two.", raw=raw, longest=6)
    text = seen[0].prompt if raw else seen[0].prompt[-1]["content"]
    assert "Text: One two." in text and f"Question: {QUESTION}" in text
    assert (text + seen[0].prefix).endswith("Answer:")


@pytest.mark.parametrize("passage", ["", " \n ", None])
def test_no_passage_is_refused(tiny_engine, passage):
    inputs = {} if passage is None else {"passage": passage}
    with pytest.raises(BadInput, match=r"^There is no passage"):
        next(exact_extract.run(tiny_engine, Task("Who?", inputs=inputs), Params(), Context(1)))


def test_other_impossible_tasks_are_refused(tiny_engine):
    def refused(task: Task, params: Params = DEFAULTS) -> str:
        with pytest.raises(BadInput) as error:
            next(exact_extract.run(tiny_engine, task, params, Context(1)))
        return str(error.value)

    given = {"passage": PASSAGE}
    assert "no question" in refused(Task(" ", inputs=given))
    assert "begun answer" in refused(Task("Who?", prefix="It", inputs=given))
    assert "no span" in refused(Task("Who?", inputs={"passage": "..."}), Params(end="sentence"))
    with pytest.raises(OutOfContext, match=r"passage is too long.*context holds 512"):
        extract(tiny_engine, "word " * 120)


# The default model


def test_exact_is_brute_force_on_the_default_model(smollm):
    assert len(smollm.tokens(SHORT)) <= 10
    expected = brute(smollm, SHORT, 3)
    events = extract(smollm, SHORT, raw=True, longest=3)
    best = max(expected, key=expected.__getitem__)
    assert tuple(token.id for token in surviving(events)) == best
    assert group(events, "spans")[0].logprob == pytest.approx(expected[best], abs=1e-4)
    assert metrics(events)["tokens read"] < metrics(events)["tokens"]


# The benchmark


def test_answers_are_compared_as_squad_does():
    assert bench.words("The  Eiffel-Tower, a b!") == ["eiffeltower", "b"]
    assert bench.f1("the red house", "a red door") == pytest.approx(0.5)
    assert bench.f1("", "x") == 0 and bench.f1("An X.", "x") == 1


def test_intervals():
    assert bench.wilson(16, 50) == pytest.approx((0.2076, 0.4581), abs=1e-3)
    assert bench.wilson(0, 50)[0] == 0 and bench.wilson(50, 50)[1] == 1
    low, high = bench.bootstrap([0.0, 0.5, 1.0] * 10)
    assert 0.3 < low < 0.5 < high < 0.7


def test_the_benchmark_gives_rows_and_its_passages_hold_their_answers(own_engine, monkeypatch):
    lines = [json.loads(line) for line in bench.PASSAGES.read_text("utf-8").splitlines()]
    assert len(lines) == len({line["passage"] for line in lines}) == 50
    assert all(line["answer"] in line["passage"] for line in lines)
    monkeypatch.setattr(bench, "load", lambda model: own_engine)
    rows = bench.measure(lambda what: None, count=1)
    assert len({row["name"] for row in rows}) == len(rows)
    assert {row["unit"] for row in rows} == {"%", "tokens", "s"}
    with pytest.raises(BadInput, match="50 passages"):
        bench.measure(lambda what: None, count=51)
