"""The page's frame, without a browser: what it refuses to serve, its style sheet, and the model
bar on a runner that only pretends to load."""

import dataclasses
import re
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import gradio as gr
import pytest

from analyzers import registry
from analyzers.common.budget import Expected
from analyzers.engine.sources import Listed
from analyzers.errors import BadInput, ModelNotFound, Stopped
from analyzers.task import Task
from analyzers.trace import surviving
from app.estimate import Paces
from app.page import main, model_bar, theme
from app.page.context import PageContext
from app.page.forms import build_form
from app.page.main import ASKING
from app.page.model_bar import ModelBar
from app.page.tabs.ask import AskTab
from app.page.tabs.compare import CompareTab
from app.page.tabs.history import HistoryTab
from app.page.tabs.race import RaceTab
from app.runner import Job, ModelChoice, Update
from visualizations import header


def test_a_public_address_needs_a_password():
    with pytest.raises(BadInput, match="CANDOR_PASSWORD"):
        main.serve(host="0.0.0.0", port=0, browser=False, model=ModelChoice())


@pytest.mark.parametrize("port", [None, 99_999])
def test_a_port_in_use_or_impossible_is_one_sentence(port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = port or taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {wanted}.*--port"):
            main.serve(host="127.0.0.1", port=wanted, browser=False, model=ModelChoice())


def test_the_page_starts_without_a_model_and_says_why(monkeypatch, capsys, tmp_path):
    """A first start without a network: history still works, and a local model can be named."""
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path))
    served = []
    monkeypatch.setattr(main.uvicorn.Server, "run", lambda self, sockets: served.append(sockets))

    def offline(*args, **kwargs):
        raise ModelNotFound("It could not be fetched: point to a local model with --model FOLDER.")

    monkeypatch.setattr("app.runner.load", offline)
    main.serve(host="127.0.0.1", port=0, browser=False, model=ModelChoice())
    said = capsys.readouterr().err
    assert "--model FOLDER. The page starts without a model." in said
    assert "Traceback" not in said and len(served) == 1


def test_the_page_is_built_without_a_model(runner):
    ctx = PageContext(runner, runner.store, ModelChoice())
    assert main.build(ctx).blocks
    assert "no model loaded" in header.render(runner.model_facts())


def test_no_selector_has_a_comma_inside_brackets():
    """Gradio cuts selectors at every comma, and would change what such a rule matches."""
    css = re.sub(r"/\*.*?\*/", "", theme.css(), flags=re.S)
    selectors = re.findall(r"(?:^|[{}])([^{}@;]+)\{", css)
    assert len(selectors) > 100
    assert not [each.strip() for each in selectors if re.search(r"\([^)]*,", each)]


COST = {"step_ms": 20.0, "verify": [[1, 1.0], [4, 1.5]], "prefill": 500.0, "memory": 100}
HERE, THERE = (SimpleNamespace(session_hash=name, username=None) for name in ("here", "there"))


class Pretended:
    """Loading that says one thing, then succeeds, or fails with `error`."""

    def __init__(self, done, error: Exception | None) -> None:
        self.done, self.error, self.stopped = done, error, False

    def updates(self) -> Iterator[Update]:
        yield Update(ahead=1)
        yield Update(doing="Loading weights", share=0.25)
        if self.error:
            raise self.error
        self.done()

    def stop(self) -> None:
        self.stopped = True


class PretendRunner:
    """Models without weights: what `facts` says of each reference."""

    def __init__(self) -> None:
        self.models: dict[ModelChoice, dict] = {}
        self.error: Exception | None = None
        self.put(ModelChoice())

    def put(self, choice: ModelChoice, **facts) -> None:
        plain = {"name": choice.ref, "quantization": "int8", "dtype": "float32", "device": "cpu"}
        more = {"memory": 100, "context": 64, "can_chat": True, "cost": COST, "choice": choice}
        others = {key: row for key, row in self.models.items() if key != choice}
        self.models = {choice: plain | more | facts, **others}

    def load(self, choice: ModelChoice, owner: str = "") -> Pretended:
        return Pretended(lambda: self.put(choice, can_chat="base" not in choice.ref), self.error)

    def unload(self, choice: ModelChoice) -> Pretended:
        return Pretended(lambda: self.models.pop(choice), None)

    def residents(self) -> list[dict]:
        return list(self.models.values())

    def model_facts(self, choice: ModelChoice | None = None) -> dict | None:
        return self.models.get(choice)


