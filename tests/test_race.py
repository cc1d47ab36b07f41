"""The race: clocks, the winner and the texts are told as they are; and the tab that runs it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import gradio as gr
import pytest

from analyzers import registry
from analyzers.card import Card
from analyzers.decoding import sampling
from analyzers.errors import BadParameter
from analyzers.params import knob
from analyzers.registry import Method
from analyzers.task import Task
from analyzers.trace import Metric, Note, RunEnded, RunStarted, Token, text_of
from app.page.context import PageContext
from app.page.tabs import race as tab
from app.page.tabs.race import RaceTab, plainly
from app.runner import Job, ModelChoice, Runner
from visualizations import race
from visualizations.compare import Lane

HOSTILE = '<img src=x onerror="alert(1)">'
HERE = SimpleNamespace(session_hash="here", username=None)


def token(pos: int, text: str, origin: str = "sampled", gap: float = 0.01) -> Token:
    top = ((1, " a", math.log(0.4)), (2, " b", math.log(0.4) - gap))
    return Token(pos, ord(text[-1]), text, "41", -0.5, 1.0, 1, 0.5, 1.0, top, origin=origin)


def lane(words: str, seconds: float, name: str = "lane", more=(), status="done", **params) -> Lane:
    started = RunStarted("m", {}, "p", (), {"max_new": 8, "temperature": 0.0, **params}, 1)
    tokens = [token(pos, word) for pos, word in enumerate(words)]
    ended = RunEnded(status, "max_new reached", tokens=len(tokens), seconds=seconds)
    return Lane(name, [started, *tokens, *more, ended])


def test_the_faster_lane_wins_and_the_texts_are_the_same():
    plain, drafted = lane("abcdefgh", 4.0), lane("abcdefgh", 2.5)
    said = race.verdict(plain, drafted)
    assert race.speedup(plain, drafted) == 1.6 and race.winner(plain, drafted) is drafted
    assert "<b>1.60 ×</b> faster" in said and "8 of 8 tokens identical" in said
    assert "x-race-verdict fast" in said and "part" not in said


def test_a_loss_is_told_as_one_with_what_the_method_says_of_it():
    lost = Note("info", f"Drafting lost here: {HOSTILE}")
    mean = Metric("mean acceptance length", 4, 1.25, "tokens a pass")
    plain, drafted = lane("abcdefgh", 2.0), lane("abcdefgh", 2.5, more=[mean, lost])
    said = race.verdict(plain, drafted)
    assert "<b>0.80 ×</b> the speed: slower here" in said and "x-race-verdict slow" in said
    assert "1.25 tokens a pass instead of 1: 0 drafted tokens accepted" in said
    assert "Drafting lost here: &lt;img" in said and race.winner(plain, drafted) is plain


def test_within_a_twentieth_nobody_wins():
    plain, drafted = lane("ab", 1.0), lane("ab", 0.97)
    assert race.winner(plain, drafted) is None
    said = race.verdict(plain, drafted)
    assert "no clear winner" in said and "x-race-verdict even" in said


@pytest.mark.parametrize(
    ("gap", "means"),
    [(0.01, "a near-tie, which rounding decides"), (0.3, "rounding alone does not explain")],
)
def test_where_the_texts_part_is_told_with_how_close_it_was(gap, means):
    plain, drafted = lane("abcdef", 2.0), lane("abcxyz", 1.0)
    plain.events[4] = token(3, "d", gap=gap)
    said = race.verdict(plain, drafted)
    assert "3 of 6 tokens identical, then the texts part" in said and means in said
    assert f"({gap:.3f} nats apart)" in said and "40 %" in said
    assert said.index(">d<") < said.index(">x<")


def test_a_text_that_ends_earlier_parts_there():
    said = race.verdict(lane("abcd", 2.0), lane("abc", 1.5))
    assert "3 of 4 tokens identical, then the texts part</b>: one of them ends there" in said


def test_sampled_texts_need_not_be_the_same_and_speed_is_that_of_a_token():
    plain, drafted = lane("abcd", 2.0, temperature=0.7), lane("axcdefgh", 2.0, temperature=0.7)
    said = race.verdict(plain, drafted)
    assert "<b>2.00 ×</b> faster" in said and "Sampled at temperature 0.7" in said


def test_without_two_whole_texts_there_is_no_verdict():
    whole = lane("abcd", 2.0)
    for other in (lane("ab", 1.0, status="stopped"), lane("", 1.0), Lane("x", whole.events[:3])):
        assert race.verdict(whole, other) == race.verdict(other, whole) == ""
        assert race.winner(whole, other) is None


def test_what_failed_is_told_instead_of_a_verdict():
    failed = Lane(HOSTILE, [RunEnded("failed", "too deep", tokens=2, seconds=1.0)])
    said = race.verdict(lane("abcd", 2.0), failed)
    assert 'role="alert"' in said and "too deep" in said and "<img" not in said


def test_a_lane_shows_its_own_clock_and_how_far_it_is():
    going = race.head(HOSTILE, lane("abcd", 9.0).events[:-1], 1.25)
    assert "<b>1.2</b> s" in going and "<b>4</b> tokens" in going and "<b>3.2</b> tokens/s" in going
    assert "width:50%" in going and "<img" not in going and "won" not in going
    before = race.head("lane", [], 0.0)
    assert "<b>0.0</b> s" in before and "<b>–</b> tokens/s" in before and "width:0%" in before
    assert "width:50%" in race.head("lane", lane("abcd", 9.0, status="stopped").events, 0.0)
    ended = race.head("lane", lane("abcd", 9.0).events, 11.0, "faster")
    assert "<b>9.0</b> s" in ended and "width:100%" in ended
    assert " won" in ended and "faster</span>" in ended


@dataclass(frozen=True)
class Params:
    size: int = knob(2, "Tokens of a draft", lo=1, hi=8)
    max_new: int = knob(12, "When to stop writing", lo=1, hi=64, unit="tokens")
    temperature: float = knob(0.0, "0 = greedy", lo=0, hi=2)
    stop: str = knob("", "Where to stop")


def run(engine, task, params, ctx):
    """Writes what sampling writes, and calls it drafted."""
    plain = sampling.Params(temperature=params.temperature, top_p=1.0, max_new=params.max_new)
    for event in sampling.run(engine, task, plain, ctx):
        yield Token(**vars(event) | {"origin": "drafted"})
    return "max_new reached"


@pytest.fixture
def drafting(monkeypatch) -> Method:
    for name, needs in (("unchecked", ("logits",)), ("made_up", ("logits", "tree"))):
        card = Card("Made up", "drafting", "made up", (Token,), needs)
        made = Method(name, card, Params, run, "Made up: it drafts a token.")
        monkeypatch.setitem(registry.methods(), name, made)
    monkeypatch.setattr(tab, "FIRST_METHOD", "made_up")
    return made


@pytest.fixture
def shown(runner: Runner, drafting) -> RaceTab:
    with gr.Blocks():
        return RaceTab(PageContext(runner, runner.store, ModelChoice()), gr.State(True))


def started(shown: RaceTab, **other) -> Iterator[dict]:
    given = {shown.mode: "raw", shown.prompt: "Once upon", shown.seed: "5", shown.method: "made_up"}
    for form in shown.forms:
        given |= {widget: widget.value for widget in form.widgets.values()}
        if form.method.name == "made_up":
            given |= {form.widgets[name]: value for name, value in other.items()}
    return shown.start(given, HERE)


def test_plain_decoding_has_the_settings_that_both_methods_know(drafting):
    asked = Job("made_up", Task("x"), {"size": 3, "max_new": 9, "temperature": 0.5, "stop": "."})
    assert plainly(asked) == {"temperature": 0.5, "top_p": 1.0, "max_new": 9, "stop": "."}
    with pytest.raises(BadParameter):
        plainly(Job("made_up", Task("x"), {"size": 100}))


def test_a_race_shows_both_clocks_then_the_verdict_and_keeps_both_runs(shown):
    steps = list(started(shown))
    last = {}
    for step in steps:
        last |= step
    assert "12 of 12 tokens identical" in last[shown.verdict]
    assert all("width:100%" in last[head] for head in shown.heads)
    assert "Plain decoding" in last[shown.heads[0]] and "Made up" in last[shown.heads[1]]
    assert 'o-sampled"' in last[shown.texts[0]] and 'o-drafted"' in last[shown.texts[1]]
    assert "each saved as a run of its own" in last[shown.state]
    plain, drafted = ([s.event for s in shown.ctx.runner.events(id)] for id in last[shown.ids])
    assert (plain[0].method, drafted[0].method) == ("sampling", "made_up")
    assert plain[0].seed == drafted[0].seed == 5 and text_of(plain) == text_of(drafted)
    assert steps[0][shown.halt].interactive and not steps[0][shown.go].interactive
    assert last[shown.go].interactive and not last[shown.halt].interactive


def test_a_race_that_is_stopped_has_no_verdict(shown):
    last = {}
    for step in started(shown, max_new=64):
        last |= step
        shown.stop(HERE)
    assert last[shown.verdict] == "" and last[shown.go].interactive
    assert "■ Stopped" in last[shown.state] or "Stopped before it began" in last[shown.state]


def test_only_what_checks_its_drafts_races(shown):
    assert "made_up" in shown.methods and "unchecked" not in shown.methods


def test_what_cannot_be_raced_is_a_sentence(shown):
    (only,) = started(shown, size=100)
    assert 'role="alert"' in only[shown.state] and "size" in only[shown.state]
