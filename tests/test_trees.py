"""Drafts: one pass over a tree says what one pass per branch says, and committing is exact."""

import pytest
import torch

from analyzers.engine import Cursor, Engine, Filters, Options, Tree
from analyzers.errors import BadInput, OutOfContext, Stopped
from analyzers.task import Task
from tests import tiny
from tests.test_engine import CLOSE, TEXT, full

# Two children of the root, a branch in the middle, and siblings with the same token.
TREE = Tree((70, 71, 72, 73, 74, 72, 75), (-1, -1, 0, 0, 3, 1, 4))


def begin(engine: Engine, length: int = 30) -> Cursor:
    return engine.prefill(engine.encode(Task(TEXT))[:length])


def test_a_tree_is_one_pass_per_branch(any_engine):
    """Past the sliding window (8), where a family has one."""
    cursor = begin(any_engine)
    checked = any_engine.verify(cursor, TREE, taps=(1, 3))
    for node in range(-1, len(TREE)):
        ids = [*cursor.ids, *(TREE.ids[i] for i in checked.path(node))]
        torch.testing.assert_close(
            checked.raw[node + 1].float(), full(any_engine, ids)[-1], **CLOSE
        )
        alone = any_engine.step(any_engine.prefill(ids), taps=(1, 3))
        for layer in (1, 3):
            torch.testing.assert_close(
                checked.hidden[layer][node + 1], alone.hidden[layer], **CLOSE
            )


@pytest.mark.parametrize("node", [-1, 1, 2, 6])
def test_after_a_commit_everything_is_as_if_written_token_by_token(any_engine, node):
    cursor = begin(any_engine)
    before = list(cursor.ids)
    checked = any_engine.verify(cursor, TREE)
    path = checked.path(node)
    any_engine.commit(cursor, path)
    assert cursor.ids == before + [TREE.ids[i] for i in path]
    assert cursor.cached == cursor.pos
    any_engine.push(cursor, 80)
    for _ in range(3):
        raw = any_engine.step(cursor).raw
        torch.testing.assert_close(raw, full(any_engine, cursor.ids)[-1], **CLOSE)
        any_engine.push(cursor, 81)


@pytest.mark.parametrize(
    "then",
    [
        lambda engine, cursor: None,
        lambda engine, cursor: engine.push(cursor, 90),
        lambda engine, cursor: engine.extend(cursor, [90, 91, 92]),
        lambda engine, cursor: list(engine.read(cursor, [90, 91])),
        lambda engine, cursor: engine.rewind(cursor, 12),
        lambda engine, cursor: engine.verify(cursor, Tree.chain([60, 61])),
        lambda engine, cursor: engine.score(cursor, [[60], [61, 62]]),
        lambda engine, cursor: engine.step([cursor, engine.fork(cursor)]),
    ],
)
def test_a_tree_that_is_not_committed_leaves_nothing(tiny_engine, then):
    cursor = begin(tiny_engine)
    tiny_engine.verify(cursor, TREE)
    then(tiny_engine, cursor)
    raw = tiny_engine.step(cursor).raw
    torch.testing.assert_close(raw, full(tiny_engine, cursor.ids)[-1], **CLOSE)


def test_a_growing_tree_computes_only_what_is_new(any_engine):
    """As a draft model grows it: level by level."""
    cursor = begin(any_engine)
    for size in (0, 2, 4, len(TREE)):
        tree = Tree(TREE.ids[:size], TREE.parents[:size])
        checked = any_engine.verify(cursor, tree)
        assert cursor.past.length() == cursor.pos + size
    whole = any_engine.verify(begin(any_engine), TREE)
    torch.testing.assert_close(checked.raw, whole.raw, **CLOSE)
    any_engine.commit(cursor, checked.path(6))
    any_engine.push(cursor, 80)
    raw = any_engine.step(cursor).raw
    torch.testing.assert_close(raw, full(any_engine, cursor.ids)[-1], **CLOSE)


def test_taps_of_a_growing_tree_are_those_of_the_whole(tiny_engine):
    cursor = begin(tiny_engine)
    for size in (0, 1, 2, 5, len(TREE)):  # one node at a time, and several
        grown = tiny_engine.verify(cursor, Tree(TREE.ids[:size], TREE.parents[:size]), taps=(0, 2))
    whole = tiny_engine.verify(begin(tiny_engine), TREE, taps=(0, 2))
    for layer in (0, 2):
        assert len(grown.hidden[layer]) == 1 + len(TREE)
        torch.testing.assert_close(grown.hidden[layer], whole.hidden[layer], **CLOSE)


