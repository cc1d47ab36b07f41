"""Scores, labels and samples say what reading or writing each text by itself says."""

import math
import random

import pytest
import torch

from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters, Options, Tree
from analyzers.engine.scoring import Labels
from analyzers.engine.signals import draw
from analyzers.errors import BadInput, ModelBroken, OutOfContext, Stopped
from analyzers.task import Task
from tests import tiny
from tests.test_engine import CLOSE, TEXT, full

# Ragged; empty, single, twice the same, and some that begin with others.
MANY = (
    *([70, 71, 72], [70, 71], [70], [], [80], [70, 71, 72]),
    *([70, 90, 91, 92, 93], [81, 82], list(range(60, 75)), [70, 71, 73], [80, 80], []),
)


def begin(engine: Engine, length: int = 20) -> Cursor:
    return engine.prefill(engine.encode(Task(TEXT))[:length])


def alone(engine: Engine, prefix: list[int], ids: list[int]) -> list[float]:
    """The slow obvious version: one forward over the whole text, no cache."""
    rows = torch.log_softmax(full(engine, [*prefix, *ids]), dim=-1)
    return [float(rows[len(prefix) - 1 + place, id]) for place, id in enumerate(ids)]


def agree(engine: Engine, prefix: list[int], scored, continuations=MANY) -> None:
    assert [one.ids for one in scored] == [tuple(ids) for ids in continuations]
    for one in scored:
        assert one.logprobs == pytest.approx(alone(engine, prefix, list(one.ids)), abs=1e-4)
        assert one.total == pytest.approx(sum(one.logprobs))


# Scores


