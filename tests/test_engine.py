"""The engine's promises, in float32: exact stepping, rewinding, forking, batching, tapping."""

import pytest
import torch

from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Engine, Filters, draw, token
from analyzers.errors import BadInput, ModelBroken, ModelUnfit, OutOfContext, Stopped
from analyzers.task import Task, chat
from tests import tiny

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TEXT = "The quick brown fox jumps over the lazy dog; twice."


def full(engine: Engine, ids: list[int]) -> torch.Tensor:
    """The slow obvious version: one forward over everything, no cache. (length, vocab)"""
    with torch.no_grad():
        return engine.model(torch.tensor([ids]), use_cache=False).logits[0].float()


def ids_of(engine: Engine, text: str = TEXT) -> list[int]:
    return engine.encode(Task(text))


def write(engine: Engine, cursor, n: int) -> list[torch.Tensor]:
    """Greedy steps; the raw logits of each."""
    rows = []
    for _ in range(n):
        step = engine.step(cursor)
        rows.append(step.raw)
        engine.push(cursor, int(step.logits.argmax()))
    return rows


def test_stepping_equals_one_full_forward(any_engine):
    """Three times the sliding window (8), where a family has one."""
    ids = ids_of(any_engine)[:24]
    cursor = any_engine.prefill(ids[:3])
    rows = []
    for id in ids[3:]:
        rows.append(any_engine.step(cursor).raw)
        any_engine.push(cursor, id)
    torch.testing.assert_close(torch.stack(rows), full(any_engine, ids)[2:-1], **CLOSE)


def test_prefill_in_chunks_equals_one_full_forward(any_engine, monkeypatch):
    monkeypatch.setattr("analyzers.engine.writing.CHUNK", 7)
    ids = ids_of(any_engine)
    step = any_engine.step(any_engine.prefill(ids))
    torch.testing.assert_close(step.raw, full(any_engine, ids)[-1], **CLOSE)


def test_reading_equals_one_full_forward(any_engine, monkeypatch):
    monkeypatch.setattr("analyzers.engine.writing.READ_CHUNK", 7)
    ids = ids_of(any_engine)
    read = list(any_engine.read(any_engine.start(), ids))
    assert [id for id, _ in read] == ids and read[0][1] is None
    assert [step.pos for _, step in read[1:]] == list(range(1, len(ids)))
    rows = torch.stack([step.raw for _, step in read[1:]])
    torch.testing.assert_close(rows, full(any_engine, ids)[:-1], **CLOSE)


def test_a_rewind_is_as_if_the_tail_had_never_been(any_engine):
    ids = ids_of(any_engine)
    cursor = any_engine.prefill(ids)
    expected = write(any_engine, cursor, 6)
    any_engine.rewind(cursor, len(ids) + 2)
    any_engine.push(cursor, 65)
    write(any_engine, cursor, 10)  # a whole sliding window (8), where a family has one
    any_engine.rewind(cursor, len(ids))
    assert cursor.ids == ids
    torch.testing.assert_close(
        torch.stack(write(any_engine, cursor, 6)), torch.stack(expected), **CLOSE
    )


@pytest.mark.parametrize("to", [None, 20])
def test_a_fork_equals_recomputation_and_leaves_the_original_alone(any_engine, to):
    ids = ids_of(any_engine)
    cursor = any_engine.prefill(ids)
    write(any_engine, cursor, 3)
    branch = any_engine.fork(cursor, to)
    kept = cursor.ids[:to]
    any_engine.push(branch, 90)
    write(any_engine, branch, 5)
    assert branch.ids[: len(kept) + 1] == [*kept, 90]
    torch.testing.assert_close(
        any_engine.step(branch).raw, full(any_engine, branch.ids)[-1], **CLOSE
    )
    torch.testing.assert_close(
        any_engine.step(cursor).raw, full(any_engine, cursor.ids)[-1], **CLOSE
    )


