"""A model of handwritten digits, trained here: a picture is a text, a pixel a token.

Source: Chen et al. 2020, Generative Pretraining from Pixels (iGPT), for a language model over the
pixels of a picture, row by row; Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits
(UCI, CC BY 4.0), for the 1,797 pictures of 8 x 8 pixels that scikit-learn brings.
Idea: a small Llama reads the begin token and which digit it is to be, and learns to write the
pixels, one of 17 shades each, and the end token. It is a toy; what it is good for is that a picture
shows at a glance what a method of decoding does to the text.
Differs from the source: real shades, where iGPT clusters colours; the digit stands before its
picture.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from analyzers.engine.builtin import tell

WIDTH, LEVELS = 8, 17
PIXELS = WIDTH * WIDTH
SHADES = "0123456789abcdefg"
"""What the levels from paper to ink are called; the id of a shade is its level."""
BEGIN, END = "<begin>", "<end>"
WORDS = (*SHADES, *(f"<{digit}>" for digit in range(10)), BEGIN, END)
STEPS, BATCH, RATE = 700, 32, 3e-3
"""Of the training: about a minute on two cores."""
WARM = 0.1
"""Share of the steps in which the rate rises."""
SEED = 0
ABOUT = "A toy, trained by this project on scikit-learn's 1,797 handwritten digits of 8 × 8 pixels."


def make(made: Path, told: Path) -> None:
    """Train the model, and save it with its tokenizer as the folder `made`.

    told: as of `builtin.tell`. What was found at the end: the nats a pixel that the model needs on
    the fifth of the pictures that it never saw, and the same for a table of how often each place
    has each shade (lower = better).
    """
    rows = pictures()
    train, held = rows[len(rows) // 5 :], rows[: len(rows) // 5]
    model = trained(train, STEPS, partial(tell, told))
    model.save_pretrained(made)
    tokenizer().save_pretrained(made)
    found = {"nats": nats(model, held), "nats_of_table": nats_of_table(train, held)}
    tell(told, 1.0, {name: round(value, 4) for name, value in found.items()})


def pictures() -> torch.Tensor:
    """Token ids (pictures, 3 + PIXELS), shuffled: begin, digit, pixels row by row, end."""
    from sklearn.datasets import load_digits  # a second, which only the training has to wait

    data, digits = load_digits(return_X_y=True)
    pixels, labels = torch.tensor(data).long(), torch.tensor(digits).long()[:, None]
    begin, end = (torch.full_like(labels, WORDS.index(word)) for word in (BEGIN, END))
    rows = torch.cat([begin, labels + LEVELS, pixels, end], dim=1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))]


def trained(
    rows: torch.Tensor, steps: int, progress: Callable[[float], None] = lambda share: None
) -> LlamaForCausalLM:
    """A model of `rows`, (pictures, 3 + PIXELS). progress(share of 1) comes before every step; what
    it raises ends the training. The same thread count gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config())
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        progress(step / steps)
        if len(order) < BATCH:
            order = torch.randperm(len(rows), generator=generator)
        batch, order = rows[order[:BATCH]], order[BATCH:]
        _losses(model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    return model.eval()


def config() -> LlamaConfig:
    """`picture` makes a model known as one that writes pictures: its width and height in pixels,
    how many `levels` of shades there are, which are the ids below that, and what it is `about`."""
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_theta=1000.0,
        bos_token_id=WORDS.index(BEGIN),
        eos_token_id=WORDS.index(END),
        picture={"width": WIDTH, "height": WIDTH, "levels": LEVELS, "about": ABOUT},
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Reads a digit, "3" as well as "<3>" or "Draw a 3", and the shades of pixels after it; what is
    no token is passed over, and the begin token comes before all."""
    # Nothing stays unknown: the last rule leaves only what is a word.
    made = Tokenizer(WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token=END))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\A[^0-9]*?(?=<?[0-9])|\A[^0-9]*\z"), ""),
            *(normalizers.Replace(Regex(rf"\A{digit}"), f"<{digit}>") for digit in range(10)),
            normalizers.Replace(Regex(r"<(?![0-9]>)|(?<!<[0-9])>|[^0-9a-g<>]"), ""),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[0-9]>|."), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, WORDS.index(BEGIN))]
    )
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BEGIN, eos_token=END)


@torch.no_grad()
def nats(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean of -log p over the pixels of `rows`, (pictures, 3 + PIXELS); lower = better."""
    return float(_losses(model, rows)[:, 1 : 1 + PIXELS].mean())


def nats_of_table(train: torch.Tensor, rows: torch.Tensor) -> float:
    """As `nats`, of how often each place of `train` has each shade, each counted once more."""
    pixels, seen = rows[:, 2 : 2 + PIXELS], train[:, 2 : 2 + PIXELS]
    counts = F.one_hot(seen, LEVELS).sum(0) + 1  # (PIXELS, LEVELS)
    logprobs = (counts / counts.sum(-1, keepdim=True)).log()
    return -float(logprobs[torch.arange(PIXELS), pixels].mean())


def _rate(share: float) -> float:
    """Of the highest one, when so much of 1 is done: it rises in a line, and falls as a cosine."""
    return min(share / WARM, 1.0) * (1 + math.cos(math.pi * share)) / 2


def _losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """(pictures, 2 + PIXELS) of rows (pictures, 3 + PIXELS): -log p of every token but the first,
    in nats."""
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
