"""The rows of a group as they were fetched last, and the statements that fetch them."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Date, Integer, Uuid
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._native import row_comparator
from pgtoolset._postgres.link import LinkLost, is_about_data, is_passing
from pgtoolset._postgres.rows import RowStatements, decoder, key_arguments
from pgtoolset.watch._snapshots import Fetch, Snapshots
from pgtoolset.watch._subscriptions import Values
from pgtoolset.watch.targets import Target

__all__ = ["KnownRows"]

logger = logging.getLogger("pgtoolset")

#: Keys up to which every row is fetched at every tick. With more, snapshots tell which rows have
#: changed, and a second statement fetches those.
FETCHED_ROWS = 30


#: Snapshots in a row that may fail before rows are only fetched.
MOST_FAILURES = 3


class KnownRows:
    """The rows that every joined subscription of a group has received.

    A key is missing where there is no row, or no subscription has joined yet. A row is a sequence
    of the driver's values, with its line at the end.

    Attributes:
        has_given_keys: whether rows begin with the keys as they were given, and not as the table
            spells them.
        has_unique_spellings: whether different keys are never equal in the table.
    """

    def __init__(self, engine: AsyncEngine, target: Target[Any]) -> None:
        dialect = engine.dialect
        translate = engine.sync_engine.get_execution_options().get("schema_translate_map")
        self._target = target
        self._width = len(target.keys)
        statements = RowStatements(target.mapper, target.keys, target.columns, dialect, translate)
        self.has_given_keys = statements.returns_given_keys
        self.has_unique_spellings = self.has_given_keys or all(
            isinstance(column.type, Integer | Uuid | Date) for column in target.mapper.primary_key
        )
        self._statement = statements.rows()
        self._snapshots = Snapshots(statements, self._width)
        self._decode = decoder(target.mapper, statements.selected, target.columns, dialect)
        self._rows: dict[Any, Sequence[Any]] = {}
        self._failures = 0

    def __contains__(self, key: Any) -> bool:
        return key in self._rows

    def get(self, key: Any) -> Sequence[Any] | None:
        return self._rows.get(key)

    def note(self, key: Any, row: Sequence[Any] | None) -> Sequence[Any] | None:
        """Keep a row, or its absence; return the row that was known before."""
        before = self._rows.pop(key, None)
        if row is not None:
            self._rows[key] = row
        self._snapshots.note(key, before, row)
        return before

    def clear(self) -> None:
        """Forget the snapshots: no row is watched any more."""
        self._snapshots.clear()

    def key_of(self, row: Sequence[Any]) -> Any:
        return row[0] if self._width == 1 else tuple(row[: self._width])

    def values_of(self, row: Sequence[Any]) -> Values:
        # All subscriptions of the row share the mapping, so it is read-only.
        return MappingProxyType(self._decode(row))

    def changed(self, rows: Sequence[Any]) -> list[Any]:
        """Return the rows whose lines differ from those of the known rows."""
        return [rows[n] for n in row_comparator.changed_rows(rows, self._rows, self._width)]

    def has_same_values(self, key: Any, row: Sequence[Any]) -> bool:
        """Return whether a row with another line has the known values, as 1.0 has those of 1.00."""
        known = self._rows.get(key)
        return known is not None and row_comparator.same_value(tuple(known)[:-1], tuple(row)[:-1])

    async def fetch(self, fetch: Fetch, keys: Sequence[Any]) -> list[Any]:
        """Return the rows of keys."""
        return await fetch(self._statement, *key_arguments(keys, self._width))

    async def changed_keys(
        self, fetch: Fetch, keys: Sequence[Any], due: set[Any], watched: Container[Any]
    ) -> Sequence[Any]:
        """Return the keys whose rows have to be fetched: the due and the changed ones.

        Args:
            fetch: runs a statement.
            keys: all keys that are watched; the same object as before where they are the same.
            due: the keys whose rows have to be fetched in any case.
            watched: the keys that are watched when the answer has arrived.
        """
        are_few = len(keys) <= FETCHED_ROWS or 2 * len(due) > len(keys)
        if are_few or not self._snapshots.is_usable:
            return keys
        try:
            changed = await self._snapshots.changed_keys(fetch, keys, self._rows, watched)
        except Exception as error:
            self._raise_unless_about_snapshots(error)
            return keys
        self._failures = 0
        return keys if changed is None else [key for key in changed | due if key in watched]

    def _raise_unless_about_snapshots(self, error: Exception) -> None:
        if isinstance(error, LinkLost) or is_passing(error):
            raise error
        # Where the keys or the rows are to blame, fetching the rows shows it.
        if is_about_data(error):
            return
        # After DDL the next snapshot may succeed, with the types that the keys have now.
        self._failures += 1
        self._snapshots.forget_types()
        if self._failures >= MOST_FAILURES:
            self._snapshots.is_usable = False
            logger.warning(
                "Rows of %s cannot be compared as text, so every tick fetches them: %s",
                self._target,
                error,
            )
