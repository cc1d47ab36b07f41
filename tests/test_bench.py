"""Benchmarks give rows of the documented shape and refuse what they cannot do; nothing is timed."""

import json
import math
import os
import shutil
import sys

import pytest
import torch

from analyzers.engine import load
from analyzers.errors import BadInput, CandorError
from app import bench
from app.bench import decode, drafting, fork, lens, lossless, page, score
from app.cli import main
from tests import tiny

COLUMNS = [
    "name", "value", "unit", "baseline", "ratio", "target", "met", "n", "better", "spread",
]  # fmt: skip


def silent(what: str) -> None:
    pass


def check(rows) -> None:
    assert rows and len({each["name"] for each in rows}) == len(rows)
    for each in rows:
        assert list(each) == COLUMNS
        assert math.isfinite(each["value"]) and each["unit"] and each["n"] >= 1
        assert (each["baseline"] is None) == (each["ratio"] is None)
        assert (each["target"] is None) == (each["met"] is None)
        assert each["spread"] is None or each["spread"] >= 0


def named(rows) -> dict:
    check(rows)
    return {each["name"]: each for each in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a folder, as a user's own model would be."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_every_benchmark_says_what_it_measures():
    assert set(bench.names()) >= {"decode", "fork", "lens", "page", "score"}
    assert all(about and "\n" not in about for about in bench.names().values())


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(BadInput, match=r"no benchmark 'speed'.*decode"):
        bench.run("speed", silent)
    assert main(["bench", "speed"]) == 2
    assert main(["bench"]) == 0
    assert "decode" in capsys.readouterr().out


def test_a_row_compares_with_its_baseline_or_stands_alone():
    compared = bench.row("a", 3.0, "ms", n=5, baseline=2.0, target=1.0)
    assert (compared["ratio"], compared["met"]) == (1.5, False)
    alone = bench.row("b", 0.2, "s", n=1, target=0.5)
    assert (alone["ratio"], alone["met"]) == (None, True)
    with pytest.raises(ValueError, match="nan"):
        bench.row("c", math.nan, "s", n=1)


def test_where_more_is_better_the_target_is_the_least():
    slow, fast = (
        bench.row("a", value, "tokens/s", n=1, baseline=2.0, target=1.5, better="more")
        for value in (2.9, 3.1)
    )
    assert (slow["met"], fast["met"]) == (False, True)


def test_a_row_of_measurements_has_their_median_and_spread():
    row = bench.median_row("a", [4.0, 1.0, 2.0, 3.0, 100.0], "ms", baseline=6.0)
    assert (row["value"], row["spread"], row["n"], row["ratio"]) == (3.0, 2.0, 5, 0.5)
    assert bench.median_row("a", [4.0], "ms")["spread"] is None


def test_ways_take_turns_in_an_order_that_rotates():
    called = []

    def way(name):
        return lambda: called.append(name) or float(len(called))

    taken = bench.alternate({name: way(name) for name in "abc"}, 2, silent)
    assert "".join(called) == "abcbcacab"
    assert taken == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}  # without the round that warms up


@pytest.fixture
def no_llama(monkeypatch):
    monkeypatch.delenv("CANDOR_LLAMA_GGUF", raising=False)
    monkeypatch.delenv("CANDOR_LLAMA_PYTHON", raising=False)


def test_decode_compares_with_generate(folder, monkeypatch, no_llama):
    monkeypatch.setattr(decode, "PROMPT", "A")
    said: list[str] = []
    rows = named(decode.measure(said.append, model=str(folder), tokens=6, rounds=2, long=60))
    ours, bare = rows[decode.OURS], rows[decode.BARE]
    assert (ours["baseline"], ours["target"], ours["n"]) == (bare["value"], 1.5, 2)
    assert ours["better"] == "more" and ours["unit"] == "tokens/s"
    assert not any("llama" in name for name in rows)
    assert any("llama.cpp is left out" in line for line in said)
    memory = rows["memory growth over 60 tokens, against the cache"]
    # layers x (keys and values) x heads x head_dim x bytes of a bfloat16
    assert memory["baseline"] * 1e3 == 3 * 2 * 2 * 8 * 2
    assert any("Round 2 of 2" in line for line in said)


