"""Sampling and reading: the text, its numbers and its characters are exactly right."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyzers.context import Context
from analyzers.decoding import read, sampling
from analyzers.engine import Engine, Filters, instead, token
from analyzers.engine.text import Vocabulary
from analyzers.errors import OutOfContext
from analyzers.task import Task, chat
from analyzers.trace import Token, text_of
from tests import tiny
from tests.events import ids_of

TEXT = "The quick brown fox jumps over the lazy dog; twice."
WORLD = "Naïve 👩‍👩‍👧‍👦 family, 🇰🇪, 日本語テキスト, مرحبا بالعالم, e\u0301, 👍🏽!"
GREEDY = {"temperature": 0.0, "top_p": 1.0}


def write(engine: Engine, task: Task | str, seed: int = 1, **knobs) -> tuple[list[Token], str]:
    """The tokens of a run of `sampling`, and why it ended."""
    task = Task(task) if isinstance(task, str) else task
    events, run = [], sampling.run(engine, task, sampling.Params(**knobs), Context(seed))
    while True:
        try:
            events.append(next(run))
        except StopIteration as end:
            return events, end.value


def reading(engine: Engine, text: str) -> list[Token]:
    return list(read.run(engine, Task(text), read.Params(), Context(1)))


def logits(engine: Engine, ids: Sequence[int]) -> torch.Tensor:
    """The slow obvious version: one forward over everything. (length, vocab)"""
    with torch.no_grad():
        return engine.model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def full(engine: Engine, ids: Sequence[int]) -> torch.Tensor:
    """The same as log-probabilities."""
    return torch.log_softmax(logits(engine, ids), -1)


def spelled(vocabulary: Vocabulary, ids: Sequence[int]) -> list[Token]:
    """Tokens for ids that no model has chosen: only their characters count."""
    nothing = dict.fromkeys(("logprob", "entropy", "rank", "margin", "p_sampled"))
    return [
        Token(
            pos=pos,
            id=id,
            text=vocabulary.piece(ids[max(0, pos - 4) : pos], id),
            bytes=vocabulary.raw(id).hex(),
            top=(),
            **nothing,
        )
        for pos, id in enumerate(ids)
    ]


def dictate(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make a greedy run write `text`, whatever the model thinks of it."""
    ids = iter(engine.tokenizer(text)["input_ids"])
    step = engine.step

    def obey(cursor, **options):
        found = step(cursor, **options)
        dictated = torch.full_like(found.logits, -torch.inf)
        dictated[next(ids)] = 0.0
        return replace(found, logits=dictated)

    monkeypatch.setattr(engine, "step", obey)


def soon_ending(family: str) -> Engine:
    """A tiny model that likes its end token."""
    model = tiny.model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight[256] *= 4.0
    identity = {"name": "ending", "hash": "0", "quantization": "none"}
    return Engine(model, tiny.tokenizer(), identity)


# Writing


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_is_transformers_greedy_down_to_the_end_token(family):
    engine, ended = soon_ending(family), 0
    for prompt in (TEXT, "Once upon", "1, 2, 3,"):
        ids = engine.encode(Task(prompt))
        theirs = engine.model.generate(
            torch.tensor([ids]), max_new_tokens=28, do_sample=False, suppress_tokens=[259, 260]
        )[0].tolist()
        events, why = write(engine, prompt, max_new=28, **GREEDY)
        assert ids + ids_of(events) == theirs
        assert [event.pos for event in events] == list(range(len(ids), len(theirs)))
        if theirs[-1] == 256:
            ended += 1
            assert why == "end token" and len(events) < 28
            assert (events[-1].text, events[-1].bytes) == ("<|end|>", "")
        else:
            assert (why, len(events)) == ("max_new reached", 28)
    assert ended


def test_the_seed_decides(tiny_engine):
    first, _ = write(tiny_engine, TEXT, seed=3, temperature=1.0, max_new=20)
    assert first == write(tiny_engine, TEXT, seed=3, temperature=1.0, max_new=20)[0]
    assert first != write(tiny_engine, TEXT, seed=4, temperature=1.0, max_new=20)[0]


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.4, "top_k": 12, "top_p": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.05, "typical_p": 0.9},
    ],
)
def test_p_sampled_is_filtered_and_logprob_is_raw(tiny_engine, knobs):
    """The two distributions are never confused; each against its slow version."""
    ids = tiny_engine.encode(Task(TEXT))
    events, _ = write(tiny_engine, TEXT, max_new=15, **knobs)
    ratios = []
    for event in events:
        raw = full(tiny_engine, ids)[-1]
        barred = logits(tiny_engine, ids)[-1]
        barred[tiny_engine.vocabulary.size :] = -torch.inf
        filtered = torch.softmax(Filters(**knobs).apply(ids, barred), -1)
        assert event.logprob == pytest.approx(float(raw[event.id]), abs=1e-4)
        assert event.p_sampled == pytest.approx(float(filtered[event.id]), abs=1e-4)
        assert 0 < event.p_sampled <= 1
        ratios.append(event.p_sampled / math.exp(event.logprob))
        ids.append(event.id)
    assert max(ratios) > 1.1  # they do differ here