def test_a_score_is_what_reading_each_text_by_itself_says(any_engine):
    """Past the sliding window (8), where a family has one."""
    cursor = begin(any_engine)
    agree(any_engine, cursor.ids, any_engine.score(cursor.ids, MANY))
    agree(any_engine, cursor.ids, any_engine.score(cursor, MANY))


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("what", ["CHUNK", "TREE_LOGITS"])
def test_many_continuations_in_several_passes_score_the_same(tiny_engine, monkeypatch, what, rows):
    size = rows if what == "CHUNK" else rows * tiny_engine.vocabulary.size
    monkeypatch.setattr(f"analyzers.engine.writing.{what}", size)
    monkeypatch.setattr("analyzers.engine.scoring.SOFTMAX_ROWS", 3)
    cursor = begin(tiny_engine)
    before = tiny_engine.forwards
    scored = tiny_engine.score(cursor, MANY)
    assert tiny_engine.forwards - before == -(-(1 + len(Tree.merged(MANY)[0])) // rows)
    agree(tiny_engine, cursor.ids, scored)


def test_a_prefix_is_computed_once(tiny_engine):
    cursor = begin(tiny_engine)
    before = tiny_engine.forwards
    tiny_engine.score(cursor, MANY)
    assert tiny_engine.forwards == before + 1


@pytest.mark.parametrize("pending", [(), (75,), (75, 76, 77)])
@pytest.mark.parametrize("options", [Options(), Options(upto=2), Options(skip={(2, "attention")})])
def test_a_cursor_stays_as_it_is(tiny_engine, pending, options):
    """Also under options: what is written afterwards knows nothing of them."""
    cursor = begin(tiny_engine)
    tiny_engine.step(cursor)
    for id in pending:
        tiny_engine.push(cursor, id)
    ids, cached = list(cursor.ids), cursor.cached
    tiny_engine.score(cursor, MANY, options=options)
    assert cursor.ids == ids and cursor.checked is None
    if options == Options():
        assert cached <= cursor.cached <= cursor.pos
    else:
        assert cursor.cached <= cached
    for id in (78, 79):
        tiny_engine.push(cursor, id)
        raw = tiny_engine.step(cursor).raw
        torch.testing.assert_close(raw, full(tiny_engine, cursor.ids)[-1], **CLOSE)


def test_a_verified_tree_is_forgotten_or_left_to_commit_nothing_wrong(tiny_engine):
    cursor = begin(tiny_engine)
    tiny_engine.verify(cursor, Tree.chain([60, 61]))
    agree(tiny_engine, cursor.ids, tiny_engine.score(cursor, MANY))
    with pytest.raises(BadInput, match="no verified tree"):
        tiny_engine.commit(cursor, (0,))


@pytest.mark.parametrize("stop_at", [0, 1, 2])
@pytest.mark.parametrize("call", ["score", "labels"])
def test_a_stop_in_the_middle_leaves_the_cursor_as_it_was(tiny_engine, monkeypatch, stop_at, call):
    cursor = begin(tiny_engine)
    expected = tiny_engine.step(cursor).raw
    tiny_engine.push(cursor, 75)
    tiny_engine.push(cursor, 76)
    ids, cached = list(cursor.ids), cursor.cached
    polls = iter(range(100))

    def poll() -> None:
        if next(polls) == stop_at:
            raise Stopped("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("analyzers.engine.writing.CHUNK", 3)
        patch.setattr(tiny_engine, "poll", poll)
        with pytest.raises(Stopped):
            if call == "score":
                tiny_engine.score(cursor, MANY)
            else:
                tiny_engine.labels(cursor, {"yes": ["yes", "Yes"], "no": ["no", "No"]})
    assert (cursor.ids, cursor.cached) == (ids, cached)
    agree(tiny_engine, ids, tiny_engine.score(cursor, MANY))
    tiny_engine.rewind(cursor, len(ids) - 2)
    torch.testing.assert_close(tiny_engine.step(cursor).raw, expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "qwen3_moe"])
def test_scores_under_options_are_those_of_steps_under_options(family):
    """An early exit; and a sub-layer that counts as zero, beside which the others stay."""
    engine = tiny.engine(family)
    for options in (Options(upto=2), Options(skip=frozenset({(2, "attention")}))):
        prefix = begin(engine).ids
        for one in engine.score(prefix, MANY[4:8], options=options):
            branch = engine.prefill(prefix, options=options)
            for place, id in enumerate(one.ids):
                raw = engine.step(branch, options=options).raw
                assert one.logprobs[place] == pytest.approx(
                    float(torch.log_softmax(raw, -1)[id]), abs=2e-4
                )
                engine.push(branch, id)
            assert len(one.logprobs) == len(one.ids)


def test_nothing_to_score_scores_nothing(tiny_engine):
    assert tiny_engine.score([65, 66], []) == []
    (empty,) = tiny_engine.score([65, 66], [[]])
    assert (empty.ids, empty.logprobs, empty.total) == ((), (), 0)


def test_what_cannot_be_scored_is_refused_and_changes_nothing(tiny_engine):
    cursor = tiny_engine.prefill([65] * (tiny.CONTEXT - 2))
    expected = tiny_engine.step(cursor).raw
    ids, cached = list(cursor.ids), cursor.cached
    tiny_engine.score(cursor, [[70, 71]])
    with pytest.raises(OutOfContext, match=r"513 tokens.* 512"):
        tiny_engine.score(cursor, [[70], [70, 71, 72]])
    for id in (259, -1):  # a padding row is no token
        with pytest.raises(BadInput, match=f"no token {id}: the vocabulary has 259"):
            tiny_engine.score(cursor, [[70, id]])
    for prefix in ([], tiny_engine.start()):
        with pytest.raises(BadInput, match="nothing to start from"):
            tiny_engine.score(prefix, [[70]])
    assert (cursor.ids, cursor.cached) == (ids, cached)
    torch.testing.assert_close(tiny_engine.step(cursor).raw, expected, **CLOSE)


def test_broken_weights_name_the_layer():
    engine = tiny.engine(seed=3)
    with torch.no_grad():
        engine.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelBroken, match="stop being finite in layer 2 of 3"):
        engine.score([1, 2, 3], [[4, 5]])
    with pytest.raises(ModelBroken, match="layer 2 of 3"):
        engine.labels([1, 2, 3], {"yes": ["y"], "no": ["n"]})
    with pytest.raises(ModelBroken, match="layer 2 of 3"):
        next(engine.sample([1, 2, 3], 2, rng=rng(), max_new=2))


def test_the_default_model_scores_as_it_reads(smollm):
    prefix = smollm.encode(Task("Question: What is the capital of France?\nAnswer:"))
    answers = [smollm.tokens(text) for text in (" Paris", " Lyon", " Paris.", " The city of Rome")]
    agree(smollm, prefix, smollm.score(prefix, answers), answers)


# Labels


def test_labels_are_their_variants_added_up(tiny_engine):
    cursor = begin(tiny_engine)
    variants = {"yes": ["yes", "Yes", "Y"], "no": ["no", " no"], "unsure": ["?"]}
    found = tiny_engine.labels(cursor, variants)
    summed = {  # "Yes" begins with "Y", which counts it already
        label: sum(
            math.exp(sum(alone(tiny_engine, cursor.ids, list(text.encode()))))
            for text in texts
            if text != "Yes"
        )
        for label, texts in variants.items()
    }
    assert {label: math.exp(raw) for label, raw in found.raw.items()} == pytest.approx(
        summed, rel=1e-3
    )
    assert found.mass == pytest.approx(sum(summed.values()), rel=1e-3)
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-9)
    assert found.probabilities == pytest.approx(
        {label: value / found.mass for label, value in summed.items()}, rel=1e-3
    )
    assert list(found.probabilities) == list(variants)


