"""`drop_database` where something that is no session uses the database: named, with its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from pgtoolset import DatabaseInUseError, create_database, drop_database
from pgtoolset.testing import EmbeddedServer

NAME = "pgtoolset obstacles"

#: By kind: what puts it in the way, what the error says of it, and what ends it there.
KINDS = {
    "prepared": (
        "BEGIN; CREATE TABLE t (); PREPARE TRANSACTION 'half paid'",
        ["prepared transaction 'half paid'", "ROLLBACK PREPARED"],
        "ROLLBACK PREPARED 'half paid'",
    ),
    "slot": (
        "SELECT pg_create_logical_replication_slot('tail', 'pgoutput', temporary => true)",
        ["active replication slot 'tail'", "process {pid}", "pg_terminate_backend"],
        "SELECT pg_drop_replication_slot('tail')",
    ),
    "subscription": (
        "CREATE SUBSCRIPTION news CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false)",
        ["subscription 'news'", "DROP SUBSCRIPTION", "slot_name = NONE"],
        "ALTER SUBSCRIPTION news SET (slot_name = NONE); DROP SUBSCRIPTION news",
    ),
}


@pytest.fixture(scope="module")
def replicating() -> Iterator[EmbeddedServer]:
    """A server that has all three of them."""
    settings = {
        "wal_level": "logical",
        "max_wal_senders": "4",
        "max_replication_slots": "4",
        "max_prepared_transactions": "4",
    }
    with EmbeddedServer(settings=settings) as server:
        yield server


@pytest.fixture
async def inside(replicating: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    """A session in the database."""
    url = replicating.url(driver="postgresql")
    await create_database(NAME, server_url=url)
    connection = await asyncpg.connect(replicating.url(NAME, driver="postgresql"))
    try:
        yield connection
    finally:
        connection.terminate()
        await drop_database(NAME, server_url=url, force=True, missing_ok=True)


@pytest.mark.filterwarnings("ignore:.*subscription was created, but is not connected")
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("kind", KINDS)
async def test_named_with_its_end(
    replicating: EmbeddedServer, inside: asyncpg.Connection, kind: str, force: bool
) -> None:
    """The error names the obstacle and how to end it, and no longer advises `force=True`."""
    make, says, end = KINDS[kind]
    await inside.execute(make)
    url = replicating.url(driver="postgresql")
    with pytest.raises(DatabaseInUseError) as caught:
        await drop_database(NAME, server_url=url, force=force)
    for words in says:
        assert words.format(pid=inside.get_server_pid()) in str(caught.value)
    assert "force=True) ends" not in str(caught.value)
    if inside.is_closed():
        inside = await asyncpg.connect(replicating.url(NAME, driver="postgresql"))
    for statement in end.split("; "):
        await inside.execute(statement)
    await drop_database(NAME, server_url=url, force=True)


@pytest.mark.filterwarnings("ignore:.*subscription was created, but is not connected")
async def test_all_at_once(replicating: EmbeddedServer, inside: asyncpg.Connection) -> None:
    """Of several obstacles, all are named at once, and inactive slots are none."""
    # A new slot waits for all transactions, a prepared one too.
    await inside.execute("SELECT pg_create_logical_replication_slot('quiet', 'pgoutput')")
    for kind in ("slot", "subscription", "prepared"):
        await inside.execute(KINDS[kind][0])
    url = replicating.url(driver="postgresql")
    with pytest.raises(DatabaseInUseError) as caught:
        await drop_database(NAME, server_url=url, force=True)
    for name in ("'half paid'", "'tail'", "'news'"):
        assert name in str(caught.value)
    assert "quiet" not in str(caught.value)
    for _, _, end in KINDS.values():
        for statement in end.split("; "):
            await inside.execute(statement)
