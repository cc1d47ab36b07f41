"""Attribution: the numbers are those of the slow obvious versions, and they add up."""

import math

import pytest
import torch

from analyzers.context import Context
from analyzers.engine import Engine
from analyzers.errors import BadInput, BadParameter, ModelLacks, OutOfContext
from analyzers.inspection import attribution
from analyzers.inspection.attribution import Params
from analyzers.task import Task
from analyzers.trace import Candidate, Event, Metric, Note, Scores, Token, surviving, text_of
from tests import tiny

TEXT = "The quick brown fox"


def explain(engine: Engine, task: Task | str = TEXT, **knobs) -> list[Event]:
    task = Task(task) if isinstance(task, str) else task
    knobs = {"method": "integrated gradients"} | knobs
    with torch.inference_mode():  # as the runner does
        return list(attribution.run(engine, task, Params(**knobs), Context(1)))


def scores(events: list[Event]) -> Scores:
    (found,) = [event for event in events if isinstance(event, Scores)]
    return found


def metrics(events: list[Event]) -> dict[str, float]:
    return {event.name: event.value for event in events if isinstance(event, Metric)}


def of_target(engine: Engine, inputs: torch.Tensor, target: list[int]) -> torch.Tensor:
    """The slow obvious version: one full forward over embeddings (tokens, d_model), and the
    summed log-probability of the target behind them."""
    begun = engine.embeddings(target)[:-1]
    logits = engine.model(inputs_embeds=torch.cat([inputs, begun])[None]).logits[0]
    rows = logits[len(inputs) - 1 :].float().log_softmax(-1)
    return sum(rows[i, id] for i, id in enumerate(target))


def mean_of(engine: Engine) -> torch.Tensor:
    return engine.model.get_input_embeddings().weight[: engine.vocabulary.size].mean(0)


@pytest.mark.parametrize(("target", "steps"), [("", 64), ("s", 64), ("es", 256)])
def test_integrated_gradients_add_up(tiny_engine, target, steps):
    """Completeness, the axiom of Sundararajan et al. 2017."""
    events = explain(tiny_engine, target=target, baseline="space", steps=steps, keep_special=False)
    found = metrics(events)
    change = found["F(text)"] - found["F(baseline)"]
    assert abs(change) > 0.1
    assert sum(scores(events).values) == pytest.approx(change, rel=0.05)
    assert found["sum of attributions"] == pytest.approx(sum(scores(events).values), abs=1e-4)
    assert found["completeness error"] == pytest.approx(
        found["sum of attributions"] - change, abs=1e-5
    )
    assert found["relative completeness error"] < 0.05
    assert not any(isinstance(event, Note) for event in events)


def test_what_does_not_add_up_is_said(tiny_engine):
    """Random weights jump next to embeddings of zero."""
    events = explain(tiny_engine, target="ab", baseline="zero", keep_special=False, steps=2)
    found = metrics(events)
    assert found["relative completeness error"] > 0.05
    (note,) = [event for event in events if isinstance(event, Note)]
    assert note.level == "warning" and "Occlusion" in note.text
    assert f"{found['relative completeness error']:.0%}" in note.text


def test_integrated_gradients_are_the_sum_over_the_path(tiny_engine):
    ids, target = tiny_engine.tokens(TEXT), tiny_engine.tokens("es")
    inputs = tiny_engine.embeddings(ids).detach()
    start = torch.cat([inputs[:1], mean_of(tiny_engine).expand(len(ids) - 1, -1)])
    total = torch.zeros_like(inputs)
    for step in range(5):
        point = (start + (step + 0.5) / 5 * (inputs - start)).requires_grad_(True)
        (slope,) = torch.autograd.grad(of_target(tiny_engine, point, target), point)
        total += slope / 5
    expected = (total * (inputs - start)).sum(-1)
    found = scores(explain(tiny_engine, target="es", steps=5))
    assert found.values == pytest.approx(expected.tolist(), abs=1e-3, rel=1e-3)
    assert found.values[0] == 0  # the first token is the same at both ends