def test_nested_and_doubled_variants_count_once(tiny_engine):
    prefix = begin(tiny_engine).ids
    once = tiny_engine.labels(prefix, {"yes": ["Y"], "no": ["n"]})
    nested = tiny_engine.labels(prefix, {"yes": ["Yes", "Y", "Y", "Ye"], "no": ["n", "no"]})
    assert nested.raw == pytest.approx(once.raw, abs=1e-5)
    assert nested.mass == pytest.approx(once.mass, abs=1e-6)


def test_one_token_labels_over_everything_have_all_the_mass(tiny_engine):
    """All 259 tokens as labels: what is missing from 1 are the two padding rows."""
    prefix = begin(tiny_engine).ids
    texts = [tiny_engine.tokenizer.decode([id]) for id in range(32, 127)]
    found = tiny_engine.labels(prefix, {text: [text] for text in texts})
    p = torch.softmax(full(tiny_engine, prefix)[-1], -1)
    ids = [tiny_engine.tokens(text)[0] for text in texts]
    assert found.mass == pytest.approx(float(p[ids].sum()), abs=1e-5)
    assert list(found.probabilities.values()) == pytest.approx(
        (p[ids] / p[ids].sum()).tolist(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ({"yes": ["Yes"], "maybe": ["Y"]}, "variant of 'yes' begins with one of 'maybe'"),
        ({"maybe": ["Y"], "yes": ["Yes"]}, "variant of 'yes' begins with one of 'maybe'"),
        ({"yes": ["Yes"], "also": ["Yes"]}, "begins with"),
        ({"yes": ["Y", "Yes"], "also": ["Yes"]}, "begins with"),
        ({"yes": ["Yes", ""], "no": ["No"]}, "'yes' needs variants, and none of them empty"),
        ({"yes": ["Yes"], "no": []}, "'no' needs variants"),
    ],
)
def test_labels_that_overlap_or_say_nothing_are_refused(tiny_engine, variants, says):
    with pytest.raises(BadInput, match=says):
        tiny_engine.labels([65, 66], variants)


def test_tiny_probabilities_of_long_labels_still_add_to_one(tiny_engine):
    found = tiny_engine.labels([65], {"a": ["a" * 100], "b": ["b" * 100]})
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert all(math.isfinite(raw) for raw in found.raw.values())


def test_a_seam_is_tokenised_as_in_the_whole_text(smollm):
    """ " Paris" is one token behind a word; behind a space of its own it is another text."""
    for text, after in ((" Paris", "capital is"), ("Paris", "(A) "), ("ing", "read"), ("x", "")):
        ids = smollm.tokens(text, after)
        assert smollm.tokenizer.decode(ids) == text
        if after and smollm.tokens(after + text) == [*smollm.tokens(after), *ids]:
            continue
        assert ids == smollm.tokens(text)  # the seam would merge, or there is none
    assert smollm.tokens(" Paris", "capital is") == smollm.tokens(" Paris")


def test_the_default_model_labels_a_capital(smollm):
    text = "Question: Is Paris the capital of France?\nAnswer (Yes or No):"
    found = smollm.labels(
        smollm.encode(Task(text)), {"yes": [" Yes", "Yes"], "no": [" No", "No"]}, after=text
    )
    assert isinstance(found, Labels) and 0 < found.mass <= 1.0001
    p = torch.softmax(full(smollm, smollm.encode(Task(text)))[-1], -1)
    ids = {label: smollm.tokens(f" {label}", text)[0] for label in ("Yes", "No")}
    assert math.exp(found.raw["yes"]) >= float(p[ids["Yes"]]) - 1e-5
    assert math.exp(found.raw["no"]) >= float(p[ids["No"]]) - 1e-5


# Samples


def rng(seed: int = 7):
    return Context(seed).rng


def one_by_one(
    engine: Engine, prefix: list[int], draws: random.Random, max_new: int, filters: Filters
) -> tuple[list[int], list[float]]:
    """A sampling loop as a method would write it."""
    cursor, ids, logprobs = engine.prefill(prefix), [], []
    while len(ids) < max_new and cursor.pos < engine.context:
        step = engine.step(cursor, filters=filters)
        id = int(step.logits.argmax()) if filters.temperature == 0 else draw(step, draws)[0]
        logprobs.append(float(torch.log_softmax(step.raw, -1)[id]))
        engine.push(cursor, id)
        ids.append(id)
        if engine.ends(id):
            break
    return ids, logprobs


