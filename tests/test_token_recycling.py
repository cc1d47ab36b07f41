"""Token recycling: the matrix holds what was last seen, the tree is filled from it, the text is
the model's own whatever the matrix says."""

from collections import Counter

import numpy as np
import pytest
import torch

from analyzers.common.acceptance import follow
from analyzers.common.drafts import Draft, Outcome, Verdict
from analyzers.common.lookup import Slot
from analyzers.common.speculation import Target
from analyzers.context import Context, Forgotten
from analyzers.decoding import sampling
from analyzers.drafting import token_recycling
from analyzers.drafting.token_recycling import (
    LOOKED_UP,
    NAME,
    RECYCLED,
    RECYCLED_ALONE,
    TEMPLATE,
    UNKNOWN,
    K,
    Params,
    Recycling,
    both,
    known,
    recycle,
    successors,
)
from analyzers.engine import Engine, Filters, Step, Tree
from analyzers.engine.cost import Cost
from analyzers.task import Task, chat
from analyzers.trace import Note, text_of
from tests.events import mean_length, trees_of

TEXT = Task("The quick brown fox. The quick brown")


def run(
    engine: Engine, task: Task = TEXT, artifacts=None, cost: Cost | None = None, **knobs
) -> list:
    ctx = Context(1, cost=cost, artifacts=artifacts or Forgotten())
    return list(token_recycling.run(engine, task, Params(**knobs), ctx))


def plain(engine: Engine, task: Task = TEXT, max_new: int = 24) -> str:
    params = sampling.Params(temperature=0.0, max_new=max_new)
    return text_of(sampling.run(engine, task, params, Context(1)))


def keeping(matrix: np.ndarray) -> Forgotten:
    """Artifacts of a run that left this matrix."""
    artifacts = Forgotten()
    artifacts.put(NAME, "matrix", matrix.tobytes())
    return artifacts


def empty(engine: Engine) -> np.ndarray:
    return np.full((engine.vocabulary.size, K), UNKNOWN, np.int32)


def random_matrix(size: int, seed: int = 0) -> np.ndarray:
    """Every row full, no token twice in it."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(size, K, replace=False) for _ in range(size)]).astype(np.int32)


def likeliest(step: Step) -> list[int]:
    """By its logits: the padding of the model's table is excluded there."""
    return step.logits.topk(K).indices.tolist()


def paths_of(tree: Tree) -> set[tuple[int, ...]]:
    return {tuple(tree.ids[i] for i in tree.path(node)) for node in range(len(tree))}


# The template


