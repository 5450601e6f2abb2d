"""Template databases: made once for each version of a schema, sealed, and kept for the next run.

PostgreSQL copies a template without reading its rows.
https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, ClassVar
from uuid import uuid4

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgtoolset._arguments import DatabaseUrl, engine_url, shown, url_of
from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.catalog import EQ, NE
from pgtoolset._postgres.databases import rename_statement
from pgtoolset._postgres.quoting import literal, quoted
from pgtoolset._postgres.renaming import END_SESSIONS, LOCK_TIMEOUT
from pgtoolset._postgres.sending import send
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset._postgres.sqlstates import INVALID_CATALOG_NAME, sqlstate_of
from pgtoolset._postgres.turns import key_of, turn
from pgtoolset._postgres.untrusted import json_in
from pgtoolset.databases import create_database, drop, seal_database
from pgtoolset.errors import DatabaseNotFoundError

__all__ = ["TemplateDatabase", "template_database"]

logger: logging.Logger = logging.getLogger("pgtoolset")

_PREFIX = "pgtoolset_template_"
_RUN_PREFIX = _PREFIX + "run_"
_DRAFT = "_draft"

#: A template that no run has used for this long is dropped when another one is made.
_KEPT = timedelta(days=7)

#: Characters of the longest mark that is read.
_LONGEST_MARK = 200
#: Seconds to wait while another process makes the template.
_TIMEOUT = 600.0

#: Seconds for one DROP DATABASE.
_DROP_TIMEOUT = 30.0

#: A version or a run, which becomes part of the name of a database.
_NAME_PART = re.compile(r"[A-Za-z0-9]{1,32}")


@dataclass(frozen=True)
class TemplateDatabase:
    """A sealed database, to be copied with `create_database(template=...)`.

    Attributes:
        name: the name of the database.
        has_rows: whether its tables have rows.
    """

    name: str
    has_rows: bool


@dataclass(frozen=True)
class _Mark:
    """What the comment of a template says about it."""

    used: date
    has_rows: bool

    _START: ClassVar = "pgtoolset template "

    def __str__(self) -> str:
        return self._START + json.dumps({"used": self.used.isoformat(), "has_rows": self.has_rows})

    @classmethod
    def read(cls, comment: str | None) -> _Mark:
        """Return the mark in a comment. A comment that was changed means: in use, with rows."""
        found = json_in((comment or "").removeprefix(cls._START), longest=_LONGEST_MARK)
        match found:
            case {"used": str(used), "has_rows": bool(has_rows)}:
                try:
                    return cls(date.fromisoformat(used), has_rows)
                except ValueError:
                    pass
        return cls(_today(), True)


@asynccontextmanager
async def template_database(
    server_url: DatabaseUrl,
    make: Callable[[str], Awaitable[object]],
    *,
    run: str,
    version: str | None = None,
) -> AsyncIterator[TemplateDatabase]:
    """Yield the template database of a version of a schema; make it where the server lacks it.

    Of several callers at a time, in any number of processes, one makes the template and the others
    wait for it, for at most 10 minutes. Templates that no block has used for a week, and drafts of
    runs that were killed, are dropped when a template is made.

    Args:
        server_url: a URL of the server, for SQLAlchemy or libpq, of a role that may create
            databases.
        make: an async function that is called with the URL of an empty database and makes the
            tables and rows.
        run: 1 to 32 letters and digits that name the run of the tests.
        version: 1 to 32 letters and digits that are the same for the same schema. With `None` the
            template is that of the run, and the last block that uses it drops it.

    Yields:
        The template.

    Raises:
        LockTimeoutError: another process makes it for longer than 10 minutes; the error names its
            session.
        ValueError, TypeError: an argument is wrong; before any SQL.

    Example:
        >>> async with template_database(url, migrate, run="r1", version="3f9") as template:
        ...     await create_database("copy", server_url=url, template=template.name)

    See https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
    """
    url = url_of("server_url", server_url)
    _check_part("run", run)
    if version is not None:
        _check_part("version", version)
    name = f"{_RUN_PREFIX}{run}" if version is None else f"{_PREFIX}{version}"
    async with AsyncExitStack() as users:
        made = False
        # An advisory lock belongs to a database, so every caller takes it in the same one. The lock
        # "making" admits one maker; the lock "using" keeps a sweep from dropping the template.
        async with (
            maintenance_connection(url, never=name) as connection,
            turn(
                connection,
                alone=key_of("making", name),
                together=_use(name),
                timeout=_TIMEOUT,
                purpose=f"make the template database {name!r}",
            ),
        ):
            mark = await _mark_of(connection, name)
            if mark is None or mark.used != _today():
                made = mark is None
                mark = await _made_or_marked(url, name, make, mark)
            if version is None:
                # A mark keeps a template with a version for a week. This one is kept by a lock,
                # which is taken before the one above ends.
                await users.enter_async_context(_used(url, name))
        if made:
            await _sweep(url, name)
        yield TemplateDatabase(name, mark.has_rows)


def _use(name: str) -> int:
    return key_of("using", name.removesuffix(_DRAFT))


async def _made_or_marked(
    url: URL, name: str, make: Callable[[str], Awaitable[object]], mark: _Mark | None
) -> _Mark:
    # On a connection of its own: the one with the lock is in a transaction.
    async with maintenance_connection(url, never=name) as connection:
        if mark is None:
            return await _make(connection, url, name, make)
        return await _set_mark(connection, name, _Mark(_today(), mark.has_rows))


@asynccontextmanager
async def _used(url: URL, name: str) -> AsyncIterator[None]:
    """Keep a template for a block; drop it afterwards, unless another block uses it."""
    async with maintenance_connection(url, never=name) as connection:
        try:
            async with turn(
                connection,
                together=_use(name),
                timeout=_TIMEOUT,
                purpose=f"use the template database {name!r}",
            ):
                yield
        finally:
            if not connection.is_closed():
                await uninterrupted(_drop_unused(connection, name))


def _check_part(argument: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a string, not {shown(value)}")
    if not _NAME_PART.fullmatch(value):
        raise ValueError(f"{argument} must be 1 to 32 letters and digits, not {shown(value)}")


async def _make(
    connection: Any, url: URL, name: str, make: Callable[[str], Awaitable[object]]
) -> _Mark:
    draft = name + _DRAFT
    # A draft that exists is that of a run that was killed: a living maker would hold the lock.
    await _drop_draft(connection, draft)
    await create_database(draft, server_url=url)
    try:
        draft_url = engine_url(url).set(database=draft)
        await make(draft_url.render_as_string(hide_password=False))
        mark = _Mark(_today(), await _has_rows(draft_url))
        await seal_database(draft, server_url=url)
        await _set_mark(connection, draft, mark)
        # Renamed last, so a database with the name of a template is complete.
        await connection.execute(f"ALTER DATABASE {quoted(draft)} RENAME TO {quoted(name)}")
    except BaseException:
        await _drop_draft(connection, draft)
        raise
    return mark


async def _drop_draft(connection: Any, draft: str) -> None:
    with suppress(DatabaseNotFoundError):
        await drop(connection, draft, force=True, timeout=_DROP_TIMEOUT)


_TABLES = text(f"""
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE c.relkind {EQ} 'r' AND n.nspname {NE} 'information_schema'
  AND NOT pg_catalog.starts_with(CAST(n.nspname AS pg_catalog.text), 'pg_')