def test_ancestors_are_the_path_to_the_root():
    for node in range(len(TREE)):
        assert tuple(TREE.ancestors[node].nonzero()[:, 0].tolist()) == TREE.path(node)
    assert Tree((), ()).ancestors.shape == (0, 0)


def test_a_large_tree_in_several_passes_is_the_same(tiny_engine, monkeypatch):
    whole = tiny_engine.verify(begin(tiny_engine), TREE)
    monkeypatch.setattr("analyzers.engine.writing.CHUNK", 3)
    cursor = begin(tiny_engine)
    pieces = tiny_engine.verify(cursor, TREE)
    torch.testing.assert_close(pieces.raw, whole.raw, **CLOSE)
    tiny_engine.commit(cursor, pieces.path(6))
    tiny_engine.push(cursor, 80)
    raw = tiny_engine.step(cursor).raw
    torch.testing.assert_close(raw, full(tiny_engine, cursor.ids)[-1], **CLOSE)


def test_a_chain_is_a_tree_and_moves_no_rows(tiny_engine):
    cursor = begin(tiny_engine)
    checked = tiny_engine.verify(cursor, Tree.chain([70, 71, 72]))
    layer = cursor.past.layers[0]
    buffers, rows = layer.buffers, slice(0, cursor.pos + 2)
    kept = [buffer[:, :, rows].clone() for buffer in buffers]
    tiny_engine.commit(cursor, checked.path(1))
    assert layer.buffers is buffers and layer.length == cursor.pos == rows.stop
    for buffer, before in zip(buffers, kept, strict=True):
        assert torch.equal(buffer[:, :, rows], before)


def test_the_step_behind_a_node_is_filtered_with_its_own_path(tiny_engine):
    filters = Filters(temperature=0.7, top_k=5, repetition_penalty=1.4)
    cursor = begin(tiny_engine)
    there = tiny_engine.verify(cursor, TREE).step(4, ban={65}, filters=filters)
    alone = tiny_engine.prefill([*cursor.ids, 70, 73, 74])
    expected = tiny_engine.step(alone, ban={65}, filters=filters)
    torch.testing.assert_close(there.logits, expected.logits, **CLOSE)
    assert (there.pos, there.before) == (expected.pos, expected.before)


def test_merging_shares_beginnings_and_nothing_else():
    tree, paths = Tree.merged([[1, 2, 3], [1, 2], [2, 1], [], [1, 2, 3]])
    assert tree == Tree((1, 2, 3, 2, 1), (-1, 0, 1, -1, 3))
    assert paths == [(0, 1, 2), (0, 1), (3, 4), (), (0, 1, 2)]


@pytest.mark.parametrize(
    ("ids", "parents", "says"),
    [
        ((1, 2), (-1, 2), "Node 1 .* parent 2"),  # after its child
        ((1, 2), (1, 0), "Node 0"),  # a cycle
        ((1,), (0,), "Node 0"),  # its own parent
        ((1,), (-2,), "Node 0"),
        ((1, 2), (-1,), "2 nodes and 1 parents"),
    ],
)
def test_what_is_no_tree_is_refused(ids, parents, says):
    with pytest.raises(BadInput, match=says):
        Tree(ids, parents)


def test_trees_that_do_not_fit_are_refused_and_change_nothing(tiny_engine):
    cursor = tiny_engine.prefill([65] * (tiny.CONTEXT - 2))
    before = tiny_engine.step(cursor).raw
    tiny_engine.verify(cursor, Tree.chain([70, 71]))
    with pytest.raises(OutOfContext, match="513 tokens"):
        tiny_engine.verify(cursor, Tree.chain([70, 71, 72]))
    with pytest.raises(BadInput, match="no token 259"):
        tiny_engine.verify(cursor, Tree.chain([259]))
    torch.testing.assert_close(tiny_engine.step(cursor).raw, before, **CLOSE)


def test_only_a_path_of_the_last_tree_can_be_committed(tiny_engine):
    cursor = begin(tiny_engine)
    with pytest.raises(BadInput, match="no verified tree"):
        tiny_engine.commit(cursor, (0,))
    tiny_engine.verify(cursor, TREE)
    for path in ((2,), (0, 1), (0, 2, 4), (99,), (-1,)):
        with pytest.raises(BadInput, match="no path"):
            tiny_engine.commit(cursor, path)
    tiny_engine.commit(cursor, (0, 2))
    with pytest.raises(BadInput, match="no verified tree"):
        tiny_engine.commit(cursor, (0,))


