"""How often a token followed the last few ones in some texts: the memory of superposed decoding.

Source: Shen et al. 2024 (Superposed Decoding, arXiv:2405.18400), section on n-gram interpolation.
Idea:   nothing is counted in advance. All occurrences of the last token are looked up, those that
        agree with one more token before it are kept, and so on; what follows them is counted. One
        sorted array serves all lengths: 12 bytes a token.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from analyzers.engine import Engine
from analyzers.errors import BadParameter
from analyzers.params import FileRef

WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)
"""Of contexts of 1 to 5 tokens, from the reference code. They sum to 0.5."""
MOST_BYTES = 20_000_000
# Characters that are split into tokens between two looks at the stop flag.
PIECE = 100_000
# Between two texts; no token.
_GAP = -1


class NGrams:
    """Texts, ready to be asked what followed. tokens: how many they have together."""

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        # A gap at the end, so that every occurrence has something behind it.
        parts = [torch.tensor([*ids, _GAP], dtype=torch.int32) for ids in texts if len(ids)]
        self._ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        self._sorted, self._places = self._ids.sort(stable=True)
        self.tokens = len(self._ids) - len(parts)

    def score(self, before: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        """How much the texts speak for each of `ids` (candidates,) behind the tokens `before`:
        (candidates,), float64, 0 to 0.5, higher = seen more often.

        The weighted sum over contexts of 1 to 5 tokens of the share of their occurrences that go on
        with the candidate; a context that was never seen adds 0. No distribution.
        """
        found = torch.zeros(len(ids), dtype=torch.float64)
        if not before:
            return found
        ids = ids.to("cpu", torch.int32)
        last = torch.tensor(before[-1], dtype=torch.int32)
        ends = self._places[
            int(torch.searchsorted(self._sorted, last)) : int(
                torch.searchsorted(self._sorted, last, right=True)
            )
        ]
        for n, weight in enumerate(WEIGHTS[: len(before)], start=1):
            if n > 1:
                ends = ends[ends >= n - 1]
                ends = ends[self._ids[ends - (n - 1)] == before[-n]]
            after = self._ids[ends + 1]
            after = after[after != _GAP]
            if not len(after):  # a longer context was not seen either
                break
            found += weight * (after[:, None] == ids).sum(0).double() / len(after)
        return found


def ngrams_of(engine: Engine, texts: Iterable[str], most: int) -> NGrams:
    """The first `most` characters of the texts, split by the engine's tokenizer. A long text is
    split in pieces at ends of lines. Polls stop between pieces."""

    def tokens() -> Iterator[list[int]]:
        left = most
        for text in texts:
            for piece in _pieces(text[:left]):
                engine.poll()
                yield engine.tokens(piece)
            left -= len(text)
            if left <= 0:
                return

    return NGrams(tokens())


def read_text(file: FileRef) -> str:
    """The text of a file of at most 20 MB in UTF-8.

    Raises: BadParameter where there is none, or it cannot be read as text."""
    if not file:
        raise BadParameter("file is empty: name a text file, or take another corpus.")
    path = Path(file).expanduser()
    try:
        with path.open("rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise BadParameter(f"{file} is no ordinary file.")
            raw = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadParameter(f"The file {file} cannot be read: {reason}.") from error
    if len(raw) > MOST_BYTES:
        raise BadParameter(
            f"The file {file} is too large: at most {MOST_BYTES // 1_000_000} MB are counted."
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadParameter(f"The file {file} is no text in UTF-8.") from None
    if "\0" in text:
        raise BadParameter(f"The file {file} is no text: it has zero bytes.")
    if not text.strip():
        raise BadParameter(f"The file {file} is empty.")
    return text


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about PIECE characters, cut behind a line where there is one."""
    first = 0
    while first < len(text):
        cut = text.rfind("\n", first, first + PIECE) + 1
        last = cut if cut > first and first + PIECE < len(text) else first + PIECE
        yield text[first:last]
        first = last