def test_greedy_tokens_are_certain_of_being_taken(tiny_engine):
    events, _ = write(tiny_engine, TEXT, max_new=10, **GREEDY)
    assert {event.p_sampled for event in events} == {1.0}
    assert all(event.rank == 1 and event.top[0][0] == event.id for event in events)


def test_max_new_counts_new_tokens(own_engine):
    for n in (1, 7):
        events, why = write(own_engine, TEXT, max_new=n)
        assert (len(events), why) == (n, "max_new reached")


def test_a_full_context_ends_the_text(own_engine):
    events, why = write(own_engine, "a" * (tiny.CONTEXT - 5), max_new=50)
    assert (len(events), why) == (5, "context full")
    assert events[-1].pos == tiny.CONTEXT - 1
    assert write(own_engine, "a" * tiny.CONTEXT, max_new=50) == ([], "context full")
    with pytest.raises(OutOfContext, match=r"513 tokens.* 512"):
        write(own_engine, "a" * (tiny.CONTEXT + 1))


def test_a_begun_answer_is_part_of_what_was_read(own_engine):
    whole = write(own_engine, "abcdef", max_new=8)
    assert write(own_engine, Task("abc", prefix="def"), max_new=8) == whole
    asked = own_engine.encode(Task(chat("hi")))
    events, _ = write(own_engine, Task(chat("hi"), prefix="Well"), max_new=8)
    assert events[0].pos == len(asked) + len("Well")
    assert "Well" not in text_of(events)


# Stop texts


def test_a_stop_text_is_found_across_tokens_and_kept(own_engine, monkeypatch):
    dictate(own_engine, monkeypatch, "one two three")
    events, why = write(own_engine, TEXT, stop="o t", **GREEDY)
    assert (text_of(events), why) == ("one two t"[:9], "stop text 'o t'")


def test_a_stop_text_may_be_an_emoji_or_a_line_break(own_engine, monkeypatch):
    dictate(own_engine, monkeypatch, "a👍🏽b\n\nc")
    events, why = write(own_engine, TEXT, stop="👍🏽", **GREEDY)
    assert (text_of(events), why) == ("a👍🏽", "stop text '👍🏽'")
    monkeypatch.undo()
    dictate(own_engine, monkeypatch, "a👍🏽b\n\nc")
    events, why = write(own_engine, TEXT, stop="\\n\\n", **GREEDY)
    assert text_of(events) == "a👍🏽b\n\n"


def test_the_first_stop_text_to_be_complete_ends_the_run(own_engine, monkeypatch):
    dictate(own_engine, monkeypatch, "abcdefgh")
    events, why = write(own_engine, TEXT, stop="never\nfg\n\ncde\nh", **GREEDY)
    assert (text_of(events), why) == ("abcde", "stop text 'cde'")


def test_a_token_that_goes_beyond_the_stop_text_stays_whole(smollm, monkeypatch):
    dictate(smollm, monkeypatch, "Hello wonderful world. The end")
    events, why = write(smollm, "Say it.", stop="o wond", **GREEDY)
    assert (text_of(events), why) == ("Hello wonderful", "stop text 'o wond'")


def test_tokens_without_text_do_not_hide_a_stop_text(own_engine, monkeypatch):
    dictate(own_engine, monkeypatch, "a<|user|>bcd")
    events, why = write(own_engine, TEXT, stop="ab", **GREEDY)
    assert (text_of(events), why) == ("ab", "stop text 'ab'")


def test_a_stop_text_that_no_token_can_spell_is_never_found(own_engine):
    events, why = write(own_engine, TEXT, stop="\ud800", max_new=5)
    assert (len(events), why) == (5, "max_new reached")


# Going on from an earlier run


def forced(engine: Engine, events: Sequence[Token], at: int, id: int) -> tuple[Token, ...]:
    before = [*engine.encode(Task(TEXT)), *ids_of(events[:at])]
    return (*events[:at], instead(engine, before, events[at], id))


def test_what_was_written_comes_first_and_the_rest_follows_from_it(own_engine):
    events, _ = write(own_engine, TEXT, max_new=12, **GREEDY)
    kept = forced(own_engine, events, 5, events[5].top[3][0])
    forked, why = write(own_engine, Task(TEXT, written=kept), max_new=7, **GREEDY)
    assert tuple(forked[:6]) == kept and why == "max_new reached"
    ids = own_engine.encode(Task(TEXT)) + ids_of(kept)
    cursor = own_engine.prefill(ids)
    for event in forked[6:]:
        step = own_engine.step(cursor)
        assert event == token(own_engine, step, int(step.logits.argmax()))
        own_engine.push(cursor, event.id)
    assert len(forked) == 6 + 7


