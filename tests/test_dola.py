"""DoLa: its layers, its two divergences, and the text of the static formula."""

import math

import pytest
import torch

from analyzers.common import contrast
from analyzers.context import Context
from analyzers.contrast import dola
from analyzers.contrast.dola import Params, candidates, contrasted, measured
from analyzers.engine import Engine, Filters
from analyzers.errors import BadParameter
from analyzers.task import Task
from analyzers.trace import Event, Lens, Note, Scores, Token
from tests import tiny

TEXT = "A fox, a dog and a crow met."


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = tiny.engine()
    made._ends = frozenset()
    return made


def events(engine: Engine, text: str = TEXT, **params: object) -> list[Event]:
    settings = Params(**{"max_new": 8, **params})
    return list(dola.run(engine, Task(text), settings, Context(1)))


def tokens(found: list[Event]) -> list[Token]:
    return [event for event in found if isinstance(event, Token)]


def explicit(*layers: int, **more: object) -> Params:
    return Params(candidates="explicit", layers=layers, **more)


# Layers


@pytest.mark.parametrize(
    ("layers", "bucket", "expected"),
    [
        (32, "high", range(16, 32, 2)),  # 7B for TruthfulQA
        (32, "low", range(2, 16, 2)),
        (40, "high", range(20, 40, 2)),
        (60, "high", range(40, 60, 2)),
        (80, "high", range(60, 80, 2)),
        (80, "low", range(2, 20, 2)),
        (30, "high", range(15, 30, 2)),
        (3, "high", (1,)),
        (3, "low", (2,)),
        (1, "high", (0,)),
        (1, "low", (0,)),
    ],
)
def test_buckets(layers, bucket, expected):
    assert candidates(layers, Params(candidates=bucket)) == tuple(expected)


def test_explicit_layers_must_be_below_the_last(engine):
    assert candidates(30, explicit(20, 0, 20)) == (0, 20)
    for wrong in ((), (3,), (-1,), (1, 7)):
        with pytest.raises(BadParameter, match="from 0 to 2: the model has 3"):
            candidates(3, explicit(*wrong))
    with pytest.raises(BadParameter):
        events(engine, candidates="explicit", layers=(30,))


# Divergences


def test_the_two_divergences_differ_as_worked_out():
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.7]).log()
    assert float(measured(torch.stack([p, q]), "dola-official")[0]) == pytest.approx(
        0.330671, abs=1e-6
    )
    final = torch.tensor([0.90, 0.08, 0.02])
    a, b = torch.tensor([1e-4, 1e-6, 0.999899]), torch.tensor([1e-6, 0.8, 0.199999])
    rows = torch.stack([a, b, final]).log()
    true, official = (measured(rows, name) for name in ("jsd", "dola-official"))
    assert true.tolist() == pytest.approx([0.6434, 0.5256, 0], abs=5e-5)
    assert official.tolist() == pytest.approx([2.589, 3.077, 0], abs=5e-4)
    assert int(true.argmax()) == 0 and int(official.argmax()) == 1


def test_the_official_divergence_is_that_of_its_code():
    """Its lines, with kl_div's swapped arguments and the mean over the vocabulary."""
    rows = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) * 5
    rows[0] *= 40  # where probabilities underflow
    kl_div = torch.nn.functional.kl_div
    m = 0.5 * (rows.softmax(-1) + rows[-1].softmax(-1))
    last = rows[-1].log_softmax(-1).expand_as(m)
    halves = (kl_div(logs, m, reduction="none") for logs in (last, rows.log_softmax(-1)))
    expected = 0.5 * sum(half.mean(-1) for half in halves)
    found = measured(rows, "dola-official")
    assert torch.allclose(found / 60, expected, rtol=1e-4, atol=1e-6)


# Writing


@pytest.mark.parametrize("norm", [True, False])
def test_one_candidate_is_the_static_formula(engine, norm):
    """Written out with a full pass for every token."""
    found = tokens(
        events(engine, candidates="explicit", layers=(2,), norm=norm, repetition_penalty=1.2)
    )
    ids = engine.encode(Task(TEXT))
    for token in found:
        step = engine.step(engine.prefill(ids), taps=(2,))
        early = step.hidden[2][None]
        if norm:
            early = engine.model.model.norm(early)
        layer = engine.model.lm_head(early)[0].log_softmax(-1)
        scores = step.logits.log_softmax(-1) - layer
        scores[step.logits < step.logits.max() + math.log(0.1)] = -math.inf
        id = int(Filters(0.0, repetition_penalty=1.2).apply(ids, scores).argmax())
        assert token.id == id
        ids.append(id)


