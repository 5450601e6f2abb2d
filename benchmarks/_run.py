"""Runs what a module declares: rounds of its contestants, and from them its figures."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import asyncpg

from benchmarks._declared import Benchmark, Curve, Experiment, Measure, at
from benchmarks._harness import (
    SET_UP_LIMIT,
    TURN_LIMIT,
    Alternation,
    Figures,
    Spread,
    database_url,
    described,
    in_time,
    plain,
)
from benchmarks._text import line_of

ROOT = Path(__file__).resolve().parent.parent

#: What `results.json` has for one measure, one curve, one module.
Result: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of the declared time and rounds is spent.

    Attributes:
        seconds: part of the declared seconds.
        rounds: part of the declared rounds.
        least: rounds that are measured even where the time is over.
        warm_up: rounds before the first that counts, at most.
        largest: no larger size of a curve is measured.
    """

    seconds: float = 1.0
    rounds: float = 1.0
    least: int = 3
    warm_up: int = 5
    largest: float = float("inf")


FULL, QUICK = Effort(), Effort(0.12, 0.5, least=2, warm_up=1, largest=1_000)

#: Seconds that an experiment takes at most, on a machine that is slow, beside three times its own.
LIMIT = 60.0


class Watcher(Protocol):
    """Follows a run: a terminal's progress, or lines."""

    def begin(self, experiment: Experiment, seconds: float) -> None:
        """An experiment begins, which takes about so long."""

    def round(self, done: int) -> None:
        """A round is over."""

    def line(self, text: str) -> None:
        """A result is known."""


class Lines:
    """Prints plain lines."""

    def begin(self, experiment: Experiment, seconds: float) -> None:
        """Print the title, underlined."""
        print(f"\n{experiment.title}\n{'-' * len(experiment.title)}", flush=True)

    def round(self, done: int) -> None:
        """Print nothing."""

    def line(self, text: str) -> None:
        """Print the result."""
        print(text, flush=True)


def load(name: str) -> Benchmark:
    """Return what a module declares."""
    benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    assert isinstance(benchmark, Benchmark)
    return benchmark


def judged(
    measure: Measure, results: Mapping[str, Sequence[Figures]], failed: Mapping[str, str]
) -> Result:
    """Return the figure of a measure, its spread and its verdict, or why there is none."""
    for contestant in filter(None, (measure.ours, measure.theirs)):
        if contestant in failed:
            return {"fails": failed[contestant], "contestant": contestant}
        if contestant not in results:
            raise ValueError(f"{measure.name}: there is no contestant {contestant!r}")
        if not results[contestant]:
            return {"fails": "no round in time", "contestant": contestant}
    ours = [each[measure.of] * measure.scale for each in results[measure.ours]]
    if not measure.theirs:
        spread, medians = Spread.of(ours), {}
    else:
        theirs = [each[measure.of] * measure.scale for each in results[measure.theirs]]
        above, below = (theirs, ours) if measure.inverse else (ours, theirs)
        spread = Spread.of_ratios(above, below)
        medians = {"ours": Spread.of(ours).median, "theirs": Spread.of(theirs).median}
    result: Result = {
        "median": spread.median,
        "low": spread.low,
        "high": spread.high,
        "least": spread.least,
        "most": spread.most,
        "n": len(ours),
        **medians,
    }
    if measure.target is not None:
        result["target"] = str(measure.target)
        result["met"] = measure.target.is_met(spread.median)
    return {key: rounded(value) for key, value in result.items()}


def rounded(value: Any) -> Any:
    """Return a figure with six significant digits, and anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def points_of(
    curve: Curve, results: Mapping[str, Sequence[Figures]], failed: Mapping[str, str]
) -> Result:
    """Return the points of a curve: by series, for each size a figure with its spread, or why
    there is none."""
    series: Result = {}
    for contestant in curve.series:
        series[contestant] = points = []
        for size in curve.sizes:
            name = at(contestant, size)
            if name in failed:
                points.append({"size": size, "fails": failed[name]})
            elif results.get(name):
                spread = Spread.of(each[curve.of] * curve.scale for each in results[name])
                point = {"size": size, "median": spread.median, "low": spread.low}
                point |= {"high": spread.high, "n": len(results[name])}
                points.append({key: rounded(value) for key, value in point.items()})
    return series


async def run_experiment(
    experiment: Experiment, url: str, effort: Effort, watcher: Watcher
) -> tuple[dict[str, Result], dict[str, Result]]:
    """Return the results of its measures and of its curves, by name.

    An experiment that cannot be set up fails with all its measures, and no other does.
    """
    watcher.begin(experiment, experiment.seconds * effort.seconds)
    alternation = Alternation(
        rounds=max(min(experiment.least, effort.least), round(experiment.rounds * effort.rounds)),
        warm_up=min(experiment.warm_up, effort.warm_up),
        least=min(experiment.least, effort.least),
        seconds=experiment.seconds * effort.seconds,
        limit=LIMIT + 3 * experiment.seconds,
        after_round=watcher.round,
    )
    left_out = {
        at(series, size)
        for curve in experiment.curves
        for series in curve.series
        for size in curve.sizes
        if size > effort.largest
    }
    failed = alternation.failures
    try:
        stack = AsyncExitStack()
        try:
            async with in_time(SET_UP_LIMIT, "not set up"):
                contestants = await stack.enter_async_context(experiment.set_up(url))
            results = await alternation.run(
                {name: turn for name, turn in contestants.items() if name not in left_out}
            )
        finally:
            async with in_time(SET_UP_LIMIT, "not removed"):
                await stack.aclose()
    except Exception as error:
        failed |= dict.fromkeys(contestants_of(experiment), described(error))
        results = {}
    measures = {each.name: judged(each, results, failed) for each in experiment.measures}
    curves = {each.name: points_of(each, results, failed) for each in experiment.curves}
    for measure in experiment.measures:
        watcher.line(line_of(measure, measures[measure.name]))
    for curve in experiment.curves:
        for contestant, points in curves[curve.name].items():
            for point in points:
                figure = point.get("fails") or f"{point['median']:.3g} {curve.y}, n {point['n']}"
                watcher.line(f"{curve.series[contestant]:<28} {point['size']:>7}  {figure}")
    return measures, curves


def contestants_of(experiment: Experiment) -> set[str]:
    """Return the contestants that an experiment's measures and curves name."""
    measured = {name for each in experiment.measures for name in (each.ours, each.theirs) if name}
    return measured | {
        at(series, size)
        for curve in experiment.curves
        for series in curve.series
        for size in curve.sizes
    }