@pytest.fixture
def bar(monkeypatch) -> ModelBar:
    monkeypatch.setattr(model_bar.sources, "listed", list)
    ctx = PageContext(PretendRunner(), None, ModelChoice())
    with gr.Blocks():
        return ModelBar(ctx)


def form(bar: ModelBar, ref: str, **other) -> dict:
    given = {field: field.value for field in bar.fields} | {bar.ref: ref}
    return given | {getattr(bar, name): value for name, value in other.items()}


def test_a_model_is_loaded_with_progress_and_used_by_this_visitor_only(bar):
    steps = list(bar.load(form(bar, "org/other-model", kind="nf4", double=False), HERE))
    said = [step[bar.said] for step in steps]
    assert "Waiting for the one before yours" in said[1]
    assert "Loading weights" in said[2] and "width:25%" in said[2]
    assert "other-model is ready" in said[-1]
    assert steps[0][bar.halt].interactive and not steps[0][bar.go].interactive
    assert steps[-1][bar.go].interactive and not steps[-1][bar.halt].interactive
    wanted = ModelChoice("org/other-model", quantization="nf4", double=False)
    assert bar.ctx.choice("here") == wanted and bar.ctx.choice("there") == ModelChoice()
    assert "<b>other-model</b>" in steps[-1][bar.top]
    assert "<b>SmolLM2-135M-Instruct</b>" in bar.look(THERE)[bar.top]
    bar.ctx.leave("here", "gone")
    assert bar.ctx.choice("here") == ModelChoice()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelNotFound("There is no such model."), 'role="alert">There is no such model.'),
        (Stopped("stopped by you"), 'role="status">Loading was stopped.'),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence_and_the_earlier_model_stays(bar, error, said):
    bar.ctx.runner.error = error
    last = list(bar.load(form(bar, "nowhere"), HERE))[-1]
    assert said in last[bar.said] and "<b>SmolLM2-135M-Instruct</b>" in last[bar.top]
    assert last[bar.go].interactive and not last[bar.halt].interactive
    assert bar.ctx.choice("here") == ModelChoice() and not bar.ctx.loading


def test_an_empty_name_is_a_sentence(bar):
    (last,) = bar.load(form(bar, "  "), HERE)
    assert "Choose a model" in last[bar.said] and last[bar.go].interactive
    assert "Choose a model" in bar.foresee(form(bar, None))


def test_cancel_stops_the_loading_of_this_visitor(bar):
    going = bar.load(form(bar, "org/other-model"), HERE)
    next(going)
    loading = bar.ctx.loading["here"]
    bar.cancel(THERE)
    assert not loading.stopped
    bar.cancel(HERE)
    assert loading.stopped


def test_a_model_without_chat_template_turns_the_prompt_into_text(bar):
    last = list(bar.load(form(bar, "some-base"), HERE))[-1]
    assert last[bar.can_chat] is False and "text mode" in last[bar.top]
    with gr.Blocks():
        tab = AskTab(bar.ctx, gr.State(True), gr.State(""), ASKING[0])
    mode, hint = tab.fit_model(False, "sampling")
    assert mode.value == "raw" and [value for _, value in mode.choices] == ["raw"]
    assert hint.visible
    assert tab.pick_method("sampling", False, "mine")[1:3] == ["raw", gr.skip()]
    assert tab.pick_method("sampling", True, "mine")[1:3] == ["chat", gr.skip()]
    mode, hint = tab.fit_model(True, "sampling")
    assert mode.value == "chat" and len(mode.choices) == 2 and not hint.visible


