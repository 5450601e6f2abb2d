"""Compares what a run has measured with the results that are committed."""

from __future__ import annotations

from typing import Any

from benchmarks._declared import Measure
from benchmarks._text import number, plain, spread

#: Two processes that run the same code differ by so much, by where their memory lies: a ratio that
#: is further from its limit than its own error, but not than this, has not changed.
TOLERANCE = 0.02


def regression(measure: Measure, before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """Return why a target that was met is not met any more; empty where that is not so.

    A target is missed by more than the spread where the better end of the interval in which the
    true median lies misses it too, and by more than a tolerance. A target that was missed before,
    or that has no committed result, is no regression. Where the other side of a ratio has failed, a
    peer that cannot be installed say, there is no ratio to judge; where ours has failed, the target
    is missed.
    """
    if measure.target is None or before is None or not before.get("met"):
        return ""
    what = f"{plain(measure.what)}" + (f" / {plain(measure.beside)}" if measure.beside else "")
    was = f"target {measure.target}, was {number(before['median'])}"
    if "fails" in now:
        failed = now.get("contestant") == measure.ours
        return f"{what}: {was}, fails now: {now['fails']}" if failed else ""
    best = (
        now["least"] * (1 - TOLERANCE)
        if measure.target.bound == "at most"
        else now["most"] * (1 + TOLERANCE)
    )
    if measure.target.is_met(now["median"]) or measure.target.is_met(best):
        return ""
    return f"{what}: {was}, is {spread(now, measure.unit)}"


def regressions(
    measures: list[Measure], before: dict[str, Any], now: dict[str, Any]
) -> list[tuple[str, str]]:
    """Return the names of measures that were met and are not, each with the reason.

    Measures that this run has left out are not judged.
    """
    found = []
    for measure in measures:
        if measure.name in now:
            reason = regression(measure, before.get(measure.name), now[measure.name])
            if reason:
                found.append((measure.name, reason))
    return found
