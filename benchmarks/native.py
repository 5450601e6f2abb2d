"""Compiled against interpreted, for the two hot modules. Run as `python -m benchmarks.native` where
both are there.

CPU time of this process, the two in alternation on the same objects:

- the comparator: the text of 10,000 rows against that of the look before, with 10 rows changed in
place, with 10 moved
  to the end as an UPDATE may do it, with a tenth changed, and with nothing changed;
- the builder: the columns of 10,000 associations from instances, from keys, from pairs of instances
and keys;
- both for 1 row, where a call is all that there is to save;
- end to end: a tick of a watcher with 10,000 rows, quiet and with 10 changes, and `m2m_add` of
10,000, each in a
  process of its own under PGTOOLSET_IMPL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from benchmarks import m2m, watch
from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import RowWatcher, m2m_add
from pgtoolset._native import associations, comparator
from pgtoolset.watch import _groups

MANY = 10_000
#: Calls between two looks at the clock.
CALLS = {MANY: 3, 1: 20_000}


def timed(
    function: Callable[..., Any], arguments: tuple[Any, ...], calls: int
) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        start = time.process_time()
        for _ in range(calls):
            function(*arguments)
        return (time.process_time() - start) / calls

    return run


async def compare(
    what: str, name: str, arguments: tuple[Any, ...], rows: int, rounds: int, target: float | None
) -> None:
    """Print how many times faster the compiled function is."""
    from pgtoolset._native import associations_c, comparator_c

    interpreted, compiled = (
        (comparator, comparator_c) if hasattr(comparator, name) else (associations, associations_c)
    )
    contestants = {
        "interpreted": timed(getattr(interpreted, name), arguments, CALLS[rows]),
        "compiled": timed(getattr(compiled, name), arguments, CALLS[rows]),
    }
    results = await alternate(contestants, rounds=rounds)
    bound: tuple[Literal["at least"], float] | None = (
        None if target is None else ("at least", target)
    )
    tell(what, Spread.of_ratios(results["interpreted"], results["compiled"]), bound)
    unit, factor = ("us", 1e6) if rows > 1 else ("ns", 1e9)
    medians = [Spread.of(results[each]).median * factor for each in contestants]
    print(f"    {medians[0]:.0f} {unit} interpreted, {medians[1]:.0f} {unit} compiled")


def joined(lines: list[bytes]) -> bytes:
    return b"\n".join(lines)


async def modules(rounds: int) -> None:
    lines = [
        b'(%d,new,"2026-01-01 12:00:00+00",%d.50)' % (number, number) for number in range(MANY)
    ]
    before = joined(lines)
    some = set(range(500, MANY, 1000))
    changed = [line.replace(b"new", b"paid") for line in lines]
    in_place = [changed[at] if at in some else line for at, line in enumerate(lines)]
    moved = [line for at, line in enumerate(lines) if at not in some] + [
        changed[at] for at in sorted(some)
    ]
    tenth = [changed[at] if at % 10 == 0 else line for at, line in enumerate(lines)]
    headline(f"comparator, {MANY} rows: times faster")
    for what, after, target in (
        ("10 changed in place", in_place, 3.0),
        ("10 changed and moved", moved, 3.0),
        ("a tenth changed", tenth, 3.0),
        ("nothing changed", list(lines), None),
    ):
        await compare(what, "changed_lines", (before, joined(after)), MANY, rounds, target)

    headline(f"builder of association rows, {MANY} rows: times faster")
    tags = [m2m.Tag(id=number) for number in range(1, MANY + 1)]
    for tag in tags:
        state: Any = tag._sa_instance_state  # type: ignore[attr-defined]
        state.key = state.mapper.identity_key_from_instance(tag)
    keys = list(range(1, MANY + 1))
    one = (0,)
    await compare("keys", "key_columns", (m2m.Tag, (), keys, 1, one), MANY, rounds, 3.0)
    await compare("instances", "key_columns", (m2m.Tag, tags, (), 1, one), MANY, rounds, 3.0)
    pairs, both = list(zip(keys, tags, strict=True)), (m2m.Tag, m2m.Tag)
    await compare(
        "pairs of a key and an instance",
        "pair_columns",
        (both, pairs, (1, 1), (one, one)),
        MANY,
        rounds,
        3.0,
    )
    of_keys = list(zip(keys, keys, strict=True))
    await compare(
        "pairs of keys", "pair_columns", (both, of_keys, (1, 1), (one, one)), MANY, rounds, 3.0
    )

    headline("1 row: times faster")
    await compare("comparator", "changed_lines", (lines[0], changed[0]), 1, rounds, 1.0)
    await compare(
        "comparator, values",
        "changed_rows",
        ([(1, "a", b"a")], {1: (1, "b", b"b")}, 1),
        1,
        rounds,
        1.0,
    )
    await compare("builder, a key", "key_columns", (m2m.Tag, (), [1], 1, one), 1, rounds, 1.0)
    await compare(
        "builder, an instance", "key_columns", (m2m.Tag, tags[:1], (), 1, one), 1, rounds, 1.0
    )
    await compare(
        "builder, a pair", "pair_columns", (both, pairs[:1], (1, 1), (one, one)), 1, rounds, 1.0
    )


async def looks(engine: AsyncEngine, ticks: int, changes: int) -> float:
    """The CPU time of a look at 10,000 rows of which so many have changed."""
    seconds: list[float] = []
    original = _groups.Group.tick

    async def look(self: _groups.Group, *arguments: Any, **options: Any) -> None:
        start = time.process_time()
        await original(self, *arguments, **options)
        seconds.append(time.process_time() - start)

    table = watch.Order.__tablename__
    async with RowWatcher(engine, interval=0.05) as watcher, engine.connect() as connection:
        connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        streams = [watcher.changes(watch.Order, number) for number in range(1, MANY + 1)]
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
    bench = m2m.Bench(engine, AsyncSession(engine), None, None)  # type: ignore[arg-type]
    seconds = []
    for _ in range(calls):
        await bench.session.execute(text("SELECT 1"))
        start = time.process_time()
        await m2m_add(bench.session, bench.post, m2m.Post.tags, *bench.tags[:MANY])
        seconds.append(time.process_time() - start)
        await bench.session.rollback()
    await bench.session.close()
    return Spread.of(seconds).median


async def child(url: str) -> None:
    """One round of what is measured end to end, as JSON."""
    engine = create_async_engine(url)
    quiet, busy = await looks(engine, 20, 0), await looks(engine, 10, 10)
    print(json.dumps({"quiet": quiet, "busy": busy, "add": await adds(engine, 5)}))
    await engine.dispose()


async def end_to_end(rounds: int) -> None:
    headline("end to end, CPU time of the client: interpreted / compiled")
    with database_url() as url:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            for base in (watch.Base, m2m.Base):
                await connection.run_sync(base.metadata.drop_all)
                await connection.run_sync(base.metadata.create_all)
            series = f"generate_series(1, {m2m.MOST})"
            await connection.execute(
                text(f"INSERT INTO {watch.Order.__tablename__} SELECT n, 'new' FROM {series} n")
            )
            await connection.execute(
                text(f"INSERT INTO {m2m.Tag.__tablename__} SELECT n FROM {series} n")
            )
            await connection.execute(text(f"INSERT INTO {m2m.Post.__tablename__} VALUES (1)"))
            await connection.execute(text("ANALYZE"))

        def contestant(implementation: str) -> Callable[[], Awaitable[dict[str, float]]]:
            async def run() -> dict[str, float]:
                variables = os.environ | {"PGTOOLSET_IMPL": implementation}
                command = [sys.executable, "-m", "benchmarks.native", "--child", url]
                result = await asyncio.to_thread(
                    subprocess.run,
                    command,
                    env=variables,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                figures: dict[str, float] = json.loads(result.stdout)
                return figures

            return run

        results = await alternate(
            {each: contestant(each) for each in ("python", "c")}, rounds=rounds, warm_up=1
        )
        for key, what in (
            ("quiet", f"a look at {MANY} rows, nothing changed"),
            ("busy", f"a look at {MANY} rows, 10 changed"),
            ("add", f"m2m_add of {MANY} instances"),
        ):
            ours, theirs = [[each[key] for each in results[name]] for name in ("c", "python")]
            tell(what, Spread.of_ratios(theirs, ours))
            medians = [Spread.of(figures).median * 1e3 for figures in (theirs, ours)]
            print(f"    {medians[0]:.2f} ms interpreted, {medians[1]:.2f} ms compiled")
        async with engine.begin() as connection:
            for base in (watch.Base, m2m.Base):
                await connection.run_sync(base.metadata.drop_all)
        await engine.dispose()


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg")
    try:
        from pgtoolset._native import associations_c, comparator_c  # noqa: F401
    except ImportError:
        raise SystemExit(
            "the compiled modules are not installed here; `make .venv-minimum/.ready` does it"
        ) from None
    await modules(rounds)
    await end_to_end(max(rounds // 8, 3))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--child", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asyncio.run(child(options.child) if options.child else run(options.rounds))


if __name__ == "__main__":
    main()
