"""Digits: pictures become texts and back, the training can be stopped and repeated, and what it
saves is a model like any other."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from analyzers.context import Context
from analyzers.decoding import sampling
from analyzers.engine import Engine, builtin, digits, load, sources
from analyzers.engine.digits import BEGIN, END, LEVELS, PIXELS, WIDTH, WORDS
from analyzers.errors import ModelBroken, Stopped
from analyzers.home import models_folder
from analyzers.task import Task
from analyzers.trace import Token, text_of


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return digits.pictures()


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory) -> Path:
    """A model of three steps, with its tokenizer, as `make` saves it."""
    path = tmp_path_factory.mktemp("digits")
    digits.trained(rows[:8], 3).save_pretrained(path)
    digits.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return load(str(folder), quantization="none")


def words(ids) -> list[str]:
    return [WORDS[id] for id in ids]


# The pictures


def test_a_picture_is_a_text(rows):
    from sklearn.datasets import load_digits

    assert rows.shape == (1797, 3 + PIXELS)
    assert set(rows[:, 0].tolist()) == {WORDS.index(BEGIN)}
    assert set(rows[:, -1].tolist()) == {WORDS.index(END)}
    found = {(WORDS[row[1]], *row[2 : 2 + PIXELS]) for row in rows.tolist()}
    data = load_digits()
    expected = {
        (f"<{label}>", *map(int, image.reshape(-1)))
        for label, image in zip(data.target, data.images, strict=True)
    }
    assert found == expected


def test_the_order_is_shuffled_and_the_same_each_time(rows):
    assert torch.equal(rows, digits.pictures())
    assert rows[:20, 1].tolist() != [LEVELS + i % 10 for i in range(20)]
    held = rows[: len(rows) // 5, 1]
    assert min(torch.bincount(held - LEVELS)) > 20, "every digit is held out a few times"


# The text


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("3", ["<3>"]),
        ("<3>", ["<3>"]),
        ("Draw a 3!", ["<3>"]),
        ("\n 7 ", ["<7>"]),
        ("3 00af\n05g", ["<3>", *"00af05g"]),
        ("3hiz9", ["<3>", "9"]),
        ("<<3>> > <", ["<3>"]),
        ("Hello", []),
        ("", []),
        ("<begin>3", [BEGIN, "<3>"]),
    ],
)
def test_a_prompt_is_a_digit_and_perhaps_the_first_pixels(engine, prompt, read):
    assert words(engine.encode(Task(prompt))) == [BEGIN, *read]


def test_the_text_of_a_picture_is_whole(engine, rows):
    for row in rows[:20].tolist():
        said = engine.vocabulary.decode(row)
        assert said == "".join(words(row[1:-1])) == engine.tokenizer.decode(row[1:-1])
        assert len(said) == len("<0>") + PIXELS
        assert engine.encode(Task(said)) == row[:-1]
        assert engine.encode(Task(said[1] + said[3:])) == row[:-1], "the brackets can be left out"
    assert engine.vocabulary.piece([], WORDS.index(END)) == END


def test_the_tokenizer_is_the_same_after_it_was_saved(folder):
    stored = AutoTokenizer.from_pretrained(folder)
    assert stored("3 0f")["input_ids"] == digits.tokenizer()("3 0f")["input_ids"]
    assert (stored.bos_token, stored.eos_token, stored.chat_template) == (BEGIN, END, None)


# The training


def test_the_same_pictures_make_the_same_model_and_touch_no_seed(rows):
    before = torch.random.get_rng_state()
    shares: list[float] = []
    first, second = (digits.trained(rows[:8], 2, shares.append) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert shares == [0.0, 0.5] * 2
    for name, weights in first.state_dict().items():
        assert torch.equal(weights, second.state_dict()[name]), name
    assert not first.training


def test_training_learns_the_pictures(rows):
    few = rows[:8]
    begun, later = (digits.nats(digits.trained(few, steps), few) for steps in (1, 12))
    assert later < begun - 0.3


def test_training_stops_between_steps(rows):
    asked: list[float] = []

    def progress(share: float) -> None:
        asked.append(share)
        if len(asked) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        digits.trained(rows[:8], 100, progress)
    assert asked == [0.0, 0.01]


def test_nats_are_those_of_the_pixels_alone(engine, rows):
    (row,) = rows[:1].tolist()
    cursor, surprise = engine.prefill(row[:2]), 0.0
    for id in row[2 : 2 + PIXELS]:
        surprise -= float(engine.step(cursor).raw.log_softmax(-1)[id])
        engine.push(cursor, id)
    assert digits.nats(engine.model, rows[:1]) == pytest.approx(surprise / PIXELS, abs=1e-4)


def test_the_table_counts_each_place_by_itself():
    """One picture of shade 3 was seen: a place has 2 of 18 for it, and 1 of 18 for another."""
    seen = torch.full((1, 3 + PIXELS), 3)
    assert digits.nats_of_table(seen, seen) == pytest.approx(math.log(9))
    other = seen.clone()
    other[0, 2 : 2 + PIXELS // 2] = 4
    half = (math.log(9) + math.log(18)) / 2
    assert digits.nats_of_table(seen, other) == pytest.approx(half)


# The model


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_it_loads_as_one_that_writes_pictures(folder, quantization):
    engine = load(str(folder), quantization=quantization)
    frame = {"width": WIDTH, "height": WIDTH, "levels": LEVELS, "about": digits.ABOUT}
    assert engine.identity["picture"] == frame
    assert json.dumps(engine.identity)
    assert [id for id in range(len(WORDS)) if engine.ends(id)] == [WORDS.index(END)]
    assert not engine.can_chat and "tree" in engine.can
    assert engine.context >= 3 + PIXELS


def test_other_models_write_none(smollm):
    assert "picture" not in smollm.identity


def test_sampling_works_on_it_unchanged(engine):
    params = sampling.Params(temperature=1.0, top_p=1.0, max_new=12)
    events = list(sampling.run(engine, Task("3"), params, Context(3)))
    tokens = [event for event in events if isinstance(event, Token)]
    assert text_of(events) == "".join(WORDS[t.id] for t in tokens if t.id != WORDS.index(END))
    assert tokens == list(sampling.run(engine, Task("3"), params, Context(3)))


# The built-in


@pytest.fixture
def trained_here(monkeypatch) -> None:
    """A short training, in this very process."""

    def here(call, arguments, tick) -> str:
        assert call.startswith("digits.make(")
        tick()
        digits.make(*map(Path, arguments))
        tick()
        return ""

    monkeypatch.setattr(digits, "STEPS", 2)
    monkeypatch.setattr(builtin, "_apart", here)


@pytest.mark.usefixtures("trained_here")
def test_it_is_made_when_it_is_first_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path))
    before = next(each for each in sources.listed() if each.ref == "digits")
    assert (before.ready, before.size, before.kind) == (False, 0, "builtin")
    assert before.about.startswith("A toy") and "nats" not in before.about

    said: list[tuple[str, float]] = []
    path = builtin.ensure("digits", models_folder(), lambda what, share: said.append((what, share)))
    assert [share for _, share in said] == [0.0, 1.0, 1.0, 1.0]
    assert said[0][0].startswith("Training Digits (demo), once (")
    assert [each.name for each in models_folder().iterdir() if each.is_dir()] == ["digits"]

    manifest = json.loads((path / builtin.MANIFEST).read_text(encoding="utf-8"))
    assert "CC BY 4.0" in manifest["data"] and manifest["licence"] == "Apache-2.0"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest["files"].keys()
    assert f"{manifest['nats_of_table']:.2f} for how often" in manifest["about"]
    after = next(each for each in sources.listed() if each.ref == "digits")
    assert after.ready and after.size > 1_000_000 and after.about == manifest["about"]

    said.clear()
    engine = load("digits", quantization="none")
    assert engine.identity["hash"] == manifest["sha256"]
    assert engine.identity["name"] == "digits"


def test_a_stop_ends_the_training_and_leaves_nothing(tmp_path):
    """In a real process of its own, which is gone afterwards."""

    def stop(what: str, share: float) -> None:
        if what.startswith("Training"):
            raise Stopped

    with pytest.raises(Stopped):
        builtin.ensure("digits", tmp_path, stop)
    assert not [each for each in tmp_path.iterdir() if each.is_dir()]


def test_a_failed_training_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin, "_apart", lambda *call: "MemoryError: no room")
    with pytest.raises(ModelBroken, match=r"^Digits \(demo\) could not be trained \(MemoryError"):
        builtin.ensure("digits", tmp_path)


def test_the_real_one_draws_what_it_is_asked_for(rows):
    """Four in five pictures, drawn at temperature 1, are most like a real one of the digit that was
    asked for. Only where the model has been made: that takes a minute."""
    if sources.find("digits") is None:
        pytest.skip("the built-in model digits has not been made here")
    folder = models_folder() / "digits"
    found = json.loads((folder / builtin.MANIFEST).read_text(encoding="utf-8"))
    assert found["nats"] < 0.75 * found["nats_of_table"]
    model = load("digits", quantization="none").model
    asked = rows[:40, :2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=True,
            min_new_tokens=PIXELS,
            max_new_tokens=PIXELS,
            pad_token_id=0,
        )
    apart = torch.cdist(drawn[:, 2:].float(), rows[:, 2 : 2 + PIXELS].float())
    alike = rows[apart.argmin(-1), 1] == asked[:, 1]
    assert alike.float().mean() >= 0.8
