"""Whether drafting leaves the text alone: every method in float32, on prompts of this project.

Each of the held-out passages that this project ships (prose, dialogue, arithmetic, code, lists) is
cut after its first words and written on greedily, plainly and by every drafting method at its own
defaults. In float32 every text must be the plain one, token for token; drafts may only change how
many passes that takes.
"""

import torch

from analyzers import registry
from analyzers.engine import load
from analyzers.engine.carve import HELDOUT
from analyzers.engine.loading import DEFAULT
from analyzers.registry import Method
from analyzers.task import Task
from app.bench import Progress, Row, row
from app.bench.drafting import drafting, plainly

ABOUT = "whether every drafting method writes the greedy text, on the project's own prompts"
WORDS = 12
"""Of a passage that are the prompt."""
TOKENS = 24


def measure(progress: Progress, *, model: str = DEFAULT, limit: int = 0) -> list[Row]:
    """The share of answers that are the plain ones, and tokens a pass, by method.

    limit: prompts; 0 = all."""
    engine = load(model, quantization="none", dtype="float32")
    asked = prompts()[: limit or None]
    rows = []
    with torch.inference_mode():
        progress(f"plain: {len(asked)} prompts")
        plain = [plainly(engine, TOKENS)(task).ids for task in asked]
        for name in (name for name, each in registry.methods().items() if verifies(each)):
            progress(f"{name}: {len(asked)} prompts")
            way = drafting(engine, {"": engine}, name, {}, TOKENS)
            found = [way(task) for task in asked]
            same = sum(each.ids == ids for each, ids in zip(found, plain, strict=True))
            share, n = 100 * same / len(asked), len(asked)
            rows.append(row(f"{name}: plain text", share, "%", n=n, target=100, better="more"))
            mean = sum(len(each.ids) for each in found) / sum(each.passes for each in found)
            rows.append(row(f"{name}: M", mean, "tokens/pass", n=n, better="more"))
    return rows


def prompts() -> list[Task]:
    """The beginnings of the passages."""
    passages = HELDOUT.read_text(encoding="utf-8").split("\n%%\n")
    return [Task(" ".join(passage.split(" ")[:WORDS])) for passage in passages]


def verifies(method: Method) -> bool:
    """Whether it drafts and has its drafts checked."""
    return method.card.family == "drafting" and "tree" in method.card.needs
