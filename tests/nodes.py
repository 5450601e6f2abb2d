"""A primary and a streaming standby that can change places, behind an address that can move.

One pair serves all the tests of a worker. A test takes it through the fixture `nodes`, which hands
it over with both nodes running, the standby caught up, the address on the primary, every table of
`Base` empty, and no other table and no role.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import create_async_engine

from pgtoolset.testing import EmbeddedServer
from pgtoolset.testing.server import _template
from tests.support import Base, plain_url, until

_SETTINGS = {
    "jit": "off",
    "max_wal_size": "256MB",
    "shared_buffers": "16MB",
    # What a node needs to follow the other one after a change of places, and to do it at once.
    "wal_keep_size": "64MB",
    "wal_retrieve_retry_interval": "100ms",
}


#: Whether a node is a standby, which goes on to replay where it was told to pause.
_FOLLOWS = """SELECT CASE WHEN pg_is_in_recovery() THEN pg_wal_replay_resume()::text IS NOT NULL
ELSE false END"""

#: Where the WAL of a primary ends.
_POSITION = "SELECT pg_current_wal_flush_lsn()::text"

#: What tests have made, on whichever node: a role, too, comes along to the other one.
_EMPTY = """
DO $$ DECLARE name text; BEGIN
  FOR name IN SELECT quote_ident(rolname) FROM pg_roles WHERE oid >= 16384
  LOOP EXECUTE 'DROP OWNED BY ' || name || ' CASCADE; DROP ROLE ' || name; END LOOP;
  FOR name IN SELECT quote_ident(tablename) FROM pg_tables
    WHERE schemaname = 'public' AND tablename <> ALL ('{{{tables}}}')
  LOOP EXECUTE 'DROP TABLE ' || name || ' CASCADE'; END LOOP;
  TRUNCATE {tables};
