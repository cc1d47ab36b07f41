"""DoLa: what the last layer adds to an earlier one decides the next token.

Source: Chuang et al., ICLR 2024 (arXiv:2309.03883); its code and the generation code of
        transformers 4.46 (both read).
Idea:   some layers are read as if they were the last. The one whose distribution is furthest from
        the last layer's is taken away from it, in log-probabilities, among the tokens that the
        last layer itself finds plausible: what came late into the model, facts more than grammar,
        is amplified.
Differs from the source: the divergence is the true Jensen-Shannon one; both codes swap its
        arguments, which can choose another layer and is the choice "dola-official" (summed here
        over the vocabulary, where they take the mean: the order is the same). The final norm comes
        before the head at every layer; both codes leave it out below the last, which is `norm`
        false (the default model then writes Mogadishu for the capital of Kenya, and soon only
        single letters). The lowest layer of "low" is always the second, as transformers has it for
        tied embeddings, whose layer 0 only repeats the token that was read; the source begins at 0
        where they are not tied. Where the layers agree, the last one decides alone.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from analyzers.card import Card
from analyzers.common import contrast
from analyzers.common.contrast import At, Branch, Exits, Fused, Rule
from analyzers.context import Context
from analyzers.engine import Engine, Step
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.task import Task
from analyzers.trace import Event, Lens, Note, Scores, Token

CARD = Card(
    "DoLa",
    family="contrast",
    source="Chuang et al., ICLR 2024, arXiv:2309.03883",
    emits=(Token, Lens, Scores),
    needs=("logits", "layers"),
)
DEEP = 40
"""In a model with more layers, a bucket is its first or last twenty."""
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Params:
    """Defaults of the source's open-ended generation; its high bucket is the one for TruthfulQA."""

    candidates: Literal["high", "low", "explicit"] = knob(
        "high", "Which layers to choose from: upper half, lower half, or those named in layers"
    )
    alpha: float = knob(0.1, "Keep tokens at least this times as likely as the best", lo=0, hi=1)
    repetition_penalty: float = knob(1.2, "Above 1: avoid tokens already there", lo=0.5, hi=2)
    divergence: Literal["jsd", "dola-official"] = knob(
        "jsd",
        "How far a layer is from the last: Jensen-Shannon, or what the published code computes",
    )
    norm: bool = knob(True, "Apply the final norm before reading an earlier layer")
    layers: tuple[int, ...] = knob((10, 15, 20), "For explicit: layer numbers, 0 = embeddings")
    temperature: float = knob(0.0, "0 = greedy; sampling is far flatter than the model", lo=0, hi=2)
    max_new: int = knob(96, "When to stop writing", lo=1, hi=8192, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a Token per step with its layers, its two distributions and their contrast, and the
    divergence of the chosen layer; return why the text ended.

    A token whose rank is not 1 is one that the contrast changed (or the repetition penalty).
    Raises: BadParameter for layers that the model does not have.
    """
    yield from task.written
    branches, rule = contrasted(engine, task, params, ctx)
    if task.written and engine.ends(task.written[-1].id):
        return "end token"
    if params.temperature > 0:
        yield Note(
            "warning",
            "The weights of this contrast sum to 0, so sampling from it is far flatter than the "
            "model; temperature 0 is the meaningful setting.",
        )
    return (
        yield from contrast.write(
            ctx,
            branches,
            rule,
            max_new=params.max_new,
            temperature=params.temperature,
            repetition_penalty=params.repetition_penalty,
            say=_say,
        )
    )


def contrasted(
    engine: Engine, task: Task, params: Params, ctx: Context
) -> tuple[list[Branch], Rule]:
    """One branch, whose own lower layers are the other side: lsm(final) - lsm(layer)."""
    layers = candidates(engine.layers, params)
    cursor = ctx.begin(engine, engine.encode(task))
    branch = Branch("final", engine, cursor, taps=layers, exits=layers if params.norm else ())

    def rule(steps: Sequence[Step]) -> Fused:
        (step,) = steps
        logits = contrast.early(engine, step, layers, norm=params.norm)
        divergences = measured(logits, params.divergence)
        picked = int(divergences[:-1].argmax())
        fused = contrast.fuse(
            step.logits, [(1.0, step.raw), (-1.0, logits[picked])], params.alpha, picked=picked
        )
        measure = f"{_NAMES[params.divergence]} from the last layer, nats"
        return replace(
            fused,
            exits=Exits((*layers, engine.layers), logits, tuple(divergences.tolist()), measure),
            shown=(("final", step.raw), ("premature", logits[picked])),
        )

    return [branch], rule


def candidates(layers: int, params: Params) -> tuple[int, ...]:
    """The layers to choose from, in a model with so many: every second one of a half.

    Raises: BadParameter for an explicit layer that is not below the last, or none."""
    if params.candidates == "explicit":
        if not params.layers or not all(0 <= layer < layers for layer in params.layers):
            raise BadParameter(
                f"layers must name layers from 0 to {layers - 1}: the model has {layers}, "
                "and the last one is what they are compared with."
            )
        return tuple(sorted(set(params.layers)))
    if params.candidates == "high":
        return tuple(range(layers // 2 if layers <= DEEP else layers - 20, layers, 2))
    low = tuple(range(2, layers // 2 if layers <= DEEP else 20, 2))
    return low or (min(2, layers - 1),)


def measured(logits: torch.Tensor, divergence: Literal["jsd", "dola-official"]) -> torch.Tensor:
    """How far each row (rows,) is from the last one, for logits (rows, vocab)."""
    if divergence == "jsd":
        return contrast.jsd(logits, logits[-1])
    # kl_div(input, target) is KL(target || input): the codes pass the mixture as the target.
    logs = logits.log_softmax(-1)
    mixed = (logs.exp() + logs[-1].exp()) / 2
    return (mixed * (mixed.clamp_min(TINY).log() - (logs + logs[-1]) / 2)).sum(-1)


_NAMES = {"jsd": "Jensen-Shannon divergence", "dola-official": "divergence of the published code"}


def _say(at: At) -> Iterator[Event]:
    exits, picked = at.fused.exits, at.fused.picked
    assert exits is not None and picked is not None  # the rule above sets both
    yield contrast.layers(at)
    yield contrast.table(at)
    yield contrast.number(
        at.token.pos, "divergence of the chosen layer", "nats", exits.scores[picked]
    )
