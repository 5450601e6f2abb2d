"""Section 11 of the contract, "outcome" and "in flight": what a server can say of a commit after it
was restarted, has crashed or was replaced, and while the commit is still in progress."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgtoolset import (
    CommitUnknownError,
    TransactionLostError,
    create_db_context,
    get_transaction,
    run_transaction,
)
from pgtoolset._postgres import commit_status
from pgtoolset.testing import EmbeddedServer
from tests.nodes import Nodes, execute
from tests.proxy import Direction, How, Proxy
from tests.support import Base, insert, plain_url, sqlalchemy_url, until

Action = Callable[[], Awaitable[None]]

#: Seconds: longer than any test, but for those in which no answer can come.
LONG = 60

IDS = itertools.count(1)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server that the tests restart and crash."""
    # What is not flushed at a commit stays so.
    settings = {"wal_writer_delay": "10s", "autovacuum": "off", "shared_buffers": "16MB"}
    version = 16 if request.config.option.pg_version == "16" else 18
    with EmbeddedServer(version=version, settings=settings) as server:  # type: ignore[arg-type]

        async def create() -> None:
            engine = create_async_engine(server.url())
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            await engine.dispose()

        asyncio.run(create())
        yield server


class Lab:
    """Sessions of a server or of an address, through a proxy."""

    def __init__(self, proxy: Proxy, maker: async_sessionmaker[AsyncSession]) -> None:
        self.proxy = proxy
        self.maker = maker

    @classmethod
    @asynccontextmanager
    async def at(cls, url: str, user: str = "postgres") -> AsyncIterator[Lab]:
        async with Proxy.to(url) as proxy:
            engine = create_async_engine(sqlalchemy_url(proxy.url).replace("postgres@", f"{user}@"))
            try:
                yield cls(proxy, async_sessionmaker(engine, expire_on_commit=False))
            finally:
                await engine.dispose()

    async def write(
        self,
        meanwhile: Action | None = None,
        *,
        how: How = "RST",
        direction: Direction = "to client",
        timeout: float = LONG,
        commands: tuple[str, ...] = (),
    ) -> int:
        """Insert an item as a unit whose COMMIT is cut; return its id."""
        id_ = next(IDS)
        async with create_db_context(self.maker, resolve_commit=timeout)() as session:
            connection = await session.connection()
            for command in commands:
                await connection.exec_driver_sql(command)
            await insert(session, id_)
            self.proxy.cut_at_commit(how, direction, meanwhile=meanwhile)
        return id_


@pytest.fixture
async def lab(server: EmbeddedServer) -> AsyncIterator[Lab]:
    async with Lab.at(server.url()) as lab:
        yield lab


async def is_stored(server: EmbeddedServer, id_: int) -> bool:
    return bool(await execute(server, f"SELECT count(*) FROM item WHERE id = {id_}"))


async def give_ids_away(server: EmbeddedServer, last: int = 0) -> int:
    """Commit transactions until `last` is the id of one; return the id of the first."""
    connection = await asyncpg.connect(plain_url(server.url()))
    try:
        ids = [0]
        while ids[-1] <= last:
            ids.append(await connection.fetchval("SELECT pg_current_xact_id()::text::int"))
        return ids[1]
    finally:
        await connection.close()


async def last_id_is_stored(server: EmbeddedServer) -> bool:
    """Whether the last item that any test of this module has made is stored."""
    return await is_stored(server, next(IDS) - 1)


# The same server


@pytest.mark.parametrize("direction", ["to server", "to client"])
async def test_clean_restart(server: EmbeddedServer, lab: Lab, direction: Direction) -> None:
    """A server that was shut down and started again knows what became of a commit."""

    async def restart() -> None:
        await asyncio.to_thread(server.restart)

    if direction == "to client":
        id_ = await lab.write(restart)
        assert await is_stored(server, id_)
    else:
        with pytest.raises(TransactionLostError):
            await lab.write(restart, direction=direction)
        assert not await last_id_is_stored(server)


async def test_waits_for_the_restart(server: EmbeddedServer, lab: Lab) -> None:
    """A server that is being started is asked again and again, until the timeout."""
    started: list[asyncio.Task[None]] = []

    async def restart() -> None:
        await asyncio.to_thread(server.shut_down)

        async def resume() -> None:
            await asyncio.sleep(0.1)
            await asyncio.to_thread(server.resume)

        started.append(asyncio.create_task(resume()))

    assert await is_stored(server, await lab.write(restart))
    await started[0]


@pytest.mark.parametrize("how", ["SIGKILL", "immediate"])
async def test_crash(server: EmbeddedServer, lab: Lab, how: str) -> None:
    """A server that has recovered from a crash may have forgotten the transaction, and given its id
    to another one that it calls committed: unknown."""
    first: list[int] = []

    async def crash() -> None:
        if how == "immediate":
            await asyncio.to_thread(server.restart, immediate=True)
        else:
            pid = await execute(
                server, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
            )
            assert isinstance(pid, int)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: is_another(pid))
        first.append(await give_ids_away(server, before + 1))

    async def is_another(checkpointer: int) -> bool:
        try:
            look = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
            return await execute(server, look) not in (checkpointer, None)
        except Exception:
            return False

    before = await give_ids_away(server)
    with pytest.raises(CommitUnknownError, match="recovered from a crash"):
        await lab.write(crash, commands=("SET LOCAL synchronous_commit = off",))
    # The id of the lost transaction is another one's, which is committed.
    assert not await last_id_is_stored(server)
    assert first[0] <= before + 1
    assert await execute(server, f"SELECT pg_xact_status('{before + 1}'::xid8)") == "committed"


