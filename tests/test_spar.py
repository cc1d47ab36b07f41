"""SPaR: votes and parsing by hand, the shape of the tree under known judges, pairs, accounting."""

import pytest

from analyzers.common.budget import Budget
from analyzers.common.checklist import read_checklist
from analyzers.common.critiques import Checks, Critics, Votes, YesShare, read_judgement
from analyzers.common.judges import Verdict
from analyzers.common.rollouts import Rollout
from analyzers.context import Context
from analyzers.errors import BadInput, BadParameter
from analyzers.search import spar
from analyzers.task import Task, chat
from analyzers.trace import Candidate, Judgement, Metric, Note, SearchNode, Token, text_of

TASK = Task(chat("Name the sun and the sea."))
CHECKS = "keywords: sun\nkeywords: sea"
PAPER = {"answers": 1, "branch": 3, "select": 2, "depth": 3}


class Says:
    """A judge whose values are known."""

    name, scale = "planted", (0.0, 1.0, "better", False)

    def __init__(self, value) -> None:
        self.value = value

    def __call__(self, texts):
        return [Verdict(self.value(text), rationale=f"About {text}.") for text in texts]


def go(engine, seed: int = 1, task: Task = TASK, **knobs):
    """The events of a run, and why it ended."""
    given = {"checks": CHECKS, "max_new": 8} | knobs
    run, events = spar.run(engine, task, spar.Params(**given), Context(seed)), []
    while True:
        try:
            events.append(next(run))
        except StopIteration as end:
            return events, end.value


@pytest.fixture
def judged(monkeypatch):
    """Make the judge be one whose value is this function of the text."""

    def judge(value):
        monkeypatch.setattr(spar.Spar, "_judge", lambda self: Says(value))

    return judge


@pytest.fixture
def dictated(monkeypatch):
    """Make everything that is written be these texts, in order; "a0", "a1", ... without any."""

    def dictate(*texts: str):
        left = iter(texts) if texts else (f"a{number}" for number in range(1000))

        def write(engine, prefixes, ids, rngs, budget, **options):
            found = []
            for _ in rngs:
                ids = engine.tokens(next(left))
                budget.charge("tokens", len(ids))
                found.append(Rollout(ids, [-1.0] * len(ids)))
            return found

        monkeypatch.setattr("analyzers.search.spar.write", write)

    return dictate


def nodes(events) -> dict[int, SearchNode]:
    """As they were told last."""
    return {event.node: event for event in events if isinstance(event, SearchNode)}


def texts(events, group: str) -> list[str]:
    return [e.text for e in events if isinstance(e, Candidate) and e.group == group]


def notes(events) -> str:
    return " ".join(event.text for event in events if isinstance(event, Note))


def metric(events, name: str) -> float:
    *_, found = [e.value for e in events if isinstance(e, Metric) and e.name == name]
    return found


def test_votes_are_counted_without_those_that_cannot_be_read():
    votes = Votes((True, True, False, True, None))
    assert (votes.value, votes.majority, votes.kept) == (0.75, True, 0)
    tie = Votes((None, True, False))
    assert (tie.value, tie.majority, tie.kept) == (0.5, None, 1)
    assert Votes((True, False, False)).kept == 1
    nothing = Votes((None, None))
    assert (nothing.value, nothing.majority, nothing.kept) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Fine. Final Judgement: No, not quite. Yes?", False),
        ("Final Judgement (Yes or No): No", False),
        ("Yes, it does.", None),
        ("Final Judgement: nothing to say", None),
        ("**Final Judgement:** YES", True),
        ("Final Judgement: No. On second thought: Final Judgement: Yes", True),
    ],
)
def test_the_first_word_behind_the_final_judgement_counts(text, said):
    assert read_judgement(text) is said


def test_the_output_stands_between_the_marks():
    assert spar.read_output("so [[start]] a\nb [[end]] and on") == "a\nb"
    assert spar.read_output("[[start]] x [[start]] y [[end]]") == "y"
    assert spar.read_output("[[start]] never ended") is None


def test_a_judge_that_always_says_yes_ends_with_the_first_child(own_engine, dictated, judged):
    dictated()
    judged(lambda text: float(text != "a0"))
    events, why = go(own_engine, **PAPER)
    assert why == "an answer was accepted at depth 1"
    assert texts(events, "refinements") == ["a1", "a2", "a3"]
    assert text_of(events) == "a1"
    assert texts(events, "pair") == ["a1", "a0"]
    assert {event.origin for event in events if isinstance(event, Token)} == {"forced"}


