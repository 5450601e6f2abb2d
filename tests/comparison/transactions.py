"""Promises about transactions: savepoints, callbacks, retries, settings, deadlines, outcomes."""

import asyncio
from contextlib import suppress
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.comparison.models import Item, Order, create_tables
from tests.comparison.promises import promise
from tests.comparison.stacks import ASYNC, FastapiToolsets, PgToolset, Stack, plain, until


def nested(stack: Stack, session: Any) -> Any:
    """The block that a function of the stack opens for a transaction."""
    if isinstance(stack, PgToolset):
        from pgtoolset import get_transaction

        return get_transaction(session)
    if isinstance(stack, FastapiToolsets):
        from fastapi_toolsets.db import transaction

        return transaction(session)
    return session.begin()


@promise(*ASYNC, lacking="get_transaction|atomic")
async def nests(stack: Stack) -> bool:
    """The same block is a transaction outside, and a savepoint inside of another one."""
    create_tables(stack)
    try:
        async with AsyncSession(stack.engine) as session, nested(stack, session):
            session.add(Order(id=1))
            with suppress(ZeroDivisionError):
                async with nested(stack, session):
                    session.add(Order(id=2))
                    await session.flush()
                    raise ZeroDivisionError
    except SQLAlchemyError:
        return False
    with plain(stack.url) as connection:
        return connection.execute('SELECT id FROM "order"').fetchall() == [(1,)]


@promise(*ASYNC, lacking="on_commit")
async def callbacks(stack: Stack) -> bool:
    """A callback after the commit is forgotten when its savepoint is rolled back."""
    create_tables(stack)
    called: list[int] = []

    def register(session: Any, number: int) -> None:
        if isinstance(stack, PgToolset):
            from pgtoolset import on_commit

            on_commit(session, lambda: called.append(number))
        else:
            event.listen(
                session.sync_session, "after_commit", lambda _: called.append(number), once=True
            )

    if isinstance(stack, FastapiToolsets):
        return await events(stack)
    async with AsyncSession(stack.engine) as session, session.begin():
        register(session, 1)
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                await session.execute(text("SELECT 1"))
                register(session, 2)
                raise ZeroDivisionError
    return called == [1]


async def events(stack: FastapiToolsets) -> bool:
    """Its callbacks belong to rows, in sessions of a class of its own."""
    from fastapi_toolsets.models import EventSession, ModelEvent, listens_for

    called: list[int] = []
    listens_for(Order, [ModelEvent.CREATE])(lambda order, *_: called.append(order.id))
    async with EventSession(stack.engine, expire_on_commit=False) as session:
        session.add(Order(id=1))
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                session.add(Order(id=2))
                await session.flush()
                raise ZeroDivisionError
        await session.commit()
    return called == [1]


@promise(PgToolset, lacking=r"(run|retry)_\w*transaction\w*|\w*serialization_failure\w*")
async def retries(stack: Stack) -> bool:
    """A transaction runs again after a serialization failure."""
    from pgtoolset import run_transaction

    create_tables(stack)
    both_have_read = asyncio.Barrier(2)
    runs = 0

    async def work(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        item = await session.get_one(Item, 1)
        if runs <= 2:
            await both_have_read.wait()
        item.name = f"{item.name}+"

    serializable = {"isolation_level": "SERIALIZABLE"}
    await asyncio.gather(
        *(run_transaction(stack.session_maker, work, **serializable) for _ in range(2))
    )
    with plain(stack.url) as connection:
        return connection.execute("SELECT name FROM item").fetchone() == ("new++",) and runs == 3


@promise(PgToolset, lacking=r"\w*((in_?doubt|resolve|unknown)_?commit|commit_?(unknown|status))\w*")
async def resolves(stack: Stack) -> bool:
    """A COMMIT whose answer was lost is resolved by asking PostgreSQL."""
    from pgtoolset import TransactionLostError, create_db_context

    async def work() -> None:
        async with create_db_context(stack.session_maker, resolve_commit="30s")() as session:
            await session.execute(text("INSERT INTO slow (id) VALUES (1)"))

    waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with plain(stack.url) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        task = asyncio.create_task(work())
        await until(lambda: gate.execute(waiting).fetchone() is not None)
        gate.execute(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS waits")
        gate.execute("SELECT pg_advisory_unlock(1)")
        try:
            await task
        except TransactionLostError:
            return gate.execute("SELECT count(*) FROM slow").fetchone() == (0,)
    return False


@promise(
    PgToolset, lacking=r"\w*(SettingMissing|transaction_settings|session_settings|set_local)\w*"
)
async def settings(stack: Stack) -> bool:
    """Settings of PostgreSQL, such as a tenant, hold in each transaction of a session."""
    from pgtoolset import create_db_context

    tenant = text("SELECT current_setting('app.tenant_id', true)")
    seen = []
    async with create_db_context(stack.session_maker, settings={"app.tenant_id": "7"})() as session:
        for _ in range(2):
            seen.append(await session.scalar(tenant))
            await session.commit()
    async with stack.unit() as session:  # the same connection, in another unit
        seen.append(await session.scalar(tenant) or "")
    return seen == ["7", "7", ""]


@promise(PgToolset, lacking=r"\w*deadline\w*")
async def deadlines(stack: Stack) -> bool:
    """One deadline bounds the pool, locks, statements and retries together."""
    from pgtoolset import DeadlineExceededError, deadline

    try:
        with deadline("500ms"):
            async with stack.unit() as session:
                await session.execute(text("SELECT pg_sleep(0.1)"))
                await session.execute(text("SELECT pg_sleep(60)"))
    except DeadlineExceededError as error:
        return error.spent_on == "statement"
    return False


@promise(PgToolset, lacking=r"\w*(release|give_back|lend)_connection\w*")
async def lends(stack: Stack) -> bool:
    """The connection can be given back while another service answers."""
    from pgtoolset import release_connection

    async with stack.unit() as session:
        await session.execute(text("SELECT 1"))
        before = stack.checked_out()
        async with release_connection(session):
            during = stack.checked_out()
        await session.execute(text("SELECT 1"))
        return (before, during) == (1, 0)
