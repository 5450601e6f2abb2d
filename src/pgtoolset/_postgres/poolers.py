"""A pooler between the driver and PostgreSQL: errors that name the option to change.

In transaction mode PgBouncer gives each transaction to any of its backends, and the next backend
does not have the statements that the last one has prepared.
https://www.pgbouncer.org/features.html and
https://docs.sqlalchemy.org/en/20/dialects/postgresql.html#prepared-statement-name-with-pgbouncer
"""

from __future__ import annotations

import re

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from pgtoolset._postgres.drivers import DRIVERS, Driver
from pgtoolset._postgres.sqlstates import driver_error, sqlstate_of
from pgtoolset.errors import PoolerError

_PREPARED = frozenset({"26000", "42P05"})  # it does not exist, or exists already

#: PgBouncer's own words, which are in English always: its message is all that psycopg has.
_STARTUP = re.compile(r"unsupported startup parameter(?: in options)?: (\w+)")


def explained(context: ExceptionContext) -> PoolerError | None:
    """Return the error that names the option to change, where a pooler is the cause of an error."""
    error = context.sqlalchemy_exception
    if not isinstance(error, DBAPIError):
        return None
    if sqlstate_of(error) in _PREPARED:
        advice = _without_caches(error, DRIVERS.get(context.dialect.driver))
    elif context.connection is None:
        advice = _without_parameter(error)
    else:
        return None
    if advice is None:
        return None
    return PoolerError(advice, refused=error, is_disconnect=context.is_disconnect)


def _without_caches(error: DBAPIError, driver: Driver | None) -> str | None:
    message = str(driver_error(error))
    if driver is None or driver.prepared_prefix not in message:
        return None
    return (
        "the driver has prepared a statement that this backend of PostgreSQL does not have, or "
        f"has from another client ({message.splitlines()[0]}): a pooler in transaction mode is "
        f"between them, or the application has deallocated it. Behind a pooler pass "
        f"{driver.without_caches} to create_async_engine, or set max_prepared_statements in "
        "PgBouncer 1.21 or newer"
    )


def _without_parameter(error: DBAPIError) -> str | None:
    found = _STARTUP.search(str(driver_error(error)))
    if found is None:
        return None
    name = found[1]
    return (
        f"the pooler refuses {name} when a connection starts. Leave it out of connect_args "
        "(server_settings of asyncpg, options of psycopg) and of the URL, and set it for the role "
        f"(ALTER ROLE ... SET); or name {name} in ignore_startup_parameters of PgBouncer, which "
        "then leaves it out"
    )
