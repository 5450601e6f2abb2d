"""Rows that are compared as text: nothing is missed, nothing invented, whatever the keys and
columns hold."""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import CHAR, Enum, ForeignKeyConstraint, Numeric, Text
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset import RowWatcher
from pgtoolset._postgres.link import LinkLost
from pgtoolset._postgres.notifications import payload_key
from pgtoolset._postgres.rows import RowStatements
from pgtoolset.watch import _known_rows
from pgtoolset.watch._groups import Group
from pgtoolset.watch._subscriptions import Stream
from pgtoolset.watch.targets import resolve_target
from tests.support import Item, connect_args, examples, until


class Base(DeclarativeBase):
    pass


class Mood(enum.Enum):
    GOOD = 'it\'s "good"'
    BAD = "b\\a,d"


class OfText(Base):
    __tablename__ = "texts_text"
    id: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]


class OfChar(Base):
    __tablename__ = "texts_char"
    id: Mapped[str] = mapped_column(CHAR(3), primary_key=True)
    value: Mapped[int]


class OfUUID(Base):
    __tablename__ = "texts_uuid"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    value: Mapped[int]


class OfTime(Base):
    __tablename__ = "texts_time"
    id: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True), primary_key=True)
    value: Mapped[int]


class OfEnum(Base):
    __tablename__ = "texts_enum"
    id: Mapped[Mood] = mapped_column(Enum(Mood, name="Texts Mood"), primary_key=True)
    value: Mapped[int]


class OfTwo(Base):
    __tablename__ = "texts_two"
    name: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


class Special(OfTwo):
    """Its columns are in two tables."""

    __tablename__ = "texts_special"
    name: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    more: Mapped[int] = mapped_column(default=0)
    __table_args__ = (
        ForeignKeyConstraint(["name", "number"], ["texts_two.name", "texts_two.number"]),
    )


class Wide(Base):
    __tablename__ = "texts_wide"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    real: Mapped[float | None]
    exact: Mapped[Decimal | None] = mapped_column(Numeric)
    data: Mapped[bytes | None]
    json: Mapped[Any] = mapped_column(JSON, nullable=True)
    jsonb: Mapped[Any] = mapped_column(JSONB, nullable=True)
    list: Mapped[Any] = mapped_column(ARRAY(Text), nullable=True)
    at: Mapped[datetime | None] = mapped_column(TIMESTAMP(timezone=True))


@pytest.fixture
async def tables(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AsyncEngine]:
    """The tables, and watchers that compare as text from the first row on, and may not give that
    up."""
    monkeypatch.setattr(_known_rows, "FETCHED_ROWS", 0)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield engine
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)


def group_of(watcher: RowWatcher) -> Group:
    hub: Any = watcher._hub
    (group,) = hub._groups.all()
    found: Group = group
    return found


async def compared(watcher: RowWatcher) -> None:
    """Wait until all rows have been compared as text twice from now on."""
    texts = group_of(watcher)._rows._snapshots
    assert texts.is_usable
    for _ in range(2):
        seen = texts.comparison._added
        await until(lambda seen=seen: texts.comparison._added is not seen)  # type: ignore[misc]
    assert texts.is_usable


KEYS: dict[str, tuple[type[Any], list[Any]]] = {
    "int": (Wide, [1, -2, 2**31 - 1]),
    "text": (
        OfText,
        ["", "NULL", "a,b", "{c}", '"d"', "e\\f", "g\nh", "\\n", "i'j", "ä\t ", "$1", ":k", "%s"],
    ),
    "char": (OfChar, ["a", "bc", "d e"]),
    "uuid": (OfUUID, [UUID(int=1), UUID(int=2**127)]),
    "time": (OfTime, [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2)]),
    "enum": (OfEnum, list(Mood)),
    "two": (OfTwo, [("a", 1), ("a", 2), ('"', 1), ("\\", 1)]),
    "joined": (Special, [("a", 1), ("b,", 2)]),
}


