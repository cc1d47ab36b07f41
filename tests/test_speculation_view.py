"""How much drafting gained: the fold against numbers worked out by hand, tiles, charts, origin."""

import json
import math
import re

import pytest

from analyzers.trace import DraftTree, Event, Rewind, RunEnded, RunStarted, Token
from tests.test_views import HOSTILE, Seen, check, token
from visualizations import assets, origin, speculation, tokens
from visualizations.speculation import Level, numbers

COST = {"step_ms": 20.0, "verify": [[1, 1.0], [4, 1.5]], "prefill": 500.0, "memory": 100}
STARTED = RunStarted("draft", {}, "Say", (1, 2), {}, 0, cost=COST)


def tree(pos: int, parents: tuple, accepted: tuple, extra: int | None = 9, **fields) -> DraftTree:
    n = len(parents)
    values = {
        "ids": tuple(range(n)),
        "texts": tuple(f" w{i}" for i in range(n)),
        "draft_logprobs": tuple(math.log(0.5) for _ in range(n)),
        "target_logprobs": tuple(math.log(0.25) for _ in range(n)),
        "ended": "no draft here was accepted",
        "extra_text": " own",
        "origin": "corrected" if extra is not None else "",
        "chances": tuple(0.5 if parent in (-1, *accepted) else None for parent in parents),
        "coins": tuple(0.25 if parent in (-1, *accepted) else None for parent in parents),
        "cost": 1.5,
        "draft_ms": 2.0,
        "verify_ms": 27.0,
        "rest_ms": 1.0,
    }
    return DraftTree(pos=pos, parents=parents, accepted=accepted, extra=extra, **(values | fields))


def wrote(pos: int, drafted: int, last: str = "corrected") -> list[Token]:
    kept = [token(pos + i, f" d{i}", origin="drafted") for i in range(drafted)]
    return [*kept, token(pos + drafted, " own", origin=last)] if last else kept


def run() -> list[Event]:
    """Four passes: a chain of three of which two survive, a plain one, a tree, and a chain within
    which the text ends."""
    chain, branching = (-1, 0, 1), (-1, -1, 0, 1, 1, 4)
    return [
        STARTED,
        tree(2, chain, (0, 1)),
        *wrote(2, 2),
        token(5, " plain"),
        tree(6, branching, (1, 4), origin="corrected"),
        *wrote(6, 2),
        tree(9, chain, (0,), None, ended="the text is over: end token"),
        *wrote(9, 1, ""),
        RunEnded("done", "end token", tokens=8, forwards=5, seconds=2.0),
    ]


def test_the_numbers_are_those_worked_out_by_hand():
    found = numbers(run())
    assert (found.steps, found.drafts, found.plain, found.tokens) == (4, 3, 1, 3 + 1 + 3 + 1)
    assert found.mean_acceptance_length == 8 / 4
    assert (found.draft_tokens, found.accepted, found.wasted) == (12, 5, 7)
    assert found.acceptance_rate == 5 / 12 and not found.chains
    assert [(step.pos, step.tokens) for step in found.passes] == [(2, 3), (5, 1), (6, 3), (9, 1)]
    # Depth 1: all three. Depth 2: behind the third nothing was asked for, since the text ended.
    # Depth 3: the first chain's last draft and the tree's node 5, both refused.
    assert found.by_depth == (Level(1, 3, 3), Level(2, 2, 2), Level(3, 2, 0))
    # Rank 1: nodes 0, 1, 2 of the chain; 0, 3, 5 of the tree; 0 of the last. Rank 2: 1 and 4.
    assert found.by_rank == (Level(1, 7, 3), Level(2, 2, 2))
    assert found.rate_per_position == (1.0, 2 / 3, 0.0)
    assert (found.draft_ms, found.verify_ms, found.rest_ms, found.ms) == (6, 81, 3, 90)
    assert found.predicted_steps == 4.5 and found.step_ms == 20
    # M 2 over a mean cost of (3 x 1.5 + 1) / 4; and 2 x 20 ms over (90 + 20) / 4 ms.
    assert found.predicted_speedup == pytest.approx(2 / (5.5 / 4))
    assert found.measured_speedup == pytest.approx(2 * 20 / (110 / 4))
    assert found.per_second == 4.0


def test_what_is_not_known_is_none():
    nothing = numbers([])
    assert (nothing.steps, nothing.mean_acceptance_length, nothing.acceptance_rate) == (
        0,
        None,
        None,
    )
    assert nothing.predicted_speedup is nothing.measured_speedup is nothing.per_second is None
    bare = numbers([tree(2, (-1,), (0,), cost=None, draft_ms=0.0, verify_ms=0.0, rest_ms=0.0)])
    assert (bare.steps, bare.tokens, bare.chains, bare.acceptance_rate) == (1, 2, True, 1.0)
    assert bare.predicted_speedup is bare.measured_speedup is bare.step_ms is None
    unpriced = numbers([STARTED, tree(2, (-1,), ()), tree(3, (-1,), (), cost=None)])
    assert unpriced.predicted_speedup is None and unpriced.measured_speedup == 2 * 20 / 60


def test_plain_decoding_has_one_token_a_pass():
    found = numbers([STARTED, *(token(i) for i in range(2, 9))])
    assert (found.mean_acceptance_length, found.drafts, found.wasted) == (1.0, 0, 0)


