"""The table of what passes cost: how it is read, stored and measured."""

import json
from itertools import count

import pytest
import torch

from analyzers.engine import Engine
from analyzers.engine.cost import AT_ONCE, CHUNK, PREFILLS, ROUNDS, STEPS, Cost, machine, measure
from analyzers.errors import Stopped
from tests import tiny

TABLE = Cost(
    step_ms=20.0,
    verify=((1, 1.0), (4, 1.6), (16, 2.8), (64, 10.0)),
    prefill=800.0,
    memory=162_000_000,
)


@pytest.mark.parametrize(
    ("n", "ratio"),
    [
        (1, 1.0),
        (2, 1.2),
        (4, 1.6),
        (10, 2.2),  # half way from 4 to 16
        (16, 2.8),
        (40, 6.4),
        (64, 10.0),
        (112, 17.2),  # on from 16 and 64: 0.15 a token
    ],
)
def test_between_and_beyond_what_was_measured_it_is_linear(n, ratio):
    assert TABLE.v(n) == pytest.approx(ratio)


def test_a_table_of_one_number_is_flat():
    assert Cost(20.0, ((1, 1.0),), 800.0, 1).v(9) == 1.0


def test_it_survives_json():
    mapping = TABLE.as_mapping()
    assert Cost.from_mapping(json.loads(json.dumps(mapping, allow_nan=False))) == TABLE


@pytest.mark.parametrize(
    "mapping", [{}, {**TABLE.as_mapping(), "verify": [[1]]}, {**TABLE.as_mapping(), "step_ms": "x"}]
)
def test_what_is_no_table_is_refused(mapping):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Cost.from_mapping(mapping)


# Measuring


class Clock:
    """A clock that only passes move: one over n tokens takes 10 + n milliseconds."""

    def __init__(self, engine: Engine) -> None:
        self.slow = 1
        self.passes: list[int] = []
        engine._flat = None  # its steps would pass the hook by
        engine.model.base_model.register_forward_pre_hook(self._passing, with_kwargs=True)

    def _passing(self, module: object, args: object, given: dict) -> None:
        self.passes.append(given["input_ids"].shape[1])

    def perf_counter(self) -> float:
        return self.slow * sum(10 + tokens for tokens in self.passes) / 1e3


@pytest.fixture
def clock(own_engine, monkeypatch) -> Clock:
    made = Clock(own_engine)
    monkeypatch.setattr("analyzers.engine.cost.time", made)
    return made


def no_poll() -> None:
    return None


def test_the_numbers_are_those_of_the_passes(own_engine, clock):
    cost = measure(own_engine, no_poll)
    assert cost.step_ms == pytest.approx(11)
    assert [n for n, _ in cost.verify] == list(AT_ONCE)
    for n, ratio in cost.verify:
        assert ratio == pytest.approx((10 + n) / 11, abs=1e-3)
    assert cost.prefill == pytest.approx(1e3 * CHUNK / (10 + CHUNK), abs=0.1)
    assert cost.memory == own_engine.memory
    once = [1] * STEPS + [*AT_ONCE[1:]]
    assert clock.passes[1:] == once * (ROUNDS + 1) + [CHUNK] * (PREFILLS + 1)


def test_a_slow_model_is_measured_less(own_engine, clock):
    clock.slow = 1000  # a step takes 11 s
    cost = measure(own_engine, no_poll)
    assert cost.step_ms == 11_000 and cost.v(4) == pytest.approx(14 / 11, abs=1e-3)
    assert clock.passes[1:] == ([1] * STEPS + [*AT_ONCE[1:]]) * 2 + [CHUNK] * 2


def test_passes_are_measured_behind_a_text_that_stays_as_long(own_engine, monkeypatch):
    lengths = []
    step = own_engine.step

    def looks(cursor, **options):
        lengths.append((cursor.pos, cursor.cached))
        return step(cursor, **options)

    monkeypatch.setattr(own_engine, "step", looks)
    measure(own_engine, no_poll)
    assert set(lengths) == {(64, 63)}


def test_a_small_window_leaves_out_what_it_cannot_hold(own_engine, clock):
    own_engine.context = 40
    cost = measure(own_engine, no_poll)
    assert [n for n, _ in cost.verify] == [1, 2, 4, 8, 16]
    assert cost.v(16) == pytest.approx(26 / 11, abs=1e-3) and max(clock.passes) == 39


def test_a_model_without_trees_is_measured_reading(own_engine, clock):
    own_engine.can -= {"tree"}
    cost = measure(own_engine, no_poll)
    assert cost.v(16) == pytest.approx(26 / 11, abs=1e-3)


def test_the_engine_is_left_as_it_was(own_engine):
    own_engine.step(own_engine.prefill([1, 2, 3]))
    before, poll = own_engine.forwards, own_engine.poll
    measure(own_engine, no_poll)
    assert (own_engine.forwards, own_engine.poll) == (before, poll)
    assert own_engine.cost is None and not torch.is_inference_mode_enabled()


def test_it_stops_before_the_next_pass_when_asked(own_engine, clock):
    calls = count()

    def third() -> None:
        if next(calls) == 3:
            raise Stopped("somebody waits")

    before, poll = own_engine.forwards, own_engine.poll
    with pytest.raises(Stopped, match="somebody waits"):
        measure(own_engine, third)
    assert len(clock.passes) == 3
    assert (own_engine.forwards, own_engine.poll) == (before, poll)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_models_of_all_kinds_can_be_measured(family):
    cost = measure(tiny.engine(family), no_poll)
    assert cost.step_ms > 0 and cost.prefill > 0
    assert [n for n, _ in cost.verify] == list(AT_ONCE) and cost.verify[0] == (1, 1.0)


def test_the_machine_is_named():
    named = machine("cpu")
    assert f"{torch.get_num_threads()} of " in named and len(named) > 10
