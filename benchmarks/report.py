"""All benchmarks as one page with tables and pictures: `make bench`, `python -m benchmarks.report`.

A run is compared with the results that are committed. The exit code is 1 where a target that was
met is missed by more than its spread, and 2 for a bad command.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import asyncpg

from benchmarks import _page, _plots, _quoted, _results
from benchmarks._declared import Benchmark, Experiment
from benchmarks._harness import described
from benchmarks._judge import regressions
from benchmarks._run import FULL, QUICK, Lines, Watcher, failed_benchmark, load, run_benchmark
from pgtoolset.errors import PgToolsetError

#: The modules, in the order of the page. Each declares a `BENCHMARK`.
MODULES = (
    "sessions",
    "units",
    "observe",
    "transactions",
    "m2m",
    "locks",
    "watch",
    "connections",
    "replicas",
    "testing",
    "plugin",
    "native",
    "page",
    "imports",
)

#: Where a run that commits nothing writes.
DRAFT = _results.ROOT / "build" / "bench"

#: What is raised where no server can be started, or reached.
NO_SERVER = (PgToolsetError, asyncpg.PostgresError, OSError)


class Terminal:
    """Shows results above a bar of progress."""

    def __init__(self, names: Sequence[str], seconds: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = ("[progress.description]{task.description}", "{task.percentage:>3.0f} %")
        self._progress = Progress(
            TextColumn(columns[0]),
            BarColumn(),
            TextColumn(columns[1]),
            TimeElapsedColumn(),
            console=Console(highlight=False),
        )
        self._task = self._progress.add_task(f"{len(names)} modules", total=seconds)
        self._passed = 0.0
        self._begun = time.monotonic()
        self._share = 0.0

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, experiment: Experiment, seconds: float) -> None:
        """Show the title; the time of the one before is over."""
        self._passed += self._share
        self._share, self._begun = seconds, time.monotonic()
        title = experiment.title.replace("`", "")
        self._progress.update(self._task, description=title[:48], completed=self._passed)
        self._progress.console.print(f"\n{title}", style="bold", markup=False)

    def round(self, done: int) -> None:
        """Move the bar."""
        part = min(self._share, time.monotonic() - self._begun)
        self._progress.update(self._task, completed=self._passed + part)

    def line(self, text: str) -> None:
        """Print the result above the bar."""
        self._progress.console.print(text, markup=False, soft_wrap=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, or end with one line and the exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Measure, compare with the committed results, and write a page with pictures.",
        epilog=f"modules: {', '.join(MODULES)}",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a module; all without one")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no large sizes")
    parser.add_argument(
        "--update",
        action="store_true",
        help="rewrite results, page, pictures, and the figures that other pages quote",
    )
    parser.add_argument(
        "--render", action="store_true", help="write page and pictures again; measure nothing"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in MODULES]
    if unknown:
        parser.exit(2, f"{parser.prog}: no module {unknown[0]!r}; there are {', '.join(MODULES)}\n")
    if os.environ.get("DRIVER", "asyncpg") != "asyncpg":
        parser.exit(2, f"{parser.prog}: the results are those of asyncpg; unset DRIVER\n")
    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, f'{parser.prog}: no matplotlib; pip install -e ".[dev,bench]"\n')
    options.names = list(dict.fromkeys(options.names)) or list(MODULES)
    return options


def watcher_for(benchmarks: dict[str, Benchmark], names: list[str], quick: bool) -> Watcher:
    """Return progress for a terminal, and plain lines for anything else."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return Lines()
    part = (QUICK if quick else FULL).seconds
    chosen = [each for name in names for each in benchmarks[name].experiments]
    seconds = sum(each.seconds * part for each in chosen if each.quick or not quick)
    return Terminal(names, seconds)


def measure(
    benchmarks: dict[str, Benchmark],
    names: list[str],
    keep: Callable[[_results.Results], None],
    *,
    quick: bool,
) -> _results.Results:
    """Run modules one after the other, and keep the results of each as it ends.

    A module that fails has its error in place of each figure. Where the first one does, and has no
    server, there is nothing to measure.
    """
    watcher = watcher_for(benchmarks, names, quick)
    effort = QUICK if quick else FULL
    results: _results.Results = {}
    with watcher if isinstance(watcher, Terminal) else nullcontext():
        for name in names:
            done = run_benchmark(benchmarks[name], effort, watcher, quick=quick)
            try:
                results[name] = asyncio.run(done)
            except Exception as error:
                if not results and isinstance(error, NO_SERVER):
                    raise
                watcher.line(f"{name} fails: {described(error)}")
                results[name] = failed_benchmark(benchmarks[name], error, quick=quick)
            keep(results)
    return results


def write(
    results: _results.Results, benchmarks: dict[str, Benchmark], page: Path, pictures: Path
) -> None:
    """Write the page and its pictures."""
    for name, benchmark in benchmarks.items():
        for curve in benchmark.curves:
            points = results.get(name, {}).get("curves", {}).get(curve.name)
            if points:
                _plots.draw(curve, points, pictures)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page.render(benchmarks, results), encoding="utf-8")


def commit(results: _results.Results, benchmarks: dict[str, Benchmark]) -> None:
    """Write what is committed beside the results: page, pictures, and figures of other pages."""
    write(results, benchmarks, _results.PAGE, _results.PICTURES)
    _quoted.write(benchmarks, results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    try:
        before = _results.load(_results.COMMITTED)
    except _results.ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    benchmarks = {name: load(name) for name in MODULES}
    if options.render:
        commit(before, benchmarks)
        print(f"wrote {_results.PAGE}")
        return 0
    measured = dict(before)

    def keep(results: _results.Results) -> None:
        _results.save(DRAFT / "results.json", results)
        if options.update:
            for name, module in results.items():
                # What a quick run leaves out keeps its figures.
                old = before.get(name, {}) if options.quick else {}
                kept = {part: old.get(part, {}) | module[part] for part in ("measures", "curves")}
                measured[name] = module | kept
            known = {name: measured[name] for name in MODULES if name in measured}
            _results.save(_results.COMMITTED, known)

    try:
        results = measure(benchmarks, options.names, keep, quick=options.quick)
    except NO_SERVER as error:
        print(f"no PostgreSQL to measure on: {described(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the modules that are done stand in {DRAFT}", file=sys.stderr)
        return 130
    lost = [
        f"{name} {reason}"
        for module in options.names
        for name, reason in regressions(
            benchmarks[module].measures,
            before.get(module, {}).get("measures", {}),
            results[module]["measures"],
        )
    ]
    if options.update:
        commit(measured, benchmarks)
        print(f"\nwrote {_results.COMMITTED} and {_results.PAGE}")
    else:
        write(results, benchmarks, DRAFT / "benchmarks.md", DRAFT / "images" / "bench")
        print(f"\nwrote {DRAFT / 'benchmarks.md'}")
    for reason in lost:
        print(f"not met any more: {reason}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
