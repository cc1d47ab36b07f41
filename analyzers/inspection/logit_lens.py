"""Logit lens: what every layer would have written at each token, and where the answer settles.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; tuned lens: Belrose et al. 2023
        (arXiv:2303.08112).
Idea:   the state of every layer goes through the model's own final norm and head as if it were the
        last one; so each layer gets a next-token distribution. Measured at each of them: how
        likely the written token was and its rank, the entropy, and the divergence from the last
        layer. The layer from which on the likeliest token stays the same is where it settled.
Differs from the source: the final norm is applied to every layer (the first logit lens had none,
        and every later one has it), and so are a family's scale and soft-cap of the logits. Tokens
        are read in groups of eight, because then the head is passed once for all of them: what
        the layers say follows the text by at most eight tokens, and a stop cuts off the rest.
        With a tuned lens a state h is read as h + A h + b; its file is made elsewhere.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from analyzers.card import Card
from analyzers.common import tuned_lens
from analyzers.common.contrast import LOGPROB
from analyzers.common.tuned_lens import TunedLens
from analyzers.context import Context
from analyzers.engine import Cursor, Engine, Filters, Step, chosen
from analyzers.engine.signals import DIGITS, TOP
from analyzers.errors import BadParameter
from analyzers.params import FileRef, knob
from analyzers.task import Task
from analyzers.trace import Event, Lens, Scores, Token

CARD = Card(
    "Logit lens",
    family="inspection",
    source="nostalgebraist 2020; Belrose et al. 2023, arXiv:2303.08112",
    emits=(Token, Lens, Scores),
    needs=("layers", "fork"),
)

GROUP = 8
"""Tokens that are read together: fewer pay more often for the head, more are seen later."""
RANK, ENTROPY, DIVERGENCE = (
    "rank of the written token",
    "entropy",
    "divergence from the last layer",
)


@dataclass(frozen=True)
class Params:
    """Defaults are ours: greedy, so that the text is what the layers lead to; all layers."""

    temperature: float = knob(0.0, "0 = greedy, above 1 flattens", lo=0, hi=2)
    max_new: int = knob(48, "When to stop writing", lo=1, hi=2048, unit="tokens")
    every: int = knob(1, "Show every n-th layer, counted down from the last", lo=1, hi=64)
    layers: tuple[int, ...] = knob(
        (), "Show these layers and the last (0 = embeddings); empty = by the knob above"
    )
    tuned: FileRef = knob(
        FileRef(""), "A tuned lens (.safetensors) made for this model; empty = plain logit lens"
    )


@dataclass(frozen=True, eq=False)
class Seen:
    """One written token and the state of every shown layer before it, (layers, d_model)."""

    pos: int
    id: int
    states: torch.Tensor


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield each Token as it is written, and for groups of tokens what the layers said.

    Each token gets its Scores over the layers and then its Lens. A run that goes on from an
    earlier one reads the tokens it keeps as well. Raises: BadParameter before the first token.
    """
    layers = _chosen(engine, params)
    lens = _tuned(engine, params.tuned, layers)
    yield from task.written
    cursor = ctx.begin(engine, engine.encode(task))
    yield from _kept(engine, cursor, len(task.written), layers, lens)
    rng, filters = ctx.rng("logit lens"), Filters(temperature=params.temperature)
    unread: list[Seen] = []
    why = "max_new reached"
    for _ in range(params.max_new):
        if cursor.pos == engine.context:
            why = "context full"
            break
        step = engine.step(cursor, filters=filters, taps=layers)
        written = chosen(engine, step, rng, params.temperature)
        engine.push(cursor, written.id)
        yield written
        unread.append(_seen(step, written.id, layers))
        if len(unread) == GROUP:
            yield from _read(engine, unread, layers, lens)
            unread.clear()
        if engine.ends(written.id):
            why = "end token"
            break
    yield from _read(engine, unread, layers, lens)
    return why


def settled(likeliest: Sequence[int]) -> int:
    """The first place from which on the likeliest token stays the same as at the end."""
    place = len(likeliest) - 1
    while place > 0 and likeliest[place - 1] == likeliest[-1]:
        place -= 1
    return place


def _chosen(engine: Engine, params: Params) -> tuple[int, ...]:
    """The layers to show, ascending; the last one is always among them."""
    last = engine.layers
    for layer in params.layers:
        if not 0 <= layer <= last:
            raise BadParameter(
                f"There is no layer {layer}: the model has {last} layers, and 0 is its embeddings."
            )
    return tuple(sorted({last, *(params.layers or range(last, -1, -params.every))}))


def _tuned(engine: Engine, file: FileRef, layers: Sequence[int]) -> TunedLens:
    """The tuned lens for all layers but the last, which needs none; one without maps for ""."""
    if not file:
        return TunedLens({})
    return tuned_lens.read(file, layers[:-1], engine.embeddings([0]).shape[-1])


def _kept(
    engine: Engine, cursor: Cursor, written: int, layers: Sequence[int], lens: TunedLens
) -> Iterator[Event]:
    """Read the last `written` tokens before the cursor."""
    if not written:
        return
    start = cursor.pos - written
    unread = []
    for id, step in engine.read(engine.fork(cursor, start), cursor.ids[start:], taps=layers):
        if step:  # nothing precedes the first token of a text
            unread.append(_seen(step, id, layers))
    for at in range(0, len(unread), GROUP):
        yield from _read(engine, unread[at : at + GROUP], layers, lens)


def _seen(step: Step, id: int, layers: Sequence[int]) -> Seen:
    return Seen(step.pos, id, torch.stack([step.hidden[layer] for layer in layers]))


def _read(
    engine: Engine, seen: Sequence[Seen], layers: Sequence[int], lens: TunedLens
) -> Iterator[Event]:
    """What the layers would have written at these tokens."""
    if not seen:
        return
    hidden = lens.translate(torch.stack([each.states for each in seen]), layers)
    found = engine.read_layers(hidden, [each.id for each in seen], TOP)
    ids, tops, logprobs, ranks, entropies, divergences = (
        values.tolist()
        for values in (
            found.top_ids,
            found.top_logprobs,
            found.logprobs,
            found.ranks,
            found.entropies,
            found.divergences,
        )
    )
    rows = tuple(map(str, layers))
    for i, each in enumerate(seen):
        numbers = (
            (RANK, "", ranks),
            (ENTROPY, "nats", entropies),
            (DIVERGENCE, "nats", divergences),
        )
        for name, unit, values in numbers:
            yield Scores(each.pos, name, unit, rows, _rounded(values[i]))
        yield Lens(
            pos=each.pos,
            rows=rows,
            top=tuple(
                tuple(
                    (id, engine.vocabulary.display(id), round(logprob, DIGITS))
                    for id, logprob in zip(*row, strict=True)
                )
                for row in zip(ids[i], tops[i], strict=True)
            ),
            scores=_rounded(logprobs[i]),
            picked=settled([likeliest for likeliest, *_ in ids[i]]),
            measure=LOGPROB,
        )


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), DIGITS) for value in values)