def test_an_earlier_runs_tokens_and_other_lanes_do_not_count():
    earlier = [token(2), token(3, origin="drafted"), token(4, origin="forced")]
    mine = [tree(5, (-1,), (0,)), *wrote(5, 1)]
    other = [tree(5, (-1,), (), lane="other"), token(5, lane="other")]
    assert numbers([STARTED, *earlier, *mine, *other]) == numbers([STARTED, *mine])
    assert numbers([STARTED, *mine, *other], lane="other").steps == 2


def test_tiles_have_plain_words_and_the_exact_term():
    seen = check(speculation.render(run()), {"div", "dl", "dt", "dd", "b"}, {"class", "title"})
    for part in (
        "tokens a pass2.00 8 tokens in 4 passes",
        "drafts that survived42 % 5 of 12 drafted tokens",
        "drafts thrown away2.3 a passof 4.0 drafted tokens",
        "speed, as predicted1.45 × plain decoding",
        "speed, as measured1.45 × plain decodingagainst a plain step of 20.0 ms in the table",
        "tokens a second4.0 1 pass without a draft",
    ):
        assert part in seen.text
    titles = " ".join(str(names.get("title")) for _, names in seen.tags)
    for term in ("mean acceptance length", "block efficiency", "tree yield", "num draft tokens"):
        assert term in titles
    chains = speculation.render([tree(2, (-1, 0), (0,))])
    assert "draft acceptance rate" in chains and "as measured" not in chains


def test_nothing_is_drawn_of_other_runs():
    for events in ([], [STARTED, token(2)], [Rewind(2, "x")], [tree(2, (-1,), (), lane="b")]):
        assert not speculation.fits(events) and speculation.render(events) == ""
        assert speculation.figures(events) == []


def test_charts_have_the_numbers_of_the_fold():
    passes, acceptance, times = (json.loads(each.to_json()) for each in speculation.figures(run()))
    bars, mean = passes["data"]
    assert bars["y"] == [3, 1, 3, 1] and bars["customdata"] == [2, 5, 6, 9]
    assert mean["y"] == [3, 2, pytest.approx(7 / 3), 2]
    depth, rank = acceptance["data"]
    assert depth["y"] == [1, 1, 0] and depth["text"] == ["3/3", "2/2", "0/2"]
    assert rank["x"] == [1, 2] and rank["text"] == ["3/7", "2/2"]
    # Three drafted passes: 30 ms each, 1.5 predicted steps of 20 ms, and 7 tokens one by one.
    assert [bar["x"][0] for bar in times["data"]] == [2, 27, 1, 30, pytest.approx(7 * 20 / 3)]
    (only,) = speculation.figures([tree(2, (), (), draft_ms=0.0, verify_ms=0.0, rest_ms=0.0)])
    assert len(only.data) == 2
    _, chain, alone = speculation.figures([tree(2, (-1, 0), (0,))])
    assert len(chain.data) == 1 and len(alone.data) == 3  # no siblings, no cost table


# ---- the origin of the text ----------------------------------------------------------------------


def test_bars_below_the_text_are_as_wide_as_high():
    drawn = origin.figure(run())
    assert drawn is not None
    (bars,) = json.loads(drawn.to_json())["data"]
    assert bars["y"] == [3, 1, 3, 1] and bars["customdata"] == [2, 5, 6, 9]
    edges = [(x - w / 2, x + w / 2) for x, w in zip(bars["x"], bars["width"], strict=True)]
    assert [(round(a), round(b)) for a, b in ((a + 0.5, b - 0.5) for a, b in edges)] == [
        (1, 3), (4, 4), (5, 7), (8, 8),
    ]  # fmt: skip
    assert bars["hovertext"][0] == "3 tokens in one pass<br>token 1 to 3"
    assert origin.figure([]) is None and origin.figure([token(2)]) is None


def test_every_origin_has_a_tint_and_a_line_in_the_style_and_the_legend():
    seen = check(origin.legend(), {"div", "ul", "li", "span", "p", "b"}, {"class"})
    sheet = assets.css()
    for name in ("drafted", "corrected", "bonus"):
        assert re.search(rf"\.by-origin \.o-{name} {{[^}}]*--tint:[^}}]*--cue:", sheet)
        assert f"t o-{name}" in [names["class"] for tag, names in seen.tags if tag == "span"]
        assert f" o-{name}" in tokens.span(token(2, origin=name))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_out_of_tiles_and_charts(text):
    events = [tree(2, (-1, -1), (0,), texts=(text, text), extra_text=text, ended=text)]
    assert (
        Seen(speculation.render(events)).text
        == Seen(speculation.render([tree(2, (-1, -1), (0,))])).text
    )
    for drawn in (*speculation.figures(events), origin.figure(events)):
        for trace in drawn.data:
            for said in trace.hovertext or ():
                assert not re.search(r"<(?!br>)|[\x00-\x1f\u202a-\u202e$]", said)


@pytest.mark.parametrize("name", ["speculation", "tree"])
def test_the_style_is_its_own(name):
    sheet = (assets._HERE / f"{name}.css").read_text()
    bare = re.sub(r"/\*.*?\*/|@media[^{]*{", "", sheet, flags=re.S)
    for selectors in re.findall(r"([^{}]+)\{", bare):
        assert all(f".x-{name}" in part for part in selectors.split(","))
