"""The page of results: tables, pictures, and what they depend on. It is made, never edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._declared import Benchmark, Curve, Measure
from benchmarks._peers import LABELS
from benchmarks._results import Results
from benchmarks._text import number, quartiles, spread, verdict

HEAD = """\
# Benchmarks

Read this page to see what pgtoolset costs beside code by hand, {peers}.

`make bench` measures all of it again on your machine, and compares it with this page. It fails
where a target that was met is missed by more than the error of the figure. `make bench QUICK=1`
takes a few minutes, with fewer rounds and without the largest sizes; `make bench UPDATE=1` writes
this page. [benchmarks/README.md](../benchmarks/README.md) says how a measure is added.

## How to read it

All contestants of an experiment run once in every round, in an order drawn again for each round.
Only figures of one round are divided by one another: a machine that becomes slower for a while
becomes slower for all. A table shows the median; in brackets, between which two figures the true
median lies with a confidence of 95 % (fewer than six rounds cannot say so much: all their figures
lie between); the quartiles of single turns; and n, the number of rounds. A ratio is the first
column divided by the second. A *control* divides a contestant by itself: the distance of its median
from 1 is the error of this machine, and a figure that is closer than that to its target says
nothing.

CPU time is that of the client and of its PostgreSQL processes together, where a row does not say
otherwise. The pictures draw medians, with a band between the quartiles; both axes are logarithmic.
"""


def render(benchmarks: Mapping[str, Benchmark], results: Results) -> str:
    """Return the page.

    Args:
        benchmarks: the modules, in the order of the page.
        results: what was measured; a measure without a result is shown as such.
    """
    parts = [HEAD.format(peers=f"{', '.join(LABELS.values())} and raw drivers")]
    parts += [targets(benchmarks, results), surroundings(benchmarks, results)]
    for name, benchmark in benchmarks.items():
        parts.append(section(name, benchmark, results.get(name, {})))
    return "\n".join(parts)


def targets(benchmarks: Mapping[str, Benchmark], results: Results) -> str:
    """Return the paragraph that counts the targets, and the table of those that are missed."""
    count, missed = 0, []
    for name, benchmark in benchmarks.items():
        measures = results.get(name, {}).get("measures", {})
        for measure in benchmark.measures:
            result = measures.get(measure.name)
            if measure.target is None or result is None:
                continue
            count += 1
            if not result.get("met"):
                missed.append(
                    f"| {what_of(measure)} | {measure.target} | {figure_of(measure, result)} |"
                )
    lines = ["## Targets", "", f"Of {count} targets, {count - len(missed)} are met."]
    if missed:
        lines += ["Missed:", "", "| measured | target | is |", "|---|---|---|", *missed]
    sources = {
        measure.target.source
        for benchmark in benchmarks.values()
        for measure in benchmark.measures
        if measure.target
    }
    lines += ["", f"Where the limits come from: {'; '.join(sorted(sources, key=len))}.", ""]
    return "\n".join(lines)


def surroundings(benchmarks: Mapping[str, Benchmark], results: Results) -> str:
    """Return what the figures depend on: the machine, the versions and the dates."""
    lines = ["## Machine and versions", ""]
    environments = {name: results[name]["environment"] for name in benchmarks if name in results}
    machines = dict.fromkeys(each["machine"] for each in environments.values())
    lines += [f"- {machine}" for machine in machines]
    versions: dict[str, set[str]] = {}
    for each in environments.values():
        for package, version in each["versions"].items():
            versions.setdefault(package, set()).add(version)
    lines.append(
        "- " + ", ".join(f"{name} {'/'.join(sorted(versions[name]))}" for name in versions)
    )
    lines += ["", "| part | date | load | seconds | pgtoolset |", "|---|---|---|---|---|"]
    for name, each in environments.items():
        quick = ", *quick*" if each.get("quick") else ""
        lines.append(
            f"| {benchmarks[name].title} | {each['date']}{quick} | {each['load']} "
            f"| {each['seconds']} | {each['pgtoolset']} |"
        )
    if any(each.get("quick") for each in environments.values()):
        lines += ["", "A part that is marked *quick* has few rounds: its figures are provisional."]
    return "\n".join([*lines, ""])


def section(name: str, benchmark: Benchmark, results: dict[str, Any]) -> str:
    """Return one module's part of the page."""
    lines = [f"## {benchmark.title}", "", f"{benchmark.about} `python -m benchmarks.{name}`", ""]
    if not results:
        return "\n".join([*lines, "Not measured.", ""])
    for experiment in benchmark.experiments:
        lines += [f"### {experiment.title}", ""]
        if experiment.note:
            lines += [experiment.note, ""]
        if experiment.measures:
            lines += [*table(experiment.measures, results["measures"]), ""]
        for curve in experiment.curves:
            lines += [*picture(curve, results["curves"].get(curve.name, {})), ""]
    return "\n".join(lines)


def what_of(measure: Measure) -> str:
    """Return what a measure is about, in one cell."""
    return f"{measure.what} / {measure.beside}" if measure.beside else measure.what


def figure_of(measure: Measure, result: dict[str, Any]) -> str:
    """Return a result in one cell."""
    if "fails" in result:
        return f"fails: {cell(result['fails'])}"
    return spread(result, measure.unit)


def cell(text: str) -> str:
    """Return a text of others, an error's message say, as a cell of a table can hold it."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return text


def table(measures: tuple[Measure, ...], results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| measured | beside | median (95 %) | quartiles | n | target |"
    yield "|---|---|---|---|---|---|"
    for measure in measures:
        result = results.get(measure.name)
        if result is None:
            limit = measure.target or ""
            yield f"| {measure.what} | {measure.beside} | not measured | | | {limit} |"
            continue
        judged = verdict(result)
        if judged == "not met":
            judged = "**not met**"
        target = f"{measure.target}: {judged or 'not measured'}" if measure.target else ""
        yield (
            f"| {measure.what} | {measure.beside} | {figure_of(measure, result)} "
            f"| {quartiles(result)} | {result.get('n', '')} | {target} |"
        )


def picture(curve: Curve, points: dict[str, Any]) -> Iterator[str]:
    """Yield a picture, and its figures as a table."""
    if not points:
        yield "Not measured."
        return
    yield f"![{alternative(curve, points)}](images/bench/{curve.name}.svg)"
    yield ""
    yield f"In {curve.y}, by {curve.x}:"
    yield ""
    yield "| | " + " | ".join(f"{size:,}" for size in curve.sizes) + " |"
    yield "|---" * (len(curve.sizes) + 1) + "|"
    failures = {}
    for contestant, label in curve.series.items():
        cells = {point["size"]: point for point in points.get(contestant, [])}
        shown = []
        for size in curve.sizes:
            point = cells.get(size, {})
            if "fails" in point:
                failures[label] = cell(point["fails"])
                shown.append("fails")
            else:
                shown.append(number(point["median"]) if point else "not measured")
        yield f"| {label} | " + " | ".join(shown) + " |"
    if failures:
        yield ""
        yield ". ".join(f"{label} fails: {error}" for label, error in failures.items()) + "."


def alternative(curve: Curve, points: dict[str, Any]) -> str:
    """Return what a picture shows, in words."""
    ends = []
    for contestant, label in curve.series.items():
        measured = [point for point in points.get(contestant, []) if "fails" not in point]
        if measured:
            first, last = measured[0], measured[-1]
            ends.append(
                f"{label} from {number(first['median'])} at {first['size']:,} to "
                f"{number(last['median'])} at {last['size']:,}"
            )
    return f"{curve.title}, in {curve.y} by {curve.x}: {'; '.join(ends)}"
