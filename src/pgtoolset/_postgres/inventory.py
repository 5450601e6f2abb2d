"""The names of a metadata's tables and sequences, kept until one of its tables becomes another.

To find and to quote them takes as long as a statement does, and tests ask for them each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Dialect, MetaData, Table

from pgtoolset._postgres.tables import qualified_names, sequences_of

__all__ = ["Inventory", "inventory_of"]

#: What the names depend on, beside the very tables and the dialect.
_Facts: TypeAlias = tuple[tuple[tuple[Any, Any, int], ...], tuple[tuple[Any, Any], ...]]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The names of tables and sequences, quoted and qualified, in the order of locks.

    Attributes:
        names: of the tables.
        tables: these as a literal of an array, which drivers send faster than an array.
        sequences: the names of the sequences that the metadata itself uses, as such a literal.
    """

    names: Sequence[str]
    tables: str
    sequences: str


class _Kept:
    """An inventory, and what it was made of. It refers to no table, or none would ever be freed."""

    __slots__ = ("_dialect", "_facts", "_tables", "inventory")

    def __init__(
        self, tables: Sequence[Table], dialect: Dialect, facts: _Facts, inventory: Inventory
    ) -> None:
        self._tables = [ref(table) for table in tables]
        self._dialect = ref(dialect)
        self._facts = facts
        self.inventory = inventory

    def is_of(self, tables: Sequence[Table], dialect: Dialect, facts: _Facts) -> bool:
        """Whether nothing has changed since."""
        return (
            self._facts == facts
            and self._dialect() is dialect
            and all(kept() is table for kept, table in zip(self._tables, tables, strict=True))
        )


_kept: WeakKeyDictionary[MetaData, _Kept] = WeakKeyDictionary()


def inventory_of(
    metadata: MetaData, dialect: Dialect, translation: Mapping[str | None, str | None]
) -> Inventory:
    """Return the names of the tables and sequences of a metadata.

    Args:
        metadata: has the tables.
        dialect: quotes the names.
        translation: a `schema_translate_map`.
    """
    tables = list(metadata.tables.values())
    shapes = tuple([(table.schema, table.name, len(table.columns)) for table in tables])
    facts = (shapes, tuple(translation.items()))
    kept = _kept.get(metadata)
    if kept is None or not kept.is_of(tables, dialect, facts):
        names = qualified_names(tables, dialect, translation)
        sequences = qualified_names(sequences_of(tables), dialect, translation)
        inventory = Inventory(names, _array(names), _array(sequences))
        kept = _kept[metadata] = _Kept(tables, dialect, facts, inventory)
    return kept.inventory


def _array(names: Iterable[str]) -> str:
    """Return a literal of an array of texts.

    https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """
    escaped = (name.replace("\\", "\\\\").replace('"', '\\"') for name in names)
    return "{" + ",".join(f'"{name}"' for name in escaped) + "}"
