"""The page as a person meets it: the real app with the default model in headless Chromium."""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from analyzers import registry
from analyzers.engine.cost import Cost
from analyzers.home import models_folder
from analyzers.trace import RunEnded, RunStarted, SearchNode, Token, surviving, text_of
from app.bench.page import FLAGS
from app.page.context import PageContext
from app.page.main import application
from app.runner import ModelChoice, Runner
from sessions.store import Store

LONG = 60_000  # ms; the slowest machine that shall pass needs this for one answer
expect.set_options(timeout=LONG)


@pytest.fixture(scope="module")
def served(smollm, tmp_path_factory) -> Iterator[tuple[PageContext, str]]:
    """The whole app on a free port, its database in an empty folder."""
    store = Store(tmp_path_factory.mktemp("home") / "runs.db")
    runner = Runner(store, measure=False)
    runner.prepare(ModelChoice(), lambda what, share: None)
    ctx = PageContext(runner, store, ModelChoice())
    app = application(ctx, frozenset({"127.0.0.1"}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield ctx, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)
    runner.close()
    store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "the browser tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def page(served, browser) -> Iterator[Page]:
    """An open page; every error in the browser's console fails the test."""
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(LONG)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(served[1])
    expect(opened.locator("#generate-run")).to_be_visible()
    yield opened
    context.close()
    assert problems == []


def ask(page: Page, prompt: str, *, tokens: int = 12, seed: int = 7) -> None:
    page.locator("#generate-prompt textarea").fill(prompt)
    page.locator("#generate-seed").locator("input, textarea").fill(str(seed))
    set_length(page, tokens)


def set_length(page: Page, tokens: int) -> None:
    """In the form that is shown."""
    box = page.get_by_label("number input for Max new (tokens)").locator("visible=true").first
    box.fill(str(tokens))
    box.press("Tab")


def run(page: Page) -> None:
    page.locator("#generate-run").click()
    ended(page)


def ended(page: Page) -> None:
    """A run is over that this page has not seen the end of before."""
    state = page.locator("#generate-state")
    seen = page.evaluate("window.seenRun || ''")
    finished = state.locator(f'span[title]:not([title="{seen}"])')
    expect(finished).to_be_visible()
    page.evaluate("id => { window.seenRun = id; }", finished.get_attribute("title"))
    expect(state).to_contain_text(re.compile("Done|Stopped|Failed"))
    expect(page.locator("#generate-run")).to_be_enabled()


def tokens(page: Page, view: str = "generate"):
    return page.locator(f"#{view}-answer .t")


def newest(ctx: PageContext):
    row = ctx.store.runs(limit=1)[0]
    return row, [stamped.event for stamped in ctx.store.events(row.id)]


def test_an_answer_streams_with_its_confidence_and_is_kept(page, served):
    ask(page, "What is the capital of Kenya, and since when?", tokens=24)
    page.locator("#generate-run").click()
    expect(tokens(page).nth(2)).to_be_visible()
    ended(page)
    row, events = newest(served[0])
    written = surviving(events)
    assert row.status == "done" and row.seed == 7 and len(written) == tokens(page).count()
    shown = "".join(
        tokens(page).nth(i).inner_text() for i, token in enumerate(written) if token.bytes
    )
    assert re.sub(r"\s+", "", shown) == re.sub(r"\s+", "", text_of(events))
    for i, token in enumerate(written[:5]):
        assert tokens(page).nth(i).get_attribute("data-i") == str(token.pos)
    expect(page.locator("#generate-state")).to_contain_text("seed 7")
    page.locator("#generate-seed").locator("input, textarea").fill("")
    page.locator("#generate-again").click()
    expect(page.locator("#generate-seed").locator("input, textarea")).to_have_value("7")
    expect(page.locator("#generate-summary")).to_contain_text("perplexity")
    expect(page.locator("#generate-curve .main-svg").first).to_be_visible()


def test_the_tint_changes_without_running_again(page, served):
    ask(page, "Say hello.")
    run(page)
    before = served[0].store.count()
    colours = {}
    for label in ("Probability", "Entropy", "Margin", "Rank", "Surprisal"):
        page.locator("#generate-view").get_by_text(label, exact=True).first.click()
        expect(page.locator(f"#generate-view.by-{label.lower()}")).to_be_visible()
        expect(page.locator("#generate-view .candor-legend")).to_contain_text(label)
        colours[label] = tokens(page).evaluate_all(
            "all => all.map(t => getComputedStyle(t).backgroundColor)"
        )
    assert len({tuple(row) for row in colours.values()}) > 1
    assert served[0].store.count() == before


def test_keyboard_and_click_open_a_token_and_its_numbers(page, served):
    ask(page, "Name a river in Africa.")
    run(page)
    token = surviving(newest(served[0])[1])[2]
    tokens(page).first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#candor-tip.on")).to_contain_text("probability")
    page.keyboard.press("Enter")
    panel = page.locator("#generate-panel")
    expect(panel).to_contain_text(f"Token {token.pos}")
    expect(panel.locator(".bar").first).to_be_visible()
    assert panel.locator("[data-fork]").count() >= 9
    tokens(page).nth(4).click()
    expect(panel).to_contain_text(f"Token {token.pos + 2}")
    expect(tokens(page).nth(4)).to_have_class(re.compile(r"\bsel\b"))
    page.locator("#generate-curve .point").first.click(force=True)
    expect(panel).to_contain_text(f"Token {token.pos - 2}")


def test_an_alternative_continues_as_a_new_run_from_the_kept_cache(page, served):
    ctx = served[0]
    ask(page, "What is the capital of France?", tokens=16)
    run(page)
    parent, events = newest(ctx)
    place = surviving(events)[3]
    tokens(page).nth(3).click()
    button = page.locator("#generate-panel [data-fork]").first
    other = int(button.get_attribute("data-fork"))
    button.click()
    expect(tokens(page).nth(3)).to_have_class(re.compile("o-forced"))
    ended(page)
    child, continued = newest(ctx)
    assert (child.parent, child.fork_pos) == (parent.id, place.pos)
    written = surviving(continued)
    assert written[:3] == surviving(events)[:3]
    assert (written[3].id, written[3].origin) == (other, "forced")
    start = next(event for event in continued if isinstance(event, RunStarted))
    end = continued[-1]
    # One pass a new token, and at most one for the token that was chosen: no prefill.
    assert isinstance(end, RunEnded) and end.forwards <= end.tokens + 1
    assert start.prompt_ids == events[0].prompt_ids


def test_stop_acts_within_one_token(page, served):
    ask(page, "Write a long story about the sea.", tokens=2000)
    page.locator("#generate-run").click()
    expect(tokens(page).nth(5)).to_be_visible()
    assert page.locator("#generate-run").is_disabled()
    page.locator("#generate-stop").click()
    ended(page)
    expect(page.locator("#generate-state")).to_contain_text("Stopped")
    row, events = newest(served[0])
    assert row.status == "stopped" and 5 <= sum(isinstance(e, Token) for e in events) < 400


def test_an_error_is_one_sentence_and_loses_nothing(page):
    ask(page, "   ")
    page.locator("#generate-run").click()
    expect(page.get_by_role("alert")).to_contain_text("The prompt is empty")
    ask(page, "kept as it was", tokens=5)
    page.locator("#generate-seed").locator("input, textarea").fill("seven")
    page.locator("#generate-run").click()
    expect(page.get_by_role("alert")).to_contain_text("whole number")
    assert page.locator("#generate-prompt textarea").input_value() == "kept as it was"
    assert "Traceback" not in page.content()
    page.locator("#generate-seed").locator("input, textarea").fill("3")
    run(page)
    expect(page.locator("#generate-state")).to_contain_text("Done")


def test_a_second_tab_waits_in_a_visible_queue_and_closing_a_tab_ends_its_run(
    page, served, browser
):
    ctx, address = served
    ask(page, "Count to a thousand.", tokens=4000)
    page.get_by_label("number input for Temperature").fill("2")  # it never comes to an end
    page.get_by_label("number input for Temperature").press("Tab")
    page.locator("#generate-run").click()
    expect(tokens(page).nth(3)).to_be_visible()
    running, _ = newest(ctx)
    second = browser.new_page()
    second.set_default_timeout(LONG)
    second.goto(address)
    expect(second.locator("#generate-run")).to_be_visible()
    ask(second, "Say yes.", tokens=4)
    second.locator("#generate-run").click()
    expect(second.locator("#generate-state")).to_contain_text("Waiting for the one before yours")
    page.close()
    ended(second)
    assert ctx.store.run(running.id).status == "stopped"
    second.close()


def test_hostile_text_stays_text(page, served):
    hostile = "<script>window.hacked=1</script> ${alert(1)} {{7*7}} </span>`x` \u202eevil\x07"
    page.get_by_text("Text", exact=True).first.click()
    page.locator("#generate-method").get_by_role("combobox").click()
    page.get_by_role("option", name="Read a text").click()
    example = registry.method("read").card.example
    expect(page.locator("#generate-prompt textarea")).to_have_value(example)
    page.locator("#generate-prompt textarea").fill(hostile)
    run(page)
    shown = "".join(tokens(page).all_inner_texts())
    assert "<script>window.hacked=1</script>" in shown
    assert "${alert(1)}" in shown and "{{7*7}}" in shown and "</span>`x`" in shown
    assert page.evaluate("window.hacked") is None
    assert text_of(newest(served[0])[1]) == hostile
    page.get_by_role("tab", name="History").click()
    expect(page.locator("#runs")).to_contain_text("<script>")
    assert page.evaluate("window.hacked") is None


def test_a_conversation_goes_on_and_an_earlier_turn_can_be_edited(page, served):
    ask(page, "My name is Ada.", tokens=6)
    run(page)
    page.locator("#generate-continue").click()
    expect(page.locator("#generate-talk")).to_contain_text("My name is Ada.")
    ask(page, "What is my name?", tokens=6)
    page.keyboard.press("Control+Enter")
    ended(page)
    _, events = newest(served[0])
    roles = [turn["role"] for turn in events[0].prompt]
    assert roles == ["user", "assistant", "user"]
    page.locator("#generate-talk [data-turn]").first.click()
    expect(page.locator("#generate-prompt textarea")).to_have_value("My name is Ada.")
    expect(page.locator("#generate-talk [data-turn]")).to_have_count(0)
    ask(page, "My name is Bob.", tokens=4)
    run(page)
    assert [turn["content"] for turn in newest(served[0])[1][0].prompt] == ["My name is Bob."]


def test_answer_and_command_can_be_copied(page, served):
    ask(page, 'It\'s a test; say "ok".', tokens=6)
    run(page)
    _, events = newest(served[0])
    for button, wanted in (("Copy answer", text_of(events)), ("Copy as command", "launch.py run")):
        page.locator("#generate-view").get_by_role("button", name=button).click()
        copied = page.evaluate(
            """async (wanted) => {
                for (;;) {
                    const text = await navigator.clipboard.readText();
                    if (text.includes(wanted)) return text;
                    await new Promise((later) => setTimeout(later, 50));
                }
            }""",
            wanted,
        )
        assert wanted in copied


def test_history_searches_opens_replays_exports_and_deletes(page, served, tmp_path):
    ctx = served[0]
    ask(page, "Zanzibar is an island.", tokens=10)
    run(page)
    kept, events = newest(ctx)
    page.get_by_role("tab", name="History").click()
    page.locator("#search").locator("input, textarea").fill("zanzibar")
    expect(page.locator("#runs [data-run]")).to_have_count(1)
    time = page.locator("#runs time")
    expect(time).not_to_contain_text("UTC")  # the visitor's own time
    assert "UTC" in time.get_attribute("title")
    page.locator("#runs [data-run]").click()
    expect(tokens(page, "history")).to_have_count(len(surviving(events)))
    for row in ctx.runner.residents():
        ctx.runner.unload(row["choice"]).finish()
    page.locator("#replay").click()
    expect(page.locator("#history-state")).to_contain_text("Replaying")
    expect(page.locator("#history-state")).to_contain_text("Done")
    expect(tokens(page, "history")).to_have_count(len(surviving(events)))
    assert ctx.runner.residents() == []  # a replay needs no model
    expect(page.locator("#history-asked")).to_contain_text("Zanzibar is an island.")
    tokens(page, "history").nth(2).click()
    page.locator("#history-panel [data-fork]").first.click()
    expect(tokens(page, "history").nth(2)).to_have_class(re.compile("o-forced"))
    expect(page.locator("#history-state")).to_contain_text("Done")
    assert newest(ctx)[0].parent == kept.id
    page.locator("#search").locator("input, textarea").fill("")
    page.locator("#search").locator("input, textarea").fill("zanzibar")
    expect(page.locator("#runs [data-run]")).to_have_count(2)
    page.locator(f'#runs [data-pick="{kept.id}"]').check()
    page.locator("#export").click()
    with page.expect_download() as download:
        page.locator("#exported a").first.click()
    saved = tmp_path / "runs.jsonl"
    download.value.save_as(saved)
    assert kept.id in saved.read_text(encoding="utf-8")
    page.locator("#delete").click()
    page.locator("#yes").click()
    expect(page.locator("#history-said")).to_contain_text("deleted")
    assert ctx.store.count("zanzibar") == 1
    page.get_by_test_id("Import-upload-button").set_input_files(saved)
    expect(page.locator("#history-said")).to_contain_text("imported")
    assert [s.event for s in ctx.store.events(kept.id)] == events


def pick_model(page: Page, name: str, quantization: str | None = None) -> None:
    """Load it with the bar, which is open then."""
    if not page.locator("#model-panel").is_visible():
        page.locator("#top .pick").click()
    page.locator("#model-ref input").fill(name)
    page.keyboard.press("Enter")
    if quantization:
        page.locator("#model-quantization input").click()
        page.get_by_role("option", name=quantization, exact=True).click()
    page.locator("#model-load").click()


def test_another_model_is_loaded_used_and_unloaded_by_one_visitor(page, served, browser):
    ctx, address = served
    ctx.runner.load(ModelChoice()).finish()
    ctx.runner.engine.cost = Cost(20.0, ((1, 1.0), (16, 2.5)), prefill=500.0, memory=1)
    expect(page.locator("#top")).to_contain_text("50 tok/s · step 20 ms")  # without a reload
    page.locator("#top summary").click()
    expect(page.locator("#top .pop")).to_contain_text("16 tokens checked at once")
    page.locator("#top .pick").click()
    expect(page.locator("#model-said")).to_contain_text("free")
    pick_model(page, "smollm2-135m", "none")
    expect(page.locator("#model-said")).to_contain_text("SmolLM2-135M-Instruct is ready")
    expect(page.locator("#top")).to_contain_text("float32 · CPU")
    expect(page.locator("#model-list li")).to_have_count(2)

    other = browser.new_page()
    other.goto(address)
    expect(other.locator("#top")).to_contain_text("int8 · CPU")  # its own choice
    other.close()

    pick_model(page, "/no/such/folder")
    expect(page.get_by_role("alert")).to_contain_text("There is no model '/no/such/folder'")
    expect(page.locator("#top")).to_contain_text("float32 · CPU")
    page.keyboard.press("Escape")
    expect(page.locator("#model-panel")).to_be_hidden()
    ask(page, "Say yes.", tokens=4)
    run(page)
    assert newest(ctx)[1][0].model["quantization"] == "none"

    page.locator("#top .pick").click()
    page.locator("#model-list [data-use]").click()
    expect(page.locator("#top")).not_to_contain_text("float32 · CPU")
    page.locator("#model-list li", has_text="float32").get_by_text("Unload").click()
    expect(page.locator("#model-list li")).to_have_count(1)
    assert len(ctx.runner.residents()) == 1


def test_a_model_without_chat_template_offers_text(page, served, tmp_path: Path):
    plain = tmp_path / "plain"
    shutil.copytree(models_folder() / "smollm2-135m", plain, copy_function=os.symlink)
    (plain / "chat_template.jinja").unlink()
    pick_model(page, str(plain))
    expect(page.locator("#top")).to_contain_text("no chat template: text mode")
    page.keyboard.press("Escape")
    expect(page.locator("#generate-mode label")).to_have_count(1)
    expect(page.locator("#generate-text-only")).to_contain_text("goes on from a text")
    ask(page, "Once upon a time", tokens=4)
    run(page)
    assert newest(served[0])[1][0].prompt == "Once upon a time"
    page.locator("#top .pick").click()
    page.locator("#model-list [data-use]").first.click()
    expect(page.locator("#generate-mode label")).to_have_count(2)


@pytest.mark.parametrize("width", [1360, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_light_or_dark_wide_or_narrow(page, width, dark, tmp_path: Path):
    page.set_viewport_size({"width": width, "height": 900})
    if dark:
        page.get_by_label("Light or dark").click()
    ask(page, "unbreakable" * 40, tokens=4)  # three times as wide as the widest page
    run(page)
    expect(page.locator("#generate-answer")).to_be_in_viewport()  # the page went there
    page.locator("#top .pick").click()
    expect(page.locator("#model-load")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    level = sum(map(int, re.findall(r"\d+", back)[:3]))  # of 765
    assert (level < 200) if dark else (level > 600)


# Inside a run, and beside another


def pick(page: Page, box: str, title: str) -> None:
    page.locator(f"#{box}").get_by_role("combobox").click()
    page.get_by_role("option", name=title).first.click()


def test_every_layer_is_read_while_the_text_streams_and_opens_at_a_click(page, served):
    page.get_by_role("tab", name="Layers & experts").click()
    set_length(page, 10)
    page.locator("#layers-run").click()
    expect(page.locator("#layers-state")).to_contain_text("Done")
    row, events = newest(served[0])
    written = surviving(events)
    assert row.method == "logit_lens" and len(written) == 10
    cells = page.locator("#layers-lens [data-row]")
    expect(cells).to_have_count(10 * 31)
    cells.first.click()
    panel = page.locator("#layers-panel")
    expect(panel).to_contain_text("Layer ")
    expect(panel).to_contain_text(f"Token {written[0].pos}")
    panel.locator("[data-ask=attention]").click()
    expect(page.locator("#layers-inside")).to_contain_text("Where it looked")
    expect(page.locator("#layers-inside .main-svg").first).to_be_visible()
    looked = newest(served[0])[0]
    assert (looked.method, looked.parent, looked.fork_pos) == ("attention", row.id, written[0].pos)


def test_answers_are_written_side_by_side_and_compared_again_later(page, served):
    ctx = served[0]
    page.get_by_role("tab", name="Compare").click()
    # The baseline has no limit that could be set: something that is soon said.
    page.locator("#compare-prompt textarea").fill("What is the capital of France?")
    pick(page, "compare-method-2", "–")
    page.get_by_role("button", name="Settings").first.click()
    set_length(page, 8)
    page.locator("#compare-run").click()
    expect(page.locator("#compare-state")).to_contain_text("each saved as a run of its own")
    table = page.locator("#compare-table")
    expect(table.locator("tr")).to_have_count(3)
    expect(page.locator("#compare-name-0")).to_contain_text("Sampling · temperature 0")
    ids = [run.id for run in ctx.store.runs(limit=2)]
    assert {ctx.store.run(id).params["temperature"] for id in ids} == {0.0, 0.7}
    page.locator("#compare-text-1 .t").first.click()
    page.locator("#compare-panel").get_by_text("Open in History").click()
    expect(page.locator("#history-panel [data-fork]").first).to_be_visible()
    expect(tokens(page, "history").first).to_be_visible()
    expect(page.locator("#compare-ticked")).to_be_disabled()
    for id in ids:
        page.locator(f'#runs [data-pick="{id}"]').check()
    page.locator("#compare-ticked").click()
    expect(page.locator("#compare-text-0 .t").first).to_be_visible()
    expect(table.locator("tr")).to_have_count(3)


def test_a_passage_is_asked_for_where_a_method_needs_one(page):
    expect(page.locator("#generate-passage")).to_be_hidden()
    pick(page, "generate-method", "Exact extraction")
    page.locator("#generate-passage textarea").fill("  ")
    page.locator("#generate-run").click()
    expect(page.locator("#generate-state")).to_contain_text("needs a passage")
    page.locator("#generate-passage textarea").fill("The station in Gorlitz opened in 1847.")
    page.locator("#generate-prompt textarea").fill("When did the station open?")
    page.locator("#generate-run").click()
    expect(page.locator("#generate-inside")).to_contain_text("The most probable span")
    expect(page.locator("#generate-state")).to_contain_text("Done")


# A search


def test_a_search_with_a_planted_judge_is_stopped_and_its_tree_is_found_in_history(page, served):
    page.get_by_role("tab", name="Search").click()
    form = page.locator(".candor-form").locator("visible=true").first
    form.get_by_role("combobox", name="Criterion").click()
    page.get_by_role("option", name="keywords").click()
    wish, said = form.get_by_role("textbox", name="Wish"), page.locator("#search-state")
    page.locator("#search-run").click()
    expect(said).to_contain_text("Failed: Name the words that the text should have")
    told = page.locator("#search-foreseen")
    expect(told).to_contain_text("At most")
    before = told.inner_text()
    wish.fill("water, map, friend")
    set_length(page, 200)
    expect(told).not_to_have_text(before)
    page.locator("#search-run").click()
    nodes = page.locator("#search-inside .canvas .node")
    expect(nodes.nth(4)).to_be_visible()
    page.locator("#search-stop").click()
    expect(said).to_contain_text("Stopped")
    expect(page.locator("#search-run")).to_be_enabled()
    row, events = newest(served[0])
    assert (row.method, row.status, row.params["criterion"]) == ("rain", "stopped", "keywords")
    assert sum(isinstance(event, SearchNode) for event in events) > 4
    page.get_by_role("tab", name="History").click()
    page.locator(f'#runs [data-run="{row.id}"]').click()
    expect(page.locator("#history-state")).to_contain_text("Stopped")
    expect(page.locator("#history-inside .canvas .node").nth(4)).to_be_visible()