def test_a_ragged_batch_equals_one_by_one(any_engine):
    ids = ids_of(any_engine)
    cursors = [any_engine.prefill(ids[:n]) for n in (1, 9, 30)]
    alone = [any_engine.prefill(ids[:n]) for n in (1, 9, 30)]
    any_engine.push(cursors[1], 70)  # two tokens pending here, one elsewhere
    any_engine.push(alone[1], 70)
    for _ in range(3):
        steps = any_engine.step(cursors, taps=(2,))
        for step, cursor, other in zip(steps, cursors, alone, strict=True):
            single = any_engine.step(other, taps=(2,))
            assert step.pos == single.pos == cursor.pos
            torch.testing.assert_close(step.raw, single.raw, **CLOSE)
            torch.testing.assert_close(step.hidden[2], single.hidden[2], **CLOSE)
            id = int(single.logits.argmax())
            any_engine.push(cursor, id)
            any_engine.push(other, id)


def test_taps_are_the_models_hidden_states_and_the_last_reads_out_as_the_logits(any_engine):
    ids = ids_of(any_engine)
    layers = range(any_engine.layers + 1)
    step = any_engine.step(any_engine.prefill(ids), taps=layers)
    with torch.no_grad():
        states = any_engine.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for layer in layers[:-1]:  # the library's last entry is already normed
        torch.testing.assert_close(step.hidden[layer], states[layer][0, -1], **CLOSE)
    torch.testing.assert_close(any_engine.unembed(step.hidden[layers[-1]]), step.raw, **CLOSE)


def test_stepping_twice_without_writing_says_the_same(tiny_engine):
    cursor = tiny_engine.prefill(ids_of(tiny_engine))
    first, second = tiny_engine.step(cursor), tiny_engine.step(cursor)
    torch.testing.assert_close(first.raw, second.raw, **CLOSE)
    assert first.pos == second.pos == cursor.pos


def test_greedy_writes_what_transformers_writes(any_engine):
    ids = ids_of(any_engine)
    written = any_engine.model.generate(
        torch.tensor([ids]), max_new_tokens=16, do_sample=False, suppress_tokens=[259, 260]
    )
    cursor = any_engine.prefill(ids)
    for _ in range(16):
        id = int(any_engine.step(cursor).logits.argmax())
        any_engine.push(cursor, id)
        if any_engine.ends(id):
            break
    assert cursor.ids == written[0].tolist()


@pytest.mark.parametrize(
    "filters",
    [
        Filters(temperature=0.7),
        Filters(temperature=1.3, top_k=20, top_p=0.9),
        Filters(min_p=0.02, typical_p=0.9),
        Filters(0.8, 50, 0.95, 0.01, 0.95, 1.3),
        Filters(temperature=0.0, repetition_penalty=1.5),
    ],
)
def test_filters_are_those_of_transformers_in_its_order(tiny_engine, filters):
    """Against the scores of `generate` itself, so that an order changed there shows here."""
    ids = ids_of(tiny_engine)
    sampled = filters.temperature > 0
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
    wanted = {name: value for name, value in vars(filters).items() if value} if sampled else {}
    settings = {**neutral, **wanted} if sampled else {}
    theirs = tiny_engine.model.generate(
        torch.tensor([ids]),
        max_new_tokens=1,
        do_sample=sampled,
        repetition_penalty=filters.repetition_penalty,
        output_scores=True,
        return_dict_in_generate=True,
        suppress_tokens=[259, 260],
        **{name: value for name, value in settings.items() if name != "repetition_penalty"},
    ).scores[0][0]
    ours = tiny_engine.step(tiny_engine.prefill(ids), filters=filters).logits
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_raw_stays_raw_and_banned_ids_are_never_offered(tiny_engine):
    cursor = tiny_engine.prefill(ids_of(tiny_engine))
    plain = tiny_engine.step(cursor)
    best = int(plain.logits.argmax())
    barred = tiny_engine.step(cursor, ban={best}, filters=Filters(temperature=0.5))
    torch.testing.assert_close(barred.raw, plain.raw, **CLOSE)
    assert barred.logits[best] == -torch.inf
    assert (plain.logits[tiny_engine.vocabulary.size :] == -torch.inf).all()


