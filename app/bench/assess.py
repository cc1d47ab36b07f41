"""What asking a model about its own answers takes, against the same one by one in transformers.

P(True) of many answers: prompts that begin alike share what was computed, and many go through the
model at once; the baseline is one forward a prompt, with the same prompts, from which the same
probabilities are read. Drawn answers: ten of a question side by side, against ten calls of
`generate`. Both in float32, alternated question group by question group.
"""

import time
from collections.abc import Sequence
from random import Random

import torch

from analyzers.common.answering import Answered, answers, ask
from analyzers.context import Context
from analyzers.engine import Engine, Filters, load
from analyzers.engine.loading import DEFAULT
from analyzers.errors import CandorError
from analyzers.evaluation.built_in import built_in
from analyzers.judging import p_true
from app.bench import Progress, Row, row

ABOUT = "P(True) of 200 answers and ten drawn answers a question, against transformers"
FASTER = 4.0
"""Times as fast as one at a time."""
AGREE = 1e-4
"""Most that a probability may differ."""
GROUP = 24
DRAWN = 10
LONGEST = 16


def measure(
    progress: Progress, *, model: str = DEFAULT, limit: int = 200, drawn: int = 24
) -> list[Row]:
    """limit: answers that are judged. drawn: questions that are answered ten times."""
    engine = load(model, quantization="none")
    items = _answered(engine, limit, progress)
    return [
        *_judged(engine, items, False, progress),
        *_judged(engine, items, True, progress),
        *_drawn(engine, items[:drawn], progress),
    ]


def _answered(engine: Engine, limit: int, progress: Progress) -> list[Answered]:
    sets = [built_in("capitals"), built_in("elements")]
    found: list[Answered] = []
    for asked in sets:
        some = asked.questions[: limit - len(found)]
        progress(f"Answering {len(some)} questions")
        put = [ask(engine, each.id, each.prompt, asked.shown) for each in some]
        written = answers(engine, put, LONGEST, [None] * len(put))
        found += [Answered(one, its) for one, its in zip(put, written, strict=True)]
    return found


def _judged(
    engine: Engine, items: Sequence[Answered], examples: bool, progress: Progress
) -> list[Row]:
    params = p_true.Params(examples=examples)
    name = "p_true with six worked judgements" if examples else "p_true"
    ours = alone = most = 0.0
    for first in range(0, len(items), GROUP):
        some = items[first : first + GROUP]
        progress(f"{name}: {first} of {len(items)}")
        began = time.perf_counter()
        with torch.inference_mode():
            said = [each["p_true"] for each in p_true.assess(engine, some, params, Context(0))]
        ours += time.perf_counter() - began
        began = time.perf_counter()
        plain = [_alone(engine, each, params) for each in some]
        alone += time.perf_counter() - began
        for verdict, (one, other) in zip(said, plain, strict=True):
            here = (verdict.detail["first"], verdict.detail["swapped"])
            most = max(most, *(abs(a - b) for a, b in zip(here, (one, other), strict=True)))
    if most > AGREE:
        raise CandorError(f"The probabilities differ by {most:.1e}.")
    n = len(items)
    return [
        row(f"{name}, many at once", 1e3 * ours / n, "ms/answer", n=n),
        row(f"{name}, one prompt at a time in transformers", 1e3 * alone / n, "ms/answer", n=n),
        row(f"{name}: times as fast", alone / ours, "times", n=n, target=FASTER, better="more"),
        row(f"{name}: most that a probability differs", most, "", n=2 * n, target=AGREE),
    ]


def _alone(engine: Engine, item: Answered, params: p_true.Params) -> tuple[float, float]:
    """P(True) in both orders, each from one forward of its whole prompt: of the letters alone, and
    of a space and then the letter, as many labels are spelt."""
    found = []
    for swapped, letter in ((False, "A"), (True, "B")):
        ids = p_true.prompt(engine, item.asked.question, item.written.text, swapped, params)
        with torch.inference_mode():
            said = engine.model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
        mass = {
            label: sum(
                float(said[ids[0]])
                for ids in {tuple(engine.tokens(form, p_true.BEGUN)) for form in forms}
                if len(ids) == 1
            )
            for label, forms in p_true.LABELS.items()
        }
        found.append(mass[letter] / sum(mass.values()))
    return found[0], found[1]


def _drawn(engine: Engine, items: Sequence[Answered], progress: Progress) -> list[Row]:
    """Both write as many tokens: answers end with their line, and `generate` is told to."""
    ours = alone = 0.0
    tokens = others = 0
    for place, item in enumerate(items):
        progress(f"Ten answers: question {place} of {len(items)}")
        began = time.perf_counter()
        with torch.inference_mode():
            found = answers(
                engine,
                [item.asked] * DRAWN,
                LONGEST,
                [Random(f"{place} {i}") for i in range(DRAWN)],
                Filters(temperature=1.0),
            )
        ours += time.perf_counter() - began
        tokens += sum(len(its.tokens) for its in found)
        began = time.perf_counter()
        for seed in range(DRAWN):
            torch.manual_seed(seed)
            made = engine.model.generate(
                torch.tensor([item.asked.ids]),
                attention_mask=torch.ones(1, len(item.asked.ids), dtype=torch.long),
                do_sample=True,
                top_k=0,
                max_new_tokens=LONGEST,
                stop_strings=["\n"],
                tokenizer=engine.tokenizer,
            )
            others += made.shape[1] - len(item.asked.ids)
        alone += time.perf_counter() - began
    n = len(items)
    return [
        row("ten drawn answers, side by side", ours / n, "s/question", n=n),
        row("ten drawn answers, ten calls of generate", alone / n, "s/question", n=n),
        row(
            "ten drawn answers: times as fast, a token for a token",
            (alone / others) / (ours / tokens),
            "times",
            n=n,
            target=FASTER,
            better="more",
        ),
    ]