def key_of(model: type[Any], key: Any) -> dict[str, Any]:
    return {"name": key[0], "number": key[1]} if isinstance(key, tuple) else {"id": key}


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize("kind", KEYS)
async def test_keys(tables: AsyncEngine, kind: str) -> None:
    """Every key has its row compared: a change of it is delivered, and of no other row."""
    model, keys = KEYS[kind]
    column: Any = model.real if model is Wide else model.value
    async with AsyncSession(tables) as session, session.begin():
        session.add_all([model(**key_of(model, key), **{column.key: 0}) for key in keys])
    async with RowWatcher(tables, interval=0.01) as watcher:
        streams = [watcher.changes(model, key, columns=[column]) for key in keys]
        for stream in streams:
            await stream.__aenter__()
        await compared(watcher)
        for number, (stream, key) in enumerate(zip(streams, keys, strict=True), 1):
            async with AsyncSession(tables) as session, session.begin():
                setattr(await session.get_one(model, key_of(model, key)), column.key, number)
            async with asyncio.timeout(30):
                change = await anext(stream)
            assert (change.before, change.after) == ({column.key: 0}, {column.key: number})
            await compared(watcher)
        assert [stream._stream.take() for stream in streams] == [None] * len(keys)


VALUES: dict[str, list[str]] = {
    "name": [
        "''",
        "'a'",
        "E'a\\nb'",
        "E'a\\\\nb'",
        "'a\"b'",
        "'NULL'",
        "NULL",
        "'(1,2)'",
        "E'\\t'",
        "'ä'",
    ],
    "real": ["0.1", "0.1::float8 + 1e-17 + 2e-17", "'NaN'", "'Infinity'", "1e300", "NULL"],
    "exact": ["1", "1.5", "'NaN'", "1e-20", "NULL"],
    "data": ["''", "'\\x00ff'", "'\\x5c6e'", "'\\x0a'", "NULL"],
    "json": ["'{}'", "'{\"a\": 1}'", "'[\"\\n\"]'", "NULL"],
    "jsonb": ["'{}'", "'{\"a\": [1, null]}'", "NULL"],
    "list": ["'{}'", "'{a,b}'", "'{\"a,b\"}'", "'{NULL}'", "NULL"],
    "at": ["'2026-01-01 00:00:00+00'", "'2026-01-01 00:00:00.000001+00'", "'infinity'", "NULL"],
}


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize("column", VALUES)
async def test_columns(tables: AsyncEngine, other: asyncpg.Connection, column: str) -> None:
    """Every value differs from the one before, and arrives as the ORM would load it."""
    await other.execute(f'INSERT INTO texts_wide (id, "{column}") VALUES (1, NULL), (2, NULL)')
    async with RowWatcher(tables, interval=0.01) as watcher:
        stream, bystander = watcher.changes(Wide, 1), watcher.changes(Wide, 2)
        async with stream, bystander:
            await compared(watcher)
            for value in [*VALUES[column], *VALUES[column][:1]]:
                if value == "NULL" and value is VALUES[column][0]:
                    continue
                await other.execute(f'UPDATE texts_wide SET "{column}" = {value} WHERE id = 1')
                async with asyncio.timeout(30):
                    change = await anext(stream)
                async with AsyncSession(tables) as session:
                    expected = getattr(await session.get_one(Wide, 1), column)
                assert change.after is not None
                assert repr(change.after[column]) == repr(expected)
            await compared(watcher)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_another_text_of_the_same_value(
    tables: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A text that differs while the values do not is no change, and is fetched once."""
    await other.execute(
        "INSERT INTO texts_wide (id, exact, real) VALUES (1, 1.0, 0.0), (2, 2.0, 0.0)"
    )
    async with RowWatcher(tables, interval=0.01) as watcher, watcher.changes(Wide, 1) as stream:
        async with watcher.changes(Wide, 2) as bystander:
            await compared(watcher)
            for scale in ("1.00", "1.000"):
                await other.execute(
                    f"UPDATE texts_wide SET exact = {scale}, real = '-0.0' WHERE id = 1"
                )
                await compared(watcher)
                assert not group_of(watcher)._rows._snapshots.comparison._unconfirmed
            await other.execute("UPDATE texts_wide SET exact = 3 WHERE id = 1")
            change = await anext(stream)
            assert change.before is not None
            assert change.before["exact"] == 1
            assert bystander.current is not None


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_one_statement_per_tick(tables: AsyncEngine, other: asyncpg.Connection) -> None:
    """A tick is one statement with one row; a second one fetches the changed rows."""
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, 200) AS n")
    async with RowWatcher(tables, interval=0.01) as watcher:
        tasks = [asyncio.create_task(watcher.wait(Item, number)) for number in range(1, 201)]
        await until(lambda: bool(getattr(watcher._hub, "_groups", None)))
        await until(lambda: not group_of(watcher)._members.joining)
        await compared(watcher)
        group = group_of(watcher)
        statements: list[tuple[str, int]] = []
        look = group.tick

        async def observed(fetch: Callable[..., Any], *, whole: bool) -> None:
            async def counting(statement: str, *arguments: Any) -> list[Any]:
                rows: list[Any] = await fetch(statement, *arguments)
                kind = "rows" if statement == group._rows._statement else "texts"
                statements.append((kind, len(rows)))
                return rows

            await look(counting, whole=whole)
            statements.append(("end", 0))

        group.tick = observed  # type: ignore[method-assign]
        await until(lambda: len(statements) >= 6)
        assert set(statements) == {("texts", 1), ("end", 0)}
        assert statements[:4] in ([("texts", 1), ("end", 0)] * 2, [("end", 0), ("texts", 1)] * 2)
        statements.clear()
        await other.execute("UPDATE item SET name = 'new' WHERE id IN (7, 8)")
        await asyncio.gather(*tasks[6:8])
        assert ("rows", 2) in statements
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_inexact_floats(
    tables: AsyncEngine, database_url: str, other: asyncpg.Connection
) -> None:
    """Where a setting shortens floats in text, rows are fetched and compared by value."""
    settings = connect_args(extra_float_digits="-10")
    engine = create_async_engine(database_url, connect_args=settings)
    await other.execute("INSERT INTO texts_wide (id, real) VALUES (1, 0.1234567890123), (2, 0)")
    try:
        async with RowWatcher(engine, interval=0.01) as watcher:
            async with watcher.changes(Wide, 1) as stream, watcher.changes(Wide, 2):
                texts = group_of(watcher)._rows._snapshots
                await until(lambda: not texts.is_usable)
                await other.execute("UPDATE texts_wide SET real = 0.1234567890124 WHERE id = 1")
                async with asyncio.timeout(30):
                    change = await anext(stream)
                assert change.after is not None
                assert change.after["real"] == 0.1234567890124
    finally:
        await engine.dispose()


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_snapshots_that_fail(
    tables: AsyncEngine,
    other: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A statement of texts that fails is given up with a warning, and the rows are fetched from
    there on."""
    monkeypatch.setattr(
        RowStatements, "snapshot", lambda self, types: "SELECT no_such_function($1)"
    )
    await other.execute("INSERT INTO item VALUES (1, ''), (2, '')")
    async with RowWatcher(tables, interval=0.01) as watcher:
        async with watcher.changes(Item, 1) as stream, watcher.changes(Item, 2):
            texts = group_of(watcher)._rows._snapshots
            await until(lambda: not texts.is_usable)
            await other.execute("UPDATE item SET name = 'new' WHERE id = 1")
            async with asyncio.timeout(30):
                assert (await anext(stream)).after == {"id": 1, "name": "new"}
    assert [
        record.levelname for record in caplog.records if "compared as text" in record.message
    ] == ["WARNING"]


class FakeDatabase:
    """Answers the statements of a group from a dictionary that changes between any two of them."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rows: dict[int, str] = {}
        self.meanwhile: list[Callable[[], None]] = []
        self.order = random.Random(0)

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        if self.meanwhile:
            self.meanwhile.pop(0)()
        if statement == self.group._rows._statement:
            return [
                (key, self.rows[key], self.line(key)) for key in arguments[0] if key in self.rows
            ]
        if statement != self.group._rows._snapshots._statement:
            return [(None, "integer[]")]
        keys = [int(key) for key in arguments[0].strip("{}").split(",")]
        lines = [self.line(key) for key in keys if key in self.rows]
        self.order.shuffle(lines)
        return [(b"\n".join(lines) or None, True)]

    def line(self, key: int) -> bytes:
        return f"({key},{self.rows[key]})".encode()

    def put(self, key: int, value: str | None) -> None:
        if value is None:
            self.rows.pop(key, None)
        else:
            self.rows[key] = value

    def fail(self) -> None:
        raise LinkLost


#: Keys that things happen to, and others that are watched all the time so that the former are few
#: among all.
NUMBERS = st.integers(1, 2)
BYSTANDERS = range(3, 9)
PUTS = st.tuples(NUMBERS, st.sampled_from(["a", "b", None]))
LOOKS = st.tuples(
    st.just("look"), st.integers(0, 3).map(bool), st.lists(PUTS | PUTS | st.none(), max_size=3)
)
STEPS = st.tuples(st.sampled_from(["join", "join", "leave", "due"]), NUMBERS, st.none())


WATCHED = [("join", 1, None), ("put", (1, "a"), None), *[("look", True, [])] * 2]


@example(
    program=[*WATCHED, ("look", True, [(1, "b"), (1, "a")]), ("put", (1, "b"), None)]
)  # there and back
@example(
    program=[
        *WATCHED,
        ("put", (1, None), None),
        ("due", 1, None),
        ("look", False, []),
        ("put", (1, "a"), None),
    ]
)
@example(
    program=[
        ("join", 1, None),
        ("look", True, []),
        ("look", True, [(1, "a"), (1, None)]),
        ("put", (1, "a"), None),
    ]
)
@example(program=[*WATCHED, ("look", True, [(1, "b"), None])])  # the second statement fails
@given(
    program=st.lists(
        LOOKS | LOOKS | STEPS | st.tuples(st.just("put"), PUTS, st.none()), max_size=40
    )
)
@settings(
    max_examples=examples(120),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_nothing_is_missed(
    monkeypatch: pytest.MonkeyPatch, program: list[tuple[str, Any, Any]]
) -> None:
    """After two quiet ticks every subscription has the latest state, and no false change."""
    monkeypatch.setattr(_known_rows, "FETCHED_ROWS", 0)

    async def main() -> None:
        engine = create_async_engine("postgresql+asyncpg://nowhere/nothing")
        target = resolve_target(Item, None)
        group = Group(engine, target)
        database = FakeDatabase(group)
        streams: list[Stream[Item]] = []

        async def look(whole: bool) -> None:
            try:
                await group.tick(database.fetch, whole=whole)
            except LinkLost:
                pass
            finally:
                database.meanwhile.clear()

        for key in BYSTANDERS:
            streams.append(Stream(target, key, key))
            group.add(streams[-1])
            database.put(key, "a")
        await look(True)
        for action, what, meanwhile in program:
            if action == "put":
                database.put(*what)
            elif action == "join":
                streams.append(Stream(target, what, what))
                group.add(streams[-1])
            elif action == "leave":
                for stream in [each for each in streams if each.key == what]:
                    group.remove(stream)
                    streams.remove(stream)
            elif action == "due":
                group.mark_due([payload_key((what,))])
            else:
                assert action == "look"
                for put in meanwhile:
                    database.meanwhile.append(
                        database.fail if put is None else lambda put=put: database.put(*put)
                    )
                await look(what)
                for stream in streams:
                    change = stream.take()
                    assert change is None or change.before != change.after
        for _ in range(2):
            await look(True)
        assert group._rows._snapshots.is_usable
        for stream in streams:
            stream.take()
            name = database.rows.get(stream.key)
            assert stream.seen == (None if name is None else {"id": stream.key, "name": name})
        # And everything is quiet: whatever is left in doubt would be fetched at every look from
        # here on.
        await look(True)
        assert not group._rows._snapshots.comparison._unconfirmed
        assert not group._rows._snapshots.comparison._strange

    asyncio.run(main())
