"""The database that each test is given: nothing that one leaves reaches the next."""

from __future__ import annotations

import asyncpg
import pytest

from pgtoolset.testing import create_worker_database
from tests.support import Renewer, plain_url, until

#: What no schema holds, so that no DROP SCHEMA ... CASCADE takes it away.
LEFT = {
    "publication": "CREATE PUBLICATION left_behind FOR ALL TABLES",
    "event trigger": """CREATE SCHEMA hooks;
                        CREATE FUNCTION hooks.refuse() RETURNS event_trigger
                          LANGUAGE plpgsql AS
                          'BEGIN RAISE ''no tables''; END';
                        CREATE EVENT TRIGGER refuse ON ddl_command_start
                          WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION hooks.refuse()""",
    "privileges": "ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM CURRENT_USER",
    "setting": """DO $$ BEGIN EXECUTE format(
                    'ALTER DATABASE %I SET default_transaction_read_only = on',
                    current_database()); END $$""",
    "large object": "SELECT lo_create(0)",
    "foreign server": "CREATE FOREIGN DATA WRAPPER far; CREATE SERVER far FOREIGN DATA WRAPPER far",
    "language": "CREATE LANGUAGE other HANDLER plpgsql_call_handler",
    "cast": "CREATE CAST (int AS point) WITH INOUT",
    "privilege on a catalog": "REVOKE SELECT ON pg_class FROM PUBLIC",
    "schema public": "DROP SCHEMA public CASCADE",
    "search_path": "ALTER ROLE CURRENT_USER IN DATABASE {name} SET search_path = nowhere",
}

#: Every catalog of the database, and what the server keeps of it.
_CATALOGS = """
SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'pg_catalog'::regnamespace
  AND NOT relisshared AND relname !~ 'statistic' ORDER BY 1
"""
_SETTINGS = """
SELECT (SELECT count(*) FROM pg_db_role_setting WHERE setdatabase = d.oid), datacl, datconnlimit
FROM pg_database AS d WHERE datname = current_database()
"""


async def contents(url: str) -> list[object]:
    """Return the number of rows of each catalog, its privileges, and the settings."""
    connection = await asyncpg.connect(plain_url(url))
    try:
        names = [row["relname"] for row in await connection.fetch(_CATALOGS)]
        counts = await connection.fetch(
            " UNION ALL ".join(f"SELECT '{name}', count(*) FROM {name}" for name in names)
        )
        acls = await connection.fetch(
            "SELECT relname, relacl FROM pg_class WHERE oid < 16384 ORDER BY oid"
        )
        return [counts, acls, await connection.fetch(_SETTINGS)]
    finally:
        await connection.close()


@pytest.mark.once
async def test_nothing_is_left(server_url: str, renewer: Renewer) -> None:
    """What outlives each schema of a database does not outlive the test, and the database is
    dropped with the others of its run."""
    async with create_worker_database(server_url, "main", prefix="pgtoolset anew") as url:
        renewer.make_anew(url)
        empty = await contents(url)
        connection = await asyncpg.connect(plain_url(url))
        name = await connection.fetchval("SELECT quote_ident(current_database())")
        for statement in LEFT.values():
            await connection.execute(statement.replace("{name}", name))
        assert await contents(url) != empty
        renewer.make_anew(url)
        assert await contents(url) == empty
        await until(connection.is_closed)
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await asyncpg.connect(plain_url(url))
