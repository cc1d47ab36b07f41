"""The logit lens: what it reads is what the model computes, in every family."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analyzers.common import tuned_lens
from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Engine
from analyzers.engine.looking import Readings
from analyzers.errors import BadInput, BadParameter, ModelBroken, Stopped
from analyzers.inspection import logit_lens
from analyzers.inspection.logit_lens import DIVERGENCE, ENTROPY, GROUP, RANK, Params, settled
from analyzers.params import FileRef
from analyzers.task import Task
from analyzers.trace import Event, Lens, Scores, Token, surviving
from tests import tiny
from tests.test_engine import CLOSE, TEXT

LAYERS, WIDTH = tiny.SIZES["num_hidden_layers"], tiny.SIZES["hidden_size"]
FAMILIES = ("llama", "gemma2", "gpt2", "cohere2", "granitemoe", "lfm2")


def events(engine: Engine, task: Task | None = None, seed: int = 1, **knobs: object) -> list[Event]:
    params = Params(**{"max_new": 12, **knobs})
    with torch.inference_mode():
        return list(logit_lens.run(engine, task or Task(TEXT), params, Context(seed)))


def lenses(found: list[Event]) -> dict[int, Lens]:
    return {event.pos: event for event in found if isinstance(event, Lens)}


def scores(found: list[Event], name: str) -> dict[int, Scores]:
    return {e.pos: e for e in found if isinstance(e, Scores) and e.name == name}


def by_hand(engine: Engine, hidden: torch.Tensor, ids: list[int], k: int) -> list[list[dict]]:
    """One row after the other, in float64, with the norm and head written out."""
    found = []
    for token, id in zip(hidden, ids, strict=True):
        rows = [engine.unembed(state).double() for state in token]
        last = torch.softmax(rows[-1], -1)
        readings = []
        for row in rows:
            p = torch.softmax(row, -1)
            order = p[: engine.vocabulary.size].argsort(descending=True)
            readings.append(
                {
                    "top": p[order[:k]].log(),
                    "logprob": float(p[id].log()),
                    "rank": 1 + sum(float(other) > float(p[id]) for other in p),
                    "entropy": -sum(float(x) * float(x.log()) for x in p),
                    "divergence": sum(
                        float(x) * (float(x.log()) - float(y.log()))
                        for x, y in zip(last, p, strict=True)
                    ),
                }
            )
        found.append(readings)
    return found


def states(engine: Engine, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all layers in front of each token but the first, and the model's own logits there."""
    steps = [s for _, s in engine.read(engine.start(), ids, taps=range(LAYERS + 1)) if s]
    hidden = [torch.stack([step.hidden[layer] for layer in range(LAYERS + 1)]) for step in steps]
    return torch.stack(hidden), torch.stack([step.raw for step in steps])


# What a layer says


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_are_the_slow_obvious_ones(family):
    engine = tiny.engine(family)
    ids = engine.encode(Task(TEXT))[:7]
    hidden, _ = states(engine, ids)
    found = engine.read_layers(hidden, ids[1:], 5)
    assert found.top_ids.shape == found.top_logprobs.shape == (6, LAYERS + 1, 5)
    for i, token in enumerate(by_hand(engine, hidden, ids[1:], 5)):
        for layer, expected in enumerate(token):
            best = found.top_logprobs[i, layer]
            torch.testing.assert_close(best, expected["top"].float(), atol=1e-4, rtol=1e-4)
            read = engine.unembed(hidden[i, layer]).log_softmax(-1)[found.top_ids[i, layer]]
            torch.testing.assert_close(best, read, atol=1e-4, rtol=1e-4)
            for name, values in (
                ("logprob", found.logprobs),
                ("entropy", found.entropies),
                ("divergence", found.divergences),
            ):
                value = float(values[i, layer])
                assert value == pytest.approx(expected[name], abs=1e-4, rel=1e-4), name
            assert int(found.ranks[i, layer]) == expected["rank"]


