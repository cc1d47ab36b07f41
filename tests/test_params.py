"""Knobs: values and strings in, one checked instance or one clear sentence out; and their forms."""

from dataclasses import dataclass, replace
from typing import Literal

import gradio as gr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyzers import registry
from analyzers.card import Card
from analyzers.errors import BadParameter
from analyzers.params import AdapterRef, FileRef, ModelRef, build, knob, knobs
from analyzers.registry import Method
from analyzers.trace import Token
from app.page import forms


@dataclass(frozen=True)
class Everything:
    """One knob of every kind."""

    count: int = knob(3, "A whole number", lo=1, hi=32, unit="tokens")
    share: float = knob(0.5, "A number", lo=0.0, hi=1.0)
    floor: float = knob(-4.0, "All below zero", lo=-20.0, hi=0.0, unit="nats")
    careful: bool = knob(True, "Yes or no")
    mode: Literal["fast", "slow"] = knob("slow", "One of two")
    width: Literal[1, 2, 4] = knob(2, "One of three numbers")
    layers: tuple[int, ...] = knob((1, 2), "Whole numbers")
    name: str = knob("a", "One line")
    text: str = knob("one\ntwo", "Several lines", lines=4)
    draft: ModelRef = knob(ModelRef("smollm2-135m"), "A second model")
    adapter: AdapterRef = knob(AdapterRef(""), "A folder")
    rows: FileRef = knob(FileRef(""), "A file")


MADE_UP = Method(
    "made_up", Card("Made up", "decoding", "none", (Token,)), Everything, lambda *_: iter(()), ""
)
each_method = pytest.mark.parametrize(
    "method", [*registry.methods().values(), MADE_UP], ids=lambda method: method.name
)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("count", 7, 7),
        ("count", "7", 7),
        ("count", 7.0, 7),  # sliders send floats
        ("count", " 32 ", 32),
        ("share", 1, 1.0),
        ("share", "0.25", 0.25),
        ("share", "1e-3", 0.001),
        ("floor", "-20", -20.0),
        ("floor", 0, 0.0),
        ("careful", False, False),
        ("careful", "no", False),
        ("careful", "TRUE", True),
        ("careful", 0, False),
        ("mode", "fast", "fast"),
        ("width", 4, 4),
        ("width", "4", 4),
        ("layers", (3, 5), (3, 5)),
        ("layers", [3, 5], (3, 5)),
        ("layers", "3, 5 7", (3, 5, 7)),
        ("layers", "", ()),
        ("name", "x=y", "x=y"),
        ("text", "a\nb", "a\nb"),
        ("draft", "models/other", ModelRef("models/other")),
        ("adapter", "folder", AdapterRef("folder")),
        ("rows", "rows.csv", FileRef("rows.csv")),
    ],
)
def test_every_kind_from_value_and_string(name, given, value):
    found = build(Everything, {name: given})
    assert found == replace(Everything(), **{name: value})
    assert type(getattr(found, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("count", 33, r"count must be a whole number from 1 to 32 tokens, not 33\."),
        ("count", 0, "from 1 to 32 tokens"),
        ("count", 2.5, "a whole number from 1 to 32 tokens, not 2.5"),
        ("count", "many", "from 1 to 32 tokens, not many"),
        ("count", True, "from 1 to 32 tokens"),
        ("count", None, "from 1 to 32 tokens"),
        ("count", 10**400, "from 1 to 32 tokens"),
        ("share", "1.01", "share must be a number from 0 to 1, not 1.01"),
        ("share", float("nan"), "from 0 to 1"),
        ("share", "inf", "from 0 to 1"),
        ("floor", 0.1, "from -20 to 0 nats"),
        ("careful", "maybe", "true or false, not 'maybe'"),
        ("careful", 2, "true or false"),
        ("mode", "medium", "mode must be one of fast, slow"),
        ("width", 3, "one of 1, 2, 4"),
        ("layers", "1, b", "whole numbers separated by commas, not '1, b'"),
        ("layers", 5, "whole numbers"),
        ("layers", [1.5], "whole numbers"),
        ("layers", [float("inf")], "whole numbers"),
        ("name", 5, "name must be text, not 5"),
        ("draft", None, "draft must be text"),
    ],
)
def test_what_does_not_fit_gets_a_sentence_with_what_would(name, given, sentence):
    with pytest.raises(BadParameter, match=sentence):
        build(Everything, {name: given})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(BadParameter, match=r"'temprature'.*temperature, top_p, max_new"):
        build(registry.method("sampling").params, {"temprature": "1"})
    with pytest.raises(BadParameter, match="this method has: none"):
        build(registry.method("read").params, {"x": 1})


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 40).map(lambda n: 10**n)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from([row.name for row in knobs(Everything)])


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(NAMES | st.text(max_size=3), ANYTHING, max_size=3))
def test_whatever_is_given_it_fits_or_is_refused(given):
    try:
        found = build(Everything, given)
    except BadParameter as error:
        assert str(error).endswith(".")
        return
    for row in knobs(Everything):
        value = getattr(found, row.name)
        if row.kind in (int, float):
            assert type(value) is row.kind and row.lo <= value <= row.hi
        elif row.choices:
            assert value in row.choices
        elif row.kind is tuple:
            assert all(type(item) is int for item in value)
        else:
            assert isinstance(value, row.kind)


# Forms


@each_method
def test_the_form_has_a_fitting_widget_for_every_knob_and_starts_at_the_defaults(method):
    with gr.Blocks():
        form = forms.build_form(method, visible=True)
    rows = knobs(method.params)
    assert list(form.widgets) == [row.name for row in rows]
    for row in rows:
        widget = form.widgets[row.name]
        assert widget.label.startswith(row.label) and row.unit in widget.label
        assert widget.info == row.help
        if row.kind in (int, float):
            assert isinstance(widget, gr.Slider)
            assert (widget.minimum, widget.maximum) == (row.lo, row.hi)
            assert widget.step == 1 or row.kind is float
        elif row.kind is bool:
            assert isinstance(widget, gr.Checkbox)
        elif row.choices:
            assert isinstance(widget, gr.Dropdown)
            assert [value for _, value in widget.choices] == list(row.choices)
        elif row.kind is ModelRef:
            assert isinstance(widget, gr.Dropdown) and widget.allow_custom_value
        else:
            assert isinstance(widget, gr.Textbox) and widget.lines == row.lines
    shown = {widget: widget.value for widget in form.widgets.values()}
    assert build(method.params, form.values(shown)) == method.params()


def test_a_field_left_empty_keeps_its_default():
    with gr.Blocks():
        form = forms.build_form(MADE_UP, visible=False)
    shown = {widget: widget.value for widget in form.widgets.values()}
    shown[form.widgets["count"]] = None
    shown[form.widgets["layers"]] = "4, 5"
    shown[form.widgets["mode"]] = "fast"
    found = build(Everything, form.values(shown))
    assert found == Everything(layers=(4, 5), mode="fast")


def test_own_knobs_come_before_inherited_ones():
    """In the order of their declaration, also one that is declared again."""

    @dataclass(frozen=True)
    class Shared:
        first: int = knob(1, "", lo=0, hi=9)
        second: int = knob(2, "", lo=0, hi=9)

    @dataclass(frozen=True)
    class Own(Shared):
        third: int = knob(3, "", lo=0, hi=9)
        second: int = knob(8, "", lo=0, hi=9)

    assert [row.name for row in knobs(Own)] == ["third", "second", "first"]
    assert knobs(Own)[1].default == 8
