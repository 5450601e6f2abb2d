"""Compiled against interpreted, for the two hot modules. Run as `python -m benchmarks.native` where
both are there: `make bench` installs them.

CPU time of this process, the two in alternation on the same objects:

- the comparator: the text of 10,000 rows against that of the look before, with 10 rows changed in
  place, with 10 moved to the end as an UPDATE may do it, with a tenth changed, and with nothing
  changed;
- the builder: the columns of 10,000 associations from instances, from keys, from pairs;
- both for 1 row, where a call is all that there is to save;
- end to end: a tick of a watcher with 10,000 rows, quiet and with 10 changes, and `m2m_add` of
  10,000, each in a process of its own under PGTOOLSET_IMPL.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from benchmarks import m2m
from benchmarks._declared import Benchmark, Experiment, Measure, at_least
from benchmarks._harness import Figures, Spread, Turn, clocked, output_of
from benchmarks._orders import Order, orders
from benchmarks._run import alone
from pgtoolset import RowWatcher, m2m_add
from pgtoolset._native import associations, comparator
from pgtoolset.watch import _groups

MANY = 10_000
#: Calls of a turn, which is a few milliseconds: a longer one meets more of what disturbs it.
CALLS = {MANY: 1, 1: 2_000}


def timed(function: Callable[..., Any], arguments: tuple[Any, ...], calls: int) -> Turn:
    async def run() -> Figures:
        with clocked(calls) as figures:
            for _ in range(calls):
                function(*arguments)
        return figures

    return run


def cases() -> dict[str, tuple[str, tuple[Any, ...], int]]:
    """By name: the function, its arguments, and the number of their rows."""
    lines = [
        b'(%d,new,"2026-01-01 12:00:00+00",%d.50)' % (number, number) for number in range(MANY)
    ]
    some = set(range(500, MANY, 1000))
    changed = [line.replace(b"new", b"paid") for line in lines]
    after = {
        "10 in place": [changed[at] if at in some else line for at, line in enumerate(lines)],
        "10 moved": [line for at, line in enumerate(lines) if at not in some]
        + [changed[at] for at in sorted(some)],
        "a tenth": [changed[at] if at % 10 == 0 else line for at, line in enumerate(lines)],
        "nothing": list(lines),
    }
    tags = [m2m.known(m2m.Tag(id=number)) for number in range(1, MANY + 1)]
    keys, one, both = list(range(1, MANY + 1)), (0,), (m2m.Tag, m2m.Tag)
    pairs, of_keys = list(zip(keys, tags, strict=True)), list(zip(keys, keys, strict=True))
    before = b"\n".join(lines)
    made: dict[str, tuple[str, tuple[Any, ...], int]] = {
        name: ("changed_lines", (before, b"\n".join(rows)), MANY) for name, rows in after.items()
    }
    tails = ((1, 1), (one, one))
    made |= {
        "keys": ("key_columns", (m2m.Tag, (), keys, 1, one), MANY),
        "instances": ("key_columns", (m2m.Tag, tags, (), 1, one), MANY),
        "pairs": ("pair_columns", (both, pairs, *tails), MANY),
        "pairs of keys": ("pair_columns", (both, of_keys, *tails), MANY),
        "1 line": ("changed_lines", (lines[0], changed[0]), 1),
        "1 row": ("changed_rows", ([(1, "a", b"a")], {1: (1, "b", b"b")}, 1), 1),
        "1 key": ("key_columns", (m2m.Tag, (), [1], 1, one), 1),
        "1 instance": ("key_columns", (m2m.Tag, tags[:1], (), 1, one), 1),
        "1 pair": ("pair_columns", (both, pairs[:1], *tails), 1),
    }
    return made


@asynccontextmanager
async def modules(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    from pgtoolset._native import associations_c, comparator_c

    turns: dict[str, Turn] = {}
    for name, (function, arguments, rows) in cases().items():
        of_rows = hasattr(comparator, function)
        interpreted, compiled = (
            (comparator, comparator_c) if of_rows else (associations, associations_c)
        )
        turns[f"{name}, python"] = timed(getattr(interpreted, function), arguments, CALLS[rows])
        turns[f"{name}, c"] = timed(getattr(compiled, function), arguments, CALLS[rows])
    yield turns


async def looks(engine: AsyncEngine, ticks: int, changes: int) -> float:
    """The CPU time of a look at 10,000 rows of which so many have changed."""
    seconds: list[float] = []
    original = _groups.Group.tick

    async def look(self: _groups.Group, *arguments: Any, **options: Any) -> None:
        start = time.process_time()
        await original(self, *arguments, **options)
        seconds.append(time.process_time() - start)

    table = Order.__tablename__
    async with RowWatcher(engine, interval=0.05) as watcher, engine.connect() as connection:
        connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        streams = [watcher.changes(Order, number) for number in range(1, MANY + 1)]
        await streams[-1].__aenter__()
        await asyncio.sleep(1)
        _groups.Group.tick = look  # type: ignore[method-assign]
        try:
            for number in range(ticks):
                if changes:
                    condition = f"id % {MANY // changes} = {number % 7}"
                    await connection.execute(
                        text(f"UPDATE {table} SET status = status || '!' WHERE {condition}")
                    )
                await asyncio.sleep(0.1)
        finally:
            _groups.Group.tick = original  # type: ignore[method-assign]
    return Spread.of(seconds).median if not changes else sum(seconds) / ticks


async def adds(engine: AsyncEngine, calls: int) -> float:
    """The CPU time of `m2m_add` of 10,000 instances, rolled back."""
    async with AsyncSession(engine) as session:
        bench = m2m.Bench(engine, session)
        related = bench.related(MANY, replace=False)
        seconds = []
        for _ in range(calls):
            await session.execute(text("SELECT 1"))
            start = time.process_time()
            await m2m_add(session, bench.post, m2m.Post.tags, *related)
            seconds.append(time.process_time() - start)
            await session.rollback()
        return Spread.of(seconds).median


async def child(url: str) -> None:
    """One round of what is measured end to end, as JSON."""
    engine = create_async_engine(url)
    quiet, busy = await looks(engine, 10, 0), await looks(engine, 5, 10)
    print(json.dumps({"quiet": quiet, "busy": busy, "add": await adds(engine, 5)}))
    await engine.dispose()


async def under(implementation: str, url: str) -> Figures:
    """A round in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.native", "--child", url]
    output = await output_of(command, os.environ | {"PGTOOLSET_IMPL": implementation})
    figures: Figures = json.loads(output)
    return figures


