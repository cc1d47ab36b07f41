"""A draft model: a second one, or the model itself in part; the text stays the model's own."""

import copy

import pytest
import torch

from analyzers.common.proposers import Itself, Second, spread
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.drafting import draft_model
from analyzers.engine import Filters, Options, Tree
from analyzers.errors import BadInput, BadParameter
from analyzers.params import build
from analyzers.task import Task
from tests import tiny
from tests.events import ids_of, trees_of

PROMPT = Task("The quick brown fox")


def written(engine, second=None, **knobs) -> list:
    params = build(draft_model.Params, {"floor": 0.0, "max_new": 24, **knobs})
    engines = {"": engine} | ({params.draft: second} if second else {})
    return list(draft_model.run(engine, PROMPT, params, Context(2, engines=engines)))


def greedy(engine) -> list[int]:
    params = sampling.Params(temperature=0.0, max_new=24)
    return ids_of(sampling.run(engine, PROMPT, params, Context(2)))


@pytest.mark.parametrize("knobs", [{}, {"skip": 0}, {"upto": 1}, {"length": 1}, {"length": 9}])
def test_the_model_drafting_for_itself_writes_its_greedy_text(tiny_engine, knobs):
    assert ids_of(written(tiny_engine, **knobs)) == greedy(tiny_engine)


def test_nothing_skipped_is_always_accepted(tiny_engine):
    trees = trees_of(written(tiny_engine, skip=0))
    assert all(tree.accepted == tuple(range(len(tree.ids))) for tree in trees)
    assert [len(tree.ids) for tree in trees[:4]] == [4, 4, 4, 4]
    sampled = trees_of(written(tiny_engine, skip=0, temperature=1.0))
    assert all(tree.accepted == tuple(range(len(tree.ids))) for tree in sampled)


def test_a_second_model_drafts(tiny_engine):
    """The same weights are always right; others change nothing but the number of passes."""
    twin = tiny.engine("llama", int8=True)
    events = written(tiny_engine, twin, draft="twin")
    assert ids_of(events) == greedy(tiny_engine)
    other = tiny.engine("qwen2")
    events = written(tiny_engine, other, draft="other")
    assert ids_of(events) == greedy(tiny_engine)
    assert len(trees_of(events)) > 8


def test_a_second_model_reads_what_was_written(tiny_engine):
    """Its rows are those of a fresh reading of the whole text, whatever was drafted before."""
    other = tiny.engine("qwen2")
    proposer = Second(tiny_engine, other, Filters(), cost=0.5)
    text = [5, 6, 7]
    for new in ([8, 9], [9, 8, 7], [1], [8, 9, 2]):
        rows = proposer.rows(text, Tree.chain([8, 9]))
        for depth, row in enumerate(rows):
            step = other.step(other.prefill([*text, *[8, 9][:depth]]))
            expected = step.logits.double().softmax(-1)[: other.vocabulary.size]
            assert torch.allclose(row, expected, atol=1e-5)
        text = [*text, *new]


def test_a_longer_tree_computes_only_what_is_new(own_engine):
    cursor = own_engine.prefill([1, 2, 3])
    proposer = Itself(own_engine, cursor, Options(skip=spread(1, 3)), Filters())
    first = proposer.rows([1, 2, 3], Tree.chain([4]))
    kept = [row.clone() for row in first]
    longer = proposer.rows([1, 2, 3], Tree.chain([4, 5]))
    assert len(longer) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, longer, strict=False))
    assert cursor.ids == [1, 2, 3]


def test_the_price_of_a_draft():
    engine = tiny.engine()
    cursor = engine.prefill([1])
    assert Itself(engine, cursor, Options(upto=1), Filters()).cost == pytest.approx(1 / 3)
    assert Itself(engine, cursor, Options(skip=spread(1, 3)), Filters()).cost == pytest.approx(
        2 / 3
    )


def test_layers_left_out_lie_evenly_and_never_at_an_end():
    assert spread(0, 30) == frozenset()
    assert sorted({layer for layer, _ in spread(2, 30)}) == [9, 23]
    assert {layer for layer, _ in spread(99, 4)} == {2, 3}
    assert spread(5, 2) == frozenset()


def test_a_draft_ends_after_an_unlikely_token(tiny_engine):
    trees = trees_of(written(tiny_engine, floor=1.0, length=9))
    assert all(len(tree.ids) == 1 for tree in trees)


def test_another_tokenizer_is_refused(tiny_engine):
    strange = copy.copy(tiny.engine("qwen2"))
    strange.tokenizer = copy.deepcopy(tiny.tokenizer())
    strange.tokenizer.add_tokens(["<|strange|>"])
    with pytest.raises(BadParameter, match=r"cannot draft for .* tokenizers differ"):
        written(tiny_engine, strange, draft="strange")


def test_an_exit_behind_the_last_layer_is_refused(tiny_engine):
    with pytest.raises(BadInput, match="layer 9"):
        written(tiny_engine, upto=9)
    with pytest.raises(BadParameter, match="length"):
        written(tiny_engine, length=0)
