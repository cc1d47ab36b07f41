"""Looking inside: readouts, ranges of layers, sentence vectors, attention and gradients."""

import pytest
import torch

from analyzers.engine import Cursor, Engine, Options, Tree
from analyzers.errors import BadInput, ModelBroken, ModelLacks, OutOfContext, Stopped
from analyzers.task import Task
from tests import tiny
from tests.test_engine import CLOSE, TEXT, full

LAYERS = tiny.SIZES["num_hidden_layers"]
# States before the final norm are larger than logits.
STATES = {"atol": 1e-3, "rtol": 1e-3}


def ids_of(engine: Engine, length: int = 20) -> list[int]:
    """Longer than the sliding window (8), where a family has one."""
    return engine.encode(Task(TEXT))[:length]


def agrees(engine: Engine, cursor: Cursor) -> None:
    """The next steps are those of a text that was simply written."""
    for id in (78, 79, 80):
        raw = engine.step(cursor).raw
        torch.testing.assert_close(raw, full(engine, cursor.ids)[-1], **CLOSE)
        engine.push(cursor, id)


# Readout


def test_many_rows_read_out_as_one_by_one(any_engine):
    cursor = any_engine.prefill(ids_of(any_engine))
    step = any_engine.step(cursor, taps=range(LAYERS + 1))
    states = torch.stack(list(step.hidden.values()))
    found = any_engine.unembed(torch.stack([states, 2 * states]))
    assert found.shape == (2, LAYERS + 1, len(step.raw)) and found.dtype == torch.float32
    for layer in range(LAYERS + 1):
        torch.testing.assert_close(found[0, layer], any_engine.unembed(states[layer]), **CLOSE)
    torch.testing.assert_close(found[0, LAYERS], step.raw, **CLOSE)


# Ranges of layers


def test_all_layers_on_the_embeddings_are_the_model(any_engine):
    ids = ids_of(any_engine)
    states = any_engine.forward(any_engine.embeddings(ids), (0, LAYERS))
    torch.testing.assert_close(any_engine.unembed(states), full(any_engine, ids), **CLOSE)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_model_in_two_parts_is_the_model(any_engine, cut):
    """Without a cache; and with one, in two calls a part."""
    ids = ids_of(any_engine)
    expected = full(any_engine, ids)
    embeddings = any_engine.embeddings(ids)
    early = any_engine.forward(embeddings, (0, cut))
    late = any_engine.forward(early, (cut, LAYERS))
    torch.testing.assert_close(any_engine.unembed(late), expected, **CLOSE)
    cursor = any_engine.start()
    for chunk in (slice(0, 12), slice(12, None)):
        states = any_engine.forward(embeddings[chunk], (0, cut), cursor=cursor)
        torch.testing.assert_close(states, early[chunk], **STATES)
        states = any_engine.forward(states, (cut, LAYERS), cursor=cursor)
        torch.testing.assert_close(any_engine.unembed(states), expected[chunk], **CLOSE)
    assert {layer.length for layer in cursor.past.layers} == {len(ids)}
    for id in ids:
        any_engine.push(cursor, id)
    agrees(any_engine, cursor)


@pytest.mark.parametrize("exit", [1, 2])
def test_early_layers_may_run_ahead_and_the_late_ones_follow(any_engine, exit):
    """As a model that drafts with its own first layers does, and then checks."""
    ids = ids_of(any_engine)
    cursor = any_engine.prefill(ids)
    states = []
    for id in (70, 71, 72, 73):
        step = any_engine.step(cursor, taps=(exit,), options=Options(upto=exit))
        states.append(step.hidden[exit])
        any_engine.push(cursor, id)
    late = any_engine.forward(torch.stack(states), (exit, LAYERS), cursor=cursor)
    assert {layer.length for layer in cursor.past.layers} == {cursor.pos - 1}
    torch.testing.assert_close(
        any_engine.unembed(late), full(any_engine, cursor.ids)[len(ids) - 1 : -1], **CLOSE
    )
    any_engine.rewind(cursor, len(ids) + 2)
    agrees(any_engine, cursor)


def test_the_drafting_goes_back_and_nothing_stays(any_engine):
    ids = ids_of(any_engine)
    cursor = any_engine.prefill(ids)
    for id in (70, 71, 72):
        any_engine.step(cursor, options=Options(upto=1))
        any_engine.push(cursor, id)
    any_engine.rewind(cursor, len(ids))
    agrees(any_engine, cursor)