def test_a_draw_follows_the_distribution(tiny_engine):
    step = tiny_engine.step(
        tiny_engine.prefill(ids_of(tiny_engine)), filters=Filters(temperature=1.5, top_k=4)
    )
    rng = Context(seed=1).rng("draw")
    n = 4000
    drawn = [draw(step, rng) for _ in range(n)]
    probabilities = torch.softmax(step.logits.double(), -1)
    for id in {id for id, _ in drawn}:
        p = float(probabilities[id])
        share = sum(other == id for other, _ in drawn) / n
        assert p > 0 and abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert all(abs(p - float(probabilities[id])) < 1e-9 for id, p in drawn[:50])


def test_token_signals_by_hand(tiny_engine):
    step = tiny_engine.step(tiny_engine.prefill(ids_of(tiny_engine)))
    p = torch.softmax(step.raw.double(), -1)
    order = p.argsort(descending=True).tolist()
    id = order[3]
    event = token(tiny_engine, step, id, p_sampled=0.5)
    assert event.logprob == pytest.approx(float(p[id].log()), abs=1e-5)
    assert event.entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    assert event.margin == pytest.approx(float(p[order[0]] - p[order[1]]), abs=1e-5)
    assert (event.rank, event.p_sampled, event.pos) == (4, 0.5, step.pos)
    offered = [other for other in order if other < tiny_engine.vocabulary.size][:10]
    assert [entry[0] for entry in event.top] == offered


def test_two_runs_interleaved_are_two_separate_runs(tiny_engine):
    def lane(text: str, seed: int):
        params = sampling.Params(temperature=1.0, max_new=25, repetition_penalty=1.2)
        return sampling.run(tiny_engine, Task(text), params, Context(seed))

    apart = [list(lane(TEXT, 1)), list(lane("Another text", 2))]
    lanes = [lane(TEXT, 1), lane("Another text", 2)]
    together = [[], []]
    while lanes[0] or lanes[1]:
        for i, events in enumerate(lanes):
            if events and (event := next(events, None)):
                together[i].append(event)
            else:
                lanes[i] = None
    assert together == apart


@pytest.mark.parametrize("error", [Stopped("stopped"), RuntimeError("broken kernel")])
def test_a_stopped_or_failed_call_leaves_the_cursor_as_it_was(tiny_engine, error, monkeypatch):
    cursor = tiny_engine.prefill(ids_of(tiny_engine))
    expected = tiny_engine.step(cursor).raw
    tiny_engine.push(cursor, 65)
    ids, cached = list(cursor.ids), cursor.cached

    def fail(*args, **kwargs):
        raise error

    late = tiny_engine.model.model.norm.register_forward_pre_hook(fail)
    for call in (
        lambda: tiny_engine.step(cursor),
        lambda: tiny_engine.step([cursor, tiny_engine.fork(cursor)]),
        lambda: tiny_engine.extend(cursor, [66] * 5),
        lambda: list(tiny_engine.read(cursor, [66] * 5)),
    ):
        with pytest.raises(type(error)):
            call()
        assert (cursor.ids, cursor.cached) == (ids, cached)
    late.remove()
    monkeypatch.setattr(tiny_engine, "poll", fail)
    with pytest.raises(type(error)):
        tiny_engine.step(cursor)
    monkeypatch.undo()
    tiny_engine.rewind(cursor, len(ids) - 1)
    torch.testing.assert_close(tiny_engine.step(cursor).raw, expected, **CLOSE)


def test_prefill_stops_between_chunks_and_reports_progress(monkeypatch):
    engine, heard = tiny.engine(), []
    monkeypatch.setattr("analyzers.engine.writing.CHUNK", 10)
    engine.progress = lambda done, total: heard.append((done, total))
    engine.prefill(ids_of(engine))
    total = len(TEXT) - 1
    assert heard == [*((n, total) for n in range(0, total, 10)), (total, total)]

    def poll():
        if len(heard) > 8:
            raise Stopped("stopped")

    engine.poll = poll
    with pytest.raises(Stopped):
        engine.prefill(ids_of(engine))
    assert len(heard) == 9


