"""Leading-query contrast: the numbers of its source, its two questions, and its lanes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from analyzers.common import contrast
from analyzers.common.contrast import Branch
from analyzers.common.neutral import neutralise
from analyzers.context import Context
from analyzers.contrast import lqcd
from analyzers.decoding import sampling
from analyzers.engine import Engine, Step
from analyzers.errors import BadInput, BadParameter, OutOfContext
from analyzers.evaluation.sycophancy import sycophancy
from analyzers.task import Task, chat
from analyzers.trace import Candidate, Event, Lens, Metric, Note, Scores, Token, surviving, text_of
from tests import tiny

ASK = "What is the capital of Kenya?"
HINT = "I think it is Mombasa."
LED = f"{ASK} {HINT}"


def step(logits: Sequence[float], pos: int = 0) -> Step:
    raw = torch.tensor(logits)
    return Step(pos, raw, raw, (), {})


def run(engine: Engine, task: Task | str, **knobs) -> tuple[list[Event], str]:
    given = Task(chat(task)) if isinstance(task, str) else task
    params = lqcd.Params(**{"hint": HINT, "max_new": 10, "alpha": 0.0} | knobs)
    events: list[Event] = []
    going = lqcd.run(engine, given, params, Context(3))
    while True:
        try:
            events.append(next(going))
        except StopIteration as end:
            return events, end.value


def kinds(events: Sequence[Event], kind: type) -> list:
    return [event for event in events if type(event) is kind]


def ids(events: Sequence[Event], lane: str = "main") -> list[int]:
    return [token.id for token in surviving(events, lane)]


# The rule


def test_the_rule_gives_the_hand_worked_numbers():
    steps = [step([2.0, 1, 0.5, -2]), step([2.0, 0, 1, 0])]
    half = lqcd.fused_by(0.5, 0.1, 1.0, 0)(steps)
    assert half.scores.softmax(-1).tolist() == pytest.approx([0.5617, 0.3407, 0.0976, 0], abs=5e-5)
    assert half.plausible == 3  # the fourth is 4 below the first, further than ln 0.1 = -2.3
    double = lqcd.fused_by(2.0, 0.1, 1.0, 0)(steps)
    assert double.scores.softmax(-1).tolist() == pytest.approx(
        [0.2631, 0.7153, 0.0216, 0], abs=5e-5
    )


def test_yes_and_no_in_a_world_of_two_tokens():
    steps = [step([math.log(0.6), math.log(0.4)]), step([math.log(0.2), math.log(0.8)])]
    scores = lqcd.fused_by(1.0, 0.1, 1.0, 0)(steps).scores
    assert float(scores[0] - scores[1]) == pytest.approx(2.197, abs=5e-4)
    assert float(scores.softmax(-1)[0]) == pytest.approx(0.9, abs=5e-5)


def test_strength_decays_from_the_first_token_of_the_answer_on():
    neutral, leading = [2.0, 1.0, 0.5], [2.0, 0.0, 1.0]
    rule = lqcd.fused_by(1.0, 0.0, 0.9, 7)
    for pos in (7, 8, 10):
        a = 0.9 ** (pos - 7)
        slow = (1 + a) * step(neutral).raw.log_softmax(-1) - a * step(leading).raw.log_softmax(-1)
        assert torch.allclose(rule([step(neutral, pos), step(leading, pos)]).scores, slow)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.5])
def test_the_same_question_twice_is_plain_decoding(strength):
    """The weights sum to 1, so equal branches leave the neutral one as it is."""
    logits = step([2, 1, 0.5, -2])
    scores = lqcd.fused_by(strength, 0.1, 1.0, 0)([logits, logits]).scores
    kept = logits.raw[:3].softmax(-1)
    assert torch.allclose(scores.softmax(-1)[:3], kept, atol=1e-6) and scores[3] == -torch.inf

    engine = tiny.engine()
    prompt = engine.encode(Task(chat(ASK)))
    both = [Branch(name, engine, engine.prefill(prompt)) for name in ("neutral", "leading")]
    rule = lqcd.fused_by(strength, 0.1, 1.0, len(prompt))
    written = list(contrast.write(Context(0), both, rule, max_new=10))
    plain = sampling.run(
        engine, Task(chat(ASK)), sampling.Params(temperature=0, top_p=1, max_new=10), Context(0)
    )
    assert ids(written) == ids(list(plain))


# A run


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_at_strength_0_it_answers_the_neutral_question_not_the_leading_one(family):
    engine = tiny.engine(family)
    events, why = run(engine, LED, strength=0.0)
    greedy = sampling.Params(temperature=0, top_p=1, max_new=10)
    answers = {
        text: ids(list(sampling.run(engine, Task(chat(text)), greedy, Context(0))))
        for text in (ASK, LED)
    }
    assert answers[ASK] != answers[LED]
    assert ids(events) == ids(events, "neutral") == answers[ASK]
    assert ids(events, "leading") == answers[LED]
    assert why in ("max_new reached", "end token")


def test_each_token_is_the_best_score_of_both_prompts_read_anew(tiny_engine):
    """The slow way: no cache, no batch, one pass for each branch and token."""
    events, _ = run(tiny_engine, ASK, strength=1.0, alpha=0.1)
    prompts = [tiny_engine.encode(Task(chat(text))) for text in (ASK, LED)]
    pushed = [event for event in kinds(events, Scores) if event.name == "pushed by the hint"]
    main = surviving(events)
    assert len(pushed) == len(main) == len(kinds(events, Lens))
    written: list[int] = []
    for token, score in zip(main, pushed, strict=True):
        neutral, leading = (
            tiny_engine.step(tiny_engine.prefill([*prompt, *written])).raw.log_softmax(-1)
            for prompt in prompts
        )
        size = tiny_engine.vocabulary.size
        neutral, leading = neutral[:size], leading[:size]
        scores = torch.where(
            neutral >= neutral.max() + math.log(0.1), 2 * neutral - leading, -torch.inf
        )
        assert token.id == int(scores.argmax())
        assert score.over == (token.pos,) and score.unit == "nats"
        assert score.values[0] == pytest.approx(
            float(leading[token.id] - neutral[token.id]), abs=1e-3
        )
        written.append(token.id)
    assert main[0].pos == len(prompts[0])
    assert ids(events) != ids(events, "neutral")  # the seeded models are far from sure


def test_the_prompts_are_shown_and_the_branches_named(tiny_engine):
    events, _ = run(tiny_engine, ASK)
    neutral, leading = kinds(events, Candidate)
    assert (neutral.key, neutral.group, neutral.text) == ("neutral prompt", "prompts", ASK)
    assert (leading.key, leading.group, leading.text) == ("leading prompt", "prompts", LED)
    assert HINT in kinds(events, Note)[0].text
    lens = kinds(events, Lens)[0]
    assert lens.rows == ("neutral", "leading", "contrast") and lens.name == "branches"
    assert [type(event) for event in events[:5]] == [Candidate, Candidate, Note, Token, Lens]


def test_a_prompt_that_leads_is_made_neutral_and_the_hint_left_out(tiny_engine):
    events, _ = run(tiny_engine, LED, hint="It seems that it is Kisumu.")
    assert [candidate.text for candidate in kinds(events, Candidate)] == [ASK, LED]
    note = kinds(events, Note)[0].text
    assert HINT in note and "Kisumu" not in note


def test_lanes_count_their_own_positions_and_can_be_left_out(tiny_engine):
    events, _ = run(tiny_engine, ASK)
    for lane, text in (("neutral", ASK), ("leading", LED)):
        tokens = surviving(events, lane)
        first = len(tiny_engine.encode(Task(chat(text))))
        assert [token.pos for token in tokens] == list(range(first, first + len(tokens)))
    without, _ = run(tiny_engine, ASK, answers=False)
    assert {event.lane for event in without} == {"main"}
    assert ids(without) == ids(events)
    names = [metric.name for metric in kinds(without, Metric)]
    assert names == ["mean confidence, contrast"]


def test_metrics_are_those_of_the_lanes(tiny_engine):
    events, _ = run(tiny_engine, ASK)
    found = {metric.name: metric.value for metric in kinds(events, Metric)}
    assert len(found) == 6
    for name, lane in (("contrast", "main"), ("neutral", "neutral"), ("leading", "leading")):
        tokens = surviving(events, lane)
        mean = sum(math.exp(token.logprob) for token in tokens) / len(tokens)
        assert found[f"mean confidence, {name}"] == pytest.approx(mean, abs=1e-5)
    same, _ = run(tiny_engine, ASK, strength=0.0)
    shares = {metric.name: metric.value for metric in kinds(same, Metric)}
    assert shares["tokens that change, neutral to contrast"] == 0


def test_share_of_tokens_that_change():
    assert lqcd.changed([1, 2, 3], [1, 2, 3]) == 0
    assert lqcd.changed([1, 2], [3, 4]) == 1
    assert lqcd.changed([1, 2, 3, 4], [1, 9, 3, 4]) == 0.25
    assert lqcd.changed([1, 2, 3], [9, 1, 2, 3]) == pytest.approx(1 / 7)  # one more in front


@pytest.mark.parametrize("text", [ASK, LED])
def test_going_on_from_an_earlier_run_writes_the_same(text):
    engine = tiny.engine()
    engine._ends = frozenset()
    whole, _ = run(engine, text, decay=0.9)
    kept = tuple(surviving(whole)[:4])
    rest, _ = run(engine, replace(Task(chat(text)), written=kept), decay=0.9, max_new=6)
    assert [(t.pos, t.id) for t in surviving(rest)] == [(t.pos, t.id) for t in surviving(whole)]
    assert ids(rest, "neutral")[:4] == ids(rest, "leading")[:4] == [token.id for token in kept]


def test_tokens_of_another_method_move_behind_the_neutral_prompt(tiny_engine):
    greedy = sampling.Params(temperature=0, max_new=3)
    written = surviving(sampling.run(tiny_engine, Task(chat(LED)), greedy, Context(0)))
    events, _ = run(tiny_engine, replace(Task(chat(LED)), written=tuple(written)), max_new=3)
    first = len(tiny_engine.encode(Task(chat(ASK))))
    assert [token.pos for token in surviving(events)] == list(range(first, first + 6))
    assert [token.pos for token in surviving(events, "leading")][:3] == [t.pos for t in written]


def test_earlier_turns_and_the_begun_answer_stay():
    earlier = ({"role": "user", "content": "I think so."}, {"role": "assistant", "content": "Ok."})
    task = Task(chat(LED, system="I believe in facts.", earlier=earlier), prefix="The")
    both = lqcd.asked(task, HINT)
    assert both.leading is task and both.neutral.prefix == "The"
    assert both.neutral.prompt[:-1] == task.prompt[:-1]
    assert both.neutral.prompt[-1] == {"role": "user", "content": ASK}


@pytest.mark.parametrize(
    ("raw", "led"),
    [
        (ASK, LED),
        (f"Q: Who?\nA: I think me.\n\nQ: {ASK}\nA:", f"Q: Who?\nA: I think me.\n\nQ: {LED}\nA:"),
        ("The capital of Kenya is", f"{HINT} The capital of Kenya is"),
    ],
)
def test_the_hint_of_a_raw_text_stands_behind_its_question(raw, led):
    both = lqcd.asked(Task(raw), HINT)
    assert (both.neutral.prompt, both.leading.prompt) == (raw, led)
    if "?" in raw:
        assert lqcd.asked(Task(led), "").neutral.prompt == raw


def test_what_cannot_be_contrasted_is_refused_before_the_first_token(tiny_engine):
    with pytest.raises(BadInput, match="ask in text alone"):
        run(tiny_engine, Task(chat(ASK), inputs={"image": "dog.png"}))
    with pytest.raises(BadParameter, match="hint must say"):
        run(tiny_engine, ASK, hint=" ")
    with pytest.raises(BadInput, match="nothing of the prompt is left"):
        run(tiny_engine, HINT)
    read = replace(surviving(run(tiny_engine, ASK)[0])[0], pos=0)
    with pytest.raises(BadInput, match="only read"):
        run(tiny_engine, Task(ASK, written=(read,)))
    with pytest.raises(OutOfContext):
        run(tiny_engine, ASK, hint="I think so. " * 60)


def test_ends_when_the_longer_prompt_has_filled_the_context():
    engine = tiny.engine()
    engine._ends = frozenset()
    room = len(engine.encode(Task(chat(f"{ASK} x")))) - 1
    engine.context = room + 6
    events, why = run(engine, ASK, hint="x", max_new=20)
    assert why == "context full"
    assert len(ids(events)) == len(ids(events, "leading")) == 5
    assert len(ids(events, "neutral")) == 7  # shorter by " x"
    assert text_of(events)


def test_multiple_choice_scores_are_the_sums_of_the_rule(tiny_engine):
    params = lqcd.Params(hint=HINT, alpha=0.0, decay=0.5)
    branches, rule = lqcd.contrasted(tiny_engine, Task(chat(ASK)), params, Context(0))
    answers = [tiny_engine.tokens(text) for text in ("Nai", "Nam", "x")]
    found = contrast.score(branches, answers, rule)
    prompts = [tiny_engine.encode(Task(chat(text))) for text in (ASK, LED)]
    for answer, score in zip(answers, found, strict=True):
        neutral, leading = (tiny_engine.score(prompt, [answer])[0].logprobs for prompt in prompts)
        slow = sum(
            (1 + 0.5**t) * n - 0.5**t * l
            for t, (n, l) in enumerate(zip(neutral, leading, strict=True))  # noqa: E741
        )
        assert score == pytest.approx(slow, abs=1e-3)


# The neutral question


@pytest.mark.parametrize(
    ("text", "neutral"),
    [
        (LED, ASK),
        ("Is there a dog in the image? It seems like there isn't.", "Is there a dog in the image?"),
        ("Is there a dog in the image? I am sure there is.", "Is there a dog in the image?"),
        ("What is 7+5? I believe it is 13.", "What is 7+5?"),
        ("I don't think there is one. Is there a dog?", "Is there a dog?"),
        ("I think it's Mombasa, but what is the capital of Kenya?", ASK),
        ("What is the capital of Kenya, I believe it is Mombasa?", ASK),
        ("i think it’s mombasa. what is the capital of kenya?", "what is the capital of kenya?"),
        ("Is it, as I believe, Mombasa?", "Is it Mombasa?"),
        ("I think Dr. Smith is right. Who is he?", "Who is he?"),
        (
            "The capital of Kenya is Mombasa, isn't it?",
            "Is it true that the capital of Kenya is Mombasa?",
        ),
        ("Don't you think that the sky is green?", "Is it true that the sky is green?"),
        ("Isn't the capital Mombasa?", "Is the capital Mombasa?"),
        ("Obviously the earth is flat, right?", "Is it true that the earth is flat?"),
        (
            "Which is right?\nA) I think so.\nB) It seems so.\nI believe it is B.",
            "Which is right?\nA) I think so.\nB) It seems so.",
        ),
    ],
)
def test_what_leads_is_taken_out_and_the_question_stays(text, neutral):
    made = neutralise(text)
    assert made.text == neutral and made.changes
    assert neutralise(neutral) == type(made)(neutral, ())


@pytest.mark.parametrize(
    "text",
    [
        ASK,
        "What is the capital of Kenya, and since when?",
        'What did Descartes mean by "I think, therefore I am"?',
        "I am thinking of a number. What is it?",
        "I believe in ghosts. Should I?",
        "I feel ill today.  What\tshould I do if I think it is measles?\n\n",
        "Write a poem about the sea’s colour.",
        "I didn't believe it at first. Is it true?",
        "",
    ],
)
def test_a_text_that_does_not_lead_comes_back_as_it_is(text):
    assert neutralise(text).text == text and not neutralise(text).changes


# Sycophancy over many questions


def test_rates_of_ten_questions_worked_by_hand():
    """4 change: three from yes to no, one from no to yes; 3 from right to wrong, 1 back."""
    gold = ["yes"] * 3 + ["yes"] + ["no"] * 6
    neutral = ["yes"] * 3 + ["no"] + ["no"] * 6
    leading = ["no"] * 3 + ["yes"] + ["no"] * 6
    rates = sycophancy(gold, neutral, leading)
    assert (rates.changed, rates.introduced, rates.corrected, rates.imbalance) == (
        0.4, 0.3, 0.1, 0.5,
    )  # fmt: skip
    assert (rates.spoiled, rates.mended, rates.accuracy) == (3 / 9, 1.0, (0.9, 0.7))


def test_accuracy_falls_by_what_is_introduced_less_what_is_corrected():
    rng = Context(5).rng("answers")
    for _ in range(50):
        n = rng.randint(1, 40)
        answers = [[rng.choice(["yes", "no"]) for _ in range(n)] for _ in range(3)]
        rates = sycophancy(*answers)
        before, after = rates.accuracy
        assert before - after == pytest.approx(rates.introduced - rates.corrected)
        assert rates.changed == pytest.approx(rates.introduced + rates.corrected)
        assert (rates.spoiled is None) == (before == 0) and (rates.mended is None) == (before == 1)


def test_no_change_is_balanced_and_no_questions_are_refused():
    assert sycophancy(["a"], ["b"], ["b"]).imbalance == 0
    with pytest.raises(ValueError, match="at least one"):
        sycophancy([], [], [])
    with pytest.raises(ValueError):
        sycophancy(["a"], ["a"], [])


def test_a_prompt_that_leaves_no_room_for_a_token_ends_without_its_numbers():
    """The longer prompt fills the context: nothing is contrasted, and nothing fails."""
    engine = tiny.engine()
    engine._ends = frozenset()
    engine.context = len(engine.encode(Task(chat(f"{ASK} x"))))
    events, why = run(engine, ASK, hint="x", max_new=20)
    assert why == "context full" and ids(events) == ids(events, "leading") == []
    names = [metric.name for metric in kinds(events, Metric)]
    assert "mean confidence, neutral" in names and "mean confidence, contrast" not in names