@pytest.mark.parametrize("search", ["breadth first", "depth first"])
def test_a_judge_that_always_says_no_gives_the_root_back(own_engine, dictated, judged, search):
    dictated()
    judged(lambda text: 0.0)
    events, why = go(own_engine, search=search, **PAPER)
    assert why == "nothing was accepted down to depth 3"
    below = [node for node in nodes(events).values() if node.detail["kind"] == "refinement"]
    # Depth first goes down from two of three at each level: 3 + 2 * (3 + 2 * 3).
    assert len(below) == (15 if search == "breadth first" else 21)
    assert {node.value for node in below} == {0}
    assert text_of(events) == "a0" and "No improvement" in notes(events)
    assert not texts(events, "pair")


def test_a_value_at_the_gate_does_not_end_the_search(own_engine, dictated, judged):
    dictated()
    judged(lambda text: 0.5 if text != "a0" else 0.0)
    events, why = go(own_engine, **PAPER)
    assert why.startswith("nothing was accepted") and len(texts(events, "refinements")) == 15
    assert not texts(events, "pair") and "not accepted" in notes(events)
    assert text_of(events) == "a1"  # better than the root all the same


def test_a_tied_answer_is_not_refined(own_engine, dictated, judged):
    dictated("tie", "bad", "good")
    judged({"tie": 0.5, "bad": 0.2, "good": 0.9}.get)
    events, _ = go(own_engine, answers=2, branch=1, depth=1)
    assert texts(events, "pair") == ["good", "bad"]


def test_where_nothing_fails_there_is_nothing_to_refine(own_engine, dictated, judged):
    dictated("fine", "better")
    judged({"fine": 0.6, "better": 0.8}.get)
    events, why = go(own_engine, answers=2)
    assert why == "no answer failed: there was nothing to refine"
    assert text_of(events) == "better" and not texts(events, "refinements")


def test_one_branch_and_one_level_are_one_refinement(own_engine, dictated, judged):
    dictated()
    judged(lambda text: 0.0)
    events, _ = go(own_engine, answers=1, branch=1, depth=1)
    assert texts(events, "refinements") == ["a1"]


def test_depth_first_goes_down_before_it_goes_on(own_engine, dictated, judged):
    dictated()
    judged(lambda text: 0.0)
    events, _ = go(own_engine, search="depth first", answers=1, branch=2, select=2, depth=2)
    parents = [node.parent for node in nodes(events).values()]
    # root, a0, its children 2 and 3, then those of 2 before those of 3
    assert parents == [None, 0, 1, 1, 2, 2, 3, 3]
    order = {number: node.detail.get("iteration") for number, node in nodes(events).items()}
    assert [order[number] for number in (1, 2, 3)] == [1, 2, 3]


def test_pairs_of_a_perfect_judge_are_always_right(own_engine, monkeypatch):
    """Real sampling of a tiny model; the check is one that such a model meets now and then."""
    meets = read_checklist("pattern: [a-m]")
    monkeypatch.setattr(spar.Spar, "_judge", lambda self: Checks(meets))
    check, pairs = meets.requirements[0].check, 0
    for seed in range(6):
        events, _ = go(own_engine, seed, answers=3, max_new=3, depth=2)
        if pair := texts(events, "pair"):
            pairs += 1
            assert (check(pair[0]), check(pair[1])) == (1, 0)
    assert pairs


def test_equal_refinements_are_one_node_and_judged_once(own_engine, dictated, judged):
    dictated("a", "same", "same", "same", "other", "other", "other")
    judged(lambda text: 0.0)
    events, _ = go(own_engine, answers=1, branch=3, select=1, depth=2)
    assert len(nodes(events)) == 4
    assert sum(isinstance(event, Judgement) for event in events) == 4  # and the plain answer
    assert nodes(events)[2].detail["tokens"] == 3 * len("same")


def test_all_tokens_are_accounted_for(own_engine):
    """Nodes and critiques together are what was charged, for a real model that samples."""
    own_engine.context = 4096
    events, _ = go(
        own_engine, judge="critiques", answers=2, critiques=2, critique_tokens=5, temperature=1.0
    )
    written = sum(node.detail.get("tokens", 0) for node in nodes(events).values())
    read = sum(event.detail["tokens"] for event in events if isinstance(event, Judgement))
    assert read and written + read == metric(events, "spent tokens")
    assert "Not one critique could be read" in notes(events)
    assert {node.detail.get("reason") for node in nodes(events).values()} >= {
        "no critique could be read", "best there was",
    }  # fmt: skip


