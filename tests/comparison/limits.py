"""Promises about what a transaction has: settings, a deadline, a connection, an outcome."""

import asyncio

from sqlalchemy import text

from tests.comparison.promises import promise
from tests.comparison.stacks import PgToolset, Stack, plain


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
        while (found := gate.execute(waiting).fetchone()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        gate.execute("SELECT pg_terminate_backend(%s)", found)
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
