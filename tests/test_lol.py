"""LOL: the worked example, its special cases, and amateurs of both kinds."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analyzers.common import contrast
from analyzers.context import Context
from analyzers.contrast import lol
from analyzers.contrast.lol import AMATEUR, TRUTH, Params, candidates, contrasted, instructed
from analyzers.engine import Engine, Options, Step
from analyzers.errors import BadParameter, ModelNotFound, ModelUnfit
from analyzers.params import AdapterRef
from analyzers.task import Task, chat
from analyzers.trace import Event, Lens, Note, Scores, Token
from tests import tiny

TASK = Task("A fox, a dog and a crow met.")
SHORT = {"amateur_prompt": "Lie.", "truth": "Be true.", "max_new": 6}


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = tiny.engine()
    made._ends = frozenset()
    return made


def events(engine: Engine, task: Task = TASK, **params: object) -> list[Event]:
    return list(lol.run(engine, task, Params(**{**SHORT, **params}), Context(1)))


def tokens(found: list[Event]) -> list[Token]:
    return [event for event in found if isinstance(event, Token)]


def ids(found: list[Event]) -> list[int]:
    return [token.id for token in tokens(found)]


def adapter(folder: Path, engine: Engine, size: float) -> AdapterRef:
    """A LoRA adapter for every query projection; size 0 changes nothing."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, module in engine.model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            outer, inner = module.weight.shape
            key = f"base_model.model.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(2, inner, generator=generator)
            tensors[f"{key}B.weight"] = size * torch.randn(outer, 2, generator=generator)
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return AdapterRef(folder)


# Worked numbers


class Said(Engine):
    """Says what it is told: layer 0's "state" is already a row of logits."""

    def __init__(self, layers: int = 1) -> None:
        self.layers = layers

    def unembed(self, hidden: torch.Tensor, *, norm: bool = True) -> torch.Tensor:
        return hidden

    def encode(self, task: Task) -> list[int]:
        return [0]

    def prefill(self, ids: list[int], *, options: Options | None = None) -> None:
        return None


def said(last: tuple[float, ...], lower: tuple[float, ...]) -> Step:
    raw = torch.tensor(last).log()
    return Step(1, raw, raw, (0,), {0: torch.tensor(lower).log()})


def worked(**params: object):
    context = Context(1, kept=lambda engine, ids: object())
    _, rule = contrasted(Said(), TASK, Params(**{"g": 0, **params}), context)
    return rule([said((0.6, 0.3, 0.1), (0.4, 0.4, 0.2)), said((0.7, 0.2, 0.1), (0.5, 0.25, 0.25))])


def test_the_worked_example():
    fused = worked()
    assert fused.scores.tolist() == pytest.approx([-0.2657, 0.6405, -0.1116], abs=5e-5)
    assert fused.plausible == 3 and int(fused.scores.argmax()) == 1
    shown = dict(fused.shown)
    assert list(shown)[:2] == ["expert", "amateur"] and len(shown) == 4
    last, lower = list(shown.values())[2:]
    assert last.tolist() == pytest.approx([-0.1542, 0.4055, 0], abs=5e-5)
    assert lower.tolist() == pytest.approx([-0.2231, 0.4700, -0.2231], abs=5e-5)
    icd = worked(w=0.0)
    assert torch.allclose(icd.scores, last, atol=1e-6)


def test_the_worked_example_weighted_by_entropy():
    fused = worked(layer="entropy")
    p = [torch.tensor(row) for row in ((0.4, 0.4, 0.2), (0.6, 0.3, 0.1))]
    weights = torch.stack([(row * row.log()).sum() for row in p]).softmax(0)
    assert fused.exits.scores == pytest.approx(weights.tolist(), abs=1e-5)
    lower, last = torch.tensor([-0.2231, 0.4700, -0.2231]), torch.tensor([-0.1542, 0.4055, 0])
    expected = weights[0] * lower + weights[1] * last
    assert fused.scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert fused.picked is None


