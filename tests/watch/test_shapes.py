"""Watching tables of every shape: names, keys and columns that something could stumble over."""

from __future__ import annotations

import asyncio
import enum
import gc
from collections.abc import AsyncIterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import anyio
import asyncpg
import pytest
from sqlalchemy import (
    CHAR,
    JSON,
    Date,
    DateTime,
    Enum,
    ForeignKey,
    Identity,
    Numeric,
    String,
    TypeDecorator,
)
from sqlalchemy.dialects.postgresql import ARRAY, CITEXT, INT4RANGE, JSONB, Range
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

from pgtoolset import (
    RowWatcher,
    WaitTimeoutError,
    WatchFailedError,
    row_change_trigger,
    wait_for_row_change,
)
from tests.support import Item, connect_args, roles, until
from tests.watch.crowd import Polls, every_connection, queued, small


class Base(DeclarativeBase):
    pass


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Reversed(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value[::-1]

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value[::-1]


class Odd(Base):
    __tablename__ = "100% :odd $1 \"select\" 'x'"

    id: Mapped[int] = mapped_column(":id %s $1", primary_key=True)
    value: Mapped[str] = mapped_column('a "value" % :b')


class ByEnum(Base):
    __tablename__ = "by_enum"
    key: Mapped[Colour] = mapped_column(Enum(Colour, name="watch_colour"), primary_key=True)
    value: Mapped[str]


class ByPadded(Base):
    __tablename__ = "by_padded"
    key: Mapped[str] = mapped_column(CHAR(5), primary_key=True)
    value: Mapped[str]


class ByParts(Base):
    __tablename__ = "by_parts"
    colour: Mapped[Colour] = mapped_column(Enum(Colour, name="watch_colour"), primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    name: Mapped[str] = mapped_column(CHAR(5), primary_key=True)
    value: Mapped[str]


class ByReversed(Base):
    __tablename__ = "by_reversed"
    key: Mapped[str] = mapped_column(Reversed(20), primary_key=True)
    value: Mapped[str]


class ByNumber(Base):
    __tablename__ = "by_number"
    key: Mapped[Decimal] = mapped_column(Numeric(10, 2), primary_key=True, autoincrement=False)
    value: Mapped[str]


class ByMoment(Base):
    __tablename__ = "by_moment"
    key: Mapped[datetime] = mapped_column(DateTime(timezone=True), primary_key=True)
    value: Mapped[str]


class Folded(DeclarativeBase):
    """What needs an extension that is not everywhere."""


class ByName(Folded):
    __tablename__ = "by_name"
    key: Mapped[str] = mapped_column(CITEXT, primary_key=True)
    value: Mapped[str]


class Wide(Base):
    """`json` has no equality in PostgreSQL, and `point` one that is not what it seems."""

    __tablename__ = "wide"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    document: Mapped[Any] = mapped_column(JSON)
    binary: Mapped[Any] = mapped_column(JSONB)
    numbers: Mapped[list[float]] = mapped_column(ARRAY(Numeric))
    span: Mapped[Range[int]] = mapped_column(INT4RANGE)
    payload: Mapped[bytes]
    value: Mapped[str]


class Part(Wide):
    __tablename__ = "wide_part"
    id: Mapped[int] = mapped_column(ForeignKey(Wide.id), primary_key=True)
    more: Mapped[str]


Wide.double = column_property(Wide.value + Wide.value)

DAY = datetime.fromisoformat("2026-02-03T04:05:06+00:00")
ID = UUID("6d1bf9f6-39f0-4f4e-8f29-6e9c2f2d9e10")

ROWS: list[tuple[Any, Any]] = [
    (Odd(id=1, value="old"), 1),
    (ByEnum(key=Colour.GREEN, value="old"), Colour.GREEN),
    (ByPadded(key="é", value="old"), "é "),
    (
        ByParts(colour=Colour.RED, id=ID, day=DAY.date(), name="n", value="old"),
        (Colour.RED, ID, DAY.date(), "n"),
    ),
    (ByReversed(key="abc", value="old"), "abc"),
    (ByNumber(key=Decimal("1.50"), value="old"), Decimal("1.5")),
    (ByMoment(key=DAY, value="old"), DAY.astimezone()),
]


@pytest.fixture
async def tables(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield engine
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)


async def update(engine: AsyncEngine, row: Any, value: str) -> None:
    async with AsyncSession(engine) as session, session.begin():
        (await session.merge(row)).value = value


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize("notify", [False, True])
@pytest.mark.parametrize(("row", "key"), ROWS, ids=[type(row).__name__ for row, _ in ROWS])
async def test_keys(tables: AsyncEngine, row: Any, key: Any, notify: bool) -> None:
    """Every key finds its row, by polling and by notifications, and delivers its changes."""
    await watch_key(tables, row, key, notify)


#: A second row for each of `ROWS`.
MORE: list[tuple[Any, Any]] = [
    (Odd(id=2, value="old"), 2),
    (ByEnum(key=Colour.RED, value="old"), Colour.RED),
    (ByPadded(key="e", value="old"), "e"),
    (
        ByParts(colour=Colour.RED, id=ID, day=DAY.date(), name="m", value="old"),
        (Colour.RED, str(ID), DAY.date(), "m"),
    ),
    (ByReversed(key="cba", value="old"), "cba"),
    (ByNumber(key=Decimal("2.50"), value="old"), Decimal("2.5")),
    (ByMoment(key=DAY.replace(hour=1), value="old"), DAY.replace(hour=1)),
]


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("one", "two"), list(zip(ROWS, MORE, strict=True)), ids=[type(row).__name__ for row, _ in ROWS]
)
async def test_keys_together(database_url: str, one: tuple[Any, Any], two: tuple[Any, Any]) -> None:
    """Waiters for two rows share one statement, and each gets its own row."""

    async def value(engine: AsyncEngine, row: Any, key: Any) -> str:
        async with AsyncSession(engine) as session:
            options: Any = {
                "columns": ["value"],
                "baseline": {"value": "old"},
                "interval": 0.1,
                "timeout": 20,
            }
            found: str = (await wait_for_row_change(session, type(row), key, **options)).value
            return found

    async with small(database_url, 1) as engine:
        for row, _ in (one, two):
            await update(engine, row, "old")
        tasks = [asyncio.create_task(value(engine, *each)) for each in (one, two)]
        polls = Polls(engine)
        await until(lambda: len(polls.sizes) > 4)  # the spelling of the table is known from then on
        async with every_connection(engine):
            await until(lambda: queued() == 2)
            polls = Polls(engine)
        await until(lambda: len(polls.sizes) > 0)
        async with every_connection(engine):
            assert not any(task.done() for task in tasks)
            await until(lambda: queued() == 2)
        assert polls.turns[0] == [2]
        await update(engine, one[0], "one")
        await update(engine, two[0], "two")
        async with asyncio.timeout(20):
            assert await asyncio.gather(*tasks) == ["one", "two"]


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize("notify", [False, True])
async def test_keys_without_case(
    engine: AsyncEngine, other: asyncpg.Connection, notify: bool
) -> None:
    """A key that the table spells in another case is found and watched."""
    if not await other.fetchval(
        "SELECT count(*) FROM pg_available_extensions WHERE name = 'citext'"
    ):
        pytest.skip("this server lacks PostgreSQL's extension citext")
    await other.execute("CREATE EXTENSION citext")
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Folded.metadata.create_all)
        await watch_key(engine, ByName(key="Straße", value="old"), "STRAßE", notify)
    finally:
        await other.execute("DROP TABLE IF EXISTS by_name; DROP EXTENSION citext")