def test_a_stopped_verification_leaves_the_cursor_as_it_was(tiny_engine, monkeypatch):
    monkeypatch.setattr("analyzers.engine.writing.CHUNK", 3)
    cursor = begin(tiny_engine)
    expected = tiny_engine.step(cursor).raw
    polls = iter([None, None])

    def poll() -> None:
        if next(polls, 1):
            raise Stopped("stopped")

    monkeypatch.setattr(tiny_engine, "poll", poll)
    ids = list(cursor.ids)
    with pytest.raises(Stopped):
        tiny_engine.verify(cursor, TREE)
    monkeypatch.setattr(tiny_engine, "poll", lambda: None)
    assert cursor.ids == ids and cursor.checked is None
    torch.testing.assert_close(tiny_engine.step(cursor).raw, expected, **CLOSE)
    raw = tiny_engine.verify(cursor, TREE).raw[0]
    torch.testing.assert_close(raw, expected, **CLOSE)


def test_cursors_that_step_together_are_copied_once(tiny_engine):
    """The same buffers serve step after step; each cursor stays free to go its own way."""
    cursors = [begin(tiny_engine, n) for n in (3, 11, 30)]
    tiny_engine.step(cursors)
    home = [cursor.past.layers[1].home for cursor in cursors]
    assert len({id(batch) for batch, _ in home}) == 1
    for _ in range(3):
        for cursor in cursors:
            tiny_engine.push(cursor, 77)
        tiny_engine.step(cursors)
    assert [cursor.past.layers[1].home for cursor in cursors] == home
    tiny_engine.rewind(cursors[0], 2)  # alone, in the middle of it
    tiny_engine.extend(cursors[1], [78] * 200)  # out of the common buffers
    for cursor in cursors:
        tiny_engine.push(cursor, 79)
    for cursor, step in zip(cursors, tiny_engine.step(cursors), strict=True):
        torch.testing.assert_close(step.raw, full(tiny_engine, cursor.ids)[-1], **CLOSE)


def test_a_cursor_cannot_be_twice_in_a_batch(tiny_engine):
    cursor = begin(tiny_engine)
    with pytest.raises(BadInput, match="only once"):
        tiny_engine.step([cursor, cursor])


def test_buffers_of_a_cache_that_is_gone_serve_the_next_one(own_engine):
    """Only within the same mode: what inference mode made may not be written to outside of it."""
    with torch.inference_mode():
        cursor = begin(own_engine)
        gone = {buffer.data_ptr() for layer in cursor.past.layers for buffer in layer.buffers}
        del cursor
        again = begin(own_engine)
        assert gone == {b.data_ptr() for layer in again.past.layers for b in layer.buffers}
        kept = own_engine.step(again).raw
        branch = own_engine.fork(again)  # while the first is alive, it has its own
        assert not gone & {b.data_ptr() for layer in branch.past.layers for b in layer.buffers}
        del branch
    del again
    outside = begin(own_engine)
    torch.testing.assert_close(own_engine.step(outside).raw, kept, **CLOSE)


def test_no_more_than_a_little_is_kept_for_later(own_engine, monkeypatch):
    monkeypatch.setattr("analyzers.engine.cache.SPARE", 0)
    before = own_engine._spare._bytes
    cursor = begin(own_engine)
    del cursor
    assert own_engine._spare._bytes == before


def test_other_taps_are_taken_from_the_whole_tree_again(tiny_engine):
    cursor = begin(tiny_engine)
    tiny_engine.verify(cursor, Tree(TREE.ids[:3], TREE.parents[:3]))
    again = tiny_engine.verify(cursor, TREE, taps=(2,))
    whole = tiny_engine.verify(begin(tiny_engine), TREE, taps=(2,))
    torch.testing.assert_close(again.hidden[2], whole.hidden[2], **CLOSE)
    none = tiny_engine.verify(cursor, TREE)
    torch.testing.assert_close(none.raw, whole.raw, **CLOSE)


@pytest.mark.parametrize(
    "options", [Options(upto=2), Options(skip=frozenset({(2, "attention")}))], ids=["upto", "skip"]
)
@pytest.mark.parametrize("node", [1, 6])
def test_layers_that_were_skipped_compute_what_was_committed_later(any_engine, options, node):
    cursor = begin(any_engine)
    any_engine.step(cursor)
    checked = any_engine.verify(cursor, TREE, options=options)
    any_engine.commit(cursor, checked.path(node))
    any_engine.push(cursor, 80)
    assert cursor.cached < cursor.pos - 1  # the skipped ones are behind
    any_engine.rewind(cursor, 25)  # before what the options wrote
    any_engine.extend(cursor, [81, 82])
    raw = any_engine.step(cursor).raw
    torch.testing.assert_close(raw, full(any_engine, cursor.ids)[-1], **CLOSE)