def by_index(samples) -> list:
    found = sorted(samples, key=lambda one: one.index)
    assert [one.index for one in found] == list(range(len(found)))
    return found


FILTERS = [
    Filters(),
    Filters(temperature=0.0),
    Filters(temperature=1.4, top_k=30, top_p=0.9),
    Filters(temperature=0.8, repetition_penalty=1.3),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_samples_are_separate_sampling_loops(tiny_engine, filters):
    prefix = begin(tiny_engine).ids
    found = by_index(tiny_engine.sample(prefix, 5, rng=rng(), max_new=12, filters=filters))
    for one in found:
        draws = rng()("sample", one.index)
        ids, logprobs = one_by_one(tiny_engine, prefix, draws, 12, filters)
        assert list(one.ids) == ids
        assert one.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert one.ended == tiny_engine.ends(ids[-1])
    assert len({one.ids for one in found}) == (1 if filters.temperature == 0 else 5)


def test_samples_of_every_family_are_separate_sampling_loops(any_engine):
    prefix = begin(any_engine).ids
    for one in any_engine.sample(prefix, 3, rng=rng(), max_new=6):
        draws = rng()("sample", one.index)
        assert list(one.ids) == one_by_one(any_engine, prefix, draws, 6, Filters())[0]


def test_a_sample_does_not_depend_on_how_many_there_are(tiny_engine):
    prefix = begin(tiny_engine).ids
    few = by_index(tiny_engine.sample(prefix, 3, rng=rng(), max_new=10))
    many = by_index(tiny_engine.sample(prefix, 8, rng=rng(), max_new=10))
    assert [one.ids for one in many[:3]] == [one.ids for one in few]
    assert list(tiny_engine.sample(prefix, 0, rng=rng(), max_new=10)) == []


def test_rows_that_end_at_different_times(own_engine):
    """Every second token ends a text; those that are done are given at once."""
    own_engine._ends = frozenset(range(0, 259, 2))
    prefix = begin(own_engine).ids
    samples = list(own_engine.sample(prefix, 8, rng=rng(), max_new=5))
    lengths = [len(one.ids) for one in samples]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2
    for one in samples:
        ids, _ = one_by_one(own_engine, prefix, rng()("sample", one.index), 5, Filters())
        assert list(one.ids) == ids
        assert one.ended == (ids[-1] % 2 == 0)
        assert all(id % 2 for id in one.ids[:-1])


def test_the_window_ends_a_sample(own_engine):
    cursor = own_engine.prefill([65, 66] * (tiny.CONTEXT // 2 - 2))
    for one in own_engine.sample(cursor, 3, rng=rng(), max_new=50):
        assert len(one.ids) == 4 and not one.ended
    full_up = own_engine.prefill([65] * tiny.CONTEXT)
    with pytest.raises(OutOfContext, match="513 tokens"):
        next(own_engine.sample(full_up, 1, rng=rng(), max_new=1))


@pytest.mark.parametrize("max_new", [0, -1])
def test_a_sample_needs_room_for_a_token(tiny_engine, max_new):
    with pytest.raises(BadInput, match=f"max_new is {max_new}"):
        next(tiny_engine.sample([65], 2, rng=rng(), max_new=max_new))


def test_sampling_leaves_its_cursor_alone(tiny_engine):
    cursor = begin(tiny_engine)
    expected = tiny_engine.step(cursor).raw
    ids, cached = list(cursor.ids), cursor.cached
    samples = tiny_engine.sample(cursor, 4, rng=rng(), max_new=4)
    next(samples)
    tiny_engine.push(cursor, 70)  # between the samples, as interleaved lanes do
    tiny_engine.rewind(cursor, len(ids))
    assert len(list(samples)) == 3
    assert cursor.ids == ids and cursor.cached <= cached
    torch.testing.assert_close(tiny_engine.step(cursor).raw, expected, **CLOSE)


def test_a_stop_ends_sampling_between_steps(tiny_engine, monkeypatch):
    polls = iter(range(100))

    def poll() -> None:
        if next(polls) == 3:
            raise Stopped("stopped")

    cursor = begin(tiny_engine)
    monkeypatch.setattr(tiny_engine, "poll", poll)
    with pytest.raises(Stopped):
        list(tiny_engine.sample(cursor, 4, rng=rng(), max_new=10))
    monkeypatch.undo()
    raw = tiny_engine.step(cursor).raw
    torch.testing.assert_close(raw, full(tiny_engine, cursor.ids)[-1], **CLOSE)