async def test_statistics_are_reset(
    server: EmbeddedServer, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset of the server's statistics looks like a crash: unknown, and never a wrong answer. A
    minute later it is noted."""

    async def reset() -> None:
        await execute(server, "SELECT pg_stat_reset_shared('bgwriter')")

    with pytest.raises(CommitUnknownError, match="statistics were reset"):
        await lab.write(reset)
    async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
        await insert(session, next(IDS))  # the server is noted
    await reset()
    with pytest.raises(CommitUnknownError, match="statistics were reset"):
        await lab.write()
    async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
        await insert(session, next(IDS))
    await reset()
    monkeypatch.setattr(commit_status, "LONGEST_MEMORY", 0)
    assert await is_stored(server, await lab.write())


@pytest.fixture
async def plain_role(server: EmbeddedServer) -> AsyncIterator[str]:
    """A role that has privileges on tables only."""
    await execute(server, "CREATE ROLE plain LOGIN")
    await execute(server, "GRANT ALL ON ALL TABLES IN SCHEMA public TO plain")
    yield "plain"
    await execute(server, "DROP OWNED BY plain")
    await execute(server, "DROP ROLE plain")


async def test_plain_role(server: EmbeddedServer, plain_role: str) -> None:
    """A role without any privilege on the server resolves its commits."""
    async with Lab.at(server.url(), plain_role) as lab:
        assert await is_stored(server, await lab.write())
        with pytest.raises(TransactionLostError):
            await lab.write(direction="to server")


async def test_refused_function(server: EmbeddedServer, plain_role: str) -> None:
    """Where the role may not call what is needed, commits work, and a lost one is unknown and says
    which function it was."""
    await execute(server, "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    try:
        async with Lab.at(server.url(), plain_role) as lab:
            async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
                await insert(session, next(IDS))
            with pytest.raises(CommitUnknownError, match=r"may not call pg_control_system\(\)"):
                await lab.write()
    finally:
        await execute(server, "GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")


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
    async with Lab.at(server.url()) as lab, lab.maker() as holder:
        await (await holder.connection()).exec_driver_sql("SELECT pg_advisory_lock(4711)")

        async def wait() -> None:
            look = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

            async def one_waits() -> bool:
                return bool(await execute(server, look))

            await until(one_waits)

        yield wait
    await execute(server, "DROP TRIGGER door ON item")


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


# Another server


async def test_failover_gives_the_id_away(nodes: Nodes) -> None:
    """After a failover that has lost the transaction, the new primary has given its id to another
    one, which is committed: unknown, and not tried again."""
    async with nodes.standby_cut_off(), Lab.at(nodes.address()) as lab:
        before = await give_ids_away(nodes.primary)

        async def fail_over() -> None:
            await nodes.fail_over()
            await give_ids_away(nodes.primary, before + 1)

        with pytest.raises(CommitUnknownError, match="a standby was promoted"):
            await lab.write(fail_over)
        assert not await last_id_is_stored(nodes.primary)
        status = await execute(nodes.primary, f"SELECT pg_xact_status('{before + 1}'::xid8)")
        assert status == "committed"


async def test_standby_answers(nodes: Nodes) -> None:
    """A standby says nothing about a commit: it is asked again until the primary answers, or
    unknown."""
    async with Lab.at(nodes.address()) as lab:

        async def away() -> None:
            nodes.move(nodes.standby)

        with pytest.raises(CommitUnknownError, match="only a standby has answered within"):
            await lab.write(away, timeout=0.2)
        nodes.move(nodes.primary)
        writing = asyncio.create_task(lab.write(away))
        await until(lambda: lab.proxy.cut is not None)
        await until(lambda: lab.proxy.cut is None)
        accepted = lab.proxy.accepted
        await until(lambda: lab.proxy.accepted > accepted + 1)
        nodes.move(nodes.primary)
        assert await is_stored(nodes.primary, await writing)


async def test_another_cluster(nodes: Nodes, request: pytest.FixtureRequest) -> None:
    """A server of another cluster says nothing about a commit: unknown."""
    # Servers of one version are copies of one cluster.
    version = 18 if request.config.option.pg_version == "16" else 16
    another = EmbeddedServer(version=version)  # type: ignore[arg-type]
    await asyncio.to_thread(another.start)
    try:
        async with Lab.at(nodes.address()) as lab:

            async def move() -> None:
                nodes.move(another)

            with pytest.raises(CommitUnknownError, match="belongs to another cluster"):
                await lab.write(move)
    finally:
        await asyncio.to_thread(another.stop)


async def test_cold_copy(nodes: Nodes, server: EmbeddedServer) -> None:
    """A server that was made from the same files, and has written less, says nothing either."""
    async with Lab.at(nodes.address()) as lab:
        for _ in range(2):
            await execute(nodes.primary, "SELECT pg_switch_wal()")
            await execute(nodes.primary, "SELECT pg_logical_emit_message(true, '', '')")

        async def move() -> None:
            nodes.move(server)

        with pytest.raises(CommitUnknownError, match="could not find out"):
            await lab.write(move)


async def test_block_in_a_switchover(nodes: Nodes) -> None:
    """A clean switchover between COMMIT and its answer is unknown: the timeline is another one."""
    async with Lab.at(nodes.address()) as lab, lab.maker() as session:
        with pytest.raises(CommitUnknownError, match="a standby was promoted"):
            async with get_transaction(session, resolve_commit=LONG):
                await insert(session, next(IDS))
                lab.proxy.cut_at_commit("RST", meanwhile=nodes.switch_over)
