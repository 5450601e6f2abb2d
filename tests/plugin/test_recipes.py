"""The ini options that describe the template, and the version of a schema."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import DDL, Column, Enum, Index, Integer, MetaData, Table, Text, event, text

from pytest_pgtoolset._recipes import recipe_of
from tests import support


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a project, called `shop`."""
    module = ModuleType("shop")
    monkeypatch.setitem(sys.modules, "shop", module)
    return module


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "set the ini option pg_metadata = module:Base"),
        (
            {"metadata": "nowhere:Base"},
            "pg_metadata = nowhere:Base: importing nowhere failed: .*pythonpath",
        ),
        ({"metadata": "shop:Nothing"}, "pg_metadata = shop:Nothing: shop has no Nothing"),
        (
            {"metadata": "shop:number"},
            "pg_metadata = shop:number: 1 is neither a MetaData nor a declarative base",
        ),
        (
            {"metadata": "shop.Base"},
            r"pg_metadata = shop\.Base must look like package\.module:name",
        ),
        ({"metadata": "shop:"}, "pg_metadata = shop: must look like"),
        (
            {"metadata": "broken_shop:x"},
            "importing broken_shop failed: ZeroDivisionError: division by zero$",
        ),
        ({"migrate": "shop:number"}, "pg_migrate = shop:number: 1 is not a function"),
        (
            {"migrate": "shop:migrate", "files": [Path("nowhere")]},
            "pg_migrate_files: there is no nowhere",
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_complaints(
    module: Any,
    options: dict[str, Any],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An option that cannot be used is a usage error that names it and the reason."""
    module.number = 1
    module.migrate = lambda url: None
    (tmp_path / "broken_shop.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pytest.UsageError, match=complaint):
        recipe_of(**options)


def test_ways_to_name_a_metadata(module: Any) -> None:
    """A declarative base, its metadata and a name with dots give the same recipe."""
    module.Base = support.Base
    module.metadata = support.Base.metadata
    for name in ("shop:Base", "shop:metadata", "shop:Base.metadata"):
        recipe = recipe_of(metadata=name)
        assert recipe.metadata is support.Base.metadata
        assert recipe.version == recipe_of(metadata="shop:Base").version


def key() -> Column[int]:
    return Column("id", Integer, primary_key=True)


def version(module: Any, *things: Any, schema: str | None = None) -> str | None:
    module.metadata = MetaData()
    Table("thing", module.metadata, *things, schema=schema)
    return recipe_of(metadata="shop:metadata").version


def test_version_of_a_metadata(module: Any) -> None:
    """The version is the same for the same tables, and another for each difference in their DDL."""
    versions = [
        version(module, key()),
        version(module, key(), schema="other"),
        version(module, key(), Column("name", Text)),
        version(module, key(), Column("name", Text, nullable=False)),
        version(module, key(), Column("name", Text, server_default="x")),
        version(module, key(), Column("name", Text, comment="x")),
        version(module, key(), Column("name", Text, index=True)),
        version(
            module,
            key(),
            Column("name", Text),
            Index("i", "name", postgresql_where=text("name > ''")),
        ),
        version(module, key(), Column("name", Enum("a", "b", name="kind"))),
        version(module, key(), Column("name", Enum("a", "c", name="kind"))),
    ]
    assert None not in versions
    assert len(set(versions)) == len(versions)
    assert version(module, key()) == versions[0]


def test_version_with_listeners(module: Any) -> None:
    """DDL of events is part of the version; a listener that needs a connection prevents one."""
    module.metadata = MetaData()
    plain = recipe_of(metadata="shop:metadata").version
    event.listen(module.metadata, "before_create", DDL("CREATE EXTENSION IF NOT EXISTS citext"))
    extended = recipe_of(metadata="shop:metadata").version
    assert extended not in (plain, None)
    event.listen(
        module.metadata,
        "after_create",
        lambda target, connection, **_: connection.exec_driver_sql("SELECT 1"),
    )
    assert recipe_of(metadata="shop:metadata").version is None


def test_version_of_a_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is that of the files and of the function's file; without files there is none."""
    (tmp_path / "migrating.py").write_text("async def migrate(url): ...")
    folder = tmp_path / "versions"
    (folder / "__pycache__").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert recipe_of(migrate="migrating:migrate").version is None

    def now() -> str | None:
        return recipe_of(migrate="migrating:migrate", files=[folder]).version

    empty = now()
    assert empty is not None
    (folder / "__pycache__" / "1.pyc").write_text("x")
    assert now() == empty
    (folder / "1.py").write_text("x")
    one = now()
    (folder / "1.py").rename(folder / "2.py")
    renamed = now()
    (tmp_path / "migrating.py").write_text("async def migrate(url): print(url)")
    assert len({empty, one, renamed, now()}) == 4
