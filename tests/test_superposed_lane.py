"""Superposed drafts beside the answer: unverified, and said to be."""

from analyzers.context import Context
from analyzers.decoding import sampling, superposed
from analyzers.drafting import superposed_lane
from analyzers.task import Task
from analyzers.trace import MAIN, Candidate, Metric, Note, Token

PROMPT = Task("The quick brown fox")


def written(engine, **knobs) -> list:
    params = superposed_lane.Params(max_new=8, **knobs)
    return list(superposed_lane.run(engine, PROMPT, params, Context(1)))


def ids_in(events, lane: str = MAIN) -> list[int]:
    return [event.id for event in events if isinstance(event, Token) and event.lane == lane]


def test_the_answer_is_the_greedy_one(tiny_engine):
    params = sampling.Params(temperature=0.0, max_new=8)
    plain = list(sampling.run(tiny_engine, PROMPT, params, Context(1)))
    assert ids_in(written(tiny_engine)) == ids_in(plain)


def test_every_lane_is_a_draft_of_superposed_decoding_and_says_that_it_is_unverified(tiny_engine):
    events = written(tiny_engine, k=3)
    lanes = dict.fromkeys(event.lane for event in events if isinstance(event, Token))
    names = [f"draft {n}, unverified" for n in (1, 2, 3)]
    assert list(lanes) == [MAIN, *names]
    told = list(superposed.run(tiny_engine, PROMPT, superposed.Params(k=3, max_new=8), Context(1)))
    final = {event.key: event.text for event in told if isinstance(event, Candidate)}
    decode = tiny_engine.vocabulary.decode
    assert [decode(ids_in(events, name)) for name in names] == [
        final[f"draft {n}"] for n in (1, 2, 3)
    ]
    assert any(isinstance(event, Note) and "unverified" in event.text for event in events)


def test_agreement_counts_the_first_tokens_that_the_answer_has_too(tiny_engine):
    events = written(tiny_engine, k=2)
    answer = ids_in(events)
    for metric in (event for event in events if isinstance(event, Metric)):
        draft = ids_in(events, metric.name.partition(":")[0])
        assert draft[: int(metric.value)] == answer[: int(metric.value)]
        assert draft[: int(metric.value) + 1] != answer[: int(metric.value) + 1] or (
            metric.value == len(draft)
        )


def test_the_numbers_of_a_lane_are_the_models_own(tiny_engine):
    events = written(tiny_engine, k=1)
    draft = [e for e in events if isinstance(e, Token) and e.lane != MAIN]
    prompt = tiny_engine.encode(PROMPT)
    total = sum(token.logprob for token in draft)
    scored = tiny_engine.score(prompt, [[token.id for token in draft]])[0].total
    assert abs(total - scored) < 1e-3