@asynccontextmanager
async def end_to_end(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with orders(url), m2m.filled_tables(url):
        yield {each: partial(under, each, url) for each in ("python", "c")}


def faster(name: str, what: str, case: str, limit: float | None = None) -> Measure:
    """How many times as long the interpreted function takes."""
    return Measure(
        name,
        f"{what}, interpreted",
        f"{case}, c",
        "compiled",
        f"{case}, python",
        of="cpu",
        inverse=True,
        target=None if limit is None else at_least(limit),
    )


def whole(name: str, what: str) -> Measure:
    """The same for a whole call."""
    return Measure(name, f"{what}, interpreted", "c", "compiled", "python", of=name, inverse=True)


OF_INSTANCES = (
    "The key of an instance is in the state that SQLAlchemy keeps for it, a Python object in the "
    "instance's dictionary. Both implementations look up that state, its key and its mark of a "
    "deletion. At its fastest, compiled is about 80 ns for each instance: 59 for these three "
    "look-ups, and 21 for the class, the key's tuples and the list. Interpreted is about 160. For "
    "three times the speed, all of it would have to take 53, which is less than the look-ups "
    "alone; and where these objects are no longer in the caches, both wait for memory."
)

BENCHMARK = Benchmark(
    title="Compiled modules",
    about="CPU time of the interpreted modules, divided by that of the compiled ones.",
    experiments=(
        Experiment(
            "The two modules",
            modules,
            (
                faster(
                    "comparator-in-place",
                    "comparator, 10 of 10,000 rows changed in place",
                    "10 in place",
                    3,
                ),
                faster(
                    "comparator-moved",
                    "comparator, 10 of 10,000 rows changed and moved",
                    "10 moved",
                    3,
                ),
                faster(
                    "comparator-tenth", "comparator, a tenth of 10,000 rows changed", "a tenth", 3
                ),
                faster("comparator-nothing", "comparator, nothing changed", "nothing"),
                faster("builder-keys", "builder, 10,000 keys", "keys", 3),
                faster("builder-instances", "builder, 10,000 instances", "instances", 3),
                faster(
                    "builder-pairs", "builder, 10,000 pairs of a key and an instance", "pairs", 3
                ),
                faster(
                    "builder-pairs-of-keys", "builder, 10,000 pairs of keys", "pairs of keys", 3
                ),
                faster("comparator-one", "comparator, 1 row", "1 line", 1),
                faster("comparator-one-row", "comparator, values of 1 row", "1 row", 1),
                faster("builder-one-key", "builder, 1 key", "1 key", 1),
                faster("builder-one-instance", "builder, 1 instance", "1 instance", 1),
                faster("builder-one-pair", "builder, 1 pair", "1 pair", 1),
            ),
            seconds=16,
            rounds=400,
            note=OF_INSTANCES,
        ),
        Experiment(
            "End to end",
            end_to_end,
            (
                whole("quiet", "a look at 10,000 rows, nothing changed"),
                whole("busy", "a look at 10,000 rows, 10 changed"),
                whole("add", "`m2m_add` of 10,000 instances"),
            ),
            seconds=12,
            warm_up=1,
            quick=False,
        ),
    ),
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        asyncio.run(child(sys.argv[2]))
    else:
        alone("native")
