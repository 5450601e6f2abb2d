"""The server of a test of templates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from pgtoolset.databases import drop_database
from tests.support import plain_url


class Server:
    """The server of this run, seen from outside: its template databases and their comments."""

    def __init__(self, url: str, connection: asyncpg.Connection) -> None:
        self.url = url
        self.connection = connection

    async def names(self, pattern: str = "^pgtoolset_template_") -> set[str]:
        rows = await self.connection.fetch(
            "SELECT datname FROM pg_database WHERE datname ~ $1", pattern
        )
        return {row["datname"] for row in rows}

    async def comment(self, name: str) -> str:
        query = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1"
        return await self.connection.fetchval(query, name)

    async def execute(self, url: str, statement: str) -> None:
        connection = await asyncpg.connect(plain_url(url))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@asynccontextmanager
async def watched(server_url: str) -> AsyncIterator[Server]:
    """Yield the server; drop the templates that the block has made."""
    connection = await asyncpg.connect(plain_url(server_url))
    server = Server(server_url, connection)
    before = await server.names()
    try:
        yield server
    finally:
        for name in await server.names() - before:
            await drop_database(name, server_url=server_url, force=True)
        await connection.close()
