"""What counts as a target that is not met any more."""

from __future__ import annotations

import random
from typing import Any

import pytest
from benchmarks._declared import Measure, at_least, at_most, with_cpu
from benchmarks._harness import Spread
from benchmarks._judge import regression, regressions
from benchmarks._run import judged

pytestmark = pytest.mark.once

COST = Measure("cost", "`ours`", "ours", "theirs", "theirs", target=at_most(1.1))
SPEED = Measure("speed", "throughput", "ours", "theirs", "theirs", target=at_least(0.9))
INFORMATION = Measure("info", "`ours`", "ours", "theirs", "theirs")


def result(least: float, median: float, most: float, met: bool = True) -> dict[str, Any]:
    quartiles = {"low": 0.0, "high": 1000.0}  # they decide nothing
    return {**quartiles, "least": least, "median": median, "most": most, "n": 9, "met": met}


MET, MISSED = result(1.0, 1.0, 1.0), result(1.0, 1.0, 1.0, met=False)


@pytest.mark.parametrize(
    ("measure", "now", "is_lost"),
    [
        (COST, result(1.00, 1.05, 1.2), False),
        (COST, result(1.08, 1.15, 1.3), False),  # within the error of the figure
        (COST, result(1.12, 1.15, 1.3), False),  # within that of a process
        (COST, result(1.13, 1.15, 1.3), True),
        (SPEED, result(0.85, 0.95, 1.0), False),
        (SPEED, result(0.80, 0.85, 0.92), False),
        (SPEED, result(0.80, 0.85, 0.89), False),
        (SPEED, result(0.80, 0.85, 0.88), True),
        (SPEED, result(2.00, 3.00, 4.0), False),
        (INFORMATION, result(9.0, 9.0, 9.0), False),
    ],
)
def test_spread(measure: Measure, now: dict[str, Any], is_lost: bool) -> None:
    """A target is lost where the better end of its error misses it too, in its own direction."""
    assert bool(regression(measure, MET, now)) is is_lost


@pytest.mark.parametrize("before", [None, MISSED, {"fails": "gone", "contestant": "ours"}])
def test_only_what_was_met(before: dict[str, Any] | None) -> None:
    """A target that was not met, or not measured, before is no regression."""
    assert regression(COST, before, result(5, 5, 5)) == ""


@pytest.mark.parametrize(("contestant", "is_lost"), [("ours", True), ("theirs", False)])
def test_failures(contestant: str, is_lost: bool) -> None:
    """A target is lost where our side fails, and not where the other side does."""
    now = {"fails": "ValueError: no", "contestant": contestant}
    assert bool(regression(COST, MET, now)) is is_lost


def test_names_the_ratio() -> None:
    """The reason names the ratio, its target and its spread, as a terminal shows them."""
    [(name, reason)] = regressions([COST, SPEED], {"cost": MET}, {"cost": result(2, 3, 4)})
    assert name == "cost"
    assert reason == "ours / theirs: target at most 1.1, was 1.000, is 3.00 (2.00 to 4.00)"


def test_left_out() -> None:
    """A measure that a quick run leaves out is not judged."""
    assert regressions([COST, SPEED], {"cost": MET, "speed": MET}, {}) == []


def test_ratios_of_one_round() -> None:
    """Figures of the same round are divided, by ours or by theirs, and the median is judged."""
    results = {"ours": [{"wall": 1.0}, {"wall": 4.0}, {"wall": 9.0}], "theirs": [{"wall": 2.0}] * 3}
    assert judged(COST, results, {}) == {
        "median": 2.0,
        "low": 1.25,
        "high": 3.25,
        "least": 0.5,
        "most": 4.5,
        "n": 3,
        "ours": 4.0,
        "theirs": 2.0,
        "target": "at most 1.1",
        "met": False,
    }
    inverse = Measure("i", "i", "ours", "b", "theirs", inverse=True, target=at_least(0.5))
    assert judged(inverse, results, {})["median"] == 0.5
    assert judged(inverse, results, {})["met"] is True


@pytest.mark.parametrize("count", [1, 2, 5, 6, 10, 100, 1000])
def test_error_of_a_median(count: int) -> None:
    """The error of a median is the interval that holds the true one in 95 of 100 runs; of fewer
    than six figures it is all of them."""
    draw = random.Random(count)
    held = 0
    for _ in range(200):
        figures = [draw.lognormvariate(0, 0.5) for _ in range(count)]
        spread = Spread.of(figures)
        assert spread.least <= spread.median <= spread.most
        assert count >= 6 or (spread.least, spread.most) == (min(figures), max(figures))
        held += spread.least <= 1 <= spread.most
    assert count < 6 or held >= 180
    assert count < 100 or (spread.most - spread.least) < 0.5 * (spread.high - spread.low)


def test_own_figure() -> None:
    """A figure of its own has a unit and a scale."""
    own = Measure("own", "own", "ours", of="share", unit="%", scale=100, target=at_most(10))
    one = judged(own, {"ours": [{"share": 0.2}]}, {})
    assert (one["median"], one["low"], one["high"], one["n"], one["met"]) == (20, 20, 20, 1, False)


@pytest.mark.parametrize(
    "options", [{}, {"theirs": "b"}, {"beside": "b"}, {"beside": "b", "theirs": "b", "unit": "ms"}]
)
def test_declarations(options: dict[str, Any]) -> None:
    """A measure is a ratio with another contestant, or a figure with a unit; nothing between."""
    with pytest.raises(ValueError, match=r"^a: a ratio has"):
        Measure("a", "a", "ours", **options)


def test_unknown_contestant() -> None:
    """A measure of a contestant that its experiment does not have is a fault of the module."""
    with pytest.raises(ValueError, match="there is no contestant 'theirs'"):
        judged(COST, {"ours": [{"wall": 1.0}]}, {})


def test_cpu_beside_wall() -> None:
    """The CPU time beside a wall time has a target only where it is asked for."""
    wall, cpu = with_cpu(COST)
    assert (wall.target, cpu.target, cpu.name, cpu.of) == (COST.target, None, "cost-cpu", "cpu")
    assert with_cpu(COST, target=True)[1].target == COST.target
