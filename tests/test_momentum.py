"""Momentum decoding: paths are found as the source finds them, and loops cost what they should."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from analyzers.context import Context
from analyzers.decoding import momentum, sampling
from analyzers.decoding.momentum import GREEDY, JUMP, NEW, Params, choose, diversity, walked
from analyzers.engine import Engine
from analyzers.errors import BadParameter
from analyzers.task import Task, chat
from analyzers.trace import Metric, Scores, Token, surviving
from tests import tiny
from tests.events import ids_of

TEXT = "The quick brown fox jumps over the lazy dog; twice."
SEEN = [5, 7, 8, 9, 7, 8]
# And after how many tokens that shows.
LOOPING = {
    "The best way to learn a language is": 40,
    "Once upon a time there was a king who": 40,
    "In this paper we": 64,
}


def write(engine: Engine, task: Task | str, **knobs) -> list:
    task = Task(task) if isinstance(task, str) else task
    return list(momentum.run(engine, task, Params(**knobs), Context(1)))


def greedy(engine: Engine, task: Task | str, max_new: int) -> list[int]:
    task = Task(task) if isinstance(task, str) else task
    params = sampling.Params(temperature=0, top_p=1, max_new=max_new)
    return ids_of(sampling.run(engine, task, params, Context(1)))


def searched(ids: Sequence[int], id: int) -> int:
    """The official search: at every place where `id` occurred, how far back it agrees."""
    best = 0
    for place, other in enumerate(ids):
        if other == id:
            best = max(best, 1)
            for i in range(2, 6):
                behind = [*ids[len(ids) - i + 1 :], id]
                if len(behind) == i and list(ids[max(0, place - i + 1) : place + 1]) == behind:
                    best = max(best, i)
    return best


def logits(**p: float) -> torch.Tensor:
    """Of a vocabulary of ten with these probabilities; the others share what is left."""
    given = {int(name[1:]): value for name, value in p.items()}
    rest = (1 - sum(given.values())) / (10 - len(given))
    return torch.tensor([given.get(id, rest) for id in range(10)]).log()


def named(events, name: str) -> list[Scores]:
    return [event for event in events if isinstance(event, Scores) and event.name == name]


def test_lengths_of_the_worked_case():
    graph = walked([SEEN])
    assert [graph.length(id) for id in (9, 5, 4)] == [3, 1, 0]
    assert [searched(SEEN, id) for id in (9, 5, 4)] == [3, 1, 0]


def test_scores_of_the_worked_case():
    made = choose(logits(t9=0.5, t5=0.3, t4=0.15), walked([SEEN]), Params(k=3))
    assert made.ids == (9, 5, 4) and made.lengths == (3, 1, 0)
    assert made.scores == pytest.approx((-0.30, 0.10, 0.15), abs=1e-6)
    assert made.ids[made.chosen] == 4 and made.label == JUMP


def test_labels_and_natural_repetition():
    graph = walked([SEEN])
    assert choose(logits(t4=0.9), graph, Params()).label == NEW
    # A peaked distribution walks on, although 9 was there behind 8: .85 - .8 > .03 - .2.
    stays = choose(logits(t9=0.97), graph, Params())
    assert stays.label == GREEDY and stays.ids[stays.chosen] == 9


def test_ties_go_to_the_likelier_and_barred_candidates_to_no_one():
    graph = walked([SEEN])
    tie = choose(logits(t5=0.5, t4=0.25), graph, Params(alpha=0.25, k=2))
    assert tie.scores == (0.25, 0.25) and tie.ids[tie.chosen] == 5
    one = choose(logits(t9=0.5, t5=0.3), graph, Params(k=2, table=(0, 1)))
    assert one.scores[0] is None and one.ids[one.chosen] == 5
    none = choose(logits(t9=0.5, t5=0.3), graph, Params(k=2, table=(0,)))
    assert none.scores == (None, None) and none.chosen == 0


@pytest.mark.parametrize("alphabet", [2, 3, 12])
def test_paths_are_those_of_the_official_search(alphabet):
    rng = random.Random(alphabet)
    for _ in range(30):
        ids = [rng.randrange(alphabet) for _ in range(rng.randrange(40))]
        graph = walked([ids])
        for id in range(alphabet):
            assert graph.length(id) == searched(ids, id)


def test_lengths_are_those_before_the_token_and_count_the_prompt(tiny_engine):
    events = write(tiny_engine, TEXT, max_new=40)
    before = tiny_engine.encode(Task(TEXT))
    for token, length in zip(surviving(events), named(events, "repetition length"), strict=True):
        assert length.over == (token.pos,) and length.values == (searched(before, token.id),)
        before.append(token.id)


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_a_price_of_zero_writes_what_greedy_writes(tiny_engine, k):
    for text in (TEXT, "abcabcabc"):
        assert ids_of(write(tiny_engine, text, alpha=0.0, k=k, max_new=40)) == greedy(
            tiny_engine, text, 40
        )


def test_one_candidate_is_greedy(tiny_engine):
    assert ids_of(write(tiny_engine, TEXT, k=1, max_new=30)) == greedy(tiny_engine, TEXT, 30)


def test_a_short_table_lets_no_path_of_four_come_again(own_engine):
    """With every token to choose from, some candidate always avoids it."""
    events = write(own_engine, "abcd" * 8, k=1000, table=(0, 0, 0, 0), max_new=150)
    answer = ids_of(events)
    ids = [*own_engine.encode(Task("abcd" * 8)), *answer]
    counts = Counter(tuple(ids[i : i + 4]) for i in range(len(ids) - 3))
    new = [tuple(ids[i : i + 4]) for i in range(len(ids) - len(answer) - 3, len(ids) - 3)]
    assert len(answer) == 150 and all(counts[gram] == 1 for gram in new)
    for score, p in zip(named(events, "score"), named(events, "probability"), strict=True):
        assert len(score.over) <= len(p.over)  # barred candidates have none


def test_every_token_says_its_candidates(tiny_engine):
    events = write(tiny_engine, TEXT, max_new=20)
    tokens = surviving(events)
    p, lengths, scores = (
        named(events, name) for name in ("probability", "candidate length", "score")
    )
    resistance, labels = named(events, "resistance"), named(events, "path")
    rows = zip(tokens, p, lengths, scores, resistance, labels, strict=True)
    prices = [0.0, 0.2, 0.6, 0.8, 1.0, 1.0]
    for token, p, lengths, scores, resistance, label in rows:
        assert p.over == lengths.over == scores.over and len(p.over) == 5
        assert p.values == tuple(sorted(p.values, reverse=True))
        expected = [q - prices[n] for q, n in zip(p.values, lengths.values, strict=True)]
        assert scores.values == pytest.approx(expected, abs=2e-6)
        chosen = scores.values.index(max(scores.values))
        assert tiny_engine.vocabulary.display(token.id) == p.over[chosen]
        assert resistance.values[0] == pytest.approx(prices[lengths.values[chosen]], abs=2e-6)
        assert label.values[0] == (0 if lengths.values[0] == 0 else 1 if chosen == 0 else 2)
        assert token.p_sampled == 1.0 and token.origin == "sampled"


def test_diversity_counts_what_repeats():
    assert diversity([1, 2, 1, 2, 1, 2]) == (
        pytest.approx(100 * (2 / 5) * (2 / 4) * (2 / 3)),
        {2: pytest.approx(60), 3: pytest.approx(50), 4: pytest.approx(100 / 3)},
    )
    assert diversity(range(9)) == (100, {2: 0, 3: 0, 4: 0})
    assert diversity([1]) == (100, {2: 0, 3: 0, 4: 0})


def test_summaries_come_on_the_way_and_at_the_end(own_engine):
    events = write(own_engine, TEXT, max_new=20)
    metrics = [event for event in events if isinstance(event, Metric)]
    assert [metric.step for metric in metrics if metric.name == "diversity"] == [16, 20]
    tokens = surviving(events)
    ratio = next(m.value for m in reversed(metrics) if m.name == "greedy ratio")
    assert ratio == pytest.approx(sum(token.rank == 1 for token in tokens) / 20)
    assert metrics[-1].name == "rep-4" and metrics[-1].step == 20
    value = next(m.value for m in reversed(metrics) if m.name == "diversity")
    assert value == pytest.approx(diversity(ids_of(events))[0], abs=1e-5)


def test_goes_on_from_an_earlier_run_as_if_it_had_not_stopped(own_engine):
    task = Task(chat(TEXT))
    for count in (True, False):
        whole = write(own_engine, task, max_new=24, count_template=count)
        kept = tuple(surviving(whole)[:9])
        rest = write(own_engine, Task(task.prompt, written=kept), max_new=15, count_template=count)
        assert ids_of(rest) == ids_of(whole)
        assert named(rest, "path") == named(whole, "path")[9:]
        for score, same in zip(named(rest, "score"), named(whole, "score")[9:], strict=True):
            assert score.over == same.over
            assert score.values == pytest.approx(same.values, abs=1e-5)


def test_the_template_can_be_left_out(tiny_engine):
    task = Task(chat("abcd", system="efgh"))
    graph = walked(momentum.contents(tiny_engine, task))
    end, assistant = tiny_engine.encode(task)[0], tiny_engine.encode(task)[-1]
    for id in (end, assistant, *tiny_engine.tokens("u:\n")):
        assert graph.length(id) == 0
    assert [graph.length(id) for id in tiny_engine.tokens("aeh")] == [1, 1, 1]
    whole = walked([tiny_engine.encode(task)])
    assert whole.length(assistant) == 1
    # Nothing leads from one text to the next.
    graph.start()
    for id in tiny_engine.tokens("gh"):
        graph.walk(id)
    assert graph.length(tiny_engine.tokens("a")[0]) == 1


@pytest.mark.parametrize("table", [(), (0, 1, 3, 4, 5, 5, 6), (0, -1)])
def test_a_table_that_makes_no_sense_is_refused(tiny_engine, table):
    with pytest.raises(BadParameter, match=r"^table must be 1 to 6 whole numbers"):
        write(tiny_engine, TEXT, table=table)


def test_ends_with_the_end_token_and_at_the_window():
    engine = tiny.engine()
    engine._ends = frozenset(range(256))
    run = momentum.run(engine, Task(TEXT), Params(), Context(1))
    events = []
    with pytest.raises(StopIteration) as end:
        while True:
            events.append(next(run))
    assert end.value.value == "end token" and len(surviving(events)) == 1
    engine._ends = frozenset()
    full = list(momentum.run(engine, Task("a" * (tiny.CONTEXT - 3)), Params(), Context(1)))
    assert len([event for event in full if isinstance(event, Token)]) == 3


def test_greedy_loops_and_momentum_does_not(smollm):
    for text, length in LOOPING.items():
        looped, _ = diversity(greedy(smollm, text, length))
        varied, _ = diversity(ids_of(write(smollm, text, max_new=length)))
        assert varied > looped, text
        assert varied > 60, text
