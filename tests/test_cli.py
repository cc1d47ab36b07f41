"""The command line: what goes to stdout, what the exit status says, and the way back to it."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyzers import registry
from analyzers.card import Card
from analyzers.common.budget import Expected
from analyzers.engine import Engine, load
from analyzers.engine.quantization import Quantization
from analyzers.home import database_path
from analyzers.params import build
from analyzers.registry import Method
from analyzers.task import Task
from analyzers.trace import KINDS, Metric, Note, RunStarted, from_data
from app.cli import main
from app.command import as_command
from app.runner import Job, ModelChoice
from sessions.store import Store
from tests.test_runner import Nothing

ROOT = Path(__file__).parent.parent
TEXT = "The quick brown fox."
RUN = ["run", "sampling", "--raw", "--prompt", TEXT, "--set", "max_new=6", "--seed", "3"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, own_engine):
    """A command on a home of its own, where every model is tiny: (status, stdout, stderr)."""
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path))
    monkeypatch.setattr("app.runner.load", lambda ref, **options: own_engine)

    def command(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return command


def stored() -> Store:
    return Store(database_path())


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


# run


def test_evaluate_prints_one_object_or_a_table_and_can_go_on(call, own_engine):
    own_engine.context = 4096
    given = ["evaluate", "--data", "arithmetic", "--signals", "mean_logprob,p_true", "--limit", "3"]
    status, out, err = call(*given, "--json")
    told = json.loads(out)
    assert (status, told["n"], told["data"]) == (0, 3, "arithmetic")
    assert [row["signal"] for row in told["signals"]] == ["mean_logprob", "p_true"]
    assert told["signals"][0]["ece"] is None and "ece_interval" in told["signals"][0]
    assert "3 of 3 questions" in err
    status, out, err = call(*given, "--resume", told["run"])
    assert status == 0 and "mean_logprob" in out and "3 questions" in out
    status, out, err = call(*given[:-1], "2", "--resume", told["run"])
    assert status == 1 and "there were 3 questions and now are 2" in err


def test_json_is_one_event_a_line_and_nothing_else(call):
    status, out, err = call(*RUN, "--json")
    assert (status, err) == (0, "")
    rows = lines(out)
    assert [row["seq"] for row in rows] == list(range(8))
    assert [row["kind"] for row in rows] == ["RunStarted", *["Token"] * 6, "RunEnded"]
    for row in rows:
        assert list(row)[:3] == ["seq", "t", "kind"]
        assert row["t"] >= 0 and math.isfinite(row["t"]) and row["kind"] in KINDS
    told = [
        from_data(row["kind"], {k: v for k, v in row.items() if k not in ("seq", "t", "kind")})
        for row in rows
    ]
    store = stored()
    (run,) = store.runs()
    assert told == [stamped.event for stamped in store.events(run.id)]


def test_text_is_exactly_the_answer_and_the_rest_goes_to_stderr(call):
    status, out, err = call(*RUN, "--set", "max_new=40")
    store = stored()
    (run,) = store.runs()
    assert status == 0 and out == run.output + "\n" and run.tokens == 40
    assert err.startswith("done: max_new reached · 40 tokens in ") and run.id in err


def test_the_same_seed_prints_the_same(call):
    assert call(*RUN)[1] == call(*RUN)[1] != call(*RUN[:-1], "4")[1]


def test_prompts_come_from_a_file_or_from_turns(call, tmp_path):
    text = 'Zeile 1\n"Zeile" 2 👍 \u202e'
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, out, _ = call("run", "read", "--prompt-file", tmp_path / "prompt.txt", "--json")
    assert lines(out)[0]["prompt"] == text  # `read` starts as raw text
    _, out, _ = call(
        *("run", "sampling", "--prompt", "c", "--system", "Be kind.", "--prefix", "Well"),
        *("--earlier", json.dumps(earlier), "--set", "max_new=1", "--json"),
    )
    started = lines(out)[0]
    assert started["prompt"] == [
        {"role": "system", "content": "Be kind."}, *earlier, {"role": "user", "content": "c"}
    ]  # fmt: skip
    assert started["prefix"] == "Well" and started["params"]["max_new"] == 1
    _, out, _ = call("run", "read", "--chat", "--prompt", "c", "--json")
    assert lines(out)[0]["prompt"] == [{"role": "user", "content": "c"}]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["run", "guess", "--prompt", "x"], "There is no method 'guess'; there are: "),
        (["run", "sampling", "--prompt", ""], "The prompt is empty"),
        (["run", "sampling", "--prompt-file", "none.txt"], "Cannot read none.txt"),
        (["run", "sampling", "--prompt-file", "."], "Cannot read ."),
        (["run", "sampling", "--prompt-file", "latin.txt"], "latin.txt is not a UTF-8 text."),
        ([*RUN, "--set", "max_new"], "--set takes name=value, not 'max_new'."),
        ([*RUN, "--set", "maximum=3"], "There is no parameter 'maximum'"),
        (["evaluate", "--data", "nonsense"], "There is no built-in set 'nonsense'"),
        (["evaluate", "--data", "capitals", "--signals", "x"], "There is no signal 'x'"),
        (["evaluate", "--data", "capitals", "--limit", "0"], "leaves no question"),
        (["evaluate", "--data", "missing.csv"], "missing.csv cannot be read"),
        ([*RUN, "--set", "max_new=0"], "a whole number from 1 to 8,192 tokens, not 0."),
        ([*RUN, "--set", "=3"], "There is no parameter ''"),
        ([*RUN, "--seed", "-1"], "The seed must be from 0 to "),
        ([*RUN, "--system", "Be kind."], "--system belongs to a conversation"),
        ([*RUN, "--earlier", "[]"], "--earlier belongs to a conversation"),
        (["run", "sampling", "--prompt", "x" * 600], "609 tokens"),
        *[
            (["run", "sampling", "--prompt", "x", "--earlier", given], "--earlier takes JSON")
            for given in ("{", "5", "[5]", '[{"role": "user"}]', '[{"role": "x", "content": "y"}]')
        ],
    ],
)
def test_bad_usage_is_two_with_a_sentence_and_records_nothing(
    call, tmp_path, monkeypatch, argv, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    status, out, err = call(*argv)
    assert (status, out) == (2, "") and sentence in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert stored().count() == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "sampling"],
        ["run", "sampling", "--prompt", "x", "--prompt-file", "y"],
        ["run", "sampling", "--prompt", "x", "--raw", "--chat"],
        ["run", "sampling", "--prompt", "x", "--seed", "one"],
        ["dance"],
        ["export", "--out", "f"],
        ["export", "x", "--format", "pdf", "--out", "f"],
    ],
)
def test_what_the_parser_refuses_is_two_as_well(call, capsys, argv):
    with pytest.raises(SystemExit) as ended:
        call(*argv)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage:" in err


def test_a_run_that_fails_is_one(call, monkeypatch):
    def breaks(engine, task, params, ctx):
        yield Note("warning", "so far")
        raise RuntimeError

    card = Card("Breaks", "decoding", "made up", (Note,))
    method = Method("breaks", card, Nothing, breaks, "")
    monkeypatch.setitem(registry.methods(), "breaks", method)
    status, out, err = call("run", "breaks", "--prompt", TEXT)
    assert status == 1 and out.strip() == ""
    assert "so far" in err and "failed: Something inside failed (RuntimeError)" in err
    status, out, _ = call("run", "breaks", "--prompt", TEXT, "--json")
    assert status == 1 and lines(out)[-1]["status"] == "failed"


def test_what_a_search_may_take_is_said_before_it_and_what_it_took_after_it(call, monkeypatch):
    def counts(engine, task, params, ctx):
        for step in range(3):
            yield Metric("spent forwards", step, 10.0 * (step + 1), "forwards")
        return "finished"

    card = Card("Counts", "search", "made up", (Metric,))
    method = Method("counts", card, Nothing, counts, "", lambda params: Expected(240, 26, 310))
    monkeypatch.setitem(registry.methods(), "counts", method)
    _, out, err = call("run", "counts", "--prompt", TEXT)
    first, spent, ended = err.splitlines()
    assert first == (
        "At most 240 tokens, 26 evaluations, 310 forwards · time: known after the first run"
    )
    assert (out.strip(), spent) == ("", "spent forwards: 30 forwards")
    assert ended.startswith("done: finished")
    assert "on this model" in call("run", "counts", "--prompt", TEXT)[2].splitlines()[0]
    assert call("run", "counts", "--prompt", TEXT, "--json")[2] == ""


def test_a_model_that_is_not_there_is_one(call, monkeypatch):
    monkeypatch.setattr("app.runner.load", load)
    status, out, err = call(*RUN, "--model", "no-such-model")
    assert (status, out) == (1, "")
    assert "There is no model 'no-such-model'" in err and "smollm2-135m" in err
    assert call(*RUN, "--quantization", "q9")[0] == 2
    assert call(*RUN, "--device", "abacus")[0] == 2


@pytest.mark.parametrize("allowed", [True, False])
def test_code_of_a_model_runs_only_with_the_flag(call, monkeypatch, own_engine, allowed):
    given = []

    def loads(ref: str, **options: object) -> Engine:
        given.append(options["remote_code"])
        return own_engine

    monkeypatch.setattr("app.runner.load", loads)
    assert call(*RUN, *(["--allow-remote-code"] if allowed else []))[0] == 0
    assert given == [allowed]
    served = {}
    monkeypatch.setattr("app.page.main.serve", lambda **options: served.update(options))
    assert call("page", *(["--allow-remote-code"] if allowed else []))[0] == 0
    assert served["remote_code"] is allowed and served["model"] == ModelChoice()


def test_the_help_names_every_quantization(call, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        call("run", "--help")
    shown = capsys.readouterr().out
    assert all(re.search(rf"[ (]{kind}[, )]", shown) for kind in get_args(Quantization))


def test_an_interrupt_stops_the_run_and_records_its_ending(call, monkeypatch):
    def interrupt(event: object, beside: dict[str, str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("app.cli._show", interrupt)
    status, _, err = call(*RUN, "--set", "max_new=400")
    assert status == 130 and err == "Stopped.\n"
    (run,) = stored().runs()
    assert run.status == "stopped"


def test_a_store_that_cannot_be_written_is_one(call, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CANDOR_HOME", str(tmp_path / "file"))
    status, out, err = call(*RUN)
    assert (status, out) == (1, "") and "CANDOR_HOME" in err


def test_trouble_with_saving_is_said_on_stderr_only(call, monkeypatch):
    monkeypatch.setattr("sessions.recorder.Recorder.problem", "The disk is full.")
    status, out, err = call(*RUN, "--json")
    assert status == 0 and "The disk is full." in err
    assert len(lines(out)) == 8


# methods, history, export, import


def test_methods_are_listed_with_the_documented_keys(call):
    status, out, _ = call("methods", "--json")
    rows = lines(out)
    assert status == 0 and [row["name"] for row in rows] == list(registry.methods())
    for row in rows:
        assert set(row) == {"name", "title", "family", "source", "needs", "emits"}
        assert set(row["emits"]) <= set(KINDS)
    status, out, _ = call("methods")
    assert status == 0 and out.splitlines()[0].split() == ["name", "title", "family", "source"]
    assert len(out.splitlines()) == 1 + len(rows)


def test_history_lists_runs_newest_first_and_finds_them(call):
    for prompt in ("apples", "pears", "\x1b[31mred\nplums"):
        call("run", "read", "--prompt", prompt)
    status, out, _ = call("history", "--json")
    assert status == 0
    assert [row["prompt"] for row in lines(out)] == ["\x1b[31mred\nplums", "pears", "apples"]
    assert [row["prompt"] for row in lines(call("history", "--search", "pea", "--json")[1])] == [
        "pears"
    ]
    assert len(lines(call("history", "--limit", "2", "--json")[1])) == 2
    _, out, _ = call("history")
    assert "\x1b" not in out and len(out.splitlines()) == 4


def test_export_and_import_give_the_same_runs(call, tmp_path, monkeypatch):
    call(*RUN)
    call("run", "read", "--prompt", "日本語 👍")
    before = lines(call("history", "--json")[1])
    ids = [row["id"] for row in before]
    status, out, err = call("export", *ids, "--format", "jsonl", "--out", tmp_path / "runs.jsonl")
    assert (status, out) == (0, "") and err.startswith("2 runs written to ")
    events = [stored().events(id) for id in ids]

    monkeypatch.setenv("CANDOR_HOME", str(tmp_path / "elsewhere"))
    status, out, _ = call("import", tmp_path / "runs.jsonl")
    assert status == 0 and sorted(out.split()) == sorted(ids)
    assert lines(call("history", "--json")[1]) == before
    assert [stored().events(id) for id in ids] == events
    call("export", *ids, "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "runs.jsonl").read_bytes()


def test_numbers_are_exported_as_a_table(call, tmp_path):
    call(*RUN)
    (row,) = lines(call("history", "--json")[1])
    out = tmp_path / "numbers.csv"
    status, _, err = call("export", row["id"], "--format", "csv", "--out", out)
    assert status == 0 and "24 numbers written" in err  # 6 tokens, 4 signals each
    assert out.read_text(encoding="utf-8").splitlines()[0].startswith("run,lane,pos,name")


def test_what_is_not_there_or_no_export_is_one(call, tmp_path):
    (tmp_path / "no.jsonl").write_text("{}\n")
    for argv in (
        ["export", "01ABC", "--out", tmp_path / "out.jsonl"],
        ["import", tmp_path / "no.jsonl"],
        ["import", tmp_path / "missing.jsonl"],
    ):
        status, out, err = call(*argv)
        assert (status, out) == (1, "") and err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


# A run as a command line

TRICKS = [
    "-x", "--prompt", "---", "-", "--raw=1", "it's", '"', "$(reboot)", "`id`", "a\nb", "\\", "=x",
    "<script>", "${x}", "{{x}}", "\u202e", "\r\n", "!!", "~", "*", "\ud800", "\0",
]  # fmt: skip
# A text of two dashes and nothing else is lost in argparse up to Python 3.12.
HOSTILE = (st.text() | st.sampled_from(TRICKS)).filter(lambda text: text != "--")
FILLED = HOSTILE.filter(str.strip)


class Submitted(Exception):
    """Carries the job out of the command."""


class OnlySubmits:
    """A runner that runs nothing."""

    def __init__(self, store: object, **options: object) -> None:
        pass

    def submit(self, job: Job) -> None:
        raise Submitted(job)

    def close(self) -> None:
        pass


def job_of(words: list[str]) -> Job:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("app.runner.Runner", OnlySubmits)
        patched.setattr("app.cli._store", nullcontext)
        with pytest.raises(Submitted) as caught:
            main(words)
    return caught.value.args[0]


@st.composite
def started(draw) -> RunStarted:
    method = registry.method(draw(st.sampled_from(["sampling", "read", "exact_extract"])))
    prompt, prefix = draw(FILLED), draw(HOSTILE)
    if draw(st.booleans()):
        turns = [{"role": "system", "content": draw(FILLED)}] if draw(st.booleans()) else []
        for role in ("user", "assistant") * draw(st.integers(0, 2)):
            turns.append({"role": role, "content": draw(HOSTILE)})
        prompt = (*turns, {"role": "user", "content": prompt})
    knobs = {"temperature": draw(st.floats(0, 2)), "stop": draw(HOSTILE), "top_k": 7}
    params = build(method.params, knobs if method.name == "sampling" else {})
    model = {"name": draw(FILLED), "hash": "1", "quantization": "none", "dtype": "float32"}
    model["device"] = draw(st.sampled_from(["cpu", "cuda:1", "split"]))
    if draw(st.booleans()):
        model |= {"quantization": "nf4", "double": draw(st.booleans()), "compute": "bfloat16"}
    seed = draw(st.integers(0, 2**31 - 1))
    inputs = {name: draw(HOSTILE) for name in method.card.takes}
    return RunStarted(method.name, model, prompt, (1,), vars(params), seed, prefix, inputs=inputs)


@settings(deadline=None, max_examples=80)
@given(started())
def test_the_copied_command_makes_the_same_run(event):
    words = shlex.split(as_command([event]))
    assert words[:2] == ["python3", "launch.py"]
    job = job_of(words[2:])
    method = registry.method(event.method)
    assert job.method == event.method and job.seed == event.seed and job.fork is None
    assert job.task == Task(event.prompt, prefix=event.prefix, inputs=event.inputs)
    assert build(method.params, job.params) == build(method.params, event.params)
    kinds = ("quantization", "dtype", "device", "double", "compute")
    given = {name: event.model[name] for name in kinds if name in event.model}
    assert job.model == ModelChoice(event.model["name"], **given)


def test_inputs_are_texts_or_files(call, tmp_path, monkeypatch):
    """`@` reads a file, `@@` is an @; a name that the method does not take is refused."""
    file = tmp_path / "passage.txt"
    file.write_text("Nairobi, since 1905.", encoding="utf-8")
    words = ["run", "exact_extract", "--prompt", "Where?"]
    for text, passage in (
        ("Nairobi.", "Nairobi."),
        (f"@{file}", "Nairobi, since 1905."),
        ("@@home = 1", "@home = 1"),
    ):
        assert job_of([*words, f"--input=passage={text}"]).task.inputs == {"passage": passage}
    for bad, sentence in (
        ("passage", "--input takes name=value"),
        ("question=x", "There is no input 'question': exact_extract takes passage."),
        ("passage=@/no/such/file", "Cannot read /no/such/file"),
    ):
        status, out, err = call(*words, "--input", bad)
        assert (status, out) == (2, "") and sentence in err


def test_the_copied_command_survives_a_real_shell():
    hostile = '--it\'s "$HOME" `id` $(id) \\ !! *\n👍 \u202e'
    event = RunStarted("sampling", {"name": "m"}, hostile, None, {}, 1)
    command = as_command([event]).replace("python3 launch.py", "printf '%s\\0'")
    out = subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout.decode()
    assert f"--prompt={hostile}" in out.split("\0")


def test_a_copied_command_never_lets_a_model_run_its_own_code():
    model = {"name": "m", "quantization": "none", "device": "cpu", "remote_code": True}
    command = as_command([RunStarted("sampling", model, "hi", None, {}, 1)])
    assert "remote" not in command
    assert "--quantization none --dtype auto --device cpu" in command


def test_there_is_no_command_before_a_run_has_begun():
    assert as_command([]) == ""


# Starting


def test_listing_methods_starts_without_the_page(tmp_path):
    code = (
        "import sys, launch; status = launch.main(['--no-setup', 'methods', '--json']); "
        "print([name for name in ('gradio', 'fastapi', 'plotly', 'pandas') "
        "if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CANDOR_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert {row["name"] for row in lines(done.stdout)} == set(registry.methods())
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert not list(tmp_path.iterdir())