def test_a_forced_end_token_or_stop_text_ends_at_once(tiny_engine):
    events, _ = write(tiny_engine, TEXT, max_new=6, **GREEDY)
    x = replace(events[2], id=ord("x"), text="x", bytes="78", origin="forced")
    end = replace(events[2], id=256, text="<|end|>", bytes="", origin="forced")
    for last, why in ((end, "end token"), (x, "stop text 'x'")):
        kept = (*events[:2], last)
        assert write(tiny_engine, Task(TEXT, written=kept), stop="x") == ([*kept], why)


def test_a_stop_text_inside_what_was_kept_does_not_end_the_run(smollm, monkeypatch):
    """Only what the new tokens complete counts."""
    dictate(smollm, monkeypatch, "Hello wonderful world again")
    kept, _ = write(smollm, "Say it.", max_new=3, **GREEDY)
    task = Task("Say it.", written=tuple(kept))
    events, why = write(smollm, task, stop="Hello w", max_new=1, **GREEDY)
    assert (text_of(events), why) == ("Hello wonderful world again", "max_new reached")


# Characters


def test_the_begun_character_is_held_back_while_writing(own_engine, monkeypatch):
    dictate(own_engine, monkeypatch, WORLD)
    events, _ = write(own_engine, TEXT, max_new=len(WORLD.encode()), **GREEDY)
    assert text_of(events) == WORLD
    assert [event.text for event in events if event.text] == list(WORLD)


def test_reading_gives_whole_characters_and_nothing_in_between(tiny_engine):
    events = reading(tiny_engine, WORLD)
    assert bytes.fromhex("".join(event.bytes for event in events)) == WORLD.encode()
    assert [event.text for event in events if event.text] == list(WORLD)
    shown = [event.text for event in events]
    for pos, char in enumerate(WORLD):  # each character appears with its last byte
        end = len(WORLD[: pos + 1].encode())
        assert shown[end - 1] == char and not any(shown[end - len(char.encode()) : end - 1])
    assert text_of(events) == WORLD


def test_an_unfinished_character_at_the_end_is_left_out(tiny_engine):
    events = reading(tiny_engine, "ok 👍")
    assert text_of(events[:-1]) == "ok " and text_of(events) == "ok 👍"


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_comes_out_as_it_went_in(text):
    ids = tiny.tokenizer()(text)["input_ids"]
    events = spelled(Vocabulary(tiny.tokenizer()), ids)
    assert "".join(event.text for event in events) == text == text_of(events)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_text_comes_out_of_the_default_models_tokens(smollm, data):
    """Where its vocabulary has every byte: it lacks some control characters and rare planes."""
    spellable = st.characters(codec="utf-8", max_codepoint=0x3FFFF, categories=("L", "N", "P", "S"))
    text = data.draw(st.text(spellable | st.sampled_from(list("\n \t\u200d\ufe0f\u202e\0"))))
    events = spelled(smollm.vocabulary, smollm.tokenizer(text)["input_ids"])
    assert "".join(event.text for event in events) == text == text_of(events)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=24) | st.lists(st.sampled_from(list(WORLD.encode()))).map(bytes))
def test_bytes_that_are_no_text_show_the_same_live_as_folded(raw):
    """U+FFFD only where Python itself would put it, and in both places alike."""
    events = spelled(Vocabulary(tiny.tokenizer()), list(raw))
    shown = "".join(event.text for event in events)
    assert shown == text_of(events)
    whole = raw.decode("utf-8", "replace")
    assert whole in (shown, shown + "\ufffd")  # there, a character begun at the end is broken


# Reading


def test_reading_gives_the_numbers_of_one_full_forward(any_engine, monkeypatch):
    monkeypatch.setattr("analyzers.engine.writing.READ_CHUNK", 7)
    events = reading(any_engine, TEXT)
    ids = any_engine.encode(Task(TEXT))
    assert ids_of(events) == ids and [event.pos for event in events] == list(range(len(ids)))
    first = events[0]
    assert (first.logprob, first.entropy, first.rank, first.margin) == (None,) * 4
    assert first.top == () and {event.p_sampled for event in events} == {None}
    assert {event.origin for event in events} == {"read"}
    rows = full(any_engine, ids)
    for before, event in zip(rows, events[1:], strict=False):
        assert event.logprob == pytest.approx(float(before[event.id]), abs=1e-4)
        assert event.entropy == pytest.approx(float(-(before.exp() * before).sum()), abs=1e-4)
        assert event.rank == 1 + int((before > before[event.id]).sum())


def test_reading_takes_in_the_begun_answer_and_the_conversation(tiny_engine):
    task = Task(chat("hi"), prefix="Well")
    events = list(read.run(tiny_engine, task, read.Params(), Context(1)))
    assert ids_of(events) == tiny_engine.encode(task)
    assert text_of(events) == "user: hi\nWell"  # special tokens are no part of the text


def test_the_default_model_reads_the_world_exactly(smollm):
    events = reading(smollm, WORLD)
    assert text_of(events) == WORLD == "".join(event.text for event in events)
    rows = full(smollm, ids_of(events))
    expected = sum(float(row[e.id]) for row, e in zip(rows, events[1:], strict=False))
    assert sum(event.logprob for event in events[1:]) == pytest.approx(expected, abs=1e-3)