def test_states_that_nobody_sees_change_nothing(any_engine):
    """Pseudo tokens behind the real ones, at positions of their own, hidden by a mask."""
    ids = ids_of(any_engine)
    real = any_engine.embeddings(ids)
    expected = any_engine.forward(real, (0, LAYERS))
    pseudo = torch.cat([real, real[:3] * 3])
    n = len(ids)
    mask = torch.ones(n + 3, n + 3, dtype=torch.bool).tril()
    mask[n:, :n] = False
    positions = [*range(n), 5, 6, 7]
    found = any_engine.forward(pseudo, (0, LAYERS), positions=positions, mask=mask)
    torch.testing.assert_close(found[:n], expected, **STATES)
    assert not torch.allclose(found[n:], expected[:3], **STATES)


def test_a_mask_and_positions_make_a_branch(any_engine):
    """Two texts with a common beginning in one pass, as trees do; over the window."""
    ids = ids_of(any_engine, 12)
    first, second = [*ids, 70, 71], [*ids, 80, 81]
    cursor = any_engine.start()
    any_engine.forward(any_engine.embeddings(ids), (0, LAYERS), cursor=cursor)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, :12] = True
    mask[:2, 12:14] = mask[2:, 14:] = torch.ones(2, 2, dtype=torch.bool).tril()
    states = any_engine.forward(
        any_engine.embeddings([70, 71, 80, 81]),
        (0, LAYERS),
        cursor=cursor,
        positions=[12, 13, 12, 13],
        mask=mask,
    )
    found = any_engine.unembed(states)
    torch.testing.assert_close(found[:2], full(any_engine, first)[12:], **CLOSE)
    torch.testing.assert_close(found[2:], full(any_engine, second)[12:], **CLOSE)
    for id in ids:
        any_engine.push(cursor, id)
    agrees(any_engine, cursor)


def test_skipped_parts_of_a_range_keep_their_rows(tiny_engine):
    """In a range, too, only the layers that attend count what they have cached."""
    ids = ids_of(tiny_engine)
    embeddings = tiny_engine.embeddings(ids)
    options = Options(skip=frozenset({(2, "attention")}))
    whole = tiny_engine.forward(embeddings, (0, LAYERS), options=options)
    cursor = tiny_engine.start()
    for chunk in (slice(0, 12), slice(12, None)):
        found = tiny_engine.forward(embeddings[chunk], (0, LAYERS), cursor=cursor, options=options)
        torch.testing.assert_close(found, whole[chunk], **STATES)
    assert [layer.length for layer in cursor.past.layers] == [len(ids), 0, len(ids)]
    mute = Options(skip=frozenset({(1, "attention"), (3, "attention")}))
    tiny_engine.forward(embeddings[:1], (0, 1), cursor=cursor, options=mute)
    assert cursor.past.layers[0].length == len(ids)


def test_a_range_forgets_a_verified_tree(tiny_engine):
    cursor = tiny_engine.prefill(ids_of(tiny_engine))
    tiny_engine.verify(cursor, Tree((70, 71), (-1, -1)))
    found = tiny_engine.forward(tiny_engine.embeddings([75]), (0, LAYERS), cursor=cursor)
    expected = full(tiny_engine, [*cursor.ids, 75])[-1]
    torch.testing.assert_close(tiny_engine.unembed(found[0]), expected, **CLOSE)
    assert cursor.checked is None
    agrees(tiny_engine, cursor)


@pytest.mark.parametrize("error", [Stopped("stopped"), RuntimeError("broken kernel")])
def test_an_error_in_a_range_leaves_the_cursor_as_it_was(tiny_engine, monkeypatch, error):
    cursor = tiny_engine.prefill(ids_of(tiny_engine))
    before = [layer.length for layer in cursor.past.layers]
    states = tiny_engine.embeddings([70, 71])

    def fail(*args):
        raise error

    hook = tiny_engine.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        tiny_engine.forward(states, (0, LAYERS), cursor=cursor)
    hook.remove()
    assert [layer.length for layer in cursor.past.layers] == before
    monkeypatch.setattr(tiny_engine, "poll", fail)
    with pytest.raises(type(error)):
        tiny_engine.forward(states, (0, LAYERS), cursor=cursor)
    monkeypatch.undo()
    agrees(tiny_engine, cursor)


def test_layers_and_ids_that_are_not_there_are_refused(tiny_engine):
    states = tiny_engine.embeddings([65, 66])
    for layers in ((0, LAYERS + 1), (2, 2), (2, 1), (-1, 2)):
        with pytest.raises(BadInput, match="There are no layers"):
            tiny_engine.forward(states, layers)
    with pytest.raises(OutOfContext, match="601 tokens"):
        tiny_engine.forward(states, (0, 2), positions=[0, 600])
    with pytest.raises(BadInput, match="no token 259"):
        tiny_engine.embeddings([65, 259])


# Sentence vectors