def test_too_long_a_text_says_both_lengths(tiny_engine):
    with pytest.raises(OutOfContext, match=r"600 tokens.* 512"):
        tiny_engine.prefill([65] * 600)
    with pytest.raises(OutOfContext, match=r"513 tokens.* 512"):
        list(tiny_engine.read(tiny_engine.start(), [65] * 513))
    cursor = tiny_engine.prefill([65] * tiny.CONTEXT)
    tiny_engine.step(cursor)
    tiny_engine.push(cursor, 65)
    with pytest.raises(OutOfContext):
        tiny_engine.step(cursor)


def test_ids_outside_the_vocabulary_and_empty_texts_are_refused(tiny_engine):
    for call in (
        lambda: tiny_engine.prefill([1, 259]),  # a padding row is no token
        lambda: tiny_engine.prefill([-1]),
        lambda: tiny_engine.prefill([]),
        lambda: tiny_engine.push(tiny_engine.prefill([1]), 10_000),
        lambda: tiny_engine.step(tiny_engine.start()),
    ):
        with pytest.raises(BadInput):
            call()


def test_logits_that_are_not_finite_fail_the_call():
    engine = tiny.engine(seed=3)
    with torch.no_grad():
        engine.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelBroken, match="stop being finite in layer 2 of 3"):
        engine.step(engine.prefill([1, 2, 3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_precisions_load_and_speak_in_float32(family, dtype):
    """Rounding does not make a fitting model look unfit; signals are float32 all the same."""
    plain = tiny.engine(family)
    half = Engine(tiny.model(family).to(dtype), tiny.tokenizer(), plain.identity)
    step = half.step(half.prefill(ids_of(half)), taps=(half.layers,))
    assert step.raw.dtype == torch.float32 == half.unembed(step.hidden[half.layers]).dtype
    assert half.model.dtype == dtype and step.raw.isfinite().all()


def test_a_readout_that_is_not_the_models_own_is_refused(monkeypatch):
    from analyzers.engine.adapters import Parts

    monkeypatch.setattr(Parts, "readout", lambda self, hidden: self.head(hidden))
    with pytest.raises(ModelUnfit, match="not the readout"):
        tiny.engine()


def test_chat_is_the_models_own_template_and_the_begun_answer_follows(tiny_engine):
    task = Task(chat("hi", system="be kind"), prefix="Well")
    text = tiny_engine.tokenizer.decode(tiny_engine.encode(task))
    assert text == "<|user|>system: be kind\n<|user|>user: hi\n<|assistant|>Well"


def test_the_default_model_writes_what_transformers_writes(smollm):
    ids = smollm.encode(Task(chat("What is the capital of Kenya, and since when?")))
    written = smollm.model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
    cursor = smollm.prefill(ids)
    rows = write(smollm, cursor, written.shape[1] - len(ids))
    assert cursor.ids == written[0].tolist()
    torch.testing.assert_close(
        torch.stack(rows), full(smollm, cursor.ids)[len(ids) - 1 : -1], **CLOSE
    )


def test_a_tokenizer_may_have_added_tokens_that_the_model_was_never_given():
    """Gemma 3 has one for images in the tokenizer of its text models."""
    table = tiny.model(vocab_size=258)  # the last special token is beyond
    engine = Engine(table, tiny.tokenizer(), {"name": "short"})
    assert engine.vocabulary.size == 258
    with pytest.raises(BadInput, match="no token 258"):
        engine.prefill(engine.encode(Task("<|assistant|>")))
    engine.step(engine.prefill(engine.encode(Task("text"))))


def test_a_tokenizer_with_more_words_than_the_embedding_is_refused():
    with pytest.raises(ModelUnfit, match="259 tokens, the model's embedding only 250"):
        Engine(tiny.model(vocab_size=250, eos_token_id=1), tiny.tokenizer(), {"name": "short"})
