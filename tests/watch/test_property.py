"""Random schedules of writes, subscriptions and cancellations: nothing that lasted is missed,
nothing is invented."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgtoolset import RowChange, RowNotFoundError, RowWatcher
from pgtoolset.watch import _known_rows
from tests.support import Item, examples

pytestmark = pytest.mark.asyncpg(reason="RowWatcher")

KEYS = (1, 2)
CLOCK = 100

steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(KEYS), st.sampled_from("abc")),
        st.tuples(st.just("delete"), st.sampled_from(KEYS), st.none()),
        st.tuples(st.just("stream"), st.sampled_from(KEYS), st.none()),
        st.tuples(st.just("wait"), st.sampled_from(KEYS), st.none()),
        st.tuples(st.just("cancel"), st.none(), st.none()),
        st.tuples(st.just("tick"), st.none(), st.none()),
    ),
    max_size=30,
)


class Seen:
    """A subscription, and what the row was whenever a tick had passed for certain."""

    def __init__(self, key: int, history: int) -> None:
        self.key = key
        self.history = history
        self.lasting: list[str | None] = []
        self.changes: list[RowChange[Item]] = []
        self.task: asyncio.Task[Any] | None = None
        self.cancelled = False


def name_of(values: Any) -> str | None:
    return None if values is None else values["name"]


async def run(engine: AsyncEngine, schedule: list[tuple[str, Any, Any]]) -> None:
    rows: dict[int, str | None] = dict.fromkeys(KEYS)
    history: dict[int, list[str | None]] = {key: [None] for key in KEYS}
    streams: list[Seen] = []
    waits: list[Seen] = []

    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("DELETE FROM item"))
        await connection.execute(text("INSERT INTO item VALUES (100, '')"))

        async def write(key: int, value: str | None) -> None:
            statement = (
                "DELETE FROM item WHERE id = :id"
                if value is None
                else "INSERT INTO item VALUES (:id, :name) "
                "ON CONFLICT (id) DO UPDATE SET name = excluded.name"
            )
            await connection.execute(
                text(statement), {"id": key} if value is None else {"id": key, "name": value}
            )

        async with (
            RowWatcher(engine, interval=0.005) as watcher,
            watcher.changes(Item, CLOCK) as clock,
        ):
            count = 0

            async def tick() -> None:
                """Return after a tick that began later: one statement polls the clock and rows."""
                nonlocal count
                for _ in range(2):  # the first look may be the one that somebody joins with
                    count += 1
                    await write(CLOCK, str(count))
                    await anext(clock)
                for _ in range(3):
                    await asyncio.sleep(0)
                for seen in streams + waits:
                    seen.lasting.append(rows[seen.key])

            async def collect(seen: Seen) -> None:
                async for change in watcher.changes(Item, seen.key):
                    seen.changes.append(change)

            for action, key, value in [*schedule, ("tick", None, None)]:
                if action in ("put", "delete"):
                    rows[key] = value
                    history[key].append(value)
                    await write(key, value)
                elif action == "tick":
                    await tick()
                elif action == "cancel":
                    for seen in (streams + waits)[:1]:
                        assert seen.task is not None
                        seen.task.cancel()
                        seen.cancelled = True
                        (streams if seen in streams else waits).remove(seen)
                else:
                    seen = Seen(key, len(history[key]) - 1)
                    if action == "stream":
                        streams.append(seen)
                        seen.task = asyncio.create_task(collect(seen))
                    else:
                        waits.append(seen)
                        seen.task = asyncio.create_task(watcher.wait(Item, key))
                    await asyncio.sleep(0)

            for seen in streams:
                check_stream(seen, history[seen.key][seen.history :])
            for seen in waits:
                check_wait(seen, history[seen.key][seen.history :])
            for seen in streams + waits:
                assert seen.task is not None
                seen.task.cancel()
            await asyncio.gather(
                *(seen.task for seen in streams + waits if seen.task), return_exceptions=True
            )


def check_stream(seen: Seen, history: list[str | None]) -> None:
    states = [name_of(change.after) for change in seen.changes]
    for change, following in zip(seen.changes, seen.changes[1:], strict=False):
        assert change.after == following.before, "each change starts where the last one ended"
    for change in seen.changes:
        assert change.before != change.after, "a change that is none was invented"
    start = (
        name_of(seen.changes[0].before)
        if seen.changes
        else (seen.lasting[0] if seen.lasting else None)
    )
    assert is_part(([start] if seen.changes else []) + states, history), "a state was invented"
    settled = [seen.lasting[0], *seen.lasting] if seen.lasting else []
    lasted = [now for before, now in itertools.pairwise(settled) if now != before]
    assert is_part(lasted, states), "a state that lasted was missed"


def check_wait(seen: Seen, history: list[str | None]) -> None:
    assert seen.task is not None
    if not seen.task.done():
        assert len(set(seen.lasting)) <= 1, "a change that lasted was missed"
        return
    error = seen.task.exception()
    if error is not None:
        assert isinstance(error, RowNotFoundError)
        assert None in history
    else:
        change = seen.task.result()
        assert is_part([name_of(change.before), name_of(change.after)], history), (
            "a change was invented"
        )
        assert change.before != change.after


def is_part(part: list[str | None], whole: list[str | None]) -> bool:
    """Whether `part` is a subsequence of `whole`."""
    remaining = iter(whole)
    return all(any(each == state for state in remaining) for each in part)


@pytest.mark.parametrize("few", [_known_rows.FETCHED_ROWS, 0], ids=["fetched", "as text"])
@given(schedule=steps)
@settings(
    max_examples=examples(20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_schedules(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    few: int,
    schedule: list[tuple[str, Any, Any]],
) -> None:
    """A state that lasted longer than a tick is delivered, in order, and no other one."""
    monkeypatch.setattr(_known_rows, "FETCHED_ROWS", few)

    async def main() -> None:
        engine = create_async_engine(database_url)
        try:
            async with asyncio.timeout(60):
                await run(engine, schedule)
            async with engine.begin() as connection:
                await connection.execute(text("DELETE FROM item"))
        finally:
            await engine.dispose()

    asyncio.run(main())
