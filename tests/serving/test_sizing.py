"""What a GPU can serve: monotone, bounded by arithmetic and memory, and Little's law."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import ConfigError
from llavakit.model.cards import CARDS, Card, card
from llavakit.model.presets import PRESETS
from llavakit.model.released import SYSTEMS
from llavakit.model.sizes import empty, sizes
from llavakit.serve import measured, sizing
from llavakit.serve.sizing import GIB, Pace, Request, capacity, fleet, under

SEVEN = SYSTEMS["llava-v1.5-7b"].config
SIZES = sizes(empty(SEVEN))
USUAL = Request(prompt=704, reply=256, views=1)
positive = st.floats(1e-5, 1.0)
PACES = st.builds(Pace, prefill=positive, base=positive, each=positive, least=st.floats(0, 0.1))


def on(kind: str, request: Request = USUAL, cards: int = 1) -> Pace:
    return sizing.pace(SEVEN, SIZES, request, card(kind), cards=cards)


def test_reading_is_two_operations_a_number_and_token() -> None:
    words = sizing.read_operations(SEVEN, SIZES, Request(prompt=128, reply=1, views=0))
    assert words == pytest.approx(2 * SIZES.packable * 128, rel=0.02)
    tower = sizing.read_operations(SEVEN, SIZES, Request(prompt=128, reply=1, views=1)) - words
    run = SIZES.tower - SIZES.idle
    assert tower == pytest.approx(2 * (run + SIZES.projector) * 577, rel=0.1)  # and attention


def test_a_step_reads_every_weight_once() -> None:
    pace = on("A100-80")
    language = 2 * (SIZES.packable + SEVEN.rows * SIZES.width)
    assert pace.base == pytest.approx(language / (card("A100-80").bandwidth * sizing.WRITE), rel=1e-6)
    assert pace.step(1) > pace.base
    assert pace.step(10_000) > 10_000 * pace.each


@given(pace=PACES, reply=st.integers(1, 2000), at_once=st.integers(1, 256))
def test_the_limit_grows_with_the_batch_and_never_beyond_its_bounds(pace: Pace, reply: int, at_once: int) -> None:
    limit = capacity(pace, reply, at_once)
    assert capacity(pace, reply, at_once + 1) >= limit * (1 - 1e-9)
    assert limit <= 1 / pace.prefill
    assert limit <= 1 / (reply * max(pace.each, pace.least)) * (1 + 1e-9)
    assert capacity(pace, reply + 1, at_once) < limit
    assert capacity(pace, reply, 0) == 0


@given(pace=PACES, reply=st.integers(1, 2000), at_once=st.integers(1, 256), share=st.floats(0.01, 0.99))
def test_littles_law(pace: Pace, reply: int, at_once: int, share: float) -> None:
    """What is under way is what comes in a second, times how long it stays; and it fits."""
    load = share * capacity(pace, reply, at_once)
    found = under(pace, reply, at_once, load)
    assert found is not None
    assert found.replies == pytest.approx(load * (found.whole - found.first), rel=1e-6)
    assert found.replies <= at_once * (1 + 1e-6)
    assert found.token >= pace.step(0)
    assert found.first >= pace.prefill
    busy = load * pace.prefill + load * reply / max(found.replies, 1e-12) * pace.step(found.replies)
    assert busy == pytest.approx(1, rel=1e-3)  # it always reads or writes: the batch is as small as the load lets it be
    lighter = under(pace, reply, at_once, load / 2)
    assert lighter is not None
    assert lighter.replies <= found.replies
    assert lighter.token <= found.token * (1 + 1e-6)
    assert lighter.whole <= found.whole * (1 + 1e-6)


@given(pace=PACES, reply=st.integers(1, 2000), at_once=st.integers(1, 256), over=st.floats(1.0, 10))
def test_more_than_the_limit_has_no_steady_state(pace: Pace, reply: int, at_once: int, over: float) -> None:
    assert under(pace, reply, at_once, over * capacity(pace, reply, at_once)) is None


@given(load=st.floats(0.01, 1000), share=st.floats(0.05, 0.95), more=st.floats(1.0, 5.0))
def test_a_fleet_carries_its_load_and_no_smaller_one_does(load: float, share: float, more: float) -> None:
    pace = on("L4")
    made = fleet(pace, USUAL, 8, load, headroom=share)
    assert made.copies * made.limit * share >= load * (1 - 1e-9)
    assert made.copies == 1 or (made.copies - 1) * made.limit * share < load
    assert made.each.share <= share * (1 + 1e-9)
    assert fleet(pace, USUAL, 8, load * more, headroom=share).copies >= made.copies
    assert math.isfinite(made.each.whole)


@pytest.mark.parametrize("kind", [kind for kind in CARDS if kind != "A100-80"])
def test_a_card_better_in_everything_serves_more(kind: str) -> None:
    one, other = card("A100-80"), card(kind)
    a, b = (capacity(on(name), USUAL.reply, 16) for name in ("A100-80", kind))
    if other.serving >= one.serving and other.bandwidth >= one.bandwidth:
        assert b >= a
    if other.serving <= one.serving and other.bandwidth <= one.bandwidth:
        assert b <= a


def test_longer_requests_cost_more_and_memory_bounds_the_batch() -> None:
    longer = Request(prompt=2000, reply=256, views=1)
    assert on("L4", longer).prefill > on("L4").prefill
    assert sizing.most(SIZES, longer, 24 * GIB) < sizing.most(SIZES, USUAL, 24 * GIB)
    count = sizing.most(SIZES, USUAL, 80 * GIB)
    assert SIZES.weights("bf16") + count * SIZES.cache(USUAL.whole) < 80 * GIB
    assert sizing.most(SIZES, USUAL, 8 * GIB) == 0
    assert on("L4", cards=2).prefill < on("L4").prefill


def test_what_cannot_be_planned() -> None:
    for load, share in ((0, 0.7), (-1, 0.7), (1, 1.0), (1, 0)):
        with pytest.raises(ConfigError):
            fleet(on("L4"), USUAL, 8, load, headroom=share)
    with pytest.raises(ConfigError, match="fits"):
        fleet(on("L4"), USUAL, 0, 1)
    with pytest.raises(ConfigError):
        sizing.pace(SEVEN, SIZES, USUAL, Card(memory=1, peak=1))


def test_this_machine_is_measured() -> None:
    pace = measured.measure(PRESETS["tiny"], Request(prompt=96, reply=8, views=1), device="cpu")
    assert pace.prefill > 0
    assert pace.base >= 0
    assert 0 < pace.step(1) <= pace.step(8) < 60
    assert measured.memory("cpu") > GIB


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from llavakit.cli import main

    assert main(["capacity", "llava-v1.5-7b", "--load", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fleet"]["copies"] * told["requests_per_s"] * 0.7 >= 20
    assert main(["capacity", "llava-v1.5-13b", "--gpu", "L4"]) == 0
    assert "not one conversation fits" in capsys.readouterr().out
    assert main(["capacity", "llava-v1.5-7b", "--prompt-tokens", "5000"]) == 2
    assert main(["capacity", "--gpu", "here", "--cards", "2"]) == 2
    assert main(["capacity", "llava-v1.5-13b", "--gpu", "L4", "--load", "1"]) == 2