def test_an_example_gives_way_to_that_of_the_method_and_ones_own_prompt_stays(bar):
    with gr.Blocks():
        tab = AskTab(bar.ctx, gr.State(True), gr.State(""), ASKING[0])
    example = tab.methods["momentum"].card.example
    assert example and tab.pick_method("momentum", True, tab.asking.prompt)[2] == example
    assert tab.pick_method("sampling", True, example)[2] == tab.asking.prompt
    assert tab.pick_method("momentum", True, "My own words")[2] == gr.skip()
    passage = tab.inputs["passage"]
    shown = {
        name: tab.pick_method(name, True, "x")[3 + list(tab.inputs.values()).index(passage)].visible
        for name in ("exact_extract", "sampling")
    }
    assert shown == {"exact_extract": True, "sampling": False}


def test_what_a_search_will_take_follows_its_knobs_and_its_method(bar, monkeypatch):
    made = dataclasses.replace(
        registry.method("rain"),
        expect=lambda params: Expected(10 * params.iterations, params.iterations, 100),
    )
    monkeypatch.setitem(registry.methods(), "rain", made)
    bar.ctx.paces = Paces(SimpleNamespace(runs=lambda limit: []))
    with gr.Blocks():
        tab = AskTab(bar.ctx, gr.State(True), gr.State(""), ASKING[3])
        plain = AskTab(bar.ctx, gr.State(True), gr.State(""), ASKING[0])
    iterations = next(form for form in tab.forms if form.method is made).widgets["iterations"]
    given = {tab.method: "rain"} | {
        widget: widget.value for form in tab.forms for widget in form.widgets.values()
    }
    bar.ctx.runner.put(ModelChoice(), cost=None)
    told = tab.foresee(given | {iterations: 3}, HERE)
    assert "At most 30 tokens, 3 evaluations, 100 forwards · time: known after" in told
    bar.ctx.runner.put(ModelChoice())
    assert "2 s or more on this model" in tab.foresee(given | {iterations: 3}, HERE)
    assert tab.foresee(given | {iterations: 1000}, HERE) == ""
    assert plain.foresee({plain.method: "sampling"}, HERE) == ""


def test_the_tabs_hear_of_another_model_and_of_its_cost(bar):
    bar.ctx.runner.put(ModelChoice(), cost=None)
    loaded = bar.look(HERE)[bar.model]
    bar.ctx.runner.put(ModelChoice())
    measured = bar.look(HERE)[bar.model]
    last = list(bar.load(form(bar, "org/other-model"), HERE))[-1]
    assert len({loaded, measured, last[bar.model], bar.look(THERE)[bar.model]}) == 3
    assert bar.look(THERE)[bar.model] == measured


def test_a_second_model_is_chosen_from_what_there_is_or_typed(monkeypatch):
    near = Listed("near", "Near", "builtin", True, 100)
    monkeypatch.setattr(model_bar.sources, "listed", lambda: [near])
    with gr.Blocks():
        judge = build_form(registry.method("rain"), True).widgets["judge"]
    assert judge.choices == [("–", ""), ("Near · ready", "near")]
    assert judge.value == "" and judge.allow_custom_value


def test_drafting_shows_first_who_proposed_a_token(bar):
    with gr.Blocks():
        tabs = {each.name: AskTab(bar.ctx, gr.State(True), gr.State(""), each) for each in ASKING}
    assert {name: tab.shown.signal.value for name, tab in tabs.items()} == {
        "generate": "probability",
        "layers": "probability",
        "drafting": "origin",
        "search": "probability",
        "assessment": "probability",
    }


