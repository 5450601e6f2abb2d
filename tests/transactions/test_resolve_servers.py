"""Section 11 of the contract, "outcome": what a server can say of a commit after it was restarted,
has crashed or was replaced."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from pgtoolset import (
    CommitUnknownError,
    TransactionLostError,
    create_db_context,
    get_transaction,
)
from pgtoolset._postgres import commit_status
from pgtoolset.testing import EmbeddedServer
from tests.nodes import Nodes, execute
from tests.proxy import Direction
from tests.support import insert, until
from tests.transactions.resolving import (
    IDS,
    LONG,
    Lab,
    give_ids_away,
    is_stored,
    last_id_is_stored,
)

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

    async def is_reset_since(time: object) -> bool:
        return await execute(server, "SELECT pg_stat_get_bgwriter_stat_reset_time()") != time

    async def reset() -> None:
        before = await execute(server, "SELECT pg_stat_get_bgwriter_stat_reset_time()")
        await execute(server, "SELECT pg_stat_reset_shared('bgwriter')")
        # Up to PostgreSQL 14 another process counts, which writes its figures to a file.
        await until(lambda: is_reset_since(before))

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
    is_away = asyncio.Event()
    async with Lab.at(nodes.address()) as lab:

        async def away() -> None:
            nodes.move(nodes.standby)
            is_away.set()

        with pytest.raises(CommitUnknownError, match="only a standby has answered within"):
            await lab.write(away, timeout=0.2)
        nodes.move(nodes.primary)
        is_away.clear()
        writing = asyncio.create_task(lab.write(away))
        await is_away.wait()
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