async def watch_key(tables: AsyncEngine, row: Any, key: Any, notify: bool) -> None:
    model = type(row)
    async with tables.begin() as connection:
        for ddl in row_change_trigger(model):
            await connection.execute(ddl)
    await update(tables, row, "old")
    async with RowWatcher(tables, interval=0.05 if not notify else 20, notify=notify) as watcher:
        async with watcher.changes(model, key, columns=["value"]) as changes, asyncio.timeout(30):
            assert changes.current == {"value": "old"}
            await update(tables, row, "new")
            change = await anext(changes)
            assert (change.pk, change.after) == (key, {"value": "new"})
            async with AsyncSession(tables) as session:
                found = await wait_for_row_change(
                    session, model, key, baseline={"value": "old"}, timeout=30
                )
                assert found.value == "new"


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_columns(tables: AsyncEngine, other: asyncpg.Connection) -> None:
    """Columns without equality are compared, values that are written anew are none, and each change
    is told once."""
    async with AsyncSession(tables) as session, session.begin():
        values = {
            "document": {"b": [1], "a": None},
            "binary": [1, {}],
            "numbers": [Decimal("NaN"), Decimal(1)],
        }
        session.add(Wide(id=1, **values, span=Range(1, 5), payload=b"\x00", value="v"))
    async with RowWatcher(tables, interval=0.05) as watcher, watcher.changes(Wide, 1) as changes:
        assert changes.current is not None
        assert changes.current["document"] == {"b": [1], "a": None}
        assert changes.current["span"] == Range(1, 5)
        assert "double" not in changes.current
        await other.execute(
            "UPDATE wide SET document = document, numbers = '{NaN,1}', span = '[1,4]'"
        )
        for column, value in [
            ("document", '{"b": [1], "a": 0}'),
            ("binary", '[1, {"x": null}]'),
            ("numbers", "{1,NaN}"),
            ("span", "[1,4)"),
            ("payload", "\\x01"),
        ]:
            await other.execute(f"UPDATE wide SET \"{column}\" = '{value}'")
            async with asyncio.timeout(30):
                change = await anext(changes)
            assert change.before is not None
            assert change.after is not None
            assert {
                name
                for name in change.after
                if repr(change.after[name]) != repr(change.before[name])
            } == {column}


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_subclass(tables: AsyncEngine, other: asyncpg.Connection) -> None:
    """A change in either table of a subclass is delivered, and announced by its triggers."""
    async with tables.begin() as connection:
        for ddl in row_change_trigger(Part):
            await connection.execute(ddl)
    async with AsyncSession(tables) as session, session.begin():
        part = {
            "document": 1,
            "binary": 1,
            "numbers": [],
            "span": Range(1, 2),
            "payload": b"",
            "value": "v",
        }
        session.add(Part(id=1, **part, more="m"))
    async with RowWatcher(tables, interval=20, notify=True) as watcher:
        async with (
            watcher.changes(Part, 1, columns=["value", "more"]) as changes,
            asyncio.timeout(30),
        ):
            await other.execute("UPDATE wide SET value = 'w'")
            assert (await anext(changes)).after == {"value": "w", "more": "m"}
            await other.execute("UPDATE wide_part SET more = 'n'")
            assert (await anext(changes)).after == {"value": "w", "more": "n"}


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_the_table_changes(tables: AsyncEngine, other: asyncpg.Connection) -> None:
    """Columns that are added or change their type under a watcher do not end it."""
    await update(tables, Odd(id=1), "1")
    name = '"100% :odd $1 ""select"" \'x\'"'
    async with RowWatcher(tables, interval=0.05) as watcher, watcher.changes(Odd, 1) as changes:
        await other.execute(f"ALTER TABLE {name} ADD COLUMN added int DEFAULT 3")
        await other.execute(f'ALTER TABLE {name} ALTER COLUMN "a ""value"" % :b" TYPE varchar(30)')
        await other.execute(f'UPDATE {name} SET "a ""value"" % :b" = \'2\'')
        async with asyncio.timeout(30):
            assert (await anext(changes)).after == {"id": 1, "value": "2"}


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_no_privilege(
    tables: AsyncEngine, other: asyncpg.Connection, database_url: str
) -> None:
    """A table without the privilege to read it fails its own waiters, with the reason."""
    await update(tables, Odd(id=1), "old")
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with roles(database_url, "pgtoolset_reader"):
        await other.execute("GRANT SELECT ON item, by_enum TO pgtoolset_reader")
        engine = create_async_engine(tables.url, connect_args=connect_args(role="pgtoolset_reader"))
        try:
            async with RowWatcher(engine, interval=0.05) as watcher:
                whole = asyncio.create_task(watcher.wait(Item, 1, timeout=30))
                with pytest.raises(WatchFailedError, match="permission denied") as failed:
                    await watcher.wait(Odd, 1, timeout=30)
                assert failed.value.sqlstate == "42501"
                async with watcher.changes(ByEnum, Colour.RED) as changes:
                    await other.execute("REVOKE SELECT ON by_enum FROM pgtoolset_reader")
                    with pytest.raises(WatchFailedError, match="permission denied"):
                        await anext(changes)
                assert not whole.done()
                await other.execute("UPDATE item SET name = 'paid'")
                assert (await whole).after == {"id": 1, "name": "paid"}
        finally:
            await engine.dispose()


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_groups_of_tasks(tables: AsyncEngine, other: asyncpg.Connection) -> None:
    """A task group that fails, and anyio's deadlines, end waits and streams and leave nothing
    behind."""
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, 20) AS n")
    async with RowWatcher(tables, interval=0.02) as watcher:
        hub: Any = watcher._hub

        def nothing_is_watched() -> bool:
            gc.collect()  # of a stream that was not a block
            return not hub._groups

        async def stream(number: int) -> None:
            async for _ in watcher.changes(Item, number):
                pass

        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                for number in range(1, 21):
                    group.create_task(watcher.wait(Item, number))
                    group.create_task(stream(number))
                with pytest.raises(WaitTimeoutError):
                    await watcher.wait(Item, 1, timeout=0.1)
                raise KeyError
        await until(nothing_is_watched)
        with anyio.move_on_after(0.1) as scope:
            async with anyio.create_task_group() as group_:
                group_.start_soon(stream, 1)
                await watcher.wait(Item, 2)
        assert scope.cancelled_caught
        await until(nothing_is_watched)
        async with AsyncSession(tables) as session:
            with anyio.move_on_after(0.1) as scope:
                await wait_for_row_change(session, Item, 1, interval=0.01)
            assert scope.cancelled_caught