def test_critiques_are_sampled_apart_and_kept(own_engine, monkeypatch):
    said = ["Good. Final Judgement: Yes", "Hm.", "Bad. Final Judgement: No", "Final Judgement: No"]

    def write(engine, prefixes, ids, rngs, budget, **options):
        assert len({rng.random() for rng in rngs}) == 4
        return [Rollout(engine.tokens(text)) for text in said]

    monkeypatch.setattr("analyzers.common.critiques.write", write)
    judge = Critics(own_engine, "Do.", Budget(), Context(1).rng, critiques=4, max_new=9)
    (verdict,) = judge(["It is done."])
    assert verdict.score == pytest.approx(1 / 3) and verdict.verdict == "No"
    assert verdict.rationale == said[2]
    assert verdict.detail["critiques"] == tuple(zip(said, ("Yes", "", "No", "No"), strict=True))


def test_probabilities_of_several_texts_are_those_of_each(tiny_engine):
    judge = YesShare(tiny_engine, "Name the sun.")
    texts = ["The sun.", "A moon, and more."]
    together = judge(texts)
    alone = [YesShare(tiny_engine, "Name the sun.")([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
    assert sum(verdict.passes for verdict in together) < sum(verdict.passes for verdict in alone)


def test_checks_are_one_only_where_all_are_met():
    judge = Checks(read_checklist(CHECKS))
    scores = [verdict.score for verdict in judge(["sun and sea", "sun", "nothing"])]
    assert scores == [1, 0.25, 0]
    (verdict,) = judge(["sun"])
    assert verdict.rationale.splitlines()[-1] == "Final Judgement: No"
    assert "sea" in verdict.rationale and verdict.verdict == "No"


def test_another_judge_is_measured_by_the_checks(own_engine, dictated, monkeypatch):
    dictated("sun and sea", "sun", "sea", "sun sea", "x")
    monkeypatch.setattr(spar.Spar, "_judge", lambda self: Says(lambda text: 0.0))
    events, _ = go(own_engine, judge="probabilities", answers=3, branch=2, depth=1)
    assert metric(events, "judge agrees") == pytest.approx(3 / 5)
    assert "says No to all 5" in notes(events)


def test_what_cannot_be_read_is_written_again(own_engine, dictated, judged):
    dictated("bad", "no marks", "[[start]]better[[end]]")
    judged({"bad": 0.0, "better": 1.0}.get)
    events, _ = go(own_engine, answers=1, branch=1, depth=1, reflect=True)
    assert text_of(events) == "better"
    assert nodes(events)[1].detail["tokens"] == len("bad") + len("no marks")


def test_a_spent_budget_keeps_the_best_so_far(own_engine, dictated, judged):
    dictated("bad", "fair", "good")
    judged({"bad": 0.1, "fair": 0.4, "good": 0.9}.get)
    events, why = go(own_engine, answers=1, branch=1, depth=2, max_new=3, tokens=8)
    assert why == "the budget of 8 tokens is spent"
    assert text_of(events) == "fair" and "cut short" in notes(events)


def test_a_context_that_is_full_ends_the_search(own_engine):
    own_engine.context = len(own_engine.encode(TASK)) + 8
    events, why = go(own_engine, answers=1)
    assert "not fit" in why and any(isinstance(event, Token) for event in events)


def test_what_cannot_be_done_is_said_before_anything_is(own_engine):
    with pytest.raises(BadParameter, match="checks is empty"):
        go(own_engine, checks=" ")
    with pytest.raises(BadParameter, match="'Is it nice\\?', which no program"):
        go(own_engine, checks="Is it nice?")
    with pytest.raises(BadParameter, match="at least 24"):
        go(own_engine, tokens=23)
    with pytest.raises(BadInput, match="begun"):
        go(own_engine, task=Task(TASK.prompt, prefix="The"))
    assert own_engine.forwards == 0


def test_a_judge_that_is_no_program_is_examined_behind_the_answer(own_engine):
    own_engine.context = 4096
    small = {"answers": 1, "branch": 1, "select": 1, "depth": 1, "max_new": 4}
    events, _ = go(own_engine, judge="probabilities", **small)
    told = [isinstance(e, Note) and "texts of known worth" in e.text for e in events]
    assert told.count(True) == 1
    assert not any(isinstance(event, Token) for event in events[told.index(True) :])
    assert 0 <= metric(events, "judge right") <= 1
    assert "known worth" not in notes(go(own_engine, judge="checks", **small)[0])


def test_what_is_said_of_the_plain_answer_has_its_place_in_the_budget(own_engine):
    own_engine.context = 4096
    knobs = {"judge": "critiques", "critiques": 3, "critique_tokens": 7, "answers": 1, "max_new": 4}
    with pytest.raises(BadParameter, match="at least 25"):
        go(own_engine, tokens=24, **knobs)
    assert text_of(go(own_engine, tokens=25, **knobs)[0])