def test_decode_refuses_a_text_of_another_length():
    with pytest.raises(CandorError, match="wrote 1 tokens, not 2"):
        decode._check("a", 1, 2)


LLAMA_CPP = """
class Llama:
    def __init__(self, model_path, *, n_ctx, n_threads, n_threads_batch, logits_all, verbose):
        assert model_path == "model.gguf" and n_ctx > 6 and n_threads == n_threads_batch
        self.logits_all = logits_all

    def create_completion(self, prompt, *, max_tokens, temperature, logprobs):
        assert prompt == "A" and temperature == 0 and (logprobs == 5) == self.logits_all
        return {"usage": {"completion_tokens": min(max_tokens, 100)}}
"""


@pytest.fixture
def a_llama(tmp_path, monkeypatch):
    """An interpreter whose llama_cpp writes at most 100 tokens."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CANDOR_LLAMA_PYTHON", sys.executable)
    monkeypatch.setenv("CANDOR_LLAMA_GGUF", "model.gguf")
    monkeypatch.setattr(decode, "PROMPT", "A")
    return tmp_path


def test_decode_compares_with_llama_in_another_process(folder, a_llama):
    rows = named(decode.measure(silent, model=str(folder), tokens=6, rounds=2, long=60))
    ours = rows[decode.OURS]["value"]
    for name, target in (("llama.cpp", None), ("llama.cpp with logprobs=5", 1.5)):
        row = rows[f"candor, against {name}"]
        assert (row["value"], row["target"]) == (ours, target) and row["baseline"] > 0


def test_decode_refuses_a_llama_that_ends_early_or_crashes(a_llama):
    with decode._llama(200, silent) as ways, pytest.raises(CandorError, match="wrote 100 tokens"):
        ways[decode.LLAMA_BARE]()
    (a_llama / "llama_cpp.py").write_text("raise SystemExit(1)")
    with decode._llama(6, silent) as ways:
        for way in ways.values():  # while it ends, and after that
            with pytest.raises(CandorError, match=r"process of llama\.cpp ended"):
                way()


def test_decode_names_an_interpreter_that_is_not_there(a_llama, monkeypatch):
    monkeypatch.setenv("CANDOR_LLAMA_PYTHON", str(a_llama / "python"))
    with pytest.raises(CandorError, match="could not be started"), decode._llama(6, silent):
        pass


def test_lens_compares_every_way_with_the_plain_step_in_bfloat16(folder):
    rows = named(lens.measure(silent, model=str(folder), rounds=2))
    base = rows["bfloat16: plain step"]
    assert base["baseline"] is None
    for engine in ("bfloat16", "auto"):
        for layers, group, target in (
            ("all", 4, None), ("all", 8, 1.25), ("all", 16, None), ("8", 8, 1.15),
        ):  # fmt: skip
            row = rows[f"{engine}: {layers} layers, {group} tokens together"]
            assert (row["baseline"], row["target"], row["n"]) == (base["value"], target, 2)
    assert rows["auto: plain step"]["baseline"] == base["value"]


def test_lens_reads_each_layer_of_each_token_once(folder, monkeypatch):
    engine = load(str(folder), quantization="none", dtype="float32")
    seen = []
    usual = engine.top_tokens
    monkeypatch.setattr(engine, "top_tokens", lambda rows, k: seen.append(rows) or usual(rows, k))
    with torch.inference_mode():
        assert lens._way(engine, (1, 3), 8)() > 0
        cursor = engine.prefill(engine.encode(lens.Task(lens.PROMPT)))
        for rows in seen:
            for token in rows.split(2):
                step = engine.step(cursor, taps=(1, 3))
                assert torch.equal(token, torch.stack([step.hidden[1], step.hidden[3]]))
                engine.push(cursor, int(step.logits.argmax()))
    assert [len(rows) for rows in seen] == [16, 16]


def test_lens_chooses_layers_evenly_with_the_last():
    assert lens.chosen(30) == (4, 8, 11, 15, 19, 22, 26, 30)
    assert lens.chosen(3) == (1, 2, 3)


def test_score_compares_speed_and_numbers(folder):
    rows = named(score.measure(silent, model=str(folder), prefix=40, count=5, length=4, rounds=2))
    for dtype in ("float32", "bfloat16"):
        together, alone = rows[f"{dtype}: in one call"], rows[f"{dtype}: one pass for each"]
        assert (together["baseline"], together["target"]) == (alone["value"], 5.0)
        assert together["better"] == "more" and together["unit"] == "texts/s"
    equal = rows["float32: largest difference of a token"]
    assert equal["met"] and equal["value"] < 1e-4 and equal["n"] == 5 * 4
    assert rows["bfloat16: largest difference of a token"]["target"] is None


def test_score_reads_alone_what_the_engine_reads_together(folder):
    """With the whole text and no cache, position by position."""
    engine, model = load(str(folder), quantization="none", dtype="float32"), tiny.model()
    text, asked = score._texts(engine, 40, 6, 5)
    assert len(text) == 40 and all(len(ids) == 5 for ids in asked)
    with torch.inference_mode():
        for ids, scored in zip(asked, engine.score(text, asked), strict=True):
            logits = model(input_ids=torch.tensor([[*text, *ids]])).logits[0].log_softmax(-1)
            slow = [float(logits[39 + place, id]) for place, id in enumerate(ids)]
            assert score.read(model, text, ids).tolist() == pytest.approx(slow, abs=1e-5)
            assert list(scored.logprobs) == pytest.approx(slow, abs=1e-4)


def test_score_refuses_what_the_passages_do_not_hold(folder):
    with pytest.raises(BadInput, match="The passages have"):
        score.measure(silent, model=str(folder), prefix=40, count=100_000)


def test_fork_compares_with_a_plain_step_in_bfloat16(folder):
    rows = named(fork.measure(silent, model=str(folder), length=60, back=40, rounds=3))
    base = rows["bfloat16: plain step"]["value"]
    for dtype, target in (("bfloat16", 0.10), ("float32", None)):
        extra = rows[f"{dtype}: fork and rewind, first steps included"]
        assert (extra["baseline"], extra["target"], extra["n"]) == (base, target, 3)
        assert rows[f"{dtype}: fork and rewind, copying"]["value"] > 0
        assert rows[f"{dtype}: letting go of it"]["n"] == 3


def test_fork_begins_each_round_with_the_same_text(folder):
    engine = load(str(folder), quantization="none", dtype="float32")
    with torch.inference_mode():
        texts = fork._Texts(engine, 60, 40)
        lengths = []
        usual = engine.fork
        engine.fork = lambda cursor: lengths.append((cursor.pos, cursor.cached)) or usual(cursor)
        for _ in range(3):
            texts.forked()
            assert texts._text.pos == 40
        assert lengths == [(60, 59)] * 3
    with pytest.raises(BadInput, match="The passages have"):
        fork._Texts(engine, 100_000, 40)


def test_page_follows_every_token_of_the_real_page():
    check(page.measure(silent, tokens=60, rate=200, rounds=1))


def test_page_counts_a_token_as_shown_with_the_first_update_that_has_it():
    made = [10.0, 10.1, 10.2]
    assert page._lags([(10_300, 2), (10_500, 3)], made) == pytest.approx([0.3, 0.2, 0.3])


def test_page_says_which_browser_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="apt install chromium"):
        page.measure(silent, tokens=1, rounds=1)


WAYS = ("prompt_lookup", "draft_model, int8", drafting.THEIR_LOOKUP)


@pytest.fixture
def spec_bench(tmp_path, monkeypatch):
    """Three prompts in two categories, six tokens each; what is done is kept in a folder."""
    lines = [("writing", "one two one two"), ("writing", "again and again"), ("rag", "a b a b")]
    text = "\n".join(json.dumps({"category": c, "turns": [t, "and?"]}) for c, t in lines)
    (tmp_path / drafting.FILE).write_text(text)
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path))
    monkeypatch.setattr(drafting, "TOKENS", 6)
    monkeypatch.setattr(drafting, "measure_cost", lambda engine, poll: tiny.COST)
    return str(tmp_path)


def test_drafting_compares_every_way_by_category(folder, spec_bench, monkeypatch):
    monkeypatch.setattr(drafting, "PART", 2)
    rows = named(drafting.measure(silent, model=str(folder), data=spec_bench, ways=WAYS))
    for name in ("bfloat16", "auto"):
        for category in ("overall", "writing", "rag"):
            plain = rows[f"{name}, {category}: plain"]
            lookup = rows[f"{name}, {category}: prompt_lookup"]
            assert lookup["baseline"] == plain["value"] > 0
            assert 1 <= rows[f"{name}, {category}: prompt_lookup, M"]["value"] <= 6
    assert rows["bfloat16, overall: plain"]["n"] == 3
    assert rows["bfloat16, rag: plain"]["n"] == 1
    part = rows["bfloat16, overall: draft_model, int8"]
    assert part["n"] == 2 and part["baseline"] != rows["bfloat16, overall: plain"]["value"]
    assert f"bfloat16, rag: {drafting.THEIR_LOOKUP}" in rows
    best = [each for each in rows if each.startswith("bfloat16: the best")]
    assert len(best) == 1 and rows[best[0]]["target"] == drafting.TARGET
    assert not list((folder / "bench").glob("*"))


def test_a_part_of_the_prompts_has_every_category(spec_bench):
    prompts = drafting.read(spec_bench)
    assert drafting.stratified(prompts, 2) == [prompts[0], prompts[2]]
    assert drafting.stratified(prompts, 0) == [prompts[0], prompts[2], prompts[1]]
    with pytest.raises(BadInput, match="--data or CANDOR_DATA must name"):
        drafting.read(spec_bench + "/nowhere")


def test_an_interrupted_benchmark_goes_on(folder, spec_bench, monkeypatch):
    """What was done is not done again, and a torn last line is."""
    answered: list[str] = []
    plainly = drafting.plainly

    def counting(engine):
        way = plainly(engine)

        def answer(task):
            answered.append(task.prompt[-1]["content"])
            if len(answered) == 3:  # the warm-up, the first prompt, the second
                raise KeyboardInterrupt
            return way(task)

        return answer

    monkeypatch.setattr(drafting, "plainly", counting)
    with pytest.raises(KeyboardInterrupt):
        drafting.measure(silent, model=str(folder), data=spec_bench, ways=("prompt_lookup",))
    (kept,) = (drafting.database_path().parent / "bench").glob("*.jsonl")
    whole = kept.read_text()
    assert len(whole.splitlines()) == 2
    kept.write_text(whole + whole[:20])
    first = answered[1]
    answered[:] = ["", "", "", *answered]
    rows = drafting.measure(silent, model=str(folder), data=spec_bench, ways=("prompt_lookup",))
    check(rows)
    own = answered[6 : answered.index("Say hello.", 7)]
    assert own == ["Say hello.", *own[1:]] and first not in own and len(own) == 3


def test_lossless_checks_every_method_that_verifies(folder, monkeypatch):
    monkeypatch.setattr(lossless, "TOKENS", 4)
    rows = named(lossless.measure(silent, model=str(folder), limit=2))
    checked = {name.partition(":")[0] for name in rows}
    assert checked >= {"prompt_lookup", "token_recycling", "swift", "spectr", "rsd", "dyspec"}
    assert "superposed_lane" not in checked
    assert all(rows[f"{name}: plain text"]["value"] == 100 for name in checked)
    assert len(lossless.prompts()) >= 30


def test_options_go_to_the_benchmarks_that_take_them():
    with pytest.raises(BadInput, match="The benchmark fork takes no --limit"):
        bench.run("fork", silent, limit=3)
    assert main(["bench", "fork", "--limit", "3"]) == 2
