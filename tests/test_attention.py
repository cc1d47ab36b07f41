"""Attention: every head's look, as transformers computes it, in a form that stays small."""

import pytest
import torch

from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.errors import BadParameter
from analyzers.inspection import attention
from analyzers.inspection.attention import Params
from analyzers.task import Task
from analyzers.trace import Event, Note, Scores, surviving, text_of
from tests import tiny

TEXT = "The quick brown fox"


def look(engine: Engine, task: Task | str = TEXT, **knobs) -> list[Event]:
    task = Task(task) if isinstance(task, str) else task
    with torch.inference_mode():  # as the runner does
        return list(attention.run(engine, task, Params(**knobs), Context(1)))


def rows(events: list[Event]) -> dict[str, Scores]:
    return {event.name: event for event in events if isinstance(event, Scores)}


def slow(engine: Engine, text: str, pos: int) -> torch.Tensor:
    """(layers, heads, positions) from one plain forward over everything."""
    model = tiny.model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([engine.tokens(text)]), output_attentions=True).attentions
    return torch.stack([weights[0, :, pos, : pos + 1] for weights in found])


@pytest.mark.parametrize("at", [1, 2, len(TEXT)])
def test_every_number_is_that_of_the_model(tiny_engine, at):
    pos = len(TEXT) - at
    expected, found = slow(tiny_engine, TEXT, pos), rows(look(tiny_engine, at=at))
    assert len(found) == 1 + 3 + 3 * 4
    assert {(row.pos, row.unit) for row in found.values()} == {(pos, "share")}
    mean = found["attention, all layers"]
    assert mean.over == tuple(range(pos + 1))
    assert mean.values == pytest.approx(expected.mean((0, 1)).tolist(), abs=1e-4)
    for layer in range(3):
        row = found[f"attention of layer {layer + 1}"]
        assert row.values == pytest.approx(expected[layer].mean(0).tolist(), abs=1e-4)
        for head in range(4):
            row = found[f"attention of layer {layer + 1}, head {head + 1}"]
            dense = dict(zip(row.over, row.values, strict=True))
            assert [dense.get(place, 0.0) for place in range(pos + 1)] == pytest.approx(
                expected[layer, head].tolist(), abs=attention.LEAST
            )
            assert all(value >= attention.LEAST for value in row.values)


def test_shares_add_up_to_one(tiny_engine):
    found = rows(look(tiny_engine))
    assert sum(found["attention, all layers"].values) == pytest.approx(1, abs=2e-3)


def test_the_text_is_read_and_the_warning_is_there(tiny_engine):
    events = look(tiny_engine)
    assert text_of(events) == TEXT
    assert {token.origin for token in surviving(events)} == {"read"}
    (note,) = [event for event in events if isinstance(event, Note)]
    assert all(name in note.text for name in ("Jain", "Wiegreffe", "Xiao"))


def test_a_run_forked_at_a_token_is_the_same_text(tiny_engine):
    plain = look(tiny_engine)
    whole = tuple(surviving(plain))
    assert look(tiny_engine, Task(TEXT, written=whole)) == plain  # a text that was itself read
    forked = look(tiny_engine, Task(TEXT[:-2], written=whole[-2:]))
    assert surviving(forked) == list(whole)
    for name, row in rows(forked).items():  # read in other chunks, so rounded otherwise
        assert row.values == pytest.approx(rows(plain)[name].values, abs=2e-4)


def test_of_a_long_text_the_most_looked_at_is_kept(tiny_engine, monkeypatch):
    monkeypatch.setattr(attention, "KEPT", 5)
    mean = slow(tiny_engine, TEXT, len(TEXT) - 1).mean((0, 1))
    events = look(tiny_engine)
    kept = tuple(sorted(mean.topk(5).indices.tolist()))
    found = rows(events)
    assert found["attention, all layers"].over == kept
    assert all(set(row.over) <= set(kept) for row in found.values())
    note = [event for event in events if isinstance(event, Note)][1]
    assert f"{len(TEXT)} tokens" in note.text and f"{mean[list(kept)].sum():.1%}" in note.text


def test_a_token_that_is_not_there_is_refused(tiny_engine):
    with pytest.raises(BadParameter, match="at is 20, but the text has only 19 tokens"):
        look(tiny_engine, at=20)


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "gpt2"])
def test_other_families(family):
    found = rows(look(tiny.engine(family)))
    assert sum(found["attention, all layers"].values) == pytest.approx(1, abs=2e-3)
