"""Promises about databases and tables of tests."""

from contextlib import suppress

from sqlalchemy import Column, MetaData, Table
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase

from tests.comparison.promises import promise
from tests.comparison.stacks import FastapiToolsets, PgToolset, Stack, plain


@promise(FastapiToolsets, PgToolset, lacking="create_worker_database|cleanup_tables")
async def worker_databases(stack: Stack) -> bool:
    """The database of a test worker is dropped after a failure in its block."""
    if isinstance(stack, PgToolset):
        from pgtoolset.testing import create_worker_database
    else:
        from fastapi_toolsets.pytest import create_worker_database
    with suppress(ZeroDivisionError):
        async with create_worker_database(
            stack.url,
            prefix="other",
            server_url=stack.url.replace("/comparison_test_db", "/postgres"),
        ):
            raise ZeroDivisionError
    with plain(stack.url) as connection:
        left = "SELECT count(*) FROM pg_database WHERE datname LIKE 'other%'"
        count = connection.execute(left).fetchone()[0]
        connection.execute("DROP DATABASE IF EXISTS other_test_db")
        return count == 0


@promise(FastapiToolsets, PgToolset, lacking="create_worker_database|cleanup_tables")
async def schemas(stack: Stack) -> bool:
    """Tables in a schema are emptied too."""
    if isinstance(stack, PgToolset):
        from pgtoolset import cleanup_tables
    else:
        from fastapi_toolsets.db.testing import cleanup_tables

    class Other(DeclarativeBase):
        metadata = MetaData(schema="shop")

    Table("till", Other.metadata, Column("id", primary_key=True))
    with plain(stack.url) as connection:
        connection.execute("CREATE SCHEMA shop; CREATE TABLE shop.till AS SELECT 1 AS id")
        try:
            async with AsyncSession(stack.engine) as session:
                await cleanup_tables(session, Other)
        except SQLAlchemyError:
            return False
        return connection.execute("SELECT count(*) FROM shop.till").fetchone() == (0,)
