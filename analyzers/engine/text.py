"""From token ids to bytes, and from bytes to whole characters."""

import codecs
import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UTF8_MOST = 4


class Vocabulary:
    """Every token's own bytes; special tokens have none, they are no part of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.size = len(tokenizer)
        self._special = {
            id: tokenizer.convert_ids_to_tokens(id) for id in set(tokenizer.all_special_ids)
        }
        self._raw = _bytes_of_tokens(tokenizer)
        self._shown: dict[int, str] = {}

    def special(self, id: int) -> bool:
        return id in self._special

    def raw(self, id: int) -> bytes:
        """b"" for special tokens and for ids beyond the vocabulary."""
        if id in self._special or not 0 <= id < len(self._raw):
            return b""
        return self._raw[id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; an unfinished character at the end is left out."""
        return _whole(b"".join(map(self.raw, ids)))

    def piece(self, before: Sequence[int], id: int) -> str:
        """The characters that become complete when `id` follows `before`; "" inside one.

        Special tokens show their name. Bytes that can belong to no character show as U+FFFD.
        """
        if id in self._special:
            return self._special[id]
        pending = self._unfinished(before)
        return _whole(pending + self.raw(id))

    def display(self, id: int) -> str:
        """A token by itself, for a list of alternatives: hex bytes in angle brackets where it is
        only a part of a character. The same string each time: ten are kept with every token."""
        if id not in self._shown:
            self._shown[id] = self._displayed(id)
        return self._shown[id]

    def _displayed(self, id: int) -> str:
        if id in self._special:
            return self._special[id]
        raw = self.raw(id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(
                f"⟨{char.encode('latin-1').hex().upper()}⟩" if "\x80" <= char <= "\xff" else char
                for char in raw.decode("latin-1")
            )

    def _unfinished(self, before: Sequence[int]) -> bytes:
        """The bytes at the end of `before` that are the beginning of a character."""
        tail = b""
        for id in reversed(before):
            if id in self._special or len(tail) >= UTF8_MOST:
                break
            tail = self.raw(id) + tail
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail[-UTF8_MOST:])
        return decoder.getstate()[0]


def encodable(text: str) -> str:
    """The text as a tokenizer takes it: half of a surrogate pair, which has no bytes in UTF-8,
    becomes U+FFFD; two halves become their character."""
    return (
        text
        if text.isascii()
        else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


def _whole(raw: bytes) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def _bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Bytes by id, read from the tokenizer's own decoder (byte-level or SentencePiece style)."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    convert = _byte_level if '"ByteLevel"' in decoder else _sentencepiece
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    raw = [convert(name) if name is not None else b"" for name in names]
    # Added tokens are written as they are, not in the alphabet of the others.
    for id, token in tokenizer.added_tokens_decoder.items():
        raw[id] = str(token).encode("utf-8")
    return raw


def _byte_level(name: str) -> bytes:
    return b"".join(
        bytes([_BYTES[char]]) if char in _BYTES else char.encode("utf-8") for char in name
    )


def _sentencepiece(name: str) -> bytes:
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
        return bytes.fromhex(byte[1])
    return name.replace("▁", " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable bytes stand for themselves, the rest follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()
