"""LOL: take away what an amateur that invents would say, at the last layer and at a lower one.

Source: Chen et al. 2024, "Lower Layer Matters" (arXiv:2408.08769); the induced amateur is that of
        Zhang et al. 2023 (ICD, arXiv:2312.15710); the choice of the lower layer is DoLa's.
Idea:   the expert's log-probabilities less those of an amateur that was made to invent; the same
        difference once more at a lower layer of both; and a push towards what becomes likelier
        when the expert is told to be truthful. Only tokens that the expert finds plausible.
Differs from the source: its code was never published, so the weights w and g and the form of the
        truth branch (log-probability with the instruction less that without it) are
        reconstructions from its abstract and from a third party's code, which also has the static
        layer, the upper quarter and the weighting by entropy. The amateur is a LoRA adapter where
        one is given; otherwise the same model is told to invent, in its own branch only. The final
        norm comes before the head at every layer. lam stays at or below 1: beyond, an amateur that
        agrees with the expert would turn its order around. Where the branches agree, the expert
        decides alone.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from analyzers.card import Card
from analyzers.common import contrast
from analyzers.common.contrast import At, Branch, Exits, Fused, Rule
from analyzers.context import Context
from analyzers.engine import Engine, Options, Step
from analyzers.engine.signals import DIGITS
from analyzers.errors import BadParameter
from analyzers.params import AdapterRef, knob
from analyzers.task import Task
from analyzers.trace import Event, Lens, Note, Scores, Token

CARD = Card(
    "LOL",
    family="contrast",
    source="Chen et al. 2024, arXiv:2408.08769 (reconstructed)",
    emits=(Token, Lens, Scores),
    needs=("logits", "layers"),
)
AMATEUR = (
    "You make things up. Answer every question with a wrong but plausible statement, in the tone "
    "of an expert. Invent names, numbers and dates, and never give the true answer."
)
TRUTH = "Answer truthfully and only with what is known; say so if you do not know the answer."


@dataclass(frozen=True)
class Params:
    """lam and alpha are the source's, w the third party's, g and both instructions ours."""

    w: float = knob(0.5, "Weight of the lower layer's contrast; 0 = last layer only", lo=0, hi=1)
    g: float = knob(0.5, "Weight of the truth instruction; 0 = without that branch", lo=0, hi=2)
    layer: Literal["dynamic", "static", "entropy"] = knob(
        "dynamic",
        "Lower layer: furthest from the last, a fixed one, or all weighted by how sure each is "
        "(w is then not used)",
    )
    amateur_prompt: str = knob(AMATEUR, "What the amateur is told, and nobody else", lines=4)
    truth: str = knob(TRUTH, "What the truth branch is told", lines=3)
    lam: float = knob(1.0, "How much of the amateur to take away", lo=0, hi=1)
    alpha: float = knob(0.1, "Keep tokens at least this times as likely as the best", lo=0, hi=1)
    adapter: AdapterRef = knob(AdapterRef(""), "LoRA adapter as the amateur, instead of its prompt")
    static_layer: int = knob(0, "For static: layer number; 0 = at three quarters", lo=0, hi=999)
    repetition_penalty: float = knob(1.2, "Above 1: avoid tokens already there", lo=0.5, hi=2)
    max_new: int = knob(96, "When to stop writing", lo=1, hi=8192, unit="tokens")


def run(engine: Engine, task: Task, params: Params, ctx: Context) -> Generator[Event, None, str]:
    """Yield a Token per step, greedily, with its layers, the distributions of all branches and
    their contrasts, and how far the expert is from the amateur; return why the text ended.

    Raises: BadParameter for a layer that the model does not have; ModelNotFound, ModelBroken and
    ModelUnfit for an adapter that cannot be used."""
    yield from task.written
    branches, rule = contrasted(engine, task, params, ctx)
    if task.written and engine.ends(task.written[-1].id):
        return "end token"
    yield Note("info", _variant(params))
    return (
        yield from contrast.write(
            ctx,
            branches,
            rule,
            max_new=params.max_new,
            repetition_penalty=params.repetition_penalty,
            say=lambda at: _say(at, params),
        )
    )


def contrasted(
    engine: Engine, task: Task, params: Params, ctx: Context
) -> tuple[list[Branch], Rule]:
    """Expert, amateur and, unless g is 0, the expert under the truth instruction.

    C = lsm(expert) - lam lsm(amateur) at a layer; the scores are C_last + w C_lower
    + g (lsm(truth) - lsm(expert)); for "entropy", C_last + w C_lower is the weighted mean of C
    over layers."""
    layers = candidates(engine.layers, params)
    expert = Branch("expert", engine, ctx.begin(engine, engine.encode(task)), taps=layers)
    branches = [expert, _amateur(engine, task, params, layers)]
    if params.g > 0:
        told = engine.encode(instructed(task, params.truth))
        branches.append(Branch("truth", engine, engine.prefill(told)))

    def rule(steps: Sequence[Step]) -> Fused:
        both = [contrast.early(engine, step, layers) for step in steps[:2]]
        weights, picked, scores, measure = _weights(both[0], params)
        terms = [
            (sign * float(weight), row)
            for sign, rows in zip((1.0, -params.lam), both, strict=True)
            for weight, row in zip(weights, rows, strict=True)
            if weight
        ]
        if params.g > 0:
            terms += [(params.g, steps[2].raw), (-params.g, steps[0].raw)]
        fused = contrast.fuse(steps[0].logits, terms, params.alpha, picked=picked)
        keep = fused.scores > -torch.inf
        shown = [(branch.name, step.raw) for branch, step in zip(branches, steps, strict=True)]
        for row in (-1, picked):
            if row is not None:
                ours, theirs = (rows[row].log_softmax(-1) for rows in both)
                difference = torch.where(keep, ours - params.lam * theirs, -torch.inf)
                name = "last layer" if row == -1 else f"layer {layers[row]}"
                shown.append((f"{name}: expert − amateur", difference))
        exits = Exits((*layers, engine.layers), both[0], tuple(scores.tolist()), measure)
        return replace(fused, exits=exits, shown=tuple(shown))

    return branches, rule


def candidates(layers: int, params: Params) -> tuple[int, ...]:
    """The lower layers to look at in a model with so many: every second one of the upper quarter,
    or the static one.

    Raises: BadParameter for a static layer that is not below the last."""
    upper = range(3 * layers // 4, layers, 2)
    if params.layer != "static":
        return tuple(upper)
    if params.static_layer >= layers:
        raise BadParameter(
            f"static_layer must be below {layers}, the model's last layer, not "
            f"{params.static_layer}."
        )
    return (params.static_layer or upper[0],)


def instructed(task: Task, text: str) -> Task:
    """The task with an instruction in front: in the system turn, or before a raw text."""
    if not text.strip():
        return task
    if isinstance(task.prompt, str):
        return replace(task, prompt=f"{text}\n\n{task.prompt}")
    system, rest = text, task.prompt
    if rest[0]["role"] == "system":
        system, rest = f"{rest[0]['content']}\n\n{text}", rest[1:]
    return replace(task, prompt=({"role": "system", "content": system}, *rest))


def _amateur(engine: Engine, task: Task, params: Params, layers: tuple[int, ...]) -> Branch:
    options = Options()
    if params.adapter:
        options = Options(adapter=engine.add_adapter(params.adapter))
    else:
        task = instructed(task, params.amateur_prompt)
    cursor = engine.prefill(engine.encode(task), options=options)
    return Branch("amateur", engine, cursor, options, layers)


def _weights(
    logits: torch.Tensor, params: Params
) -> tuple[torch.Tensor, int | None, torch.Tensor, str]:
    """For the expert's layers (layers, vocab): the weight of each one's contrast, which one was
    chosen (None = all), a number for each of them, and what that number is."""
    if params.layer == "entropy":
        logprobs = logits.log_softmax(-1)
        weights = (logprobs.exp() * logprobs).sum(-1).softmax(0)  # the sum is minus the entropy
        return weights, None, weights, "weight of the layer's contrast, softmax of minus entropy"
    far = contrast.jsd(logits, logits[-1])
    picked = int(far[:-1].argmax())
    weights = torch.zeros(len(logits))
    weights[picked], weights[-1] = params.w, 1.0
    return weights, picked, far, "Jensen-Shannon divergence from the last layer, nats"


def _say(at: At, params: Params) -> Iterator[Event]:
    pos, exits = at.token.pos, at.fused.exits
    assert exits is not None  # the rule above sets it
    expert, amateur = (step.raw for step in at.steps[:2])
    yield contrast.layers(at)
    yield contrast.table(at)
    yield contrast.number(pos, "KL(expert‖amateur)", "nats", float(contrast.kl(expert, amateur)))
    if params.layer == "entropy":
        shares = tuple(round(score, DIGITS) for score in exits.scores)
        yield Scores(pos, "weight of each layer", "share", tuple(map(str, exits.layers)), shares)


def _variant(params: Params) -> str:
    amateur = (
        "the given LoRA adapter"
        if params.adapter
        else "the same model, told to invent (no trained amateur)"
    )
    lower = {
        "dynamic": f"the layer furthest from the last is added with weight {params.w:g}",
        "static": f"one fixed layer is added with weight {params.w:g}",
        "entropy": "layers are weighted by how sure the expert is at each",
    }[params.layer]
    truth = (
        f"what a truth instruction makes likelier is added with weight {params.g:g} "
        "(a reconstruction)"
        if params.g
        else "there is no truth branch"
    )
    return f"The amateur is {amateur}; {lower}; {truth}."
