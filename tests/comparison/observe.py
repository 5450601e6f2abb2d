"""Run one program on one stack, in a database of its own."""

from pgtoolset.testing import create_worker_database
from tests.comparison import (  # noqa: F401 - they register their promises
    associations,
    databases,
    locks,
    packages,
    sessions,
    transactions,
    watching,
)
from tests.comparison.promises import Promise, counterparts
from tests.comparison.stacks import Stack, plain

TABLES = """
    CREATE TABLE item (id int PRIMARY KEY, name text);
    CREATE TABLE part (
        id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        item_id int REFERENCES item DEFERRABLE INITIALLY DEFERRED
    );
    CREATE TABLE slow (id int PRIMARY KEY);
    CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        BEGIN
            PERFORM pg_advisory_lock(1);
        EXCEPTION WHEN query_canceled THEN NULL;
        END;
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION wait_at_commit();
"""


async def observed(promise: Promise, stack: type[Stack], server_url: str) -> bool | None:
    """Whether the stack keeps the promise; `None` where it has no counterpart."""
    if stack not in promise.stacks:
        found = counterparts(stack, promise.lacking)
        assert found == [], f"{stack.heading} may have a counterpart: {found}"
        return None
    if not promise.in_database:
        return await promise.program(stack(server_url))
    async with create_worker_database(server_url, prefix="comparison") as url:
        with plain(url) as connection:
            connection.execute(TABLES)
        used = stack(url)
        try:
            return await promise.program(used)
        finally:
            await used.close()
