"""N-grams: exactly what followed what, counted slowly in the test; and files that are no texts."""

import random
from fractions import Fraction

import pytest
import torch

from analyzers.common import ngrams
from analyzers.common.ngrams import WEIGHTS, NGrams, ngrams_of, read_text
from analyzers.errors import BadParameter, Stopped
from analyzers.params import FileRef


def slowly(texts: list[list[int]], before: list[int], id: int) -> float:
    """The formula of the paper, with every place looked at."""
    total = Fraction(0)
    for n, weight in enumerate(WEIGHTS, start=1):
        if n > len(before):
            continue
        context = before[-n:]
        after = [
            text[i + n]
            for text in texts
            for i in range(len(text) - n)
            if text[i : i + n] == context
        ]
        if after:
            total += Fraction(str(weight)) * Fraction(after.count(id), len(after))
    return float(total)


def test_worked_by_hand():
    found = NGrams([[1, 2, 3], [1, 2, 4], [5, 2, 3], [2]])
    assert found.tokens == 10
    # Behind 2 came 3, 4, 3; behind 1 2 came 3, 4; nothing longer was seen.
    scores = found.score([9, 1, 2], torch.tensor([3, 4, 5]))
    assert scores.tolist() == pytest.approx([0.01 * 2 / 3 + 0.04 / 2, 0.01 / 3 + 0.04 / 2, 0.0])
    assert found.score([4], torch.tensor([1, 5])).tolist() == [0, 0]  # a text ended there
    assert found.score([7], torch.tensor([1])).tolist() == [0]
    assert found.score([], torch.tensor([1, 2])).tolist() == [0, 0]
    assert sum(WEIGHTS) == pytest.approx(0.5)


def test_five_tokens_of_context_and_no_more():
    found = NGrams([[0, 1, 2, 3, 4, 5, 6]])
    full = found.score([8, 8, 1, 2, 3, 4, 5], torch.tensor([6]))
    assert float(full) == pytest.approx(0.5)
    cut = found.score([8, 2, 3, 4, 5], torch.tensor([6]))
    assert float(cut) == pytest.approx(0.01 + 0.04 + 0.15 + 0.18)


@pytest.mark.parametrize("seed", range(5))
def test_equals_counting_every_place(seed):
    rng = random.Random(seed)
    texts = [[rng.randrange(4) for _ in range(rng.randrange(40))] for _ in range(12)]
    found = NGrams(texts)
    assert found.tokens == sum(map(len, texts))
    for _ in range(60):
        before = [rng.randrange(4) for _ in range(rng.randrange(1, 8))]
        scores = found.score(before, torch.arange(5))
        expected = [slowly(texts, before, id) for id in range(5)]
        assert scores.tolist() == pytest.approx(expected, abs=1e-12)
        assert 0 <= float(scores.sum()) <= 0.5 + 1e-12


def test_nothing_at_all():
    for empty in (NGrams([]), NGrams([[], []])):
        assert empty.tokens == 0
        assert empty.score([1], torch.tensor([2])).tolist() == [0]


def test_texts_are_split_by_the_tokenizer_up_to_a_limit(tiny_engine, monkeypatch):
    found = ngrams_of(tiny_engine, ["abcab", "ca"], 100)
    assert found.tokens == 7
    (a, b, c) = tiny_engine.tokens("abc")
    # Behind a came b twice, and nothing across the texts.
    assert found.score([a], torch.tensor([b, c])).tolist() == pytest.approx([0.01, 0])
    assert ngrams_of(tiny_engine, ["abcab", "ca", "never"], 6).tokens == 6
    monkeypatch.setattr(ngrams, "PIECE", 4)
    pieces = list(ngrams._pieces("ab\ncdefghij\nk"))
    assert "".join(pieces) == "ab\ncdefghij\nk" and pieces[0] == "ab\n"
    assert max(map(len, pieces)) <= 4


def test_counting_can_be_stopped(own_engine):
    def texts():
        yield "abc"
        own_engine.poll = stop
        yield "never split"

    def stop() -> None:
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        ngrams_of(own_engine, texts(), 1000)


def test_files_that_are_texts(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve")
    assert read_text(FileRef(path)) == "naïve"


def test_files_that_are_none(tmp_path, monkeypatch):
    path = tmp_path / "corpus.txt"

    def refuses(match: str, name: object = path) -> None:
        with pytest.raises(BadParameter, match=match) as error:
            read_text(FileRef(name))
        assert str(error.value).endswith(".") and "\n" not in str(error.value)

    refuses("file is empty", "")
    refuses("cannot be read: No such file")
    refuses("cannot be read: Is a directory", tmp_path)
    refuses("cannot be read", "a\0b")
    path.write_bytes(b"\xff\xfe\x00")
    refuses("no text in UTF-8")
    path.write_bytes(b"abc\0def")
    refuses("zero bytes")
    path.write_text(" \n")
    refuses("is empty")
    monkeypatch.setattr(ngrams, "MOST_BYTES", 3)
    path.write_text("abcd")
    refuses("too large")