def test_what_is_for_ticked_or_opened_runs_waits_for_one(runner):
    """A run of another tab opens here at its token, where it can be continued."""
    going = runner.submit(Job("sampling", Task("Hello"), {"max_new": 3}))
    going.finish()
    run = going.id
    ctx = PageContext(runner, runner.store, ModelChoice())
    can_chat = gr.State(True)
    with gr.Blocks(), gr.Tabs() as tabs, gr.Tab() as tab:
        beside, race = CompareTab(ctx, can_chat), RaceTab(ctx, can_chat)
        shown = HistoryTab(ctx, tab, tabs, beside, race)
    buttons = (shown.compare, shown.export, shown.delete, shown.replay)
    assert not any(button.interactive for button in buttons)
    listing = shown.find("", ())[1]
    assert "<span>Sampling</span>" in listing and "<time datetime=" in listing
    token = surviving([each.event for each in runner.events(run)])[1]
    at = gr.EventData(None, {"run": run, "pos": token.pos})
    (opened,) = shown.bring("probability", at, HERE)
    assert opened[tabs].selected == "history" and opened[shown.shown.run_id] == run
    assert f"Token {token.pos}" in opened[shown.shown.panel]
    assert "data-fork" in opened[shown.shown.panel]
    assert list(shown.bring("probability", gr.EventData(None, {"pos": 1}), HERE)) == []


def test_models_in_memory_are_used_and_unloaded(bar):
    other = ModelChoice("other")
    bar.ctx.runner.put(other)
    keys = re.findall(r'data-unload="([^"]*)"', bar.look(HERE)[bar.list])
    assert len(keys) == 2
    list(bar.act(gr.EventData(None, {"use": keys[0]}), HERE))
    assert bar.ctx.choice("here") == other
    waiting, *_, left = bar.act(gr.EventData(None, {"unload": keys[0]}), HERE)
    assert "Waiting for the one before yours" in waiting[bar.said]
    assert bar.ctx.runner.residents() == [bar.ctx.runner.model_facts(ModelChoice())]
    assert "other is no longer in memory" in left[bar.said]
    assert "no model loaded" in left[bar.top] and "<b>other</b>" in left[bar.top]
    (again,) = bar.act(gr.EventData(None, {"unload": keys[0]}), THERE)
    assert "That model is no longer in memory" in again[bar.said]


def test_the_page_asks_again_until_the_cost_is_known(bar):
    assert bar.look(HERE)[bar.clock].active is False
    bar.ctx.runner.put(ModelChoice(), cost=None)
    waiting = bar.look(HERE)
    assert waiting[bar.clock].active is True and "tok/s" not in waiting[bar.top]
    bar.ctx.runner.models.clear()
    assert bar.look(HERE)[bar.clock].active is True


def test_what_is_needed_is_foreseen_and_nothing_is_fetched(bar, monkeypatch):
    far = Listed("far", "Far", "builtin", False, 240_000_000)
    made = Listed("made", "Made", "builtin", False, 0, about="A demonstration <here>.")
    monkeypatch.setattr(model_bar.sources, "listed", lambda: [far, made])
    monkeypatch.setattr(model_bar.sources, "find", lambda ref: ref if ref == "near" else None)
    plan = SimpleNamespace(quantization="int8", dtype="x", device="cpu", weights=162e6, peak=170e6)
    monkeypatch.setattr(model_bar.memory, "plan", lambda source, *how: plan)
    monkeypatch.setattr(model_bar.memory, "free", lambda device: 20_000_000_000)
    assert "int8 needs 162 MB; 20 GB free" in bar.foresee(form(bar, "near"))
    assert "fetched first, once: 240 MB" in bar.foresee(form(bar, "far"))
    assert "Not on this computer" in bar.foresee(form(bar, "org/unknown"))
    assert ("Far · fetched on demand, 240 MB", "far") in model_bar.choices("near")
    assert ("Made · made on demand", "made") in model_bar.choices("near")
    told = bar.foresee(form(bar, "made"))
    assert "A demonstration &lt;here&gt;." in told and "made from what is here first" in told