def test_entropy_weights_as_worked_out():
    """Two layers with entropies of 1.0 and 0.5 nats, found by bisection."""
    rows = []
    for wanted in (1.0, 0.5):
        low, high = 0.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            p = torch.tensor([middle, 0, 0, 0], dtype=torch.float64).softmax(-1)
            low, high = (middle, high) if float(-(p * p.log()).sum()) > wanted else (low, middle)
        rows.append(torch.tensor([low, 0, 0, 0]))
    weights, picked, scores, measure = lol._weights(torch.stack(rows), Params(layer="entropy"))
    assert weights.tolist() == pytest.approx([0.3775, 0.6225], abs=1e-4)
    assert picked is None and scores is weights and "entropy" in measure


# Layers and instructions


def test_candidates_are_every_second_of_the_upper_quarter():
    assert candidates(32, Params()) == (24, 26, 28, 30)
    assert candidates(30, Params()) == (22, 24, 26, 28)
    assert [candidates(n, Params()) for n in (1, 2, 3)] == [(0,), (1,), (2,)]
    assert candidates(30, Params(layer="static")) == (22,)
    assert candidates(30, Params(layer="static", static_layer=7)) == (7,)
    with pytest.raises(BadParameter, match="below 30"):
        candidates(30, Params(layer="static", static_layer=30))


def test_instructions_go_where_the_prompt_has_its_place_for_them():
    assert instructed(Task("Once"), "Lie.").prompt == "Lie.\n\nOnce"
    plain, system = Task(chat("Hi")), Task(chat("Hi", "Be brief."))
    assert instructed(plain, "Lie.").prompt == chat("Hi", "Lie.")
    assert instructed(system, "Lie.").prompt == chat("Hi", "Be brief.\n\nLie.")
    assert instructed(plain, "  ") is plain


def test_instructions_stay_in_their_branches(engine):
    task = Task(chat("Who?", "Be brief."))
    branches, _ = contrasted(engine, task, Params(), Context(1))
    texts = [engine.tokenizer.decode(branch.cursor.ids) for branch in branches]
    assert [branch.name for branch in branches] == ["expert", "amateur", "truth"]
    assert AMATEUR not in texts[0] + texts[2] and AMATEUR in texts[1]
    assert TRUTH not in texts[0] + texts[1] and TRUTH in texts[2]
    assert all("Be brief." in text and "Who?" in text for text in texts)


# Writing


@pytest.mark.parametrize("layer", ["dynamic", "static"])
def test_without_lower_layer_and_truth_it_is_icd(engine, layer):
    """lsm(expert) - lam lsm(amateur) among the plausible, each read again for every token."""
    found = events(engine, w=0.0, g=0.0, lam=0.8, layer=layer, repetition_penalty=1.0)
    both = [engine.encode(task) for task in (TASK, instructed(TASK, "Lie."))]
    for id in ids(found):
        expert, amateur = (engine.step(engine.prefill(each)).raw.log_softmax(-1) for each in both)
        scores = expert - 0.8 * amateur
        scores[expert < expert.max() + math.log(0.1)] = -math.inf
        scores[engine.vocabulary.size :] = -math.inf
        assert id == int(scores.argmax())
        for each in both:
            each.append(id)


def test_nothing_taken_away_is_greedy(engine):
    found = events(engine, lam=0.0, w=0.0, g=0.0, repetition_penalty=1.0)
    assert {token.rank for token in tokens(found)} == {1}
    assert {token.rank for token in tokens(events(engine, alpha=1.0, repetition_penalty=1.0))} == {
        1
    }


def test_an_amateur_that_is_the_expert_says_nothing(engine):
    found = events(engine, amateur_prompt="", g=0.0, repetition_penalty=1.0)
    assert {token.rank for token in tokens(found)} == {1}
    assert any("branches agree" in event.text for event in found if isinstance(event, Note))


