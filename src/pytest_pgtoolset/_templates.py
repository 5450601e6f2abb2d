"""Template databases: made once for each version of a schema, sealed, kept on the server for the
next run.

https://www.postgresql.org/docs/current/manage-ag-templatedbs.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, ClassVar

from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgtoolset._postgres.quoting import quoted
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset.databases import create_database, drop_database, seal_database
from pytest_pgtoolset._recipes import Recipe

_PREFIX = "pgtoolset_template_"
_RUN_PREFIX = _PREFIX + "run_"
_DRAFT = "_draft"

#: A template that no run has used for so long is dropped by the next run that makes one.
_KEPT = timedelta(days=7)


@dataclass(frozen=True)
class Template:
    """A sealed database.

    Attributes:
        name: its name.
        has_rows: whether making it has also put rows into its tables.
    """

    name: str
    has_rows: bool


@dataclass(frozen=True)
class _Mark:
    """What is written on a template, as the comment of the database."""

    used: date
    has_rows: bool

    _START: ClassVar = "pgtoolset template "

    def __str__(self) -> str:
        return self._START + json.dumps({"used": self.used.isoformat(), "has_rows": self.has_rows})

    @classmethod
    def read(cls, comment: str | None) -> _Mark:
        """What a comment says. Of a template whose comment somebody has changed, the careful: in
        use, with rows."""
        try:
            found = json.loads((comment or "").removeprefix(cls._START))
            return cls(date.fromisoformat(found["used"]), bool(found["has_rows"]))
        except (ValueError, KeyError, TypeError):
            return cls(_today(), True)


@asynccontextmanager
async def template_of(server_url: str, recipe: Recipe, run: str) -> AsyncIterator[Template]:
    """The template of a recipe, made now where the server does not have it yet. Of several who
    come, one makes it.

    Args:
        server_url: the server.
        recipe: what is in it. Where it has no version the template is for this run alone, and is
            dropped by the last who leaves the block.
        run: names the run.
    """
    url = make_url(server_url)
    name = f"{_PREFIX}{recipe.version}" if recipe.version else f"{_RUN_PREFIX}{run}"
    # Databases are not in a database, but advisory locks are: all who come here are in the same
    # one.
    async with maintenance_connection(url, never=name) as connection:
        # Who makes it keeps the others waiting, and who uses it keeps it from being dropped.
        await connection.execute("SELECT pg_advisory_lock($1)", _lock_key("making", name))
        await connection.execute("SELECT pg_advisory_lock_shared($1)", _lock_key("using", name))
        mark = await _mark_of(connection, name)
        if mark is None:
            mark = await _make(connection, url, name, recipe)
            await _sweep(connection, name)
        elif mark.used != _today():
            mark = await _set_mark(connection, name, _Mark(_today(), mark.has_rows))
        await connection.execute("SELECT pg_advisory_unlock($1)", _lock_key("making", name))
        template = Template(name, mark.has_rows)
        if recipe.version is None:
            try:
                yield template
            finally:
                await connection.execute(
                    "SELECT pg_advisory_unlock_shared($1)", _lock_key("using", name)
                )
                await _drop_unused(connection, name)
            return
    yield template


async def _make(connection: Any, url: URL, name: str, recipe: Recipe) -> _Mark:
    draft = name + _DRAFT
    # A draft that is there is of a run that was killed: whoever makes one holds the lock.
    await drop_database(draft, server_url=url, missing_ok=True, force=True)
    await create_database(draft, server_url=url)
    try:
        draft_url = url.set(database=draft)
        await recipe.make(draft_url.render_as_string(hide_password=False))
        mark = _Mark(_today(), await _has_rows(draft_url))
        await seal_database(draft, server_url=url)
        await _set_mark(connection, draft, mark)
        # What has this name is complete.
        await connection.execute(f"ALTER DATABASE {quoted(draft)} RENAME TO {quoted(name)}")
    except BaseException:
        await drop_database(draft, server_url=url, missing_ok=True, force=True)
        raise
    return mark


async def _has_rows(url: URL) -> bool:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        tables = await connection.scalars(
            text(
                "SELECT c.oid::regclass::text FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace "
                "WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'"
            )
        )
        for table in tables.all():
            if await connection.scalar(text(f"SELECT EXISTS (SELECT FROM {table})")):
                return True
    return False


async def _mark_of(connection: Any, name: str) -> _Mark | None:
    """What is marked on a template; `None` where there is none of that name."""
    row = await connection.fetchrow(
        "SELECT shobj_description(oid, 'pg_database') AS mark FROM pg_database WHERE datname = $1",
        name,
    )
    return None if row is None else _Mark.read(row["mark"])


async def _set_mark(connection: Any, name: str, mark: _Mark) -> _Mark:
    # COMMENT takes no parameters.
    comment = str(mark).replace("'", "''")
    await connection.execute(f"COMMENT ON DATABASE {quoted(name)} IS '{comment}'")
    return mark


async def _sweep(connection: Any, keep: str) -> None:
    """Drop templates that nobody has used for long, and what runs that were killed have left."""
    rows = await connection.fetch(
        "SELECT datname, shobj_description(oid, 'pg_database') AS mark FROM pg_database "
        "WHERE starts_with(datname, $1) AND datname <> $2",
        _PREFIX,
        keep,
    )
    for name, mark in rows:
        of_a_run = name.startswith(_RUN_PREFIX) or name.endswith(_DRAFT)
        if of_a_run or _Mark.read(mark).used < _today() - _KEPT:
            await _drop_unused(connection, name)


async def _drop_unused(connection: Any, name: str) -> None:
    key = _lock_key("using", name.removesuffix(_DRAFT))
    if await connection.fetchval("SELECT pg_try_advisory_lock($1)", key):
        try:
            await connection.execute(f"DROP DATABASE IF EXISTS {quoted(name)} WITH (FORCE)")
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", key)


def _today() -> date:
    return datetime.now(UTC).date()


def _lock_key(what: str, name: str) -> int:
    return int.from_bytes(
        hashlib.sha256(f"pgtoolset {what} {name}".encode()).digest()[:8], signed=True
    )
