"""A primary with two standbys, and the sessions of tests on them."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import ReadReplicas
from pgtoolset.testing import EmbeddedServer
from tests.nodes import Nodes, execute
from tests.support import until

#: The driver of the engines.
DRIVER = os.environ.get("DRIVER", "asyncpg")

#: Seconds that nothing of a test takes, even on a machine that is very busy.
LONG = 60


class Cluster:
    """The pair of `nodes` with a second standby, and engines on them, disposed after the test.

    Attributes:
        nodes: the pair.
        second: a pair of the same primary and the second standby.
    """

    def __init__(self, nodes: Nodes, second: Nodes) -> None:
        self.nodes = nodes
        self.second = second
        self.engines: list[AsyncEngine] = []

    @property
    def standbys(self) -> list[EmbeddedServer]:
        return [self.nodes.standby, self.second.standby]

    def engine(self, url: str, **options: Any) -> AsyncEngine:
        engine = create_async_engine(
            url.replace("+asyncpg", f"+{DRIVER}"),
            **({"pool_size": 5, "max_overflow": 0, "pool_timeout": LONG} | options),
        )
        self.engines.append(engine)
        return engine

    def maker(self, server: EmbeddedServer | str, **options: Any) -> async_sessionmaker[Any]:
        url = server if isinstance(server, str) else server.url()
        return async_sessionmaker(self.engine(url, **options), expire_on_commit=False)

    def replicas(self, **options: Any) -> ReadReplicas[AsyncSession]:
        return ReadReplicas(
            self.maker(self.nodes.primary),
            [self.maker(each) for each in self.standbys],
            **({"max_wait": LONG} | options),
        )

    async def pause(self, *, paused: bool = True) -> None:
        """Stop the standbys from replaying, or let them go on."""
        action = "pause" if paused else "resume"
        for server in self.standbys:
            await execute(server, f"SELECT pg_wal_replay_{action}()")

        async def is_so() -> bool:
            look = "SELECT pg_get_wal_replay_pause_state()"
            wanted = "paused" if paused else "not paused"
            return all([await execute(each, look) == wanted for each in self.standbys])

        await until(is_so)

    async def cut_off(self) -> None:
        """Keep the standbys from receiving anything more.

        The one that may be promoted comes last. PostgreSQL writes now and then by itself, and a
        standby that has received more than the new primary could never follow it.
        """
        for server in reversed(self.standbys):
            await execute(server, "ALTER SYSTEM SET primary_conninfo = ''")
            await execute(server, "SELECT pg_reload_conf()")
            look = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)"

            async def is_cut(server: EmbeddedServer = server, look: str = look) -> bool:
                return bool(await execute(server, look))

            await until(is_cut)

    async def caught_up(self) -> None:
        await self.nodes.caught_up()
        await self.second.caught_up()

    async def close(self) -> None:
        """Dispose the engines, whose connections must be back in their pools."""

        async def returned() -> bool:
            return all(engine.pool.checkedout() == 0 for engine in self.engines)  # type: ignore[attr-defined]

        await until(returned)
        for engine in self.engines:
            await engine.dispose()


async def start_second(nodes: Nodes) -> Nodes:
    """Return a pair with the primary of another one, and a standby of its own."""
    second = Nodes(nodes._version)
    second.primary = nodes.primary
    await asyncio.to_thread(second.standby.start)
    await asyncio.to_thread(second.standby.shut_down)
    await second.rejoin()
    return second


async def restore_second(nodes: Nodes, second: Nodes) -> None:
    """Make the second standby follow the primary of the pair, whatever the last test left."""
    if not await follows(second.standby, nodes.primary):
        second.primary = nodes.primary
        with suppress(OSError):
            await execute(second.standby, "ALTER SYSTEM RESET ALL")
        await asyncio.to_thread(second.standby.shut_down, immediate=True)
        await second.rejoin()
    await execute(second.standby, "SELECT pg_wal_replay_resume()")
    await second.caught_up()


async def follows(standby: EmbeddedServer, primary: EmbeddedServer) -> bool:
    """Whether a standby streams the timeline of a primary from it."""
    try:
        look = "received_tli || ' ' || current_setting('primary_conninfo')"
        found = await execute(standby, f"SELECT {look} FROM pg_stat_wal_receiver")
    except OSError:
        return False
    wal_file = str(await execute(primary, "SELECT pg_walfile_name(pg_current_wal_lsn())"))
    streamed, _, conninfo = str(found).partition(" ")
    return streamed == str(int(wal_file[:8], 16)) and str(primary._directory) in conninfo


def stop_second(second: Nodes) -> None:
    second.standby.stop()
    shutil.rmtree(second._address)


def settings(**values: str) -> dict[str, Any]:
    """Return the arguments of an engine whose sessions have settings from their start."""
    if DRIVER == "asyncpg":
        return {"connect_args": {"server_settings": values}}
    options = " ".join(f"-c {name}={value}" for name, value in values.items())
    return {"connect_args": {"options": options.replace("repeatable read", "repeatable\\ read")}}


def silent_url(port: int) -> str:
    """Return the URL of a server on a port that says nothing."""
    ssl = "ssl" if DRIVER == "asyncpg" else "sslmode"
    return f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres?{ssl}=disable"


async def is_standby(session: AsyncSession) -> bool:
    return bool(await session.scalar(text("SELECT pg_is_in_recovery()")))


async def server_of(session: AsyncSession) -> str:
    """Return the directory of the node that a session reads on."""
    return str(await session.scalar(text("SHOW unix_socket_directories")))


def counted(engine: AsyncEngine) -> list[str]:
    """Return the list of statements that an engine sends from now on."""
    statements: list[str] = []

    def note(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    return statements
