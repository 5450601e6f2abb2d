"""Template databases: made once for each version of a schema, sealed, and kept for the next run.

PostgreSQL copies a template without reading its rows.
https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, ClassVar

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgtoolset._arguments import DatabaseUrl, asyncpg_url, shown, url_of
from pgtoolset._postgres.catalog import EQ, NE
from pgtoolset._postgres.quoting import literal, quoted
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset._postgres.untrusted import json_in
from pgtoolset.databases import create_database, drop_database, seal_database

__all__ = ["TemplateDatabase", "template_database"]

_PREFIX = "pgtoolset_template_"
_RUN_PREFIX = _PREFIX + "run_"
_DRAFT = "_draft"

#: A template that no run has used for this long is dropped when another one is made.
_KEPT = timedelta(days=7)

#: Characters of the longest mark that is read.
_LONGEST_MARK = 200

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
    wait for it. Templates that no block has used for a week, and drafts of runs that were killed,
    are dropped when a template is made.

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
        ValueError, TypeError: an argument is wrong; before any SQL.

    Example:
        >>> async with template_database(url, migrate, run="r1", version="3f9") as template:
        ...     await create_database("copy", server_url=url, template=template.name)

    See https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
    """
    url = asyncpg_url(url_of("server_url", server_url))
    _check_part("run", run)
    if version is not None:
        _check_part("version", version)
    name = f"{_RUN_PREFIX}{run}" if version is None else f"{_PREFIX}{version}"
    # An advisory lock belongs to a database, so every caller takes it in the same one.
    async with maintenance_connection(url, never=name) as connection:
        # The lock "making" admits one maker; the lock "using" keeps a sweep from dropping it.
        await connection.execute(_LOCK, _lock_key("making", name))
        await connection.execute(_LOCK_SHARED, _lock_key("using", name))
        mark = await _mark_of(connection, name)
        if mark is None:
            mark = await _make(connection, url, name, make)
            await _sweep(connection, name)
        elif mark.used != _today():
            mark = await _set_mark(connection, name, _Mark(_today(), mark.has_rows))
        await connection.execute(_UNLOCK, _lock_key("making", name))
        if version is None:
            try:
                yield TemplateDatabase(name, mark.has_rows)
            finally:
                await connection.execute(_UNLOCK_SHARED, _lock_key("using", name))
                await _drop_unused(connection, name)
            return
    # The mark keeps a template with a version for a week, so the block needs no connection.
    yield TemplateDatabase(name, mark.has_rows)


_LOCK = "SELECT pg_catalog.pg_advisory_lock($1)"
_LOCK_SHARED = "SELECT pg_catalog.pg_advisory_lock_shared($1)"
_TRY_LOCK = "SELECT pg_catalog.pg_try_advisory_lock($1)"
_UNLOCK = "SELECT pg_catalog.pg_advisory_unlock($1)"
_UNLOCK_SHARED = "SELECT pg_catalog.pg_advisory_unlock_shared($1)"


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
    await drop_database(draft, server_url=url, missing_ok=True, force=True)
    await create_database(draft, server_url=url)
    try:
        draft_url = url.set(database=draft)
        await make(draft_url.render_as_string(hide_password=False))
        mark = _Mark(_today(), await _has_rows(draft_url))
        await seal_database(draft, server_url=url)
        await _set_mark(connection, draft, mark)
        # Renamed last, so a database with the name of a template is complete.
        await connection.execute(f"ALTER DATABASE {quoted(draft)} RENAME TO {quoted(name)}")
    except BaseException:
        await drop_database(draft, server_url=url, missing_ok=True, force=True)
        raise
    return mark


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
            if (await connection.exec_driver_sql(f"SELECT EXISTS (SELECT FROM {table})")).scalar():
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


async def _sweep(connection: Any, keep: str) -> None:
    """Drop templates that have not been used for long, and what killed runs left."""
    for name, mark in await connection.fetch(_TEMPLATES, _PREFIX, keep):
        is_left_over = name.startswith(_RUN_PREFIX) or name.endswith(_DRAFT)
        if is_left_over or _Mark.read(mark).used < _today() - _KEPT:
            await _drop_unused(connection, name)


async def _drop_unused(connection: Any, name: str) -> None:
    key = _lock_key("using", name.removesuffix(_DRAFT))
    if await connection.fetchval(_TRY_LOCK, key):
        try:
            await connection.execute(f"DROP DATABASE IF EXISTS {quoted(name)} WITH (FORCE)")
        finally:
            await connection.execute(_UNLOCK, key)


def _today() -> date:
    return datetime.now(UTC).date()


def _lock_key(purpose: str, name: str) -> int:
    digest = hashlib.sha256(f"pgtoolset {purpose} {name}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
