"""Figures that other pages quote: some rows of the results, between two marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks._declared import Benchmark
from benchmarks._page import figure_of
from benchmarks._results import ROOT, Results

README = ROOT / "README.md"

#: By page, its tables one after the other: modules and names of measures.
QUOTED: dict[Path, tuple[tuple[tuple[str, str], ...], ...]] = {
    README: (
        (
            ("transactions", "nested-select"),
            ("m2m", "set-toolsets-6"),
            ("watch", "watcher-1000-share"),
            ("watch", "toolsets-6-1000-share"),
            ("testing", "cleanup-toolsets-6"),
        ),
    ),
}

BETWEEN = re.compile(r"(?<=<!-- figures -->\n)(?:(?!<!--).)*(?=<!-- end of figures -->)", re.DOTALL)


def tables(page: Path, benchmarks: Mapping[str, Benchmark], results: Results) -> list[str]:
    """Return what a page quotes; a row that was not measured says so."""
    return [table(rows, benchmarks, results) for rows in QUOTED[page]]


def table(
    rows: tuple[tuple[str, str], ...], benchmarks: Mapping[str, Benchmark], results: Results
) -> str:
    """Return some rows as a table."""
    lines = ["| measured | beside | median (95 %) |", "|---|---|---|"]
    for module, name in rows:
        [measure] = [each for each in benchmarks[module].measures if each.name == name]
        result = results.get(module, {}).get("measures", {}).get(name)
        figure = figure_of(measure, result) if result else "not measured"
        lines.append(f"| {measure.what} | {measure.beside} | {figure} |")
    return "\n".join(lines) + "\n"


def write(benchmarks: Mapping[str, Benchmark], results: Results) -> None:
    """Replace the figures of all pages."""
    for page in QUOTED:
        text = page.read_text(encoding="utf-8")
        others = BETWEEN.split(text)
        made = [*tables(page, benchmarks, results), ""]
        pairs = zip(others, made, strict=True)
        page.write_text("".join(each for pair in pairs for each in pair), encoding="utf-8")