""")


async def _has_rows(url: URL) -> bool:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        for table in (await connection.scalars(_TABLES)).all():
            found = await connection.run_sync(send, f"SELECT EXISTS (SELECT FROM {table})")
            if found.scalar():
                return True
    return False


_MARK = f"""
SELECT pg_catalog.shobj_description(oid, 'pg_database') AS mark
FROM pg_catalog.pg_database WHERE datname {EQ} $1
"""

_TEMPLATES = f"""
SELECT datname, pg_catalog.shobj_description(oid, 'pg_database') AS mark
FROM pg_catalog.pg_database
WHERE pg_catalog.starts_with(CAST(datname AS pg_catalog.text), $1) AND datname {NE} $2
"""


async def _mark_of(connection: Any, name: str) -> _Mark | None:
    """Return the mark of a template, `None` where no database has that name."""
    row = await connection.fetchrow(_MARK, name)
    return None if row is None else _Mark.read(row["mark"])


async def _set_mark(connection: Any, name: str, mark: _Mark) -> _Mark:
    # COMMENT takes no parameters.
    await connection.execute(f"COMMENT ON DATABASE {quoted(name)} IS {literal(str(mark))}")
    return mark


async def _sweep(url: URL, keep: str) -> None:
    """Drop templates that have not been used for long, and what killed runs left."""
    async with maintenance_connection(url, never=keep) as connection:
        for name, mark in await connection.fetch(_TEMPLATES, _PREFIX, keep):
            is_left_over = name.startswith(_RUN_PREFIX) or name.endswith(_DRAFT)
            if is_left_over or _Mark.read(mark).used < _today() - _KEPT:
                try:
                    await _drop_unused(connection, name)
                except Exception:
                    if connection.is_closed():
                        raise
                    logger.warning("the template %r could not be dropped", name, exc_info=True)


async def _drop_unused(connection: Any, name: str) -> None:
    """Drop a template that no block uses.

    DROP DATABASE refuses to run in the transaction that has the lock, so it drops the template
    under a name that no other process can use, and that a later sweep drops.
    """
    doomed = f"{_PREFIX}{uuid4().hex}{_DRAFT}"
    try:
        async with turn(
            connection, alone=_use(name), timeout=0, purpose=f"drop {name!r}"
        ) as is_unused:
            if not is_unused:
                return
            await connection.execute(END_SESSIONS, name)
            await connection.execute(f"SET LOCAL lock_timeout = {round(1000 * LOCK_TIMEOUT)}")
            await connection.execute(rename_statement(name, doomed))
    except Exception as error:
        if sqlstate_of(error) != INVALID_CATALOG_NAME:  # another process was faster
            raise
    else:
        await drop(connection, doomed, force=True, timeout=_DROP_TIMEOUT)


def _today() -> date:
    return datetime.now(UTC).date()
