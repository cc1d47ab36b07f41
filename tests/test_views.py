"""Views: what is drawn equals what was written, safely, and the numbers are the right ones."""

import json
import math
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyzers import registry
from analyzers.trace import Event, Note, Rewind, RunEnded, RunStarted, Token, surviving
from visualizations import (
    assets,
    curve,
    header,
    history,
    legend,
    models,
    panel,
    status,
    summary,
    tokens,
    turns,
)
from visualizations.signals import PROBABILITY, SIGNALS
from visualizations.text import duration, escape, human_size, number, percent

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "${x} {{x}} {{{x}}} {{#each x}}",
    "</span></li></ul></section><b>",
    "`back` \\` \\u0041",
    "\" onclick='x' data-i=7 &lt; &amp; &#36;",
    "".join(map(chr, range(0x20))) + "\x7f\x85\x9f",
    "\u202eright\u202c \u2066in\u2069 \u200e\u200f\u061c \u2028\u2029",
    "<|im_end|>",
    "سلام שלום 日本語 👩\u200d👩\u200d👧",
]


MODEL = {
    "name": "org/little-model",
    "quantization": "int8",
    "dtype": "float32",
    "device": "cpu",
    "memory": 162_000_000,
    "context": 8192,
    "can_chat": True,
    "cost": {"step_ms": 21.3, "verify": [[1, 1.0], [4, 1.62]], "prefill": 530.0},
}


def token(pos: int, text: str = " a", p: float | None = 0.5, **fields: object) -> Token:
    values: dict[str, object] = {
        "id": 7,
        "bytes": text.encode("utf-8", "replace").hex(),
        "logprob": None if p is None else math.log(p),
        "entropy": None if p is None else 1.25,
        "rank": None if p is None else 1,
        "margin": None if p is None else 0.25,
        "p_sampled": None,
        "top": () if p is None else ((7, text, math.log(p)), (8, " b", math.log(0.01))),
    }
    return Token(pos=pos, text=text, **(values | fields))  # type: ignore[arg-type]