def test_the_last_layer_is_the_model_itself(any_engine):
    """The two classic bugs are a norm applied twice there, or not at all elsewhere; the caps and
    scales of the families are away from 1."""
    ids = any_engine.encode(Task(TEXT))[:12]
    hidden, raw = states(any_engine, ids)
    found = any_engine.read_layers(hidden, ids[1:], 10)
    logprobs = raw.log_softmax(-1)
    best = logprobs[:, : any_engine.vocabulary.size].topk(10)
    torch.testing.assert_close(found.top_logprobs[:, -1], best.values, **CLOSE)
    written = logprobs[range(11), ids[1:]]
    torch.testing.assert_close(found.logprobs[:, -1], written, **CLOSE)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(found.entropies[:, -1], entropies, **CLOSE)
    assert float(found.divergences[:, -1].max()) < 1e-4
    assert float(found.divergences[:, 0].min()) > 1e-3 and bool((found.divergences >= 0).all())


def test_pieces_of_the_softmax_change_nothing(tiny_engine, monkeypatch):
    """More layers than fit into one piece."""
    ids = tiny_engine.encode(Task(TEXT))[:6]
    hidden, _ = states(tiny_engine, ids)
    whole = tiny_engine.read_layers(hidden, ids[1:], 300)
    monkeypatch.setattr("analyzers.engine.looking.SOFTMAX_ROWS", 3)
    pieces = tiny_engine.read_layers(hidden, ids[1:], 300)
    assert whole.top_ids.shape[-1] == tiny_engine.vocabulary.size  # no padding rows among them
    for name in Readings.__dataclass_fields__:
        torch.testing.assert_close(getattr(whole, name), getattr(pieces, name), **CLOSE)


def test_what_cannot_be_read_is_said(tiny_engine):
    hidden, _ = states(tiny_engine, [65, 66, 67])
    with pytest.raises(BadInput, match="no token 259"):
        tiny_engine.read_layers(hidden, [65, 259], 3)
    hidden[0, 1, 0] = torch.nan
    with pytest.raises(ModelBroken, match="not finite"):
        tiny_engine.read_layers(hidden, [65, 66], 3)


@pytest.mark.parametrize(
    ("likeliest", "place"),
    [([5], 0), ([5, 5, 5], 0), ([1, 2, 3], 2), ([3, 1, 3, 3], 2), ([1, 3, 2, 3], 3)],
)
def test_where_a_token_settles(likeliest, place):
    assert settled(likeliest) == place


# The run


