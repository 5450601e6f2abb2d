"""JSON: two values are equal where PostgreSQL's jsonb has them equal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import JSON
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset import RowWatcher, WaitTimeoutError, wait_for_row_change
from pgtoolset.protocols import RowComparator
from pgtoolset.watch import _groups, _known_rows, _polls
from tests.native.conftest import implementations, name_of
from tests.support import until


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "json_document"

    id: Mapped[int] = mapped_column(primary_key=True)
    packed: Mapped[Any] = mapped_column(JSONB)
    plain: Mapped[Any] = mapped_column(JSON)


class Named(Base):
    __tablename__ = "json_named"

    name: Mapped[Any] = mapped_column(JSONB, primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


@pytest.fixture
async def documents(engine: AsyncEngine) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


NUMBERS = (
    st.integers(-(2**53), 2**53)
    | st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))
    | st.sampled_from([0, 1, -0.0, 0.0, 1.0, 1e300, 2.0**60])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(codec="ascii", min_codepoint=1)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)


def with_other_kinds(value: Any) -> Any:
    """The same value with numbers in place of booleans, and floats in place of integers."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return float(value)
    if isinstance(value, list):
        return [with_other_kinds(each) for each in value]
    if isinstance(value, dict):
        return {name: with_other_kinds(value[name]) for name in reversed(value)}
    return value


@pytest.mark.parametrize("comparator", implementations("comparator"), ids=name_of)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=VALUES, another=VALUES)
async def test_as_jsonb(
    other: asyncpg.Connection, comparator: RowComparator, one: Any, another: Any
) -> None:
    """The comparator has two values equal exactly where PostgreSQL's jsonb has."""
    for left, right in ((one, another), (one, with_other_kinds(one)), (one, one)):
        texts = json.dumps(left), json.dumps(right)
        equal = await other.fetchval("SELECT $1::text::jsonb = $2::text::jsonb", *texts)
        values = [json.loads(each) for each in texts]
        assert comparator.same_value(*values) == equal, texts


CHANGES = [("1", "true"), ("[0]", "[false]"), ('{"a": {"b": 1}}', '{"a": {"b": true}}')]
SAME = [("1", "1.0"), ('{"a": 1, "b": [0]}', '{"b": [-0.0], "a": 1e0}'), ("1e400", "10e399")]


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.usefixtures("documents")
@pytest.mark.parametrize("column", ["packed", "plain"])
@pytest.mark.parametrize("kind", ["wait", "fetched", "as text"])
async def test_changes(
    engine: AsyncEngine,
    other: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    column: str,
    kind: str,
) -> None:
    """A change that jsonb does not have equal ends a wait; another spelling of the value does
    not."""
    if kind != "fetched":
        monkeypatch.setattr(_known_rows, "FETCHED_ROWS", 0)
    await other.execute("INSERT INTO json_document VALUES (1, '0', '0')")
    looks = 0
    fetch, tick = _polls.RowQuery._fetch, _groups.Group.tick

    def fetched(*arguments: Any) -> Any:
        nonlocal looks
        found = fetch(*arguments)
        looks += 1
        return found

    async def ticked(*arguments: Any, **options: Any) -> None:
        nonlocal looks
        await tick(*arguments, **options)
        looks += 1

    monkeypatch.setattr(_polls.RowQuery, "_fetch", fetched)
    monkeypatch.setattr(_groups.Group, "tick", ticked)

    async def wait(watcher: RowWatcher) -> Any:
        if kind != "wait":
            change = await watcher.wait(Document, 1, columns=[column], timeout=60)
            assert change.after is not None
            return change.after[column]
        async with AsyncSession(engine) as session:
            row = await wait_for_row_change(
                session, Document, 1, columns=[column], interval=0.02, timeout=60
            )
            return getattr(row, column)

    write = (
        f"UPDATE json_document SET {column} = $1::text::{'jsonb' if column == 'binary' else 'json'}"
    )
    async with RowWatcher(engine, interval=0.02) as watcher:
        for pairs, is_change in ((CHANGES, True), (SAME, False)):
            for before, after in pairs:
                await other.execute(write, before)
                task = asyncio.create_task(wait(watcher))
                start = looks
                await until(lambda start=start: looks > start + 1)  # type: ignore[misc]
                await other.execute(write, after)
                start = looks
                if is_change:
                    value = await task
                    assert json.dumps(value) == after
                else:
                    await until(lambda start=start: looks > start + 1)  # type: ignore[misc]
                    assert not task.done()
                    await other.execute(write, '"another"')
                    assert await task == "another"


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.usefixtures("documents")
@pytest.mark.parametrize("many", [False, True])
async def test_keys_of_json(engine: AsyncEngine, other: asyncpg.Connection, many: bool) -> None:
    """A watcher finds the rows whose keys are JSON, as wait_for_row_change does."""
    await other.execute(
        """INSERT INTO json_named SELECT to_jsonb(n), 0 FROM generate_series(1, 100) AS n;
           INSERT INTO json_named VALUES ('"é \\" 1"', 0), ('"1"', 0)"""
    )
    for key in (5, 'é " 1', "1"):
        async with RowWatcher(engine, interval=0.02) as watcher:
            streams = [watcher.changes(Named, n) for n in range(10, 100) if many]
            async with watcher.changes(Named, key) as changes:
                assert changes.current == {"name": key, "value": 0}
                await other.execute("UPDATE json_named SET value = value + 1")
                assert (await anext(changes)).after == {"name": key, "value": 1}
            for stream in streams:
                await stream.aclose()
        async with AsyncSession(engine) as session:
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, Named, key, timeout=0)
        await other.execute("UPDATE json_named SET value = 0")
