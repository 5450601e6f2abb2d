"""The figures of the README: some rows of the results, between two marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks._declared import Benchmark
from benchmarks._page import figure_of
from benchmarks._results import ROOT, Results

README = ROOT / "README.md"

#: Modules and names of measures.
ROWS = (
    ("transactions", "nested-select"),
    ("m2m", "set-toolsets-6"),
    ("watch", "watcher-1000-share"),
    ("watch", "toolsets-6-1000-share"),
    ("testing", "cleanup-toolsets-6"),
)

BETWEEN = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


def table(benchmarks: Mapping[str, Benchmark], results: Results) -> str:
    """Return the rows as a table; one that was not measured says so."""
    lines = ["| measured | beside | median (quartiles) |", "|---|---|---|"]
    for module, name in ROWS:
        [measure] = [each for each in benchmarks[module].measures if each.name == name]
        result = results.get(module, {}).get("measures", {}).get(name)
        figure = figure_of(measure, result) if result else "not measured"
        lines.append(f"| {measure.what} | {measure.beside} | {figure} |")
    return "\n".join(lines) + "\n"


def write(benchmarks: Mapping[str, Benchmark], results: Results, readme: Path = README) -> None:
    """Replace the figures of the README."""
    text = readme.read_text(encoding="utf-8")
    readme.write_text(BETWEEN.sub(lambda _: table(benchmarks, results), text), encoding="utf-8")
