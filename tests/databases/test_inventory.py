"""The kept names of a metadata: always those that it has now, and no longer than it lives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
from sqlalchemy import Column, Integer, MetaData, Sequence, Table
from sqlalchemy.dialects import postgresql

from pgtoolset._postgres.inventory import inventory_of
from tests.databases.cleaning import tables


def _redefine(metadata: MetaData) -> None:
    """The same name and number of columns, in a table that may have the same address."""
    metadata.remove(metadata.tables["a"])
    gc.collect()
    Table("a", metadata, Column("id", Integer, Sequence("made_anew"), primary_key=True))


def _rename(metadata: MetaData) -> None:
    metadata.tables["a"].name = 'A "name"'


def _move(metadata: MetaData) -> None:
    metadata.tables["a"].schema = "elsewhere\\"


def _add_column(metadata: MetaData) -> None:
    metadata.tables["a"].append_column(Column("more", Integer, Sequence("of_more")))


CHANGES: list[Callable[[MetaData], object]] = [
    lambda metadata: Table("c", metadata, Column("id", Integer, primary_key=True)),
    lambda metadata: metadata.remove(metadata.tables["b"]),
    _redefine,
    _rename,
    _move,
    _add_column,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_metadata(change: Callable[[MetaData], object]) -> None:
    """Whatever becomes of a table or its columns, the names are as those of a new metadata."""
    kept, new = tables("a", "b"), tables("a", "b")
    dialect = postgresql.dialect()
    before = inventory_of(kept, dialect, {})
    assert inventory_of(kept, dialect, {}) is before
    for metadata in (kept, new):
        change(metadata)
    after = inventory_of(kept, dialect, {})
    assert after != before
    assert after == inventory_of(new, dialect, {})


def test_translation_and_dialect() -> None:
    """The names are those of the session's own translation and dialect."""
    metadata = tables("a", schema="one")
    dialect = postgresql.dialect()
    assert inventory_of(metadata, dialect, {}).names == ["one.a"]
    assert inventory_of(metadata, dialect, {"one": "two"}).names == ["two.a"]
    assert inventory_of(metadata, dialect, {}).names == ["one.a"]
    other = postgresql.dialect()
    other.identifier_preparer.reserved_words = {"one"}
    assert inventory_of(metadata, other, {}).names == ['"one".a']


def test_nothing_is_kept_alive() -> None:
    """A metadata that is forgotten is freed, with its tables, sequences and dialect."""
    metadata = tables("a")
    metadata.tables["a"].append_column(Column("more", Integer, Sequence("of_more")))
    dialect = postgresql.dialect()
    inventory_of(metadata, dialect, {})
    left = [weakref.ref(each) for each in (metadata, metadata.tables["a"], dialect)]
    del metadata, dialect
    gc.collect()
    assert [each() for each in left] == [None] * 3
