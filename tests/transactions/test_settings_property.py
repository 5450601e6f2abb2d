"""Random nesting of blocks with settings, commits, rollbacks and errors, against a dictionary."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)

from pgtoolset import create_db_context, get_transaction
from tests.settings import NOTHING, left_behind, narrow, setting
from tests.support import examples, swallow_error

STEPS = st.sampled_from(["look", "commit", "rollback", "error", "by hand"])
VALUES = st.dictionaries(
    st.sampled_from(["app.a", "app.b", "lock_timeout"]), st.integers(1, 9).map(str), max_size=3
)
BLOCKS: st.SearchStrategy[Any] = st.recursive(
    STEPS,
    lambda inner: st.tuples(
        st.sampled_from(["block", "failing block", "savepoint", "failing savepoint"]),
        VALUES,
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)


class Model:
    """What the open transaction of a unit must have, as plain dictionaries."""

    def __init__(self, unit: dict[str, str], *, is_joined: bool) -> None:
        self.unit = unit
        self.is_joined = is_joined
        self.now = dict(unit)


class Failed(Exception):
    """What a failing block raises."""


async def seen(session: AsyncSession, model: Model) -> None:
    expected = [
        model.now.get("app.a", ""),
        model.now.get("app.b", ""),
        f"{model.now['lock_timeout']}ms" if "lock_timeout" in model.now else "0",
    ]
    names = ("app.a", "app.b", "lock_timeout")
    assert [await setting(session, name) for name in names] == expected


async def run(session: AsyncSession, steps: list[Any], model: Model, depth: int = 0) -> None:
    for step in steps:
        if isinstance(step, tuple):
            await run_block(session, step, model, depth + 1)
        elif step in ("commit", "rollback", "error"):
            if depth:
                continue  # SQLAlchemy has none of it inside of a block
            if step == "error":
                await swallow_error(session)
            await (session.commit() if step == "commit" else session.rollback())
            model.now = dict(model.unit)
        elif step == "by hand" and not model.is_joined:  # where it would outlive the session
            await session.execute(text("SET LOCAL app.a = '77'"))
            model.now["app.a"] = "77"
        await seen(session, model)


async def run_block(session: AsyncSession, step: Any, model: Model, depth: int) -> None:
    kind, values, steps = step
    before = dict(model.now)
    opened = (
        get_transaction(session, settings=values) if "block" in kind else session.begin_nested()
    )
    try:
        async with opened:
            if "block" in kind:
                model.now.update(values)
            await seen(session, model)
            await run(session, steps, model, depth)
            if "failing" in kind:
                raise Failed
    except Failed:
        model.now = before
    else:
        # A RELEASE keeps what was set by hand, but for what the block itself had set.
        if "block" in kind:
            model.now = {
                **model.now,
                **{name: before[name] for name in values if name in before},
            }
            for name in values:
                if name not in before:
                    del model.now[name]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def shared_engine(runner: asyncio.Runner, database_url: str) -> Iterator[AsyncEngine]:
    opened = narrow(database_url)
    yield runner.run(opened.__aenter__())
    runner.run(opened.__aexit__(None, None, None))


@asynccontextmanager
async def bound_to(engine: AsyncEngine, is_joined: bool) -> AsyncIterator[Any]:
    if not is_joined:
        yield engine
        return
    async with engine.connect() as connection:
        await connection.begin()
        await connection.execute(text("SELECT 1"))
        yield connection
        assert await setting(connection, "app.a") == ""


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(unit=VALUES, steps=st.lists(BLOCKS, max_size=4), is_joined=st.booleans())
def test_any_nesting(
    runner: asyncio.Runner,
    shared_engine: AsyncEngine,
    unit: dict[str, str],
    steps: list[Any],
    is_joined: bool,
) -> None:
    """At each point a unit has what a dictionary says, and the next user of the connection has
    none of it; over a pool, and joined to the transaction of a connection."""

    async def check() -> None:
        async with bound_to(shared_engine, is_joined) as bind:
            maker = async_sessionmaker(bind, join_transaction_mode="create_savepoint")
            async with create_db_context(maker, settings=unit)() as session:
                await run(session, steps, Model(unit, is_joined=is_joined))
        assert await left_behind(shared_engine) == NOTHING

    runner.run(check())