def test_alpha_1_is_greedy(engine):
    found = tokens(events(engine, alpha=1.0, repetition_penalty=1.0))
    assert {token.rank for token in found} == {1}


def test_the_contrast_changes_choices_and_ranks_show_it(engine):
    found = events(engine, alpha=0.0, repetition_penalty=1.0)
    assert any(token.rank > 1 for token in tokens(found))
    assert not any(isinstance(event, Note) for event in found)


def test_events_of_a_token(engine):
    found = events(engine, candidates="explicit", layers=(0, 1, 2), max_new=2)
    assert [type(event) for event in found] == [Token, Lens, Lens, Scores] * 2
    token, layers, table, score = found[:4]
    assert layers.name == "layers" and layers.rows == ("0", "1", "2", "3")
    assert layers.picked == max(range(3), key=lambda row: layers.scores[row])
    assert layers.scores[-1] == 0 and "Jensen-Shannon" in layers.measure
    assert [len(top) for top in layers.top] == [10] * 4
    assert [id for id, _, _ in layers.top[-1]] == [id for id, _, _ in token.top]
    assert table.name == "branches" and table.rows == ("final", "premature", "contrast")
    assert table.top[1] == layers.top[layers.picked]
    assert table.scores[0] == pytest.approx(token.logprob, abs=1e-5)
    assert score.over == (token.pos,) and score.values == (layers.scores[layers.picked],)
    assert score.name == "divergence of the chosen layer" and score.unit == "nats"


def test_layers_are_read_as_the_model_reads_its_last(engine):
    """The last row is the step's own; the one below, sent through the last block, is it too."""
    step = engine.step(engine.prefill(engine.encode(Task(TEXT))), taps=(2, 3))
    rows = contrast.early(engine, step, (2, 3))
    assert torch.equal(rows[-1], step.raw)
    assert torch.allclose(rows[1], step.raw, atol=1e-4)
    normed = engine.model.model.norm(step.hidden[3])
    assert torch.allclose(engine.unembed(normed, norm=False), step.raw, atol=1e-4)
    assert not torch.allclose(contrast.early(engine, step, (2,), norm=False)[0], rows[0], atol=0.1)


def test_the_layer_is_chosen_by_each_step_alone(engine):
    """Also when continuations are scored in one pass."""
    params = explicit(0, 1, 2, alpha=0.0)
    branches, rule = contrasted(engine, Task(TEXT), params, Context(1))
    picks = []

    def noted(steps):
        picks.append(rule(steps))
        return picks[-1]

    (found,) = contrast.score(branches, [list(b"and then")], noted)
    cursor, total = engine.prefill(engine.encode(Task(TEXT))), 0.0
    for id, pick in zip(b"and then", picks, strict=True):
        fused = rule([engine.step(cursor, taps=(0, 1, 2))])
        assert fused.picked == pick.picked
        total += float(fused.scores[id])
        engine.push(cursor, id)
    assert found == pytest.approx(total, abs=1e-2)


def test_sampling_warns_that_it_is_flat(engine):
    first = next(event for event in events(engine, temperature=1.0) if isinstance(event, Note))
    assert first.level == "warning" and "sum to 0" in first.text


def test_soft_caps_belong_to_every_layer():
    """Gemma caps its logits: so are those of its early exits, and deep negative ones stay."""
    engine = tiny.engine("gemma2")
    step = engine.step(engine.prefill(list(TEXT.encode())), taps=(1, 2))
    for norm in (True, False):
        assert float(contrast.early(engine, step, (1, 2), norm=norm).abs().max()) <= 20
    assert len(tokens(events(engine))) > 0


def test_going_on_from_written_tokens(engine):
    whole = tokens(events(engine, max_new=6))
    task = Task(TEXT, written=tuple(whole[:3]))
    more = list(dola.run(engine, task, Params(max_new=3), Context(1)))
    assert more[:3] == whole[:3]
    assert [token.id for token in tokens(more)] == [token.id for token in whole]
    engine = tiny.engine()
    engine._ends = frozenset([whole[2].id])
    ended = dola.run(engine, task, Params(), Context(1))
    assert [next(ended) for _ in range(3)] == whole[:3]
    with pytest.raises(StopIteration) as stop:
        next(ended)
    assert stop.value.value == "end token"
