"""What the tests of `create_database` and `drop_database` share."""

from __future__ import annotations

import asyncpg

#: Of the names of the databases that a test makes, which `databases_gone` drops.
PREFIX = "pgtoolset databases"


async def exists(connection: asyncpg.Connection, name: str) -> bool:
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name
        )
    )