def test_a_sentence_vector_is_the_mean_of_the_last_normed_states(any_engine):
    texts = ["A fox.", "Another, much longer sentence about a dog.", "x"]
    found = any_engine.embed(texts)
    for row, text in zip(found, texts, strict=True):
        ids = any_engine.tokens(text)
        with torch.no_grad():
            states = any_engine.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected = states[-1][0].float().mean(0)  # the library's last entry is already normed
        torch.testing.assert_close(row, expected / expected.norm(), **CLOSE)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert found.dtype == torch.float32


def test_what_has_no_sentence_vector(tiny_engine):
    assert tiny_engine.embed([]).shape == (0, 32)
    with pytest.raises(BadInput, match="empty text"):
        tiny_engine.embed(["a", ""])
    with pytest.raises(OutOfContext, match="513 tokens"):
        tiny_engine.embed(["a" * 513])


# Attention


def eager_attention(family: str, ids: list[int]) -> torch.Tensor:
    """transformers' own, of a fresh model of the same weights: (layers, heads, queries, keys)."""
    model = tiny.model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        given = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    return torch.stack([weights[0] for weights in given]).float()


# transformers cannot change Falcon's implementation of attention once it is made.
@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "falcon"])
def test_attention_is_what_transformers_says(family):
    """In the middle and at the pending end; the cursor stays, and so does the implementation."""
    engine = tiny.engine(family)
    ids = ids_of(engine)
    cursor = engine.prefill(ids)
    cached, implementation = cursor.cached, engine.model.config._attn_implementation
    expected = eager_attention(family, ids)
    for pos in (0, 13, len(ids) - 1):
        found = engine.attention(cursor, pos)
        assert found.shape == (LAYERS, 4, pos + 1) and found.dtype == torch.float32
        torch.testing.assert_close(found, expected[:, :, pos, : pos + 1], **CLOSE)
        sums = found.sum(-1)
        if family == "gpt_oss":  # the rest goes to the sinks
            assert ((sums > 0) & (sums < 1)).all()
        else:
            torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (cursor.ids, cursor.cached) == (ids, cached)
    assert engine.model.config._attn_implementation == implementation
    agrees(engine, cursor)


def test_attention_after_an_error_is_as_it_was(tiny_engine, monkeypatch):
    cursor = tiny_engine.prefill(ids_of(tiny_engine))

    def fail(*args):
        raise RuntimeError("broken kernel")

    hook = tiny_engine.model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        tiny_engine.attention(cursor, 10)
    hook.remove()
    assert tiny_engine.model.config._attn_implementation == "sdpa"
    polls = iter(range(10))

    def poll() -> None:
        if next(polls) == 1:
            raise Stopped("stopped")

    monkeypatch.setattr(tiny_engine, "poll", poll)
    tiny_engine.rewind(cursor, 15)
    with pytest.raises(Stopped):
        tiny_engine.push(cursor, 70)
        tiny_engine.push(cursor, 71)
        tiny_engine.attention(cursor, 16)
    monkeypatch.undo()
    assert tiny_engine.model.config._attn_implementation == "sdpa"
    agrees(tiny_engine, cursor)


def test_attention_of_nothing_is_refused(tiny_engine):
    cursor = tiny_engine.prefill([65, 66])
    for pos in (-1, 2):
        with pytest.raises(BadInput, match=f"position {pos}: the text has 2"):
            tiny_engine.attention(cursor, pos)


def test_a_model_that_gives_no_attention_weights_says_so():
    engine = tiny.engine("falcon")
    cursor = engine.prefill([65, 66])
    with pytest.raises(ModelLacks, match="tiny-falcon does not give its attention weights"):
        engine.attention(cursor, 1)
    agrees(engine, cursor)


# Gradients


def objective(logits: torch.Tensor) -> torch.Tensor:
    return logits[-1, 70] - logits[-1, 71] + logits[3].square().mean()


def by_hand(engine: Engine, family: str, ids: list[int]) -> tuple[float, torch.Tensor]:
    """Autograd written out, on a fresh model of the same weights."""
    model = tiny.model(family)
    given = engine.embeddings(ids).detach().clone().requires_grad_(True)
    value = objective(model(inputs_embeds=given[None], use_cache=False).logits[0].float())
    value.backward()
    return float(value.detach()), given.grad


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_those_of_autograd(family):
    """In inference mode, as the runner enters it. No parameter gets one."""
    engine = tiny.engine(family)
    ids = ids_of(engine)
    value, gradient = by_hand(engine, family, ids)
    with torch.inference_mode():
        found = engine.gradients(ids, objective)
        assert torch.is_inference_mode_enabled()
        torch.testing.assert_close(found.inputs, engine.embeddings(ids))
        assert found.value == pytest.approx(value, rel=1e-4, abs=1e-4)
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found.gradient / scale, gradient / scale, atol=1e-3, rtol=1e-3)
        assert not found.gradient.requires_grad
        assert not any(p.requires_grad or p.grad is not None for p in engine.model.parameters())
        agrees(engine, engine.prefill(ids))


