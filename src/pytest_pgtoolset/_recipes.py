"""How the template database is made: the ini options `pg_metadata` and `pg_migrate`, resolved."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, create_mock_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateSchema

#: Part of every version: changed when a template of the same schema is made differently.
_FORMAT = "1"


@dataclass(frozen=True)
class Recipe:
    """How a template is made.

    Attributes:
        option: the ini option that names it, for messages: `pg_metadata = shop.models:Base`.
        metadata: the tables, `None` where they are unknown.
        version: the same for the same schema, `None` where that is unknown.
        make: makes the tables in the database of a URL.
    """

    option: str
    metadata: MetaData | None
    version: str | None
    make: Callable[[str], Awaitable[None]]


def recipe_of(*, metadata: str = "", migrate: str = "", files: Sequence[Path] = ()) -> Recipe:
    """Return the recipe that the ini options describe.

    Args:
        metadata: `pg_metadata`.
        migrate: `pg_migrate`.
        files: `pg_migrate_files`.

    Raises:
        pytest.UsageError: they describe none.
    """
    if metadata:
        return _of_metadata(metadata)
    if migrate:
        return _of_migration(migrate, files)
    raise pytest.UsageError(
        "pg_database_url needs tables: set the ini option pg_metadata = module:Base (or the name "
        "of a MetaData), or pg_migrate = module:function"
    )


def _of_metadata(name: str) -> Recipe:
    option = f"pg_metadata = {name}"
    found = _find(option, name)
    metadata = getattr(found, "metadata", found)
    if not isinstance(metadata, MetaData):
        raise pytest.UsageError(
            f"the ini option {option}: {found!r} is neither a MetaData nor a declarative base"
        )
    tables = metadata

    async def make(url: str) -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.begin() as connection:
            for schema in sorted(
                {table.schema for table in tables.tables.values() if table.schema}
            ):
                await connection.execute(CreateSchema(schema, if_not_exists=True))
            await connection.run_sync(tables.create_all)

    return Recipe(option, metadata, _version_of_metadata(metadata), make)


def _of_migration(name: str, files: Sequence[Path]) -> Recipe:
    option = f"pg_migrate = {name}"
    function = _find(option, name)
    if not callable(function):
        raise pytest.UsageError(f"the ini option {option}: {function!r} is not a function")

    def run(url: str) -> None:
        result = function(url)
        if inspect.isawaitable(result):
            asyncio.run(_outcome(result))

    async def make(url: str) -> None:
        # In a thread without a loop, because the function may call asyncio.run(), as Alembic's
        # async template does.
        await asyncio.to_thread(run, url)

    return Recipe(option, None, _version_of_files(files, function) if files else None, make)


async def _outcome(result: Awaitable[object]) -> None:
    await result


def _find(option: str, name: str) -> Any:
    module, colon, attributes = name.partition(":")
    if not (colon and module and attributes):
        raise pytest.UsageError(f"the ini option {option} must look like package.module:name")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = "; pythonpath = . in the ini file puts the project's folder on the path"
        raise pytest.UsageError(
            f"the ini option {option}: importing {module} failed: "
            f"{type(error).__name__}: {error}{advice}"
        ) from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise pytest.UsageError(
                f"the ini option {option}: {module} has no {attributes}"
            ) from None
    return found


def _version_of_metadata(metadata: MetaData) -> str | None:
    statements: list[str] = []

    def collect(statement: Any, *parameters: object, **options: object) -> None:
        if not isinstance(statement, str):
            statement = statement.compile(dialect=engine.dialect)
        statements.append(f"{statement} {parameters} {options}")

    engine = create_mock_engine("postgresql+asyncpg://", collect)
    try:
        metadata.create_all(engine, checkfirst=False)
    except Exception:
        # A listener of DDL events needs a real connection, so its part of the schema is unknown.
        return None
    # Sorted, because SQLAlchemy does not promise an order for independent tables.
    return _digest(statement.encode() for statement in sorted(statements))


def _version_of_files(files: Sequence[Path], function: Callable[..., object]) -> str:
    paths: list[Path] = []
    for path in files:
        if not path.exists():
            raise pytest.UsageError(f"the ini option pg_migrate_files: there is no {path}")
        paths += (
            sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        )
    source = inspect.getsourcefile(inspect.unwrap(function))
    if source is not None:
        paths.append(Path(source))

    def parts() -> Iterator[bytes]:
        for path in paths:
            if "__pycache__" not in path.parts:
                yield path.name.encode()
                yield path.read_bytes()

    return _digest(parts())


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()[:16]