async def run_benchmark(
    benchmark: Benchmark, effort: Effort, watcher: Watcher, *, quick: bool = False
) -> Result:
    """Run the experiments of a module on one server and return what `results.json` has of it."""
    start = time.monotonic()
    with database_url(**benchmark.settings) as url:
        about = await environment(url, benchmark.packages, quick=quick)
        measures: dict[str, Result] = {}
        curves: dict[str, Result] = {}
        for experiment in benchmark.experiments:
            if quick and not experiment.quick:
                continue
            one, other = await run_experiment(experiment, url, effort, watcher)
            measures |= one
            curves |= other
    about["load"] = f"{about['load']} to {os.getloadavg()[0]:.1f}"
    about["seconds"] = round(time.monotonic() - start)
    return {"environment": about, "measures": measures, "curves": curves}


def failed_benchmark(benchmark: Benchmark, error: Exception, *, quick: bool = False) -> Result:
    """Return the results of a module that has none, with the error in place of each figure."""
    fails = {"fails": described(error)}

    def points(curve: Curve) -> Result:
        return {name: [fails | {"size": size} for size in curve.sizes] for name in curve.series}

    return {
        "environment": surroundings("none", benchmark.packages, quick=quick) | {"seconds": 0},
        "measures": {each.name: fails | {"contestant": each.ours} for each in benchmark.measures},
        "curves": {each.name: points(each) for each in benchmark.curves},
    }


async def environment(url: str, packages: Sequence[str], *, quick: bool) -> Result:
    """Return what figures depend on: the server, the machine, the versions, the date."""
    connection = await asyncpg.connect(plain(url), timeout=TURN_LIMIT)
    try:
        server = await connection.fetchval("SHOW server_version")
    finally:
        await connection.close()
    return surroundings(server.split()[0], packages, quick=quick)


def surroundings(server: str, packages: Sequence[str], *, quick: bool) -> Result:
    """Return the same, given the version of the server."""
    import pgtoolset

    versions = {"Python": platform.python_version(), "PostgreSQL": server}
    for package in dict.fromkeys(("sqlalchemy", "asyncpg", *packages)):
        versions[package] = version_of(package)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "versions": versions,
        "pgtoolset": f"{version_of('pgtoolset')}, commit {commit()}, {pgtoolset.implementation}",
        "quick": quick,
    }


def version_of(package: str) -> str:
    """Return the version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the commit of the checkout, with a mark where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src")
        return (git("rev-parse", "--short=9", "HEAD") or "unknown") + ("+" if changed else "")
    except FileNotFoundError:
        return "unknown"


def alone(name: str) -> None:
    """Run one module by its name, as `python -m benchmarks.NAME`, and print its figures."""
    benchmark = load(name)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=benchmark.about
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and wider figures")
    parser.add_argument("--only", metavar="WORD", help="experiments whose title has this word")
    options = parser.parse_args()
    chosen = tuple(
        each
        for each in benchmark.experiments
        if (options.only or "").casefold() in each.title.casefold()
    )
    if not chosen:
        titles = ", ".join(repr(each.title) for each in benchmark.experiments)
        parser.error(f"no experiment has {options.only!r} in its title; there are {titles}")
    benchmark = dataclasses.replace(benchmark, experiments=chosen)
    effort = QUICK if options.quick else FULL
    result = asyncio.run(run_benchmark(benchmark, effort, Lines(), quick=options.quick))
    about = result["environment"]
    versions = ", ".join(" ".join(pair) for pair in about["versions"].items())
    print(f"\n{about['machine']}, load {about['load']}; {versions}; pgtoolset {about['pgtoolset']}")
    sys.stdout.flush()