@pytest.mark.parametrize("target", ["s", "es"])
def test_gradient_x_input_is_the_product(tiny_engine, target):
    wanted = tiny_engine.tokens(target)
    ids = tiny_engine.tokens(TEXT)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        rows = logits[len(ids) - 1 :].log_softmax(-1)
        return sum(rows[i, id] for i, id in enumerate(wanted))

    slow = tiny_engine.gradients([*ids, *wanted[:-1]], objective)
    expected = (slow.inputs * slow.gradient).sum(-1)[: len(ids)].tolist()
    found = scores(explain(tiny_engine, target=target, method="gradient x input"))
    assert found.values == pytest.approx(expected, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("baseline", ["mean", "zero", "space"])
def test_occlusion_removes_one_token_at_a_time(tiny_engine, baseline):
    ids, target = tiny_engine.tokens(TEXT), tiny_engine.tokens("es")
    inputs = tiny_engine.embeddings(ids).detach()
    space = tiny_engine.embeddings(tiny_engine.tokens(" "))[0]
    empty = {"mean": mean_of(tiny_engine), "zero": torch.zeros(32), "space": space}[baseline]
    with torch.no_grad():
        whole = of_target(tiny_engine, inputs, target)
        expected = []
        for place in range(len(ids)):
            without = inputs.clone()
            without[place] = empty
            expected.append(float(whole - of_target(tiny_engine, without, target)))
    events = explain(
        tiny_engine, target="es", method="occlusion", baseline=baseline, keep_special=False
    )
    assert scores(events).values == pytest.approx(expected, abs=1e-4)
    assert metrics(events)["F(text)"] == pytest.approx(float(whole), abs=1e-4)


def test_a_hand_made_case():
    """A sum of the embeddings' first numbers: every method gives each token its own number, less
    that of the baseline (zero here) where it has one."""
    engine = tiny.engine()
    found = torch.tensor([[1.0, 9.0], [-2.0, 9.0], [0.5, 9.0]])
    engine.embeddings = lambda ids: found if len(ids) == 3 else torch.zeros(len(ids), 2)

    def logits_of(inputs: torch.Tensor, keep: int) -> torch.Tensor:
        total = inputs[..., 0].sum(1)  # log p of token 0 is minus this softplus
        return torch.stack([total, torch.zeros_like(total)], -1)[:, None]

    engine.logits_of = logits_of

    def log_p(total: float) -> float:
        return -math.log1p(math.exp(-total))

    for method, expected in {
        "occlusion": [log_p(-0.5) - log_p(-0.5 - x) for x in (1.0, -2.0, 0.5)],
        # d log p / d total at the text is 1 - p = 1 / (1 + e^-0.5).
        "gradient x input": [x / (1 + math.exp(-0.5)) for x in (1.0, -2.0, 0.5)],
        # The path is straight in the total, so each has its part of the change.
        "integrated gradients": [x / -0.5 * (log_p(-0.5) - log_p(0)) for x in (1.0, -2.0, 0.5)],
    }.items():
        params = Params(method=method, baseline="zero", keep_special=False, steps=100)
        shares = attribution._attributed(engine, [1, 2, 3], [0], params).shares
        assert shares == pytest.approx(expected, abs=1e-4), method


def test_the_events_tell_text_target_and_shares(tiny_engine):
    events = explain(tiny_engine, target="es")
    tokens = surviving(events)
    assert text_of(events) == TEXT + "es"
    assert [token.origin for token in tokens] == ["read"] * len(TEXT) + ["forced"] * 2
    found = scores(events)
    assert found.name == "attribution: integrated gradients" and found.unit == "nats"
    assert found.pos == len(TEXT) and found.over == tuple(range(len(TEXT)))
    (candidate,) = [event for event in events if isinstance(event, Candidate)]
    assert (candidate.key, candidate.group, candidate.text) == ("target", "target", "es")
    written = sum(token.logprob for token in tokens[-2:])
    assert candidate.logprob == pytest.approx(written, abs=1e-4)
    assert metrics(events)["F(text)"] == candidate.logprob


def test_without_a_target_it_is_the_models_own_next_token(tiny_engine):
    last = surviving(explain(tiny_engine))[-1]
    step = tiny_engine.step(tiny_engine.prefill(tiny_engine.tokens(TEXT)))
    assert last.id == int(step.logits.argmax()) and last.rank == 1 and last.origin == "sampled"


def test_a_run_forked_at_a_token_explains_that_token(tiny_engine):
    """The tokens before it belong to the text, and the knob's text does not count."""
    written = tuple(surviving(explain(tiny_engine, target="es")))[-2:]
    events = explain(tiny_engine, Task(TEXT, written=written), target="xyz")
    assert surviving(events)[-2:] == list(written)
    assert scores(events).pos == len(TEXT) + 1
    assert scores(events).values == scores(explain(tiny_engine, TEXT + "e", target="s")).values
    whole = tuple(surviving(events))
    assert scores(explain(tiny_engine, Task(TEXT, written=whole))) == scores(events)


def test_what_cannot_be_explained_is_refused_before_the_first_token(tiny_engine):
    with pytest.raises(BadInput, match="Nothing stands before the target"):
        explain(tiny_engine, Task("T", written=tuple(surviving(explain(tiny_engine, "T"))[:1])))
    room = "a" * tiny.CONTEXT
    with pytest.raises(OutOfContext, match="with the target it has 513 tokens"):
        explain(tiny_engine, room, target="b")


def test_a_target_without_tokens_is_refused(tiny_engine, monkeypatch):
    monkeypatch.setattr(tiny_engine, "tokens", lambda text, after="": [])
    with pytest.raises(BadParameter, match="target has no tokens"):
        explain(tiny_engine, target="\x00")


def test_the_first_and_special_tokens_stay(tiny_engine):
    task = Task(({"role": "user", "content": "A fox"},))
    ids = tiny_engine.encode(task)
    special = {0} | {pos for pos, id in enumerate(ids) if tiny_engine.vocabulary.special(id)}
    for method in ("integrated gradients", "occlusion"):
        values = scores(explain(tiny_engine, task, method=method, steps=2)).values
        assert {pos for pos, value in enumerate(values) if value == 0} == special
        every = scores(explain(tiny_engine, task, method=method, steps=2, keep_special=False))
        assert all(every.values)


def test_a_text_of_one_token_still_changes(tiny_engine):
    assert scores(explain(tiny_engine, "T", steps=64)).values[0] != 0


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt", "mixtral"])
def test_other_families(family):
    engine = tiny.engine(family)
    events = explain(engine, "A fox", target="es", method="occlusion")
    assert any(scores(events).values[1:])
    assert any(scores(explain(engine, "A fox", target="es", steps=2)).values)


def test_int8_weights_have_gradients_close_to_those_of_floats():
    exact = scores(explain(tiny.engine(), target="es", steps=8, baseline="space"))
    rounded = scores(explain(tiny.engine(int8=True), target="es", steps=8, baseline="space"))
    pair = torch.tensor([exact.values, rounded.values])
    assert torch.corrcoef(pair)[0, 1] > 0.95


def test_weights_without_gradients_are_named_and_occlusion_still_works(own_engine, monkeypatch):
    class Blocked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("no derivative of 4 bits")

    run = own_engine._passes.run
    monkeypatch.setattr(
        own_engine._passes, "run", lambda *args, **more: Blocked.apply(run(*args, **more))
    )
    with pytest.raises(ModelLacks, match=r"no gradients .*no derivative of 4 bits"):
        explain(own_engine)
    assert any(scores(explain(own_engine, method="occlusion")).values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_weights_on_a_cpu_have_no_gradients(kind):
    """bitsandbytes would give wrong ones, with a warning that appears once."""
    engine = tiny.engine()
    engine.identity = {**engine.identity, "quantization": kind}
    with pytest.raises(ModelLacks, match=rf"no gradients .*{kind} on a CPU"):
        explain(engine)
    assert any(scores(explain(engine, method="occlusion")).values)


def test_the_default_model_says_paris_because_of_france(smollm):
    events = explain(smollm, "The capital of France is")
    tokens, found = surviving(events), scores(events)
    assert tokens[-1].text == " Paris"
    assert metrics(events)["relative completeness error"] < 0.05
    ranked = sorted(zip(found.values, tokens[:-1], strict=True), key=lambda pair: -pair[0])
    assert {token.text for _, token in ranked[:2]} == {" capital", " France"}
    assert all(isinstance(token, Token) for token in tokens)
