"""ADED: the table counts and learns, the search visits what the formula says, the text is plain."""

import heapq
import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from analyzers.common.acceptance import follow
from analyzers.common.drafts import Outcome, Verdict
from analyzers.common.speculation import write
from analyzers.common.trigrams import (
    INCREMENT,
    LENGTH,
    MOST,
    Trigrams,
    exploration,
    ordered,
    paths,
    puct,
    search,
)
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import aded
from analyzers.drafting.aded import Adaptive, Params, proposed
from analyzers.engine import Engine, Tree
from analyzers.engine.cost import Cost
from analyzers.errors import BadParameter
from analyzers.params import FileRef
from analyzers.task import Task
from analyzers.trace import Metric, Note, Token, text_of
from tests.events import mean_length, trees_of

TEXT = Task("The quick brown fox jumps over the lazy dog. The quick brown")
DEAR = Cost(10.0, ((1, 1.0), (2, 1.5), (64, 32.0)), 1000.0, 1)


def random_text(seed: int, length: int = 3000, size: int = 30) -> list[int]:
    """Some pairs of tokens go on in many ways, some in one."""
    rng = random.Random(seed)
    return [min(int(rng.expovariate(0.25)), size - 1) for _ in range(length)]


def run(engine: Engine, history: list[str] | None = None, cost: Cost | None = None, **knobs):
    """The events of a run, and why it ended."""
    ctx = Context(1, cost=cost, history=lambda: iter(history or []))
    events, going = [], aded.run(engine, TEXT, Params(**knobs), ctx)
    while True:
        try:
            events.append(next(going))
        except StopIteration as end:
            return events, end.value


def greedy(engine: Engine, max_new: int) -> str:
    params = sampling.Params(temperature=0.0, max_new=max_new)
    return text_of(sampling.run(engine, TEXT, params, Context(1)))


# The table


def test_shares_are_counts_of_the_pair():
    table = Trigrams([[1, 2, 3, 1, 2, 4, 1, 2, 3], [1, 2, 9]])
    assert table.after((1, 2)) == {3: 0.5, 4: 0.25, 9: 0.25} and table.tokens == 12
    assert table.after((3, 1)) == {2: 1.0}
    assert table.after((2, 3)) == {1: 1.0}  # the second text is no continuation of the first
    assert table.after((2, 9)) == {} and Trigrams().after((1, 2)) == {}


def test_counting_equals_the_slow_obvious_version():
    ids = random_text(3)
    table, counts = Trigrams([ids]), Counter(zip(ids, ids[1:], ids[2:], strict=False))
    for pair in {each[:2] for each in counts}:
        after = {c: n for (*ab, c), n in counts.items() if tuple(ab) == pair}
        kept = sorted(after, key=lambda c: (-after[c], c))[:MOST]
        assert table.after(pair) == {c: after[c] / sum(after.values()) for c in kept}


def test_learning_adds_up_to_the_cap_and_no_further():
    table = Trigrams([[1, 2, 3]])
    assert table.adapt([1, 2, 3, 7]) == 1  # 1 2 3 was there
    assert table.after((1, 2)) == {3: pytest.approx(1.04)}
    assert table.after((2, 3)) == {7: pytest.approx(0.04)}
    for _ in range(100):
        assert table.adapt([1, 2, 3]) == 0
    assert table.after((1, 2)) == {3: 3.0}
    assert table.adapt([5]) == 0 == table.adapt([])


# The search


def test_worked_by_hand():
    """The card's own numbers, N = 10."""
    assert puct(2, 1, 0.3, 10) == pytest.approx(17.5892, abs=1e-4)
    assert puct(5, 5, 0.5, 10) == pytest.approx(9.6607, abs=1e-4)
    assert puct(0, 0, 0.01, 10) == math.inf
    assert exploration(1) == pytest.approx(32 + math.log(10 / 8))