def test_an_adapter_as_amateur(tmp_path):
    engine = tiny.engine()
    engine._ends = frozenset()
    nothing = adapter(tmp_path / "nothing", engine, 0.0)
    found = events(engine, adapter=nothing, g=0.0, repetition_penalty=1.0)
    assert {token.rank for token in tokens(found)} == {1}
    assert any("branches agree" in event.text for event in found if isinstance(event, Note))
    real = adapter(tmp_path / "real", engine, 1.0)
    found = events(engine, adapter=real, w=0.0, g=0.0, alpha=0.0, repetition_penalty=1.0)
    text = engine.encode(TASK)
    for id in ids(found):
        cursor = engine.prefill(text, options=Options(adapter=real))
        amateur = engine.step(cursor, options=Options(adapter=real)).raw
        expert = engine.step(engine.prefill(text)).raw
        scores = expert.log_softmax(-1) - amateur.log_softmax(-1)
        assert id == int(scores[: engine.vocabulary.size].argmax())
        text.append(id)
    assert "LoRA" in found[0].text and str(tmp_path) not in found[0].text


def test_adapters_that_do_not_fit_are_refused(engine, tmp_path):
    with pytest.raises(ModelNotFound):
        events(engine, adapter=AdapterRef(tmp_path / "none"))
    other = adapter(tmp_path / "other", tiny.engine("qwen2", seed=1), 1.0)
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(ModelUnfit):
        events(engine, adapter=other)


def test_truth_pulls_towards_what_it_makes_likelier(engine):
    """The scores grow by g times the difference of the two log-probabilities."""
    with_truth, rule = contrasted(engine, TASK, Params(**SHORT, alpha=0.0, g=0.5), Context(1))
    without, plain = contrasted(engine, TASK, Params(**SHORT, alpha=0.0, g=0.0), Context(1))
    steps, fewer = contrast.step_all(with_truth), contrast.step_all(without)
    pull = steps[2].raw.log_softmax(-1) - steps[0].raw.log_softmax(-1)
    size = engine.vocabulary.size
    expected = plain(fewer).scores + 0.5 * pull
    found = rule(steps).scores
    assert torch.allclose(found[:size], expected[:size], atol=1e-3)
    assert (found[size:] == -math.inf).all()


# Events


@pytest.mark.parametrize("layer", ["dynamic", "static", "entropy"])
def test_events_of_a_token(engine, layer):
    found = events(engine, layer=layer, max_new=2)
    assert isinstance(found[0], Note) and "truth instruction" in found[0].text
    kinds = [Token, Lens, Lens, Scores] + [Scores] * (layer == "entropy")
    assert [type(event) for event in found[1 : len(kinds) + 1]] == kinds
    token, layers, table, number, *shares = found[1 : len(kinds) + 1]
    assert layers.rows == ("2", "3") and layers.name == "layers"
    assert layers.picked == (None if layer == "entropy" else 0)
    assert table.rows[:3] == ("expert", "amateur", "truth") and table.rows[-1] == "contrast"
    assert "last layer: expert − amateur" in table.rows
    assert ("layer 2: expert − amateur" in table.rows) == (layer != "entropy")
    assert table.scores[0] == pytest.approx(token.logprob, abs=1e-5)
    assert number.name == "KL(expert‖amateur)" and number.over == (token.pos,)
    assert number.values[0] > 0 and all(math.isfinite(score) for score in table.scores)
    for share in shares:
        assert share.over == ("2", "3") and sum(share.values) == pytest.approx(1, abs=1e-5)


def test_scoring_equals_stepping(engine):
    branches, rule = contrasted(engine, TASK, Params(**SHORT, alpha=0.0), Context(1))
    (found,) = contrast.score(branches, [list(b"so it")], rule)
    branches, rule = contrasted(engine, TASK, Params(**SHORT, alpha=0.0), Context(1))
    total = 0.0
    for id in b"so it":
        total += float(rule(contrast.step_all(branches, together=False)).scores[id])
        for branch in branches:
            engine.push(branch.cursor, id)
    assert found == pytest.approx(total, abs=1e-2)


def test_going_on_from_written_tokens(engine):
    whole = events(engine, max_new=6)
    task = Task(TASK.prompt, written=tuple(tokens(whole)[:3]))
    more = events(engine, task, max_new=3)
    assert more[:3] == tokens(whole)[:3] and ids(more) == ids(whole)
