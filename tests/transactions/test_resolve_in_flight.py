"""Section 11 of the contract, "in flight": a COMMIT that is still in progress somewhere is ended or
waited for before anything is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset import CommitUnknownError, TransactionLostError, run_transaction
from pgtoolset.testing import EmbeddedServer
from tests.nodes import execute
from tests.support import insert, until
from tests.transactions.resolving import (
    IDS,
    LONG,
    Action,
    Lab,
    is_stored,
    last_id_is_stored,
)

# A commit that is still in progress


@asynccontextmanager
async def commits_wait(server: EmbeddedServer) -> AsyncIterator[Action]:
    """Let each COMMIT after an INSERT into item wait until the block has ended; yield a function
    that waits until one does."""
    await execute(
        server,
        """
        CREATE OR REPLACE FUNCTION wait_for_door() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END $$;
        """,
    )
    await execute(
        server,
        "CREATE CONSTRAINT TRIGGER door AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait_for_door()",
    )
    try:
        async with Lab.at(server.url()) as lab, lab.maker() as holder:
            await (await holder.connection()).exec_driver_sql("SELECT pg_advisory_lock(4711)")

            async def wait() -> None:
                look = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

                async def one_waits() -> bool:
                    return bool(await execute(server, look))

                await until(one_waits)

            yield wait
    finally:
        await execute(server, "DROP FUNCTION wait_for_door CASCADE")


@pytest.mark.parametrize("user", ["postgres", "plain"])
async def test_in_progress_is_ended(server: EmbeddedServer, plain_role: str, user: str) -> None:
    """A COMMIT that is still in progress is ended before anything is answered."""
    async with Lab.at(server.url(), user) as lab, commits_wait(server) as one_waits:
        with pytest.raises(TransactionLostError):
            await lab.write(one_waits, how="whole", direction="to server")
    assert not await last_id_is_stored(server)


async def test_in_progress_is_waited_for(
    server: EmbeddedServer, plain_role: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the backend cannot be ended, its COMMIT is waited for."""
    caplog.set_level(logging.WARNING, "pgtoolset")
    function = "pg_terminate_backend(integer, bigint)"
    await execute(server, f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    try:
        async with Lab.at(server.url(), plain_role) as lab:
            async with commits_wait(server) as one_waits:
                writing = asyncio.create_task(
                    lab.write(one_waits, how="whole", direction="to server")
                )
                await until(lambda: "cannot be ended" in caplog.text)
                assert not writing.done()
            assert await is_stored(server, await writing)
    finally:
        await execute(server, f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")


async def test_in_progress_for_too_long(server: EmbeddedServer, plain_role: str) -> None:
    """A COMMIT that does not end in time is unknown."""
    function = "pg_terminate_backend(integer, bigint)"
    await execute(server, f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    try:
        async with Lab.at(server.url(), plain_role) as lab, commits_wait(server) as one_waits:
            with pytest.raises(CommitUnknownError, match="the COMMIT has not ended within"):
                await lab.write(one_waits, how="whole", direction="to server", timeout=0.3)
    finally:
        await execute(server, f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")


async def test_half_open(server: EmbeddedServer, lab: Lab) -> None:
    """A COMMIT that has not reached the server, which does not know that the client is gone, is
    ended before it can arrive."""

    async def work(session: AsyncSession) -> int:
        id_ = next(IDS)
        await insert(session, id_)
        if not ended:
            lab.proxy.cut_at_commit("RST", "to server", meanwhile=leave)
            ended.append(asyncio.Event())
        return id_

    async def leave() -> None:
        # Only the client hears of the end, and the COMMIT waits before the server.
        lab.proxy.drop_clients()
        await ended[0].wait()

    ended: list[asyncio.Event] = []
    id_ = await run_transaction(lab.maker, work, resolve_commit=LONG)
    assert await is_stored(server, id_)
    assert not await is_stored(server, id_ - 1)
    ended[0].set()


# Synchronous standbys


@asynccontextmanager
async def synchronous(server: EmbeddedServer, names: str = "nobody") -> AsyncIterator[None]:
    """Let commits wait for a standby that does not exist."""
    await set_standbys(server, names)
    try:
        yield
    finally:
        await set_standbys(server, "")


async def set_standbys(server: EmbeddedServer, names: str) -> None:
    await execute(server, f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    await execute(server, "SELECT pg_reload_conf()")

    async def is_set() -> bool:
        return await execute(server, "SHOW synchronous_standby_names") == names

    await until(is_set)


async def one_waits_for_a_standby(server: EmbeddedServer) -> int | None:
    pid = await execute(server, "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
    assert pid is None or isinstance(pid, int)
    return pid


async def test_waits_for_a_synchronous_standby(server: EmbeddedServer, lab: Lab) -> None:
    """A COMMIT that waits for a synchronous standby is never ended, and is stored only when the
    standby has it."""

    async def waits() -> bool:
        return await one_waits_for_a_standby(server) is not None

    async def wait() -> None:
        await until(waits)

    async with synchronous(server):
        writing = asyncio.create_task(lab.write(wait, how="whole", direction="to server"))
        await until(lambda: lab.proxy.accepted > 1)
        await asyncio.sleep(0.3)
        assert not writing.done()
        assert await waits()
    assert await is_stored(server, await writing)


async def test_standby_was_not_waited_for(server: EmbeddedServer, lab: Lab) -> None:
    """A COMMIT whose wait for a standby was cut short is on one machine only: unknown, until a
    standby has confirmed what was written."""

    async def cut_short() -> None:
        async def waits() -> bool:
            return await one_waits_for_a_standby(server) is not None

        await until(waits)
        pid = await one_waits_for_a_standby(server)
        await execute(server, f"SELECT pg_terminate_backend({pid}, 10000)")

    async with synchronous(server):
        with pytest.raises(CommitUnknownError, match="no synchronous standby has confirmed"):
            await lab.write(cut_short, how="whole", direction="to server", timeout=0.5)
        assert await last_id_is_stored(server)
        # A session that does not wait for standbys has not lost anything.
        local = ("SET LOCAL synchronous_commit = local",)
        assert await is_stored(server, await lab.write(commands=local))