@pytest.mark.parametrize("iterations", [1, 7, 150])
def test_visits_add_up(iterations):
    table, rng = Trigrams([random_text(1)]), random.Random(5)
    tree = search(table.after, (1, 2), iterations, rng)
    assert tree.visits == iterations == sum(child.visits for child in tree.children)
    for ids, node in paths(tree):
        below = sum(child.visits for child in node.children)
        assert 1 <= len(ids) <= LENGTH and below <= node.visits
        # Of the walks through a node at most the first ends there, if it can go on.
        assert node.visits - below <= 1 or len(ids) == LENGTH or not table.after(node.pair)


def test_walks_that_end_at_the_root_are_counted_there():
    tree = search(Trigrams().after, (1, 2), 9, random.Random(1))
    assert (tree.visits, tree.score, tree.children) == (9, 9.0, [])


def test_every_child_is_visited_once_before_any_is_visited_twice():
    table = Trigrams([random_text(1)])
    width = len(table.after((1, 2)))
    tree = search(table.after, (1, 2), width, random.Random(5))
    assert width > 3 and [child.visits for child in tree.children] == [1] * width
    weights = [child.weight for child in tree.children]
    assert weights == sorted(weights, reverse=True)


def test_each_walk_takes_the_child_that_the_formula_prefers():
    """The written-out formula is `puct`: one more walk visits the best child."""
    table = Trigrams([random_text(1)])
    for iterations in range(20, 40):
        tree, more = (
            search(table.after, (1, 2), n, random.Random(5)) for n in (iterations, iterations + 1)
        )
        worth = [puct(c.score, c.visits, c.weight, tree.visits) for c in tree.children]
        gained = [b.visits - a.visits for a, b in zip(tree.children, more.children, strict=True)]
        assert gained.index(1) == worth.index(max(worth)) and sum(gained) == 1


def test_a_walk_is_worth_one_and_its_weights():
    chain = Trigrams([[1, 2, 3, 4, 5, 6]])
    assert search(chain.after, (1, 2), 1, random.Random(1)).score == 4.0  # three steps of 1
    assert search(chain.after, (3, 4), 1, random.Random(1)).score == 3.0
    official = search(chain.after, (1, 2), 5, random.Random(1), official=True)
    assert official.score == 5.0  # nothing is found: all walks are worth 1
    repeated = Trigrams([[2, 2, 2, 2]])  # the one case in which the reference code finds something
    assert search(repeated.after, (2, 2), 1, random.Random(1), official=True).score == 4.0


def test_the_order_in_which_a_table_was_filled_does_not_matter():
    ids = random_text(1)
    table = Trigrams([ids])
    pairs = {pair: table.after(pair) for pair in pairwise(ids)}
    turned = {pair: dict(reversed(weights.items())) for pair, weights in pairs.items()}
    one, two = (search(each.__getitem__, (1, 2), 150, random.Random(3)) for each in (pairs, turned))
    found = [[(ids, node.visits, node.score) for ids, node in paths(tree)] for tree in (one, two)]
    assert found[0] == found[1]


# What is drafted


def expected_length(table: Trigrams, root: tuple[int, int], sequences) -> float:
    """Of the accepted path, if texts were drawn from the table itself."""
    total = 0.0
    for ids in {each[:n] for each in sequences for n in range(1, len(each) + 1)}:
        p, before = 1.0, root
        for id in ids:
            weights = table.after(before)
            p *= weights[id] / sum(weights.values())
            before = (before[1], id)
        total += p
    return total


def along(table: Trigrams, root: tuple[int, int], first: int) -> list[int]:
    """A beginning that goes on with what is heaviest."""
    ids, before = [first], (root[1], first)
    while len(ids) <= LENGTH and table.after(before):
        ids.append(ordered(table.after(before))[0][0])
        before = (before[1], ids[-1])
    return ids