END $$
"""


class Nodes:
    """Two servers, of which one is the primary and the other one its standby.

    Attributes:
        primary: the server that takes writes.
        standby: the other one; its data are those of the primary.
    """

    def __init__(self, version: Literal[16, 18]) -> None:
        self._version: Literal[16, 18] = version
        self.primary = EmbeddedServer(version=version, settings=_SETTINGS)
        self.standby = EmbeddedServer(version=version, settings=_SETTINGS)
        self._address = Path(tempfile.mkdtemp(prefix="pgtoolset-address-"))

    def address(self, database: str = "postgres", *, driver: str = "postgresql+asyncpg") -> str:
        """Return the URL of the address that `move` points to a node, as a DNS name would."""
        return f"{driver}://postgres@/{database}?host={quote(str(self._address))}"

    def move(self, server: EmbeddedServer) -> None:
        """Point the address to a node. Connections that are open stay where they are."""
        owner = os.stat(server._directory)
        os.chown(self._address, owner.st_uid, owner.st_gid)
        link = self._address / "new"
        link.symlink_to(server._directory / ".s.PGSQL.5432")
        link.rename(self._address / ".s.PGSQL.5432")

    async def start(self) -> None:
        """Start both nodes."""
        await asyncio.to_thread(self.primary.start)
        engine = create_async_engine(self.primary.url())
        try:
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
        finally:
            await engine.dispose()
        await asyncio.to_thread(self.standby.start)
        await asyncio.to_thread(self.standby.shut_down)
        await self.rejoin()
        self.move(self.primary)

    def stop(self) -> None:
        """Stop both nodes and delete their data."""
        self.standby.stop()
        self.primary.stop()
        shutil.rmtree(self._address)

    async def switch_over(self, *, moves_address: bool = True) -> None:
        """Change the places of both nodes without a loss, as an administrator does.

        The primary is shut down, which ends its sessions, and comes back as the standby of the
        other one.
        """
        await asyncio.to_thread(self.primary.shut_down)
        await self.promote(moves_address=moves_address)
        self._follow(self.standby, self.primary)
        await self._resume(self.standby)
        await self.caught_up()

    async def fail_over(self, *, moves_address: bool = True) -> None:
        """Crash the primary and promote the standby. `rejoin` makes the old primary a standby."""
        await asyncio.to_thread(self.primary.shut_down, immediate=True)
        await self.promote(moves_address=moves_address)

    @asynccontextmanager
    async def standby_cut_off(self) -> AsyncIterator[None]:
        """Let the standby receive nothing any more until the end of the block."""
        standby = self.standby
        await execute(standby, "ALTER SYSTEM SET primary_conninfo = ''")
        await execute(standby, "SELECT pg_reload_conf()")

        async def is_cut_off() -> bool:
            # Not what the primary says: another standby may follow it.
            return not await execute(standby, "SELECT count(*) FROM pg_stat_wal_receiver")

        try:
            await until(is_cut_off)
            yield
        finally:
            await execute(standby, "ALTER SYSTEM RESET primary_conninfo")
            await execute(standby, "SELECT pg_reload_conf()")

    async def promote(self, *, moves_address: bool = True) -> None:
        """Promote the standby. Where the primary still runs there are two of them afterwards."""
        assert await execute(self.standby, "SELECT pg_promote(true, 60)")
        self.primary, self.standby = self.standby, self.primary
        if moves_address:
            await asyncio.to_thread(self.move, self.primary)

    async def rejoin(self) -> None:
        """Replace the data of the standby, which does not run, by a copy of the primary."""
        await asyncio.to_thread(self._copy)
        self._follow(self.standby, self.primary)
        await self._resume(self.standby)
        await self.caught_up()

    async def caught_up(self) -> None:
        """Wait until the standby has replayed all that the primary has written."""
        position = await execute(self.primary, _POSITION)
        await self.replayed(position)

    async def replayed(self, position: object) -> None:
        """Wait until the standby has replayed all up to a position."""
        async with connected(self.standby) as connection:

            async def is_there() -> bool:
                look = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
                return bool(await connection.fetchval(look, position))

            await until(is_there)

    async def restore(self) -> None:
        """Bring the pair back to where each test begins, whatever the last one left."""
        states = [await _recovers(self.primary), await _recovers(self.standby, _FOLLOWS)]
        if states[0] is None:
            await self._resume(self.primary)
        if states[1] is not True:
            if states[1] is False:
                await asyncio.to_thread(self.standby.shut_down, immediate=True)
            await self.rejoin()
        await execute(self.primary, "ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()")
        tables = ", ".join(f'"{each.name}"' for each in Base.metadata.sorted_tables)
        await self.replayed(await execute(self.primary, _EMPTY.format(tables=tables), _POSITION))
        self.move(self.primary)

    def _copy(self) -> None:
        data = self.standby._directory / "data"
        owner = os.stat(data)
        shutil.rmtree(data)
        program = _template(self._version)[1].bin_path / "pg_basebackup"
        arguments = ["-D", str(data), "--checkpoint=fast", "--no-sync"]
        address = ["-h", str(self.primary._directory), "-U", "postgres"]
        identity = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        subprocess.run(
            [str(program), *arguments, *address],
            check=True,
            cwd="/",
            **(identity if os.geteuid() == 0 else {}),  # type: ignore[call-overload]
        )

    def _follow(self, standby: EmbeddedServer, primary: EmbeddedServer) -> None:
        data = standby._directory / "data"
        owner = os.stat(data)
        with (data / "postgresql.conf").open("a") as file:
            conninfo = f"host={primary._directory} user=postgres"
            file.write(f"\nprimary_conninfo = '{conninfo}'\n")
        (data / "standby.signal").touch()
        os.chown(data / "standby.signal", owner.st_uid, owner.st_gid)

    async def _resume(self, server: EmbeddedServer) -> None:
        await asyncio.to_thread(server._command, "start")  # `resume` waits for a primary

        async def answers() -> bool:
            return await _recovers(server) is not None

        await until(answers)


@asynccontextmanager
async def connected(server: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a node."""
    connection = await asyncpg.connect(plain_url(server.url()))
    try:
        yield connection
    finally:
        await connection.close()


async def execute(server: EmbeddedServer, *statements: str) -> object:
    """Execute statements on a node, each by itself; return the value of the last one, if any."""
    value: object = None
    async with connected(server) as connection:
        for statement in statements:
            value = await connection.fetchval(statement)
    return value


async def _recovers(
    server: EmbeddedServer, look: str = "SELECT pg_is_in_recovery()"
) -> bool | None:
    """Whether a node is a standby; `None` where it does not answer."""
    try:
        return bool(await execute(server, look))
    except (OSError, asyncpg.PostgresError):
        return None


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def node_pair(request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    """The pair of a worker; tests take it through `nodes`."""
    version: Literal[16, 18] = 16 if request.config.option.pg_version == "16" else 18
    nodes = Nodes(version)
    try:
        await nodes.start()
        yield nodes
    finally:
        await asyncio.to_thread(nodes.stop)


@pytest.fixture
async def nodes(node_pair: Nodes) -> Nodes:
    """A primary and its standby, with the tables of `Base`, which are empty."""
    await node_pair.restore()
    return node_pair
