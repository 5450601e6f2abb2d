"""Figures as a line of a terminal and a cell of a table show them."""

from __future__ import annotations

from typing import Any

from benchmarks._declared import Measure


def number(value: float) -> str:
    """Return a figure with as many digits as can be believed: three, or two decimals."""
    if value != 0 and abs(value) < 0.01:
        return f"{value:.2g}"
    if abs(value) < 10:
        return f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}"
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def spread(result: dict[str, Any], unit: str = "") -> str:
    """Return the median of a result, and how far it is known."""
    suffix = f" {unit}" if unit else ""
    least, most = number(result["least"]), number(result["most"])
    return f"{number(result['median'])}{suffix} ({least} to {most})"


def quartiles(result: dict[str, Any]) -> str:
    """Return the quartiles of a result; empty where there is none."""
    return "" if "fails" in result else f"{number(result['low'])} to {number(result['high'])}"


def verdict(result: dict[str, Any]) -> str:
    """Return whether a target is met; empty where there is none."""
    if "met" not in result:
        return ""
    return "met" if result["met"] else "not met"


def plain(markdown: str) -> str:
    """Return a text of a page as a terminal shows it."""
    return markdown.replace("`", "")


def line_of(measure: Measure, result: dict[str, Any]) -> str:
    """Return a result as a line of a terminal."""
    what = plain(f"{measure.what} / {measure.beside}" if measure.beside else measure.what)
    if "fails" in result:
        return f"{what:<72} fails: {result['fails']}"
    mark = f"   target {measure.target}: {verdict(result)}" if measure.target else ""
    return f"{what:<72} {spread(result, measure.unit)}, n {result['n']}{mark}"