def test_searching_beats_taking_the_heaviest_at_the_same_number_of_tokens():
    gains = []
    for seed in range(6):
        table, root = Trigrams([random_text(seed)]), (seed % 3, 1)
        found = proposed(table, search(table.after, root, 150, random.Random(seed)), 4)
        sequences = [each.ids for each in found]
        simple: list[tuple[int, ...]] = []
        for first in ordered(table.after(root))[0]:
            ids = along(table, root, first)
            simple += [tuple(ids[:n]) for n in range(1, len(ids) + 1)]
        best, heap = [], [(-1.0, ())]
        while len(best) <= len(found):  # the full traversal; () is the root
            p, ids = heapq.heappop(heap)
            best.append(ids)
            weights = table.after((*root, *ids)[-2:]) if len(ids) <= LENGTH else {}
            for id, weight in weights.items():
                heapq.heappush(heap, (p * weight / sum(weights.values()), (*ids, id)))
        lengths = [
            expected_length(table, root, some)
            for some in (simple[: len(found)], sequences, best[1:])
        ]
        assert lengths[0] <= lengths[1] <= lengths[2] + 1e-9
        gains.append(lengths[1] - lengths[0])
    assert min(gains) >= 0 and max(gains) > 0.1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_proposals_are_a_tree_without_repetition(depth):
    table = Trigrams([random_text(2)])
    found = proposed(table, search(table.after, (0, 1), 150, random.Random(1)), depth)
    paths_ = [each.ids for each in found]
    assert max(map(len, paths_)) == depth and len(set(paths_)) == len(paths_)
    for n in range(1, len(found) + 1):  # also of the first few: each beginning comes before
        assert len(Tree.merged(paths_[:n])[0]) == n
    shares = [each.share for each in found]
    assert shares == sorted(shares, reverse=True) and max(shares) <= 1


def test_the_most_visited_are_drafted_and_one_more_behind_each():
    table = Trigrams([[1, 2, 3, 4, 5, 6, 7]])
    found = proposed(table, search(table.after, (1, 2), 10, random.Random(1)), 9)
    assert [each.ids for each in found] == [(3,), (3, 4), (3, 4, 5), (3, 4, 5, 6)]
    assert [each.visits for each in found] == [10, 9, 8, None]


@pytest.mark.parametrize("choices", [1, 5, 64])
def test_never_more_than_choices(tiny_engine, choices):
    events, _ = run(tiny_engine, ["the quick brown fox. " * 5], max_new=12, choices=choices)
    assert trees_of(events) and max(len(tree.ids) for tree in trees_of(events)) <= choices
    tree = trees_of(events)[0]
    assert tree.measure == "visits" and tree.values[0] <= 150


def test_where_a_pass_over_many_tokens_is_dear_few_are_drafted(tiny_engine):
    history = ["".join(f"wn{a}{b}" for a in "abcdef" for b in "abcdef")]  # behind "brown"
    free, _ = run(tiny_engine, history, max_new=12)
    dear, _ = run(tiny_engine, history, max_new=12, cost=DEAR)
    all_of_them, _ = run(tiny_engine, history, max_new=12, cost=DEAR, fit=False)

    def first(events):
        return len(trees_of(events)[0].ids)

    assert 1 <= first(dear) < first(free) == first(all_of_them)
    assert all(tree.cost >= 1.5 + 0.1 for tree in trees_of(dear))  # two tokens, and the search


# The text


def test_greedy_text_is_the_greedy_text_whatever_the_table_says(own_engine):
    plain = greedy(own_engine, 40)
    nonsense = "".join(chr(32 + id) for id in random_text(4, 1000, 90))
    for history in ([], [nonsense], [TEXT.prompt + plain]):
        for knobs in ({}, {"official": True}, {"increment": 0.0}, {"corpus": "none"}):
            events, why = run(own_engine, history, max_new=40, **knobs)
            assert text_of(events) == plain and why == "max_new reached"
            assert {type(event) for event in events} <= {*aded.CARD.emits, Note}


