"""Benchmarks give rows of the documented shape and refuse what they cannot do; nothing is timed."""

import math
import shutil

import pytest

from analyzers.errors import BadInput, CandorError
from app import bench
from app.bench import decode, page
from app.cli import main
from app.runner import ModelChoice
from tests import tiny

COLUMNS = ["name", "value", "unit", "baseline", "ratio", "target", "met", "n"]


def silent(what: str) -> None:
    pass


def check(rows) -> None:
    assert rows and len({each["name"] for each in rows}) == len(rows)
    for each in rows:
        assert list(each) == COLUMNS
        assert math.isfinite(each["value"]) and each["unit"] and each["n"] >= 1
        assert (each["baseline"] is None) == (each["ratio"] is None)
        assert (each["target"] is None) == (each["met"] is None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a folder, as a user's own model would be."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_every_benchmark_says_what_it_measures():
    assert set(bench.names()) >= {"decode", "page"}
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


def test_decode_compares_three_ways_to_write_the_same(folder, monkeypatch):
    monkeypatch.setattr(decode, "PROMPT", "A")
    said: list[str] = []
    rows = decode.measure(said.append, model=ModelChoice(str(folder)), tokens=6, rounds=2, long=60)
    check(rows)
    by_name = {each["name"]: each for each in rows}
    ours, bare = by_name[decode.OURS], by_name[decode.BARE]
    assert (ours["baseline"], ours["target"], ours["n"]) == (bare["value"], 1.0, 2)
    cache = next(each for each in rows if each["name"].startswith("memory"))
    # layers x (keys and values) x heads x head_dim x bytes of a float32
    assert cache["baseline"] * 1e3 == 3 * 2 * 2 * 8 * 4
    assert any("Round 2 of 2" in line for line in said)


def test_decode_refuses_to_compare_different_texts():
    with pytest.raises(CandorError, match="another text"):
        decode._check({"a": [1, 2], "b": [1, 3]}, 2)
    with pytest.raises(CandorError, match="wrote 1 tokens, not 2"):
        decode._check({"a": [1]}, 2)


def test_page_follows_every_token_of_the_real_page():
    check(page.measure(silent, tokens=60, rate=200, rounds=1))


def test_page_counts_a_token_as_shown_with_the_first_update_that_has_it():
    made = [10.0, 10.1, 10.2]
    assert page._lags([(10_300, 2), (10_500, 3)], made) == pytest.approx([0.3, 0.2, 0.3])


def test_page_says_which_browser_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="apt install chromium"):
        page.measure(silent, tokens=1, rounds=1)
