"""Search trees: what reaches the page, safely and small; and the drawing itself in a browser."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from analyzers.trace import (
    Candidate,
    Event,
    Judgement,
    Metric,
    Note,
    RunEnded,
    RunStarted,
    SearchNode,
)
from tests.test_views import HOSTILE, check, shown, token
from visualizations import assets
from visualizations import search_tree as view

TAGS = {"div", "small", "button", "input", "output", "p", "ul", "li", "b", "span", "i", "dl", "dt",
        "dd", "u", "section", "h4"}  # fmt: skip
NAMES = {"class", "dir", "type", "min", "max", "value", "role", "aria-label", "title",
         "style", "data-search", "data-move", "data-play", "data-fold", "data-zoom"}  # fmt: skip

STARTED = RunStarted(
    method="rain",
    model={"name": "little"},
    prompt=({"role": "user", "content": "How do I stay safe on a mountain hike?"},),
    prompt_ids=(1, 2),
    params={"budget": 6_000, "evaluations": 200},
    seed=7,
)
SCALE = (-1.0, 1.0, "better", False)
_STARTS = [
    "Tell", " someone", " You", " should", " Just", " It", " climb", " check", " the weather",
    " your friends", " where you are", " going and when", " turn around", " no one", " fast",
    " water,", " a map", " before the storm", " and keep", " to the path.",
]  # fmt: skip


def node(number: int, parent: int | None = None, text: str = " a", **fields: object) -> SearchNode:
    values: dict[str, object] = {
        "prior": 0.5, "value": None, "visits": 0.0, "real_visits": 0, "status": "open",
    }  # fmt: skip
    return SearchNode(node=number, parent=parent, text=text, **(values | fields))  # type: ignore[arg-type]


def judgement(key: str, score: float | None = 0.5, **fields: object) -> Judgement:
    return Judgement(key, "rollout", "harmless, both orders", score, SCALE, **fields)  # type: ignore[arg-type]


def search(nodes: int = 30, seed: int = 3) -> list[Event]:
    """A tree search by PUCT: every iteration visits a leaf, judges what was tried behind it, and
    expands it; now and then the most visited child of the root is committed, and what hangs
    beside it rewound."""
    rng = random.Random(seed)
    tree: list[SearchNode] = [node(0, None, "", prior=None, status="committed")]
    told: dict[int, SearchNode] = {}
    events: list[Event] = [STARTED]
    top = 0

    def below(number: int) -> list[int]:
        found = [each.node for each in tree if each.parent == number]
        return [number, *(deep for each in found for deep in below(each))]

    def children(number: int) -> list[SearchNode]:
        return [each for each in tree if each.parent == number]

    def puct(each: SearchNode, visits: float) -> tuple[float, float]:
        exploit = 0.0 if each.value is None else (each.value + 1) / 2
        return exploit, 2 * (each.prior or 0) * math.sqrt(visits) / (1 + each.visits)

    def news() -> None:
        for each in tree:
            if told.get(each.node) != each:
                told[each.node] = each
                events.append(each)

    def expand(number: int) -> None:
        said = rng.sample(_STARTS, rng.choice([2, 3, 4]) if nodes < 100 else 8)
        weights = [rng.random() ** 3 + 0.02 for _ in said]
        for text, weight in zip(said, weights, strict=True):
            detail = {"kind": "set", "logprob": -round(rng.uniform(1, 9), 3)}
            prior = round(weight / sum(weights), 4)
            tree.append(node(len(tree), number, text, prior=prior, detail=detail))

    iteration = 0
    while len(tree) < nodes:
        iteration += 1
        path = [top]
        while under := [each for each in children(path[-1]) if each.status == "open"]:
            visits = tree[path[-1]].visits + 1
            terms = [(each.node, *puct(each, visits)) for each in under]
            tree[path[-1]] = replace(
                tree[path[-1]],
                detail=dict(tree[path[-1]].detail)
                | {"siblings": [[n, round(a, 4), round(b, 4)] for n, a, b in terms]},
            )
            path.append(max(terms, key=lambda term: term[1] + term[2])[0])
        p, q = rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.8)
        value = float((p > 0.5) + (q > 0.4) - 1)
        key = f"e{iteration}"
        events.append(
            judgement(key, value, label_mass=round(rng.uniform(0.7, 1), 3), passes=2,
                      detail={"first": {"A harmless": round(p, 3), "B harmful": round(1 - p, 3)},
                              "swapped": {"A harmful": round(1 - q, 3), "B harmless": round(q, 3)}})
        )  # fmt: skip
        if iteration == 1 or tree[path[-1]].visits:
            expand(path[-1])
        for number in path:
            was = tree[number]
            n = was.visits + 1
            mean = ((was.value or 0) * was.visits + value) / n
            tree[number] = replace(
                was, visits=n, real_visits=int(n), value=round(mean, 4), evals=(*was.evals, key),
                detail=dict(was.detail)
                | {"iteration": iteration, "rollout": rng.choice(_STARTS) + " and be careful."},
            )  # fmt: skip
        if iteration % 6 == 0:
            best = max(children(top), key=lambda each: each.visits)
            for other in children(top):
                if other.node != best.node:
                    for each in below(other.node):
                        status = "rewound" if tree[each].visits else "pruned"
                        tree[each] = replace(tree[each], status=status)
            detail = dict(best.detail) | {"reason": "most visited, value above 0.8"}
            tree[best.node] = replace(best, status="committed", detail=detail)
            top = best.node
            events.append(token(iteration, best.text))
        news()
    events += [
        Metric("spent tokens", iteration, 37.0 * iteration, "tokens"),
        Metric("spent evaluations", iteration, float(iteration), "evaluations"),
        Metric("spent nodes", iteration, float(len(tree)), "nodes"),
        Metric("spent forwards", iteration, 1912.0, "forwards"),
        Metric("judge right", 0, 11.0, "of 20"),
        Note("warning", "This judge is at chance: 11 of 20 right, and it says A 16 times."),
        RunEnded("done", "the budget is spent", 40, 1912, 31.0),
    ]
    return events


def samples() -> list[Event]:
    """Whole answers beside each other, and a better one made of one of them."""
    texts = ["Take water and a map.", "Climb fast.\nNever look back, it only slows you down."]
    made = [
        node(i, 0, text, value=v, visits=1.0, real_visits=1, prior=None, evals=(f"e{i}",),
             status=status, detail={"kind": kind})
        for i, text, v, status, kind in (
            (1, texts[0], 0.25, "pruned", "sample"), (2, texts[1], -0.5, "pruned", "sample"))
    ]  # fmt: skip
    last = node(
        3, 1, "Take water, a map and a friend.", value=0.75, visits=1.0, real_visits=1,
        status="committed", evals=("e3",), detail={"kind": "refinement", "reason": "the best"},
    )  # fmt: skip
    return [
        STARTED,
        node(0, None, "", prior=None),
        Candidate("s1", "samples", texts[0]),
        judgement("e1", 0.25, rationale="It names two things.\nJudgement: fair", verdict="fair"),
        made[0],
        judgement("e2", -0.5, rationale="Dangerous."),
        made[1],
        judgement("e3", 0.75, rationale="Good.", verdict="good"),
        last,
        RunEnded("done", "the best of three", 9, 9, 1.0),
    ]


def data(events: list[Event]) -> dict:
    seen = check(view.render(events), TAGS, NAMES)
    return json.loads(
        next(names["data-search"] for _, names in seen.tags if "data-search" in names)
    )


def folded(steps: list) -> dict[int, dict]:
    """What the script makes of the changes."""
    nodes: dict[int, dict] = {}
    for _, changes in steps:
        for change in changes:
            nodes[change["i"]] = nodes.get(change["i"], {}) | change
    return nodes


# ---- what reaches the page -----------------------------------------------------------------------


def test_nothing_is_drawn_of_other_runs():
    for events in ([], [STARTED, token(2)], [replace(node(0), lane="other")]):
        assert not view.fits(events) and view.render(events) == ""
    assert view.fits(search())


def test_the_changes_fold_to_the_tree_of_every_moment():
    events = search(60)
    found, steps = view.moments(events), data(events)["steps"]
    assert len(found) == len(steps) > 10
    for k in (0, 3, len(found) // 2, len(found) - 1):
        wanted, got = view.latest(found[: k + 1]), folded(steps[: k + 1])
        assert list(wanted) == list(got)
        for id, event in wanted.items():
            one = got[id]
            assert one.get("up") == event.parent and one["s"] == event.status[0]
            assert one.get("v") == event.value and one.get("p") == event.prior
            assert (one["n"], one["f"]) == (event.visits, event.real_visits)
            assert one.get("t", "") == event.text and tuple(one.get("e", ())) == event.evals[-5:]


def test_only_what_changed_travels_again():
    first = node(0, None, "x", value=0.5, visits=1.0)
    events = [first, token(2), replace(first, value=None, visits=2.0, status="pruned")]
    ((_, [whole]), (_, [change])) = data([STARTED, *events, RunEnded("done", "")])["steps"]
    assert whole == {"i": 0, "t": "x", "v": 0.5, "n": 1, "f": 0, "p": 0.5, "s": "o"}
    assert change == {"i": 0, "n": 2, "s": "p", "v": None}
    large = search(500)
    nodes = view.latest(view.moments(large))
    assert len(nodes) >= 500 and len(view.render(large).encode()) < 1500 * len(nodes)


def test_a_moment_ends_where_something_else_happened_or_a_node_comes_again():
    events = [
        node(0), node(1, 0), judgement("a"), node(2, 1, detail={"iteration": 1}), node(3, 1),
        node(2, 1, detail={"iteration": 2}), token(3), replace(node(9), lane="other"), node(4, 1),
    ]  # fmt: skip
    found = view.moments(events)
    assert [list(moment.changed) for moment in found] == [[0, 1], [2, 3], [2], [4]]
    assert [moment.iteration for moment in found] == [None, 1, 2, 2]


def test_evaluations_come_with_both_orders():
    found = data(search())["evals"]["e1"]
    assert set(found["detail"]["first"]) == {"A harmless", "B harmful"}
    assert set(found["detail"]["swapped"]) == {"A harmful", "B harmless"}
    assert (found["lo"], found["hi"]) == (-1, 1) and 0.7 <= found["mass"] <= 1
    assert any(each.get("m", 0) > 5 for each in folded(data(search())["steps"]).values())
    assert "unheard" not in data([node(0), judgement("unheard")])["evals"]


def test_a_run_that_goes_on_shows_its_tree_without_a_past():
    events = search(60)
    going = [event for event in events if not isinstance(event, RunEnded)]
    whole, live = data(events), data(going)
    assert live["going"] and len(live["steps"]) == 1 and not whole["going"]
    last, live_nodes = folded(whole["steps"]), folded(live["steps"])
    assert set(live_nodes) == set(last)
    assert all(
        {n: v for n, v in last[id].items() if v is not None} == now
        for id, now in live_nodes.items()
    )
    assert len(view.render(going)) < len(view.render(events))


def test_more_than_the_page_bears_is_said_and_never_what_was_committed(monkeypatch):
    monkeypatch.setattr(view, "MOST", 20)
    events = search(120)
    nodes, kept = view.latest(view.moments(events)), folded(data(events)["steps"])
    committed = {id for id, each in nodes.items() if each.status == "committed"}
    assert committed <= set(kept) and 20 <= len(kept) < 60
    assert f"{len(nodes) - len(kept)} nodes that were left behind" in view.render(events)
    assert all(each.get("up") is None or each["up"] in kept for each in kept.values())


def test_a_long_search_keeps_its_end_when_moments_are_merged(monkeypatch):
    events = search(120)
    wanted = data(events)
    monkeypatch.setattr(view, "CHANGES", 200)
    found = data(events)
    assert 1 < len(found["steps"]) < len(wanted["steps"])
    assert folded(found["steps"]) == folded(wanted["steps"])
    assert found["steps"][-1][0] == wanted["steps"][-1][0]


def test_a_tree_that_goes_in_circles_is_cut_open():
    events = [node(0, 0), node(1, 7), node(2, 3), node(3, 2)]
    found = folded(data(events)["steps"])
    assert {id: each.get("up") for id, each in found.items()} == {0: None, 1: None, 2: None, 3: 2}


@pytest.mark.parametrize(
    ("values", "judged", "wanted"),
    [
        ((0.5, None), SCALE, (-1, 1, False, True)),
        ((0.5,), (0.0, 1.0, "worse", True), (0, 1, True, True)),
        ((-30.0, -5.5), SCALE, (-30, -5.5, False, False)),
        ((-30.0, -5.5), None, (-30, -5.5, False, False)),
        ((2.0,), None, (1, 3, False, False)),
        ((None,), None, (-1, 1, False, False)),
    ],
)
def test_colours_run_over_the_judges_scale_or_over_the_values(values, judged, wanted):
    events: list[Event] = [node(i, value=value) for i, value in enumerate(values)]
    if judged:
        events.append(Judgement("a", "t", "j", 0.5, judged))
    scale = view.scale_of(events)
    assert (scale.lo, scale.hi, scale.worse, scale.measured) == wanted
    assert ("higher is worse" in view.render(events)) == wanted[2]


def test_the_budget_and_the_judge_are_said():
    seen = check(view.render(search()), TAGS, NAMES)
    assert "1,912" in seen.text and "of 6,000" in seen.text and "of 200" in seen.text
    assert "at chance: 11 of 20 right, and it says A 16 times" in seen.text
    assert "judge right 11 of 20" in seen.text and "seconds31.0" in seen.text
    plain = check(view.render([node(0)]), TAGS, NAMES)
    assert "spent" not in plain.text and "trusted" not in plain.text


def beside() -> list[Event]:
    """A search that chose "Be kind." in two pieces; greedy decoding would say "<b>Hit</b> him."."""
    return [
        STARTED,
        Candidate("plain", "plain", "<b>Hit</b>\nhim.", -3.0),
        Judgement("e0", "plain", "harmless", -0.5, SCALE, label_mass=0.9),
        Metric("expected forwards", 0, 400.0, "forwards"),
        Metric("spent forwards", 1, 120.0, "forwards"),
        node(0, None, "", status="committed"),
        node(1, 0, "Be ", status="committed", value=0.25),
        node(2, 1, "kind.", status="committed", value=0.75),
        node(3, 1, "quick.", status="pruned", value=0.1),
        *(token(pos, text) for pos, text in enumerate(["B", "e", " k", "ind", "."], 9)),
        Metric("judge right", 0, 0.55, "share"),
        Metric("judge says first", 0, 0.9, "share"),
        RunEnded("done", "end token", 5, 150, 2.0),
    ]


def test_the_plain_answer_stands_beside_the_chosen_one_with_what_both_are_worth():
    seen = check(view.render(beside()), TAGS, NAMES)
    assert "The search worth 0.75" in seen.text
    assert "the likeliest token worth −0.50" in seen.text and "<b>Hit</b>" in seen.text
    going = view.render([e for e in beside() if not isinstance(e, RunEnded)])
    assert "0.75" not in check(going, TAGS, NAMES).text.split("Plain")[0]
    assert "Plain decoding" not in view.render(search())


def test_without_a_limit_the_bar_runs_to_what_is_expected_at_most():
    html = view.render(beside())
    assert "120 of at most 400" in check(html, TAGS, NAMES).text and "width:30%" in html


def test_shares_of_the_judge_have_a_line_at_one_half_and_a_program_is_right():
    seen = check(view.render(beside()), TAGS, NAMES).text
    assert "right55%" in seen and "says first90%" in seen and "program" not in seen
    events = [Judgement("e", "1", "keywords: sun", 1.0, SCALE), node(0), node(1, 0, evals=("e",))]
    assert "keywords: sun: a program, right by definition" in view.render(events)


def test_every_token_of_the_answer_has_its_node():
    """The blank that ends "Be " came with the k, whose first character is not of that piece."""
    assert data(beside())["places"] == [[1, 9, 11], [2, 12, 13]]
    whole = [node(0), node(1, 0, "No.", status="committed", detail={"kind": "sample"})]
    assert data([*whole, token(4, "N"), token(5, "o."), token(6, "")])["places"] == [[1, 4, 6]]
    assert data([node(0), token(4, "N")])["places"] == []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    safe = shown(text).replace("\n", "⏎").replace("\t", "⇥")
    events = [
        replace(STARTED, prompt=text),
        replace(
            judgement(text), judge=text,
                  verdict=text, rationale=text, detail={text: {text: 0.5}}),
        node(0, None, text, evals=(text,), detail={"reason": text, text: [text]}),
        Note("warning", f"judge {text}"),
        Metric(f"spent {text}", 0, 1.0, text),
        Metric(f"judge {text}", 0, 1.0, text),
    ]  # fmt: skip
    found = data(events)
    (drawn,) = folded(found["steps"]).values()
    assert drawn["t"] == drawn["d"]["reason"] == found["prompt"] == safe and drawn["e"] == [safe]
    heard = found["evals"][safe]
    assert heard["judge"] == heard["verdict"] == heard["why"] == safe
    assert list(drawn["d"].values())[1] == [safe]


def test_long_and_deep_details_become_small():
    deep: object = 1.0
    for _ in range(30):
        deep = {"more": deep, **{str(i): "x" * 5000 for i in range(200)}}
    assert len(view.render([node(0, text="y" * 50_000, detail={"deep": deep})])) < 800_000


# ---- the drawing, in a browser -------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    chromium = shutil.which("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser.new_page(viewport={"width": 1000, "height": 1100})
        browser.close()


def opened(page, events: list[Event]):
    here = Path(view.__file__).parent
    script = (here / "view.js").read_text() + (here / "search_tree.js").read_text()
    page.set_content(f'<style>{assets.css()}</style><div id="a">{view.render(events)}</div>')
    page.evaluate(
        """js => { window.again = []; Function('element', 'trigger', 'watch', js)(
            document.getElementById('a'), () => {}, (name, done) => again.push(done)); }""",
        script,
    )
    return page


def test_the_tree_is_scrubbed_opened_and_played(page):
    events = search(30)
    found = view.moments(events)
    opened(page, events)
    nodes, at = page.locator(".canvas .node"), page.locator("output")
    page.locator('[data-zoom="0"]').click()  # all of it is in sight
    tree = view.latest(found)
    assert nodes.count() == len(tree)
    committed = [each for each in tree.values() if each.status == "committed" and each.text]
    assert page.locator(".piece").all_text_contents() == [each.text for each in committed]
    assert page.locator(".node.c").count() == len(committed) + 1  # and the root
    page.locator(".piece").first.click()
    assert "it nearly said" in page.locator(".instead").text_content()
    panel = page.locator(".node-panel").text_content()
    assert "Why: most visited, value above 0.8" in panel and "swapped" in panel
    assert "exploit + explore" in panel and page.locator(".beside .explore").count() > 0
    page.locator("input").fill("1")
    assert nodes.count() == len(view.latest(found[:2])) and "iteration 2" in at.text_content()
    page.locator('[data-move="1"]').click()
    assert nodes.count() == len(view.latest(found[:3]))
    page.locator('[data-node="0"].node').click()
    assert "mountain hike" in page.locator(".node-panel .who").text_content()
    page.locator('[data-node="0"].node').press("ArrowRight")
    chosen = page.locator(".node.on")
    assert chosen.count() == 1 and tree[int(chosen.get_attribute("data-node"))].parent == 0
    assert page.evaluate("document.activeElement.classList.contains('on')")
    page.locator("input").fill(str(len(found) - 1))
    page.locator("[data-play]").click()
    assert (
        "iteration 1" in at.text_content() and "Pause" in page.locator("[data-play]").text_content()
    )
    page.wait_for_function("document.querySelector('output').textContent.startsWith('iteration 2')")
    page.locator("[data-play]").click()
    stood = nodes.count()
    # Rendering anew, as the page does, brings the same drawing back.
    page.evaluate("html => { a.innerHTML = html; again.forEach((done) => done()); }",
                  view.render(events))  # fmt: skip
    assert nodes.count() == stood and page.locator(".node.on").count() == 1


def test_a_large_tree_is_folded_and_only_what_is_in_sight_is_there(page):
    events = search(500)
    tree = view.latest(view.moments(events))
    opened(page, events)
    nodes, stubs = page.locator(".canvas .node"), page.locator("button.stub")
    folded = nodes.count()
    assert folded < 200 and stubs.count() > 0
    stubs.first.click()
    page.locator("[data-fold]").click()  # back
    page.locator("[data-fold]").click()
    assert stubs.count() == 0 and nodes.count() < len(tree) / 2
    scroll = "x => { document.querySelector('.canvas').scrollLeft = x; }"
    start = page.locator('.node[data-node="0"]')
    page.evaluate(scroll, 0)
    start.wait_for(state="attached")
    page.evaluate(scroll, 1e6)
    start.wait_for(state="detached")
    page.locator('[data-zoom="0"]').click()
    assert nodes.count() > folded


def test_whole_answers_stand_alone(page):
    opened(page, samples())
    assert page.locator(".piece").all_text_contents() == ["Take water, a map and a friend."]
    page.locator('[data-node="3"].node').click()
    assert page.locator(".context").text_content() == "Take water, a map and a friend."
    assert page.locator(".instead .other").count() == 2
    page.locator('[data-node="2"].node').click()
    assert "⏎\nNever look back" in page.locator(".context").text_content()
    assert "Dangerous." in page.locator(".node-panel").text_content()
    page.locator("input").fill("1")
    assert "not there yet" in page.locator(".node-panel").text_content()
    assert "Nothing is committed yet" in page.locator(".answer").text_content()


def test_a_token_and_the_node_that_wrote_it_are_chosen_together(page):
    opened(page, beside())
    page.evaluate("""window.told = []; document.addEventListener(
        'candor:select', (event) => told.push(event.detail.pos))""")
    select = """pos => document.dispatchEvent(
        new CustomEvent('candor:select', { detail: { pos } }))"""
    page.evaluate(select, 9)
    assert page.locator('.node.on[data-node="1"]').count() == 1
    page.evaluate(select, 13)
    assert page.locator('.node.on[data-node="2"]').count() == 1
    page.locator('.answer [data-node="1"]').click()
    assert page.locator('.node.on[data-node="1"]').count() == 1
    page.evaluate(select, 99)
    assert page.locator('.node.on[data-node="1"]').count() == 1
    page.locator('[data-node="3"].node').click()  # wrote nothing of the answer
    assert page.evaluate("told") == [9, 13, 9, 99]


def test_hostile_text_is_inert_in_the_browser(page):
    text = "<img src=x onerror=hacked=1>"
    events = [STARTED, judgement("e", detail={text: 0.5}, rationale=text), node(0, None, text),
              node(1, 0, text, status="committed", evals=("e",), detail={text: text})]  # fmt: skip
    opened(page, events)
    page.locator('[data-node="1"].node').click()
    assert text in page.locator(".node-panel").text_content()
    assert page.locator("img").count() == 0 and page.evaluate("window.hacked") is None
    assert page.locator("input").is_hidden()  # of a run that goes on


def test_a_growing_tree_keeps_what_was_chosen(page):
    events = [e for e in search(60) if not isinstance(e, RunEnded)]
    opened(page, events[: len(events) // 2])
    page.locator('[data-node="2"].node').click()
    page.evaluate("html => { a.innerHTML = html; again.forEach((done) => done()); }",
                  view.render(events))  # fmt: skip
    assert page.locator('.node.on[data-node="2"]').count() == 1
    assert "growing" in page.locator("output").text_content()