def test_a_text_that_was_written_before_is_drafted_better_if_it_was_learned(own_engine):
    lengths = {}
    for increment in (0.0, 0.04):
        params = Params(max_new=60, increment=increment)
        drafter = Adaptive(Trigrams([random_text(1, 500, 256)]), params, Context(1))
        for time in (1, 2):
            ctx = Context(1)
            cursor = ctx.begin(own_engine, own_engine.encode(TEXT))
            events = list(write(own_engine, cursor, TEXT, params, ctx, drafter, follow))
            lengths[increment, time] = mean_length(events)
    assert lengths[0.04, 2] > 1.5 * lengths[0.04, 1]
    assert lengths[0.0, 2] == pytest.approx(lengths[0.0, 1], abs=0.1)


def test_what_was_new_is_counted(own_engine):
    def learned(**knobs):
        events, _ = run(own_engine, max_new=8, **knobs)
        return [e.value for e in events if isinstance(e, Metric) and "learned" in e.name]

    ids = own_engine.encode(TEXT)
    assert learned()[0] >= len(set(zip(ids, ids[1:], ids[2:], strict=False)))
    assert learned(increment=0.0) == []


def test_sampling_is_seeded(own_engine):
    first, again = (run(own_engine, max_new=30, temperature=1.0)[0] for _ in range(2))
    assert first == again and trees_of(first)
    assert {e.origin for e in first if isinstance(e, Token)} >= {"corrected"}


def test_no_tri_gram_is_missed_and_the_last_ones_are_learned_again():
    table, text = Trigrams(), list(range(60))
    drafter = Adaptive(table, Params(), Context(1))
    for length in (20, 59, 60):  # as after a pause, and after one token
        drafter.propose(text[:length], 1)
    assert drafter.learned == 58
    weights = [table.after((id, id + 1))[id + 2] for id in (0, 19, 50, 57)]
    assert weights == pytest.approx([INCREMENT, INCREMENT, 2 * INCREMENT, INCREMENT])


def test_few_are_drafted_while_few_come_true():
    table, cost = Trigrams([random_text(2)]), Cost(10.0, ((1, 1.0), (64, 4.0)), 1000.0, 1)

    def last_of_many(come_true: bool) -> int:
        drafter = Adaptive(table, Params(increment=0.0), Context(1, cost=cost))
        for _ in range(20):
            draft = drafter.propose((0, 1), 3)
            path = draft.tree.path(len(draft.tree) - 1) if come_true else ()
            drafter.learn(Outcome((0, 1), draft, None, Verdict(path, 0, "bonus"), None))
        return len(draft.tree)

    assert last_of_many(False) == 1 < last_of_many(True)


def test_the_table_begins_with_what_was_chosen(own_engine, tmp_path):
    def said(history=(), **knobs):
        events, _ = run(own_engine, list(history), max_new=1, **knobs)
        return next(event.text for event in events if isinstance(event, Note))

    file = tmp_path / "corpus.txt"
    file.write_text("A text of thirty-one characters", encoding="utf-8")
    assert "no earlier runs" in said()
    assert "earlier runs, 9 tokens" in said(["one two", "xy"])
    assert "begins empty and learns" in said(["one"], corpus="none")
    assert "the chosen file, 31 tokens" in said(corpus="file", file=FileRef(file))
    with pytest.raises(BadParameter, match="cannot be read"):
        run(own_engine, corpus="file", file=FileRef(tmp_path / "none.txt"))
    with pytest.raises(BadParameter, match="empty"):
        run(own_engine, corpus="file")


def test_only_so_much_of_the_history_is_read(own_engine, monkeypatch):
    monkeypatch.setattr(aded, "PIECE", 10)
    pieces = list(aded._tokens(own_engine, ["a" * 25, "b" * 25, "c"], 32))
    assert list(map(len, pieces)) == [10, 10, 5, 7]


def test_tokens_that_the_model_does_not_have_are_not_drafted(own_engine):
    own_engine.vocabulary.size = 256  # as in a model with fewer rows than its tokenizer has tokens
    assert list(aded._tokens(own_engine, ["a<|user|>b"], 99)) == [own_engine.tokens("ab")]