def test_the_text_is_that_of_sampling(tiny_engine):
    """Reading changes nothing, greedy or drawn."""
    with torch.inference_mode():
        plain = list(
            sampling.run(
                tiny_engine,
                Task(TEXT),
                sampling.Params(temperature=0.0, top_p=1.0, max_new=12),
                Context(1),
            )
        )
    assert surviving(events(tiny_engine)) == surviving(plain)
    drawn = [events(tiny_engine, seed=seed, temperature=1.0) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert surviving(drawn[0]) != surviving(drawn[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_read_and_its_last_row_is_the_token_itself(family):
    engine = tiny.engine(family)
    found = events(engine, max_new=11, temperature=1.0)
    seen = lenses(found)
    tokens = surviving(found)
    assert tokens and list(seen) == [token.pos for token in tokens]
    for token in tokens:
        lens = seen[token.pos]
        assert lens.rows == ("0", "1", "2", "3") and lens.name == "layers"
        assert lens.measure == "log-probability of the written token, nats"
        assert lens.scores[-1] == pytest.approx(token.logprob, abs=1e-4)
        for (_, text, logprob), (_, expected, value) in zip(lens.top[-1], token.top, strict=True):
            assert (text, logprob) == (expected, pytest.approx(value, abs=1e-4))
        assert lens.picked == settled([row[0][0] for row in lens.top])
        ranks = scores(found, RANK)[token.pos]
        assert (ranks.over, ranks.unit) == (lens.rows, "")
        assert ranks.values[-1] == token.rank
        entropies, divergences = (
            scores(found, ENTROPY)[token.pos],
            scores(found, DIVERGENCE)[token.pos],
        )
        assert entropies.unit == divergences.unit == "nats"
        assert entropies.values[-1] == pytest.approx(token.entropy, abs=1e-4)
        assert divergences.values[-1] == pytest.approx(0, abs=1e-4) and divergences.values[0] > 0


def test_the_readings_follow_the_text_in_groups(own_engine):
    """At most GROUP tokens behind; the rest at the end; scores before the lens they belong to."""
    found = events(own_engine, max_new=GROUP + 3)
    kinds = "".join(type(event).__name__[0] for event in found)
    assert kinds == "T" * GROUP + "SSSL" * GROUP + "TTT" + "SSSL" * 3
    assert [event.pos for event in found if isinstance(event, Lens)] == [
        event.pos for event in found if isinstance(event, Token)
    ]
    for i, event in enumerate(found):
        if isinstance(event, Lens):
            assert {before.pos for before in found[i - 3 : i]} == {event.pos}


def test_a_stop_keeps_the_groups_that_were_read(own_engine):
    expected = events(own_engine, max_new=20)
    before = own_engine.forwards

    def poll() -> None:
        if own_engine.forwards - before == GROUP + 3:
            raise Stopped("stopped by you")

    own_engine.poll = poll
    said = []
    with pytest.raises(Stopped), torch.inference_mode():
        for event in logit_lens.run(own_engine, Task(TEXT), Params(max_new=20), Context(1)):
            said.append(event)
    assert said == expected[: len(said)]
    assert len(lenses(said)) == GROUP and GROUP < len(surviving(said)) < 2 * GROUP


def test_why_it_ends(own_engine):
    def why(task: Task, **knobs: object) -> str:
        run = logit_lens.run(own_engine, task, Params(**knobs), Context(1))
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value

    with torch.inference_mode():
        assert why(Task(TEXT), max_new=2) == "max_new reached"
        assert why(Task("a" * 510), max_new=9) == "context full"
        first = surviving(events(own_engine))[0]
        own_engine._ends = frozenset({first.id})
        assert why(Task(TEXT), max_new=9) == "end token"
    assert len(lenses(events(own_engine, max_new=9))) == 1


# Which layers


@pytest.mark.parametrize(
    ("knobs", "rows"),
    [
        ({}, "0123"),
        ({"every": 2}, "13"),
        ({"every": 3}, "03"),
        ({"every": 9}, "3"),
        ({"layers": (1,)}, "13"),
        ({"layers": (2, 0, 2), "every": 3}, "023"),
        ({"layers": (3,)}, "3"),
    ],
)
def test_the_layers_that_are_shown(tiny_engine, knobs, rows):
    """The last one always; each says what it says among all."""
    full, found = lenses(events(tiny_engine)), lenses(events(tiny_engine, **knobs))
    for pos, lens in found.items():
        assert lens.rows == tuple(rows)
        for row, score in zip(lens.rows, lens.scores, strict=True):
            assert score == pytest.approx(full[pos].scores[int(row)], abs=1e-4)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_refused(tiny_engine, layer):
    before = tiny_engine.forwards
    with pytest.raises(BadParameter, match=f"no layer {layer}: the model has 3 layers"):
        events(tiny_engine, layers=(1, layer))
    assert tiny_engine.forwards == before


# Going on from an earlier run


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_the_tokens_that_stay_are_read_as_well(family):
    """A run in two parts says what it says in one, also where nothing precedes the first token."""
    engine = tiny.engine(family)
    engine._ends = frozenset()
    whole = events(engine, max_new=14)
    tokens = tuple(surviving(whole))
    found = events(engine, Task(TEXT, written=tokens[:10]), max_new=4)
    assert found[:10] == list(tokens[:10])
    assert [token.id for token in surviving(found)] == [token.id for token in tokens]
    assert list(lenses(found)) == list(lenses(whole))
    for pos, lens in lenses(found).items():
        assert lens.scores == pytest.approx(lenses(whole)[pos].scores, abs=1e-4)
    whole_text = tuple(_read_as_tokens(engine))
    found = events(engine, Task("", written=whole_text), max_new=2)
    assert list(lenses(found)) == list(range(1, len(whole_text) + 2))


def _read_as_tokens(engine: Engine) -> list[Token]:
    numbers = {"entropy": None, "rank": None, "margin": None, "p_sampled": None, "top": ()}
    return [
        Token(pos=i, id=id, text=chr(id), bytes=f"{id:02x}", logprob=None, origin="read", **numbers)
        for i, id in enumerate(b"some text")
    ]


# A tuned lens


def maps(layers: range = range(LAYERS), scale: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"{layer}.{name}": scale * torch.randn(*shape, generator=generator)
        for layer in layers
        for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    }


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> FileRef:
    save_file(tensors, folder / "lens.safetensors")
    return FileRef(folder / "lens.safetensors")


def test_a_tuned_lens_of_zeros_is_the_logit_lens(tiny_engine, tmp_path):
    assert events(tiny_engine, tuned=saved(tmp_path, maps())) == events(tiny_engine)


def test_a_tuned_lens_maps_the_state_before_it_is_read(tiny_engine, tmp_path):
    """z = unembed(h + A h + b), for the input of block i; the last layer has no map."""
    tensors = maps(scale=0.1)
    found = events(tiny_engine, tuned=saved(tmp_path, tensors), max_new=3)
    plain = lenses(events(tiny_engine, max_new=3))
    ids = tiny_engine.encode(Task(TEXT))
    tokens = surviving(found)
    with torch.inference_mode():
        cursor = tiny_engine.prefill(ids)
        for token in tokens:
            step = tiny_engine.step(cursor, taps=range(LAYERS + 1))
            lens = lenses(found)[token.pos]
            for layer in range(LAYERS):
                h = step.hidden[layer]
                h = h + tensors[f"{layer}.weight"] @ h + tensors[f"{layer}.bias"]
                expected = float(tiny_engine.unembed(h).log_softmax(-1)[token.id])
                assert lens.scores[layer] == pytest.approx(expected, abs=1e-3)
                assert lens.scores[layer] != pytest.approx(plain[token.pos].scores[layer], abs=1e-3)
            assert lens.scores[LAYERS] == pytest.approx(plain[token.pos].scores[LAYERS], abs=1e-4)
            tiny_engine.push(cursor, token.id)


def test_only_the_layers_that_are_shown_need_a_map(tiny_engine, tmp_path):
    file = saved(tmp_path, maps(range(1, 2)))
    assert lenses(events(tiny_engine, tuned=file, layers=(1,)))
    with pytest.raises(BadParameter, match=r"lens\.safetensors has no 0\.weight"):
        events(tiny_engine, tuned=file)


def test_a_lens_that_does_not_fit_is_refused_before_the_first_pass(tiny_engine, tmp_path):
    before = tiny_engine.forwards
    good = maps()
    wrong = {
        r"has no 1\.bias": {k: v for k, v in good.items() if k != "1.bias"},
        r"another model: 1\.weight is 8 by 32, this model needs 32 by 32": good
        | {"1.weight": torch.zeros(8, 32)},
        r"another model: 0\.bias is 32 by 1, this model needs 32": good
        | {"0.bias": torch.zeros(32, 1)},
        r"numbers that are not finite in 2\.weight": good
        | {"2.weight": torch.full((32, 32), torch.nan)},
    }
    for message, tensors in wrong.items():
        with pytest.raises(BadParameter, match=message):
            events(tiny_engine, tuned=saved(tmp_path, tensors))
    (tmp_path / "other.safetensors").write_bytes(b"no tensors in here")
    for path in (tmp_path / "other.safetensors", tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(BadParameter, match="could not be read"):
            events(tiny_engine, tuned=FileRef(path))
    assert tiny_engine.forwards == before


def test_a_map_is_h_plus_a_h_plus_b():
    """Worked by hand: (1, 2) + ((0, 1), (1, 0)) (1, 2) + (10, 0) = (13, 3)."""
    lens = tuned_lens.TunedLens(
        {4: (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([10.0, 0.0]))}
    )
    hidden = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]])
    assert lens.translate(hidden, (4, 5)).tolist() == [[[13.0, 3.0], [1.0, 2.0]]]
    assert hidden.tolist() == [[[1.0, 2.0], [1.0, 2.0]]]


# The default model


def test_the_default_model_settles_late_and_below_the_last_layer(smollm):
    """What one sees at the first click: the early layers say other things than the answer."""
    found = events(smollm, Task("The capital of France is"), max_new=8)
    seen = list(lenses(found).values())
    assert len(seen) == 8 and seen[0].rows == tuple(map(str, range(31)))
    assert seen[0].top[-1][0][1] == " Paris" and seen[0].top[3][0][1] != " Paris"
    places = [lens.picked for lens in seen]
    assert 15 < sum(places) / len(places) <= 30 and min(places) < 30
    assert min(scores(found, DIVERGENCE)[seen[0].pos].values[:15]) > 1.0