def test_the_template_is_that_of_the_paper():
    assert len(TEMPLATE) == 80
    assert Counter(map(len, TEMPLATE)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert all(path[:-1] in TEMPLATE for path in TEMPLATE if len(path) > 1)


def test_the_whole_template_is_filled_from_the_rows_of_the_parents():
    matrix, text = random_matrix(300), [5, 17]
    params = Params(drafts="template", budget=80, fit=False)
    draft = Recycling(matrix, params, Context(1)).propose(text, 99)
    expected = set()
    for ranks in TEMPLATE:  # step 3 of the algorithm, path by path
        path, token = [], text[-1]
        for rank in ranks:
            token = int(matrix[token, rank])
            path.append(token)
        expected.add(tuple(path))
    assert len(draft.tree) == 80 and paths_of(draft.tree) == expected
    assert all(parent < node for node, parent in enumerate(draft.tree.parents))


def test_a_smaller_template_is_its_likeliest_part():
    matrix = random_matrix(300)

    def draft(most: int, depth: int = 99) -> Draft:
        params = Params(drafts="template", budget=most)
        return Recycling(matrix, params, Context(1)).propose([5], depth)

    whole, some = draft(80), draft(12)
    assert some.tree.ids == whole.tree.ids[:12] and some.tree.parents == whole.tree.parents[:12]
    assert min(some.values) >= max(whole.values[12:])
    assert max(draft(80, depth=2).tree.depths) == 2 and len(draft(80, depth=2).tree) == 29


# The matrix


def test_the_last_node_of_a_token_wins_and_other_rows_stay():
    matrix = random_matrix(40)
    before, raw = matrix.copy(), torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    recycle(matrix, [3, 9, 3, 7], raw)
    best = raw[:, :40].topk(K).indices.tolist()
    assert [matrix[i].tolist() for i in (3, 9, 7)] == [best[2], best[1], best[3]]
    others = [i for i in range(40) if i not in (3, 7, 9)]
    assert (matrix[others] == before[others]).all()


def test_a_step_recycles_the_root_and_every_node_rejected_ones_as_well(tiny_engine):
    matrix = random_matrix(tiny_engine.vocabulary.size)
    before, cursor = matrix.copy(), tiny_engine.prefill(tiny_engine.encode(TEXT))
    drafter = Recycling(matrix, Params(drafts="recycled", budget=12), Context(1))
    draft = drafter.propose(cursor.ids, 99)
    checked = tiny_engine.verify(cursor, draft.tree)
    target = Target(checked, Filters(temperature=0.0))
    verdict = follow(target, draft, lambda: 0.5)
    assert len(verdict.path) < len(draft.tree) == 12
    drafter.learn(Outcome(cursor.ids, draft, checked, verdict, target))
    last = {id: node for node, id in enumerate(draft.tree.ids)}
    last.setdefault(cursor.ids[-1], -1)
    for id, node in last.items():
        assert matrix[id].tolist() == likeliest(checked.step(node))
    untouched = [id for id in range(len(matrix)) if id not in last]
    assert (matrix[untouched] == before[untouched]).all()


def test_the_models_own_successors_are_those_behind_the_begin_of_a_text(tiny_engine):
    count = tiny_engine.vocabulary.size - 1  # more than one pass holds
    begin = tiny_engine.encode(Task(chat("\n")))[0]
    matrix = successors(tiny_engine, count)
    assert known(matrix) == count and (matrix[count:] == UNKNOWN).all()
    for id in (0, 7, 255, count - 1):
        step = tiny_engine.step(tiny_engine.prefill([begin, id]))
        assert matrix[id].tolist() == likeliest(step)


def test_the_prompt_is_recycled_where_asked_for(tiny_engine):
    ids = tiny_engine.encode(TEXT)
    artifacts = keeping(empty(tiny_engine))
    events = run(tiny_engine, artifacts=artifacts, max_new=1, prompt=True)
    assert text_of(events) == plain(tiny_engine, max_new=1)
    found = np.frombuffer(artifacts.get(NAME, "matrix")[0], np.int32).reshape(-1, K)
    assert known(found) == len(set(ids))
    end = len(ids) - 5  # the last time that this token stands there
    assert ids[end] not in ids[end + 1 :]
    step = tiny_engine.step(tiny_engine.prefill(ids[: end + 1]))
    assert found[ids[end]].tolist() == likeliest(step)


# The tree


def test_looking_up_and_recycling_share_their_nodes():
    matrix = np.full((20, K), UNKNOWN, np.int32)
    matrix[2, :3] = [6, 9, 3]
    drafter = Recycling(matrix, Params(budget=4), Context(1))
    draft = drafter.propose([1, 2, 3, 8, 1, 2], 1)
    chances = dict(zip(draft.tree.ids, draft.values, strict=True))
    assert chances == {
        3: pytest.approx(1 - (1 - LOOKED_UP[1][0]) * (1 - RECYCLED[2])),
        6: pytest.approx(RECYCLED[0]),
        9: pytest.approx(RECYCLED[1]),
    }
    assert draft.tree.ids == (3, 6, 9) and draft.measure == "estimated chance"


def test_without_looking_up_a_rank_has_a_chance_of_its_own():
    matrix = np.full((20, K), UNKNOWN, np.int32)
    matrix[2, :3] = [6, 9, 3]
    drafter = Recycling(matrix, Params(drafts="recycled", budget=4), Context(1))
    draft = drafter.propose([1, 2, 3, 8, 1, 2], 1)
    assert draft.tree.ids == (6, 9, 3) and draft.values == pytest.approx(RECYCLED_ALONE[:3])


def test_what_comes_true_is_drafted_sooner(tiny_engine):
    """A slot's chance rises or falls with what became of its drafts."""
    size = tiny_engine.vocabulary.size
    drafter = Recycling(random_matrix(size), Params(drafts="recycled", budget=8), Context(1))
    before = drafter.propose([5], 1)
    chances = {0: 0.0, 1: 1.0}  # of the first two: never, and for sure
    verdict = Verdict((), 0, "corrected", chances, dict.fromkeys(chances, 0.5))
    checked = tiny_engine.verify(tiny_engine.prefill([5]), before.tree)
    drafter.learn(Outcome([5], before, checked, verdict, Target(checked, Filters())))
    drafter._matrix[:] = random_matrix(size)  # the same drafts again
    after = drafter.propose([5], 1)
    sooner = dict(zip(after.tree.ids, after.values, strict=True))
    never, sure = before.tree.ids[:2]
    assert sooner[never] < before.values[0] and sooner[sure] > before.values[1]


def test_unknown_tokens_have_no_drafts():
    matrix = np.full((20, K), UNKNOWN, np.int32)
    for drafts in ("looked up and recycled", "recycled", "template"):
        drafter = Recycling(matrix, Params(drafts=drafts), Context(1))
        assert not drafter.propose([1, 2, 3], 5).tree.ids


def test_the_chance_of_a_slot_of_one_kind_is_its_own():
    assert both(Slot(rank=3)) == pytest.approx(RECYCLED[3])
    assert both(Slot(match=9)) == pytest.approx(LOOKED_UP[3][0])
    assert len(RECYCLED) == len(RECYCLED_ALONE) == K


def test_a_dear_pass_makes_the_tree_small(tiny_engine):
    dear = Cost(10.0, ((1, 1.0), (2, 1.1), (64, 20.0)), 1000.0, 1)
    free = Cost(1e6, ((1, 1.0), (64, 1.0)), 1000.0, 1)

    def largest(cost: Cost, **knobs) -> int:
        artifacts = keeping(random_matrix(tiny_engine.vocabulary.size))
        events = run(tiny_engine, artifacts=artifacts, cost=cost, max_new=6, **knobs)
        return max((len(tree.ids) for tree in trees_of(events)), default=0)

    assert largest(dear) < 4 < largest(free) == 16 == largest(dear, fit=False)


# The text


@pytest.mark.parametrize("drafts", ["looked up and recycled", "recycled", "template"])
@pytest.mark.parametrize("begun", ["cold", "model", "random", "hot"])
def test_writes_what_greedy_writes_whatever_the_matrix_holds(tiny_engine, drafts, begun):
    artifacts = Forgotten()
    if begun == "random":
        artifacts = keeping(random_matrix(tiny_engine.vocabulary.size))
    if begun == "hot":
        run(tiny_engine, artifacts=artifacts, drafts=drafts, max_new=24)
    start = begun if begun in ("cold", "model") else "hot"
    events = run(
        tiny_engine, artifacts=artifacts, drafts=drafts, start=start, max_new=24, budget=30
    )
    assert text_of(events) == plain(tiny_engine)


def test_what_is_sampled_does_not_depend_on_the_drafts(tiny_engine):
    texts = {
        text_of(run(tiny_engine, temperature=1.0, max_new=24, **knobs))
        for knobs in ({}, {"start": "cold"}, {"drafts": "template", "budget": 80}, {"prompt": True})
    }
    assert len(texts) == 1


def test_a_hot_matrix_is_left_to_the_next_run_and_others_are_not(tiny_engine):
    artifacts = Forgotten()
    for start in ("cold", "model"):
        first = run(tiny_engine, artifacts=artifacts, start=start, max_new=8)
        assert artifacts.get(NAME, "matrix") is None
        assert first == run(tiny_engine, artifacts=artifacts, start=start, max_new=8)
    asked = artifacts.get(NAME, "successors")
    run(tiny_engine, artifacts=artifacts, max_new=8)
    left = artifacts.get(NAME, "matrix")
    assert left is not None and left != asked == artifacts.get(NAME, "successors")
    again = run(tiny_engine, artifacts=artifacts, max_new=8)
    (note,) = [e.text for e in again if isinstance(e, Note) and "matrix" in e.text]
    assert note.startswith("The matrix of earlier runs knows")


def test_the_model_is_asked_for_no_more_than_can_be_afforded(tiny_engine):
    slow = Cost(10.0, ((1, 1.0), (64, 1.0)), 5.0, 1)  # 5 tokens a second
    asked = Forgotten()
    run(tiny_engine, artifacts=asked, cost=slow, start="model", max_new=1)
    found = np.frombuffer(asked.get(NAME, "successors")[0], np.int32).reshape(-1, K)
    assert known(found) == 30


def test_the_same_prompt_again_is_written_in_fewer_passes(smollm):
    """Measured by hand with a tree of 80 from an empty matrix: 1.6, then 2.4 tokens a pass."""
    task, artifacts = Task(chat("Name three colors of the rainbow.")), keeping(empty(smollm))
    knobs = {"drafts": "recycled", "max_new": 16}
    first = run(smollm, task, artifacts, **knobs)
    again = run(smollm, task, artifacts, **knobs)
    assert text_of(first) == text_of(again)
    assert mean_length(again) > 1.3 * mean_length(first) >= 1.3
