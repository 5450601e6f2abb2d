"""Items of tenants under row-level security, for a role that does not own the table."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

ROLE = "reader of items"


@asynccontextmanager
async def secured_items(other: asyncpg.Connection) -> AsyncIterator[None]:
    """Let the role see and write only the items of its tenant, whose name ends at a colon."""
    await other.execute(
        f"""CREATE ROLE "{ROLE}";
            GRANT SELECT, INSERT, UPDATE, DELETE ON item, part TO "{ROLE}";
            ALTER TABLE item ENABLE ROW LEVEL SECURITY;
            ALTER TABLE item FORCE ROW LEVEL SECURITY;
            CREATE POLICY tenant ON item USING
                (split_part(name, ':', 1) = nullif(current_setting('app.tenant', true), ''))"""
    )
    try:
        yield
    finally:
        await other.execute(
            f"""DROP POLICY tenant ON item; ALTER TABLE item NO FORCE ROW LEVEL SECURITY;
                ALTER TABLE item DISABLE ROW LEVEL SECURITY;
                DROP OWNED BY "{ROLE}"; DROP ROLE "{ROLE}" """
        )


def tenant(name: str) -> dict[str, str]:
    """The settings of a tenant."""
    return {"role": ROLE, "app.tenant": name}