def test_gradients_are_finite_differences():
    """In float64, where a difference is not noise."""
    plain = tiny.engine()
    engine = Engine(tiny.model().double(), tiny.tokenizer(), plain.identity)
    ids = ids_of(engine, 10)
    found = engine.gradients(ids, lambda logits: logits[-1, 70] - logits[-1, 71])
    generator = torch.Generator().manual_seed(3)
    start, step = engine.embeddings(ids).double(), 1e-3

    def value(inputs: torch.Tensor) -> float:
        with torch.no_grad():
            logits = engine.model(inputs_embeds=inputs[None], use_cache=False).logits[0]
        return float(logits[-1, 70] - logits[-1, 71])

    for _ in range(4):
        way = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        slope = (value(start + step * way) - value(start - step * way)) / (2 * step)
        assert float((found.gradient.double() * way).sum()) == pytest.approx(slope, rel=1e-2)


def test_gradients_at_other_inputs_are_a_point_on_a_path(tiny_engine):
    """Also where those were computed in inference mode."""
    ids = ids_of(tiny_engine)
    with torch.inference_mode():
        half = tiny_engine.embeddings(ids) / 2
        found = tiny_engine.gradients(ids, objective, inputs=half)
        torch.testing.assert_close(found.inputs, half)
    given = half.clone().detach().requires_grad_(True)
    value = objective(tiny_engine.model(inputs_embeds=given[None], use_cache=False).logits[0])
    value.backward()
    torch.testing.assert_close(found.gradient, given.grad, **STATES)
    assert found.value == pytest.approx(float(value.detach()), abs=1e-4)


def test_integrated_gradients_add_up_to_the_change(tiny_engine):
    """Completeness, the axiom of integrated gradients: the reason for `inputs`."""
    ids = ids_of(tiny_engine, 8)
    start = tiny_engine.embeddings(ids)

    def along(share: float):
        return tiny_engine.gradients(ids, lambda rows: rows[-1, 70], inputs=start * share)

    low, high, steps = 0.9, 1.0, 40
    width = (high - low) / steps
    total = sum(
        float((along(low + (place + 0.5) * width).gradient * start).sum()) * width
        for place in range(steps)
    )
    assert total == pytest.approx(along(high).value - along(low).value, rel=2e-2, abs=1e-3)


def test_an_objectives_own_errors_are_not_the_models(tiny_engine):
    with pytest.raises(RuntimeError, match="of the method"):
        tiny_engine.gradients([65, 66], lambda logits: exec("raise RuntimeError('of the method')"))
    with pytest.raises(BadInput, match="not one token"):
        tiny_engine.gradients([], objective)
    with pytest.raises(BadInput, match="no token 259"):
        tiny_engine.gradients([259], objective)
    with pytest.raises(OutOfContext):
        tiny_engine.gradients([65] * 513, objective)


def test_weights_that_cannot_be_differentiated_are_named(tiny_engine, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no derivative of int8")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.raises(ModelLacks, match=r"tiny-llama has no gradients .*no derivative of int8"):
        tiny_engine.gradients([65, 66, 67, 68], objective)


def test_broken_weights_name_the_layer():
    engine = tiny.engine(seed=3)
    cursor = engine.prefill([65, 66, 67])
    with torch.no_grad():
        engine.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    for call in (
        lambda: engine.embed(["abc"]),
        lambda: engine.attention(cursor, 2),
        lambda: engine.gradients([65, 66], objective),
    ):
        with pytest.raises(ModelBroken, match="layer 2 of 3"):
            call()


def test_exits_are_the_readouts_of_their_layers(any_engine):
    """In one product with the model's own logits, or after it: the same numbers."""
    ids = any_engine.tokens("The quick brown fox")
    with torch.inference_mode():
        plain = any_engine.step(any_engine.prefill(ids), taps=(1, 2))
        step = any_engine.step(any_engine.prefill(ids), exits=(2, 1))
        assert list(step.exits) == [2, 1] and plain.exits == {}
        torch.testing.assert_close(step.raw, plain.raw, atol=1e-4, rtol=1e-4)
        for layer in (1, 2):
            expected = any_engine.unembed(plain.hidden[layer])
            torch.testing.assert_close(step.exits[layer], expected, atol=1e-3, rtol=1e-4)
        many = any_engine.step([any_engine.prefill(ids), any_engine.prefill(ids[:3])], exits=(1,))
        torch.testing.assert_close(many[0].exits[1], step.exits[1], atol=1e-3, rtol=1e-4)
