"""DDL during a wait ends nothing that a second look can serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import MetaData
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset import RowWatcher, WatchFailedError, wait_for_row_change
from pgtoolset.watch import _groups, _polls
from tests.support import until

pytestmark = pytest.mark.asyncpg(reason="RowWatcher")


class Base(DeclarativeBase):
    metadata = MetaData(schema="altered")


class Thing(Base):
    __tablename__ = "thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column(default=1)
    name: Mapped[str] = mapped_column(default="")


@pytest.fixture(autouse=True)
async def things(engine: AsyncEngine, other: asyncpg.Connection) -> AsyncIterator[None]:
    await other.execute("CREATE SCHEMA altered")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await other.execute(
        "INSERT INTO altered.thing SELECT n, 1, '' FROM generate_series(1, 50) AS n"
    )
    yield
    await other.execute("DROP SCHEMA altered CASCADE")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each look, however it ends."""
    seen: list[str] = []
    fetch, tick = _polls.RowQuery._fetch, _groups.Group.tick

    def fetched(*arguments: Any) -> Any:
        try:
            found = fetch(*arguments)
        except Exception:
            seen.append("failed")
            raise
        seen.append("served")
        return found

    async def ticked(*arguments: Any, **options: Any) -> Any:
        try:
            await tick(*arguments, **options)
        except Exception:
            seen.append("failed")
            raise
        seen.append("served")

    monkeypatch.setattr(_polls.RowQuery, "_fetch", fetched)
    monkeypatch.setattr(_groups.Group, "tick", ticked)
    return seen


#: Statements that leave the mapping valid.
DDL = {
    "type": "ALTER TABLE altered.thing ALTER size TYPE bigint",
    "other type": "ALTER TABLE altered.thing ALTER name TYPE varchar(30)",
    "type of the key": "ALTER TABLE altered.thing ALTER id TYPE bigint",
    "more columns": "ALTER TABLE altered.thing ADD more text, ADD again int",
    "column dropped": """ALTER TABLE altered.thing ADD more text;
                         ALTER TABLE altered.thing DROP more""",
    "another table": """ALTER TABLE altered.thing RENAME TO gone;
                        CREATE TABLE altered.thing AS TABLE altered.gone""",
    "another order": """ALTER TABLE altered.thing ADD later int DEFAULT 1;
                        ALTER TABLE altered.thing DROP size;
                        ALTER TABLE altered.thing RENAME later TO size""",
}
KINDS = ["wait", "predicate", "connection", "watcher", "watcher of many"]


async def start(kind: str, engine: AsyncEngine) -> asyncio.Task[Any]:
    async def wait() -> Any:
        async with AsyncSession(engine) as session:
            options: dict[str, Any] = {"interval": 0.02, "timeout": 60}
            if kind == "predicate":
                options["until"] = lambda thing: thing.size == 2
            return (await wait_for_row_change(session, Thing, 1, **options)).size

    async def wait_on_connection() -> Any:
        async with engine.connect() as connection:
            session = AsyncSession(connection)
            row = await wait_for_row_change(session, Thing, 1, interval=0.02, timeout=60)
            return row.size

    async def watch() -> Any:
        async with RowWatcher(engine, interval=0.02) as watcher:
            others = [watcher.changes(Thing, n) for n in range(2, 50) if kind.endswith("many")]
            change = await watcher.wait(Thing, 1, until=lambda thing: thing.size == 2, timeout=60)
            for stream in others:
                await stream.aclose()
            assert change.after is not None
            return change.after["size"]

    if kind == "connection":
        return asyncio.create_task(wait_on_connection())
    return asyncio.create_task(watch() if kind.startswith("watcher") else wait())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statement", DDL)
async def test_ddl(
    engine: AsyncEngine, other: asyncpg.Connection, looks: list[str], kind: str, statement: str
) -> None:
    """A wait goes on after DDL that leaves the mapping valid, and finds the next change."""
    wait = await start(kind, engine)
    await until(lambda: looks.count("served") >= 3 or wait.done())
    await other.execute(DDL[statement])
    served = looks.count("served")
    await until(lambda: looks.count("served") >= served + 3 or wait.done())
    await other.execute("UPDATE altered.thing SET size = 2")
    assert await wait == 2


@pytest.mark.parametrize("kind", ["wait", "predicate", "watcher", "watcher of many"])
async def test_renamed_and_back(
    engine: AsyncEngine, other: asyncpg.Connection, looks: list[str], kind: str
) -> None:
    """A column that is gone for one look is found by the next."""
    wait = await start(kind, engine)
    await until(lambda: looks.count("served") >= 3 or wait.done())
    await other.execute("ALTER TABLE altered.thing RENAME size TO gone")
    await until(lambda: "failed" in looks)
    await other.execute("ALTER TABLE altered.thing RENAME gone TO size")
    served = looks.count("served")
    await until(lambda: looks.count("served") >= served + 3 or wait.done())
    await other.execute("UPDATE altered.thing SET size = 2")
    assert await wait == 2


async def test_gone(engine: AsyncEngine, other: asyncpg.Connection, looks: list[str]) -> None:
    """A column that stays gone ends each wait with PostgreSQL's error, after three looks."""
    waits = [await start(kind, engine) for kind in ("wait", "wait", "watcher")]
    await until(lambda: looks.count("served") >= 6)
    await other.execute("ALTER TABLE altered.thing DROP size")
    for wait in waits[:2]:
        with pytest.raises(ProgrammingError, match="size"):
            await wait
    with pytest.raises(WatchFailedError, match="size"):
        await waits[2]
    assert looks.count("failed") >= 6