class Seen(HTMLParser):
    """Everything a browser would find: text, (tag, attributes) in order, and unclosed tags."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.open = "", []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag != "input":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = unknown_decl = handle_pi = handle_comment


def shown(text: str) -> str:
    """What should be read on the page, one character at a time."""
    signs = dict(zip("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
                     "⇢⇠⇠↱↰↥⇒⇐⇉⇇⇄⇅", strict=True))  # fmt: skip
    signs |= {"\n": "\n", "\t": "\t", "\x7f": "\u2421", "\u2028": "↵", "\u2029": "¶"}
    out = ""
    for char in text:
        if char in signs:
            out += signs[char]
        elif unicodedata.category(char) in ("Cc", "Cs"):
            out += chr(0x2400 + ord(char)) if ord(char) < 0x20 else "\ufffd"
        else:
            out += char
    return out


def check(markup: str, tags: set[str], names: set[str]) -> Seen:
    """Parses `markup` and refuses any tag, attribute or template mark beyond the expected."""
    seen = Seen(markup)
    assert not seen.open
    assert {tag for tag, _ in seen.tags} <= tags
    assert {name for _, attributes in seen.tags for name in attributes} <= names
    assert not re.search(r"[`${}\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", markup)
    markup.encode()  # a lone surrogate could not be sent
    return seen


TOKEN_TAGS = {"span", "i"}
TOKEN_NAMES = {"class", "tabindex", "data-i", "data-v", "data-w"}


# ---- signals -------------------------------------------------------------------------------------


@given(st.floats(0, 12), st.floats(0, 12))
def test_less_sure_is_never_a_lower_level(a: float, b: float):
    for signal in SIGNALS.values():
        surer, less = max(a, b), min(a, b)
        if signal.higher_is == "unsure":
            surer, less = less, surer
        assert 0 <= signal.level_of(surer) <= signal.level_of(less) <= 5


def test_levels_at_their_thresholds():
    assert [PROBABILITY.level_of(p) for p in (1, 0.8, 0.79, 0.6, 0.4, 0.2, 0.05, 0.04, 0)] == [
        0, 0, 1, 1, 2, 3, 4, 5, 5,
    ]  # fmt: skip
    assert [SIGNALS["rank"].level_of(rank) for rank in (1, 2, 3, 4, 5, 10, 99, 100)] == [
        0, 1, 2, 2, 3, 4, 4, 5,
    ]  # fmt: skip
    for signal in SIGNALS.values():
        assert [len(signal.steps), signal.level(token(0, p=None))] == [5, 0]
        assert signal.mark(token(0, p=None)) == signal.letter + "x"
        assert signal.formula and signal.label


def test_values_are_those_of_the_token():
    values = {name: signal.value(token(0, p=0.25)) for name, signal in SIGNALS.items()}
    assert values == pytest.approx(
        {
            "probability": 0.25,
            "entropy": 1.25,
            "margin": 0.25,
            "rank": 1,
            "surprisal": 2 * math.log(2),
        }
    )


# ---- the answer ----------------------------------------------------------------------------------


def writing(steps: list[tuple[str, int, str]]) -> list[Event]:
    """Tokens at growing positions, and rewinds by a number of them."""
    events: list[Event] = []
    pos = 3
    for what, back, text in steps:
        if what == "token":
            events.append(token(pos, text, 0.1))
            pos += 1
        elif what == "rewind":
            pos = max(3, pos - back)
            events.append(Rewind(pos, "again"))
        else:
            events.append(token(pos, "elsewhere", lane="other"))
    return events


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["token", "token", "token", "rewind", "other"]),
        st.integers(0, 5),
        st.one_of(st.sampled_from(HOSTILE), st.text(max_size=6), st.just("")),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.lists(st.integers(1, 6), max_size=40))
def test_growing_equals_drawing_at_once(steps: list[tuple[str, int, str]], sizes: list[int]):
    events, view, value, at = writing(steps), tokens.TokenView(), "", 0
    for size in [*sizes, len(events)]:
        part = events[at : at + size]
        at += size
        former, value = value, view.add(part)
        if not any(isinstance(event, Rewind) for event in part):
            assert value.startswith(former)
    assert value == tokens.render(events)
    kept = surviving(events)
    seen = check(value, TOKEN_TAGS, TOKEN_NAMES)
    assert seen.text == shown("".join(token.text for token in kept))
    positions = [int(a["data-i"] or "") for tag, a in seen.tags if tag == "span"]
    assert positions == [token.pos for token in kept]


def test_a_rewind_takes_back_exactly_the_undone_tokens():
    view = tokens.TokenView()
    one = view.add([token(5, "a")])
    view.add([token(6, "b"), token(7, "c")])
    assert view.add([Rewind(6, "no"), Note("info", "x")]) == one
    assert view.add([Rewind(5, "no")]) == ""


def test_every_token_carries_its_levels_and_numbers():
    written = token(12, " been", 0.22, entropy=3.1, margin=0.03, rank=1204, origin="forced")
    assert tokens.render([written]) == (
        ' <span class="t p3 h4 m4 r5 s2 o-forced sp" tabindex="-1" data-i="12"'
        ' data-v="-1.514;3.1;0.03;1204">been</span>'
    )
    unknown = tokens.render([token(0, "Hi", None, origin="read")])
    assert 'class="t px hx mx rx sx o-read"' in unknown and 'data-v=";;;"' in unknown


def test_pieces_of_a_character_are_empty_but_there():
    pieces = [token(i, "", bytes=b) for i, b in enumerate(("f0", "9f", "99"))]
    seen = check(tokens.render([*pieces, token(3, "🙂", bytes="82")]), TOKEN_TAGS, TOKEN_NAMES)
    assert seen.text == "🙂"
    assert [" u" in (a["class"] or "") for _, a in seen.tags] == [True, True, True, False]


def test_special_tokens_are_chips():
    seen = Seen(tokens.render([token(0, "<|im_end|>", bytes="")]))
    assert seen.text == "<|im_end|>" and seen.tags[0][1]["class"].endswith(" chip")


def test_white_space_is_marked_where_it_is():
    drawn = tokens.render([token(0, "   x"), token(1, "  "), token(2, "a\n\n\tb"), token(3, " ")])
    seen = Seen(drawn)
    assert seen.text == "   x  a\n\n\tb "
    assert [a["class"] for tag, a in seen.tags if tag == "i"] == ["nl", "nl", "tb"]
    assert [a.get("data-w") for tag, a in seen.tags if tag == "span"] == ["···", "··", None, "·"]


def test_a_token_costs_few_bytes():
    words = [token(i, word) for i, word in enumerate((" capital", " of", "air", ".", "\n") * 400)]
    assert len(tokens.render(words).encode()) / len(words) <= 200


# ---- hostile texts in every other view -----------------------------------------------------------


@pytest.mark.parametrize("text", [*HOSTILE, "\ud800 alone", "x" * 100_000, ""])
def test_no_view_runs_what_was_written(text: str):
    one = token(4, text[:500], 0.3, top=((9, text, -0.5), (8, text[::-1], -2.0)), rank=40)
    drawn = panel.render(one, text, False, text)
    seen = check(
        drawn,
        {"section", "h3", "span", "q", "i", "dl", "div", "dt", "dd", "b", "ol", "li", "u", "em",
         "button", "p"},
        {"class", "style", "title", "type", "data-fork", "data-at", "data-ask", "aria-label",
         "disabled"},
    )  # fmt: skip
    assert all(re.fullmatch(r"width:[\d.]+%", a["style"]) for t, a in seen.tags if "style" in a)
    assert shown(text) in seen.text

    events = [one, RunEnded("stopped", text, 1, 1, 0.5)]
    check(
        summary.render(summary.summarize(events)),
        {"section", "p", "b", "dl", "div", "dt", "dd", "span", "button", "q", "i"},
        {"class", "type", "data-go", "title"},
    )

    row = history.RunRow(text, text, text, text, text, text, text, parent=text)
    seen = check(
        history.render([row], {text}) + history.render([], query=text),
        {"ul", "li", "input", "button", "span", "b", "small", "i", "time", "div", "p"},
        {"class", "type", "data-pick", "data-run", "aria-label", "aria-hidden", "checked",
         "title", "dir", "datetime"},
    )  # fmt: skip
    assert [a["data-run"] for _, a in seen.tags if "data-run" in a] == [shown(text)]

    seen = check(
        turns.render([{"role": text, "content": text}]),
        {"ol", "li", "header", "b", "button", "div", "details", "summary", "span", "p"},
        {"class", "type", "data-turn", "title", "aria-label", "dir"},
    )
    assert shown(text[:50_000]) in seen.text

    hover = json.loads(curve.to_json(curve.figure([one])))["data"][0]["hovertext"][0]
    assert re.findall(r"<.*?>", hover) == ["<br>", "<br>"] and "$" not in hover


def test_long_texts_are_clipped():
    run = history.RunRow("a", "", "m", "m", "x" * 1_000_000, "y" * 1_000_000)
    assert len(history.render([run])) < 8_000
    drawn = turns.render([{"role": "user", "content": "x" * 1_000_000}])
    assert len(drawn) < 60_000 and "950,000 more characters" in drawn


# ---- one token opened up -------------------------------------------------------------------------


def test_panel_offers_every_alternative_but_the_written():
    top = ((5, " a", math.log(0.5)), (7, " b", math.log(0.25)), (9, " c", math.log(0.1)))
    drawn = panel.render(token(12, " b", 0.25, top=top), "Token 3", True, "")
    buttons = [a for tag, a in Seen(drawn).tags if tag == "button" and "data-fork" in a]
    assert [(a["data-fork"], a["data-at"]) for a in buttons] == [("5", "12"), ("9", "12")]
    assert drawn.count('class="bar me"') == 1 and "width:25.0%" in drawn
    assert not any("disabled" in a for a in buttons)
    disabled = panel.render(token(12, " b", 0.25, top=top), "Token 3", False, "no model <here>")
    assert disabled.count(" disabled") == 2 + 2 and "no model &lt;here&gt;" in disabled


def test_panel_of_a_run_beside_others_offers_to_open_it():
    top = ((5, " a", math.log(0.5)), (7, " b", math.log(0.25)))
    drawn = panel.render(token(12, " b", 0.25, top=top), "Token 3", True, "", elsewhere='"run"')
    buttons = [a for tag, a in Seen(drawn).tags if tag == "button"]
    assert [(a["data-run"], a["data-at"]) for a in buttons] == [('"run"', "12")]
    assert drawn.count("<li") == 2


def test_panel_asks_for_methods_that_look_at_the_token():
    drawn = panel.render(token(12, " b", top=((7, " b", -0.5),)), "Token 12", True, "")
    asks = [a for tag, a in Seen(drawn).tags if "data-ask" in a]
    assert [(a["data-ask"], a["data-at"]) for a in asks] == [
        ("attribution", "12"),
        ("attention", "12"),
    ]
    assert {a["data-ask"] for a in asks} <= set(registry.methods())


def test_panel_appends_a_written_token_outside_of_the_top():
    top = tuple((i, f" {i}", math.log(0.09)) for i in range(10))
    drawn = panel.render(token(1, " odd", 0.002, id=99, rank=412, top=top), "Token 1", True, "")
    assert drawn.count("<li") == 11 and drawn.count("data-fork") == 10
    assert 'class="bar me apart"><span class="n">412</span>' in drawn


def test_panel_names_what_has_no_text_or_number():
    assert "bytes f0 9f" in panel.render(token(1, "", bytes="f09f"), "Token 1", True, "")
    assert "Nothing precedes" in panel.render(token(0, "Hi", None), "Token 1", True, "")
    assert "Choose a token" in panel.empty()


# ---- the summary ---------------------------------------------------------------------------------


def test_summary_of_a_worked_example():
    """p = 1/2, 1/4, 1/8: sum -6 ln 2, mean -2 ln 2, perplexity 4."""
    events: list[Event] = [
        token(0, "prompt", 0.9, origin="read"),
        token(10, "a", 0.5, entropy=1.0, origin="forced"),
        token(11, "gone", 0.001),
        Rewind(11, "again"),
        token(11, " b", 0.25, entropy=2.0),
        token(12, "<|im_end|>", 0.125, entropy=3.0, bytes=""),
        token(13, "no number", None),
        RunEnded("done", "end token", 4, 5, 0.5),
    ]
    found = summary.summarize(events)
    assert (found.tokens, found.forced, found.uncounted) == (3, 1, 1)
    assert found.logprob == pytest.approx(-6 * math.log(2))
    assert found.mean_logprob == pytest.approx(-2 * math.log(2))
    assert (found.perplexity, found.mean_probability) == pytest.approx((4.0, 0.25))
    assert found.least == (12, "<|im_end|>", pytest.approx(0.125))
    assert (found.mean_entropy, found.max_entropy) == (2.0, 3.0)
    assert not found.truncated
    drawn = Seen(summary.render(found)).text
    for part in ("−4.2", "−1.39 nats a token", "4.00", "25 %", "2.00", "highest 3.00"):
        assert part in drawn
    assert drawn.count("not measured yet") == 1 and "1 of 3 tokens set by hand" in drawn
    assert "1 token without a number left out" in drawn


def test_what_was_only_read_counts_when_nothing_was_written():
    read = [token(0, "a", None, origin="read"), token(1, "b", 0.5, origin="read")]
    found = summary.summarize(read)
    assert (found.tokens, found.perplexity) == (1, pytest.approx(2.0))


@pytest.mark.parametrize(
    ("status", "reason", "cut"),
    [
        ("done", "end token", False),
        ("done", "max_new reached", True),
        ("stopped", "", True),
        ("failed", "ModelBroken", True),
    ],
)
def test_an_answer_cut_off_is_flagged(status: str, reason: str, cut: bool):
    found = summary.summarize([token(0), RunEnded(status, reason)])  # type: ignore[arg-type]
    assert found.truncated is cut
    assert ("Cut off" in summary.render(found)) is cut


def test_trust_says_when_a_number_is_at_chance():
    found = summary.summarize([token(0)])
    drawn = summary.render(found, {"logprob": (0.82, 0.06), "perplexity": (0.48, 0.08)})
    assert '"badge ok">AUROC 0.82 ± 0.06' in drawn
    assert '"badge no">at chance: 0.48 ± 0.08' in drawn
    assert "not measured yet (least sure token, mean entropy)" in drawn


def test_summary_of_nothing():
    found = summary.summarize([RunEnded("failed", "x")])
    assert (found.tokens, found.logprob, found.perplexity, found.least) == (0, None, None, None)
    assert "when a run has ended" in summary.render(found)
    assert summary.summarize([token(0, p=1e-300, logprob=-900.0)]).perplexity is None


# ---- the curve -----------------------------------------------------------------------------------


def test_curve_marks_the_least_sure_token_and_knows_positions():
    events = [token(20, "a", 0.9), token(21, "<b>b</b>", 0.1), token(22, "c", None)]
    data = json.loads(curve.to_json(curve.figure(events)))["data"]
    assert data[0]["customdata"] == [20, 21, 22] and data[0]["x"] == [1, 2, 3]
    assert data[0]["y"] == [pytest.approx(0.9), pytest.approx(0.1), None]
    assert data[1]["customdata"] == [21] and "&lt;b&gt;" in data[1]["text"][0]
    surprise = json.loads(curve.to_json(curve.figure(events, SIGNALS["surprisal"])))["data"]
    assert surprise[1]["customdata"] == [21]


def test_curve_of_nothing_and_of_much():
    assert len(curve.figure([]).data) == 1
    for signal in SIGNALS.values():
        drawn = curve.figure([token(i, " a", 0.3 + i % 5 / 10) for i in range(10_000)], signal)
        assert drawn.data[0].mode == "lines" and len(drawn.data[0].x) == 10_000
    assert "<" not in curve.to_json(drawn)


# ---- lists ---------------------------------------------------------------------------------------


def test_history_says_what_a_run_was():
    row = {
        "id": "01K", "when": "2026-11-23T11:31:07+01:00", "method": "sampling", "model": "tiny",
        "prompt": "Capital?", "output": "Nairobi.", "status": "interrupted", "tokens": 1,
        "seconds": 0.5, "mean_logprob": math.log(0.61), "size": 48_211, "unknown": 1,
    }  # fmt: skip
    drawn = history.render([row], selected={"01K"})
    text = Seen(drawn).text
    for part in ("2026-11-23 10:31 UTC", "61 %", "48 kB", "1 token ·", "↯ interrupted", "Nairobi."):
        assert part in text
    assert " checked>" in drawn and 'data-run="01K"' in drawn
    assert '<time datetime="2026-11-23T10:31:07Z" title="2026-11-23 10:31 UTC">' in drawn
    assert history.when("<b>yesterday") == "<span>&lt;b&gt;yesterday</span>"
    going = history.render([row | {"status": "running", "tokens": None, "seconds": None}])
    assert "▸ running" in Seen(going).text and "token" not in Seen(going).text
    assert history.render([]).count("No runs yet") == 1
    assert "Nothing found for ‘&lt;x&gt;’" in history.render([], query="<x>")


def test_turns_can_be_edited_and_unfolded():
    long = "line\n" * 40
    drawn = turns.render([{"role": "user", "content": "a\n  b"}, {"role": "tool", "content": long}])
    assert [a["data-turn"] for _, a in Seen(drawn).tags if "data-turn" in a] == ["0", "1"]
    assert ">a\n  b</div>" in drawn and f">{escape(long)}</div>" in drawn
    assert turns.render([], editable=False) == ""
    assert " disabled>" in turns.render([{"role": "user", "content": ""}], editable=False)


def test_numbers_as_people_read_them():
    assert [percent(p) for p in (0, 1e-5, 0.042, 0.0951, 0.22, 0.99, 0.9999, 1)] == [
        "0 %", "< 0.1 %", "4.2 %", "10 %", "22 %", "99.0 %", "> 99.9 %", "100 %",
    ]  # fmt: skip
    assert [number(-1.514), number(-0.001), number(12345.6, 0)] == ["−1.51", "0.00", "12,346"]
    assert [human_size(n) for n in (0, 999, 1000, 9_960, 162_000_000, 10**15)] == [
        "0 B", "999 B", "1.0 kB", "10 kB", "162 MB", "1000 TB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.774, 31.24, 59.97, 200, 3900)] == [
        "0.77 s", "31.2 s", "1 min 00 s", "3 min 20 s", "1 h 05 min",
    ]  # fmt: skip


# ---- the style sheet -----------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [":root", ".dark"])
def test_every_text_can_be_read_in_both_themes(theme: str):
    block = re.search(re.escape(theme) + r" \{(.*?)\}", assets.css(), re.DOTALL)
    colours = dict(re.findall(r"--candor-([\w-]+): (#[0-9a-f]{6});", block[1] if block else ""))
    pairs = [("ink", "card"), ("ink", "soft"), ("mute", "card"), ("mute", "soft"), ("acc", "card")]
    pairs += [("ink", "1"), ("ink", "2"), ("ink", "3"), ("on-4", "4"), ("on-5", "5")]
    pairs += [("ok", "ok-soft"), ("no", "no-soft"), ("ok", "card"), ("no", "card")]
    pairs += [("acc", "acc-soft"), ("acc", "soft"), ("no", "soft"), ("ok", "soft")]
    poor = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
    assert {pair: ratio for pair, ratio in poor.items() if ratio < 4.5} == {}
    ramp = [luminance(colours[name]) for name in ("card", "1", "2", "3", "4", "5")]
    assert ramp in (sorted(ramp), sorted(ramp, reverse=True))


def test_no_selector_has_a_comma_in_parentheses():
    """Gradio splits selectors at every comma, which turns such a rule into another one."""
    assert not re.search(r":(is|where|not|has)\([^)]*,", assets.css())


def test_each_signal_has_a_tint_and_an_underline_for_each_level():
    css = assets.css()
    for signal in SIGNALS.values():
        for level in range(1, 6):
            assert f".by-{signal.name} .{signal.letter}{level}" in css
        drawn = legend.render(signal)
        classes = [a["class"] for _, a in Seen(drawn).tags if (a.get("class") or "")[:2] == "t "]
        assert classes == [f"t {signal.letter}{level}" for level in range(6)]
        assert signal.label in drawn and f"by-{signal.name}" in drawn


# ---- the script, in a browser --------------------------------------------------------------------


def test_script_selects_moves_and_survives_rendering(browse):
    pieces = [token(7, "", bytes="f09f"), token(8, "🙂", bytes="9982")]
    answer = tokens.render([token(4, "The"), token(5, " <b>"), token(6, " cap"), *pieces])
    other = panel.render(token(5, " <b>"), "Token 2", True, "")
    other += panel.render(token(5, " <b>"), "Token 2", True, "", elsewhere="c")
    other += history.render(
        [history.RunRow("a", "", "m", "m", "p"), history.RunRow("b", "", "m", "m", "p")]
    )
    page = browse(
        f'<div id="a" class="candor-text by-entropy">{answer}</div><div id="b">{other}</div>'
    )
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.locator("#candor-tip .head").text_content() == " <b>"
    assert page.locator("#candor-tip .row.on").text_content() == "entropy1.25 nats"
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    page.keyboard.press(" ")
    page.locator('[data-i="8"]').click(position={"x": 1, "y": 8})  # the piece before it
    page.locator("[data-fork]").click()
    page.locator('[data-run="b"]').click()
    page.locator('[data-run="c"]').click()
    page.locator('[data-pick="a"]').check()
    assert page.evaluate("seen") == [
        {"pos": 5}, {"pos": 8}, {"pos": 7}, {"fork": 8, "pos": 5}, {"run": "b"},
        {"run": "c", "pos": 5}, {"picked": ["a"]},
    ]  # fmt: skip
    # Rendering anew takes classes and attributes back; the choice stays.
    page.evaluate("html => { a.innerHTML = html; again.forEach((done) => done()); }", answer)
    assert page.locator(".sel").get_attribute("data-i") == "7"
    assert page.locator('#a [tabindex="0"]').get_attribute("data-i") == "7"
    page.evaluate("document.dispatchEvent(new CustomEvent('candor:select', {detail: {pos: 4}}))")
    assert page.locator(".sel").text_content() == "The"


@pytest.mark.parametrize("text", HOSTILE)
def test_prompt_state_and_model_stay_text(text: str):
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": text})
    for prompt in (chat, text):
        started = RunStarted("sampling", {}, prompt, None, {}, 0, prefix=text)
        seen = check(turns.asked([started]), {"dl", "div", "dt", "dd"}, {"class", "dir"})
        assert seen.text.count(shown(text)) == 2
        ended = [started, Note("warning", text), RunEnded("failed", text)]
        seen = check(
            status.ended(ended, text, text) + status.doing(text, 0.5) + status.problem(text),
            {"p", "span", "u"},
            {"class", "role", "title", "style"},
        )
        assert seen.text.count(shown(text)) >= 4
    facts = dict.fromkeys(("name", "quantization", "dtype", "device"), text)
    check(
        header.render({**MODEL, **facts}, quality=(0.1, text)) + header.render(None, text),
        {"header", "span", "b", "i", "button", "details", "summary", "div", "table", "tr", "th",
         "td", "p"},
        {"class", "type", "title", "aria-label", "aria-controls", "onclick"},
    )  # fmt: skip
    check(
        models.residents([(text, {**MODEL, **facts}), ("b", MODEL)], "b") + models.hint(text),
        {"div", "h3", "ul", "li", "span", "b", "small", "button", "p"},
        {"class", "title", "type", "data-use", "data-measure", "data-unload", "role"},
    )
    assert turns.asked([]) == ""


def test_state_says_how_far_and_how_it_ended():
    assert "Waiting for 2 before yours" in status.waiting(2)
    assert "10 tokens · 5.0 tokens/s · seed 3" in status.writing(10, 2.0, 3)
    assert "Interrupted" in status.ended([], "01K")
    done = status.ended([RunEnded("done", "end token", 4, 4, 2.0)], "01KABCDEFGHIJ")
    cut = status.ended([RunEnded("done", "max_new reached", 4, 5, 2.0)], "01K")
    assert "Done: limit of new tokens reached" in cut and "max_new" not in cut
    assert "Done: end token · 4 tokens in 2.00 s, 2.0 a second" in done and "01KABCDEFG…" in done


def test_the_bar_tells_model_memory_and_speed():
    seen = Seen(header.render(MODEL, quality=(0.004, "another model"))).text
    assert "little-model" in seen and "org/" not in seen
    assert "int8 · CPU · 162 MB" in seen and "8,192" in seen
    assert "47 tok/s · step 21 ms" in seen
    assert "4 tokens checked at once1.6 × a token" in seen and "530 tokens/s" in seen
    assert "Perplexity with int8+0.4 %" in seen and "measured on another model" in seen
    assert "text mode" not in seen


def test_the_bar_says_what_is_not_there():
    assert "no chat template: text mode" in header.render({**MODEL, "can_chat": False})
    assert "tok/s" not in header.render({**MODEL, "cost": None})
    assert "Perplexity" not in header.render(MODEL)
    whole = header.render({**MODEL, "quantization": "none"})
    assert "float32 · CPU" in whole
    gone = header.render(None, "/models/mine")
    assert "no model loaded" in gone and "<b>mine</b>" in gone


def test_models_in_memory_have_their_buttons():
    seen = Seen(models.residents([("a", MODEL), ("b", MODEL)], "b"))
    buttons = [attributes for tag, attributes in seen.tags if tag == "button"]
    keys = [{k: v for k, v in row.items() if k.startswith("data-")} for row in buttons]
    assert keys == [
        {"data-use": "a"}, {"data-measure": "a"}, {"data-unload": "a"},
        {"data-measure": "b"}, {"data-unload": "b"},
    ]  # fmt: skip
    assert seen.text.count("in use") == 1
    assert "No model is in memory" in models.residents([], "")


def test_what_does_not_fit_is_told_before_loading():
    small = models.needs("int8", 162_000_000, 566_000_000, 20_000_000_000)
    assert "int8 needs 162 MB, 566 MB while loading; 20 GB free" in small
    assert "not fit" not in small and "while loading" not in models.needs("int8", 10, 11, 11)
    assert "may not fit" in models.needs("int8", 1, 3, 2)
    assert "fetched first" in models.download(240_000_000)
